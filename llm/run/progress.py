"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Literal, Protocol, Self

PLAIN_LINE_SECONDS = 10.0


class Progress(Protocol):
    """Steps of training, stages of preparation, and lines of text between them."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: Any) -> None: ...
    def say(self, text: str) -> None: ...
    def prepare(self, what: str, done: int, total: int | None) -> None: ...
    def step(self, step: int, steps: int, loss: float, tokens_per_second: float) -> None: ...


def make_progress(choice: Literal["auto", "bar", "plain", "none"], speaks: bool = True) -> Progress:
    """The progress of logging.progress; nothing at all in a process that does not speak."""
    if not speaks:
        return NoProgress()
    if choice == "auto":
        choice = "bar" if sys.stderr.isatty() else "plain"
    if choice == "bar":
        return BarProgress()
    return PlainProgress(silent=choice == "none")


def readable_seconds(seconds: float) -> str:
    """ "1:02:03" """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class PlainProgress:
    """A line now and then, for logs. `silent` leaves out all but what `say` is given."""

    def __init__(self, silent: bool = False):
        self._silent = silent
        self._last = time.monotonic()
        self._started: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def prepare(self, what: str, done: int, total: int | None) -> None:
        if self._due():
            share = f" {100 * done / total:.0f} %" if total else ""
            self.say(f"{what}{share}")

    def step(self, step: int, steps: int, loss: float, tokens_per_second: float) -> None:
        if self._started is None:
            self._started = (time.monotonic(), step)
        if self._due() or step == steps:
            numbers = f"step {step}/{steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
            self.say(numbers + self._time_left(step, steps))

    def _time_left(self, step: int, steps: int) -> str:
        start, first = self._started or (0.0, step)
        if step in (first, steps):
            return ""
        per_step = (time.monotonic() - start) / (step - first)
        return f"  {readable_seconds(per_step * (steps - step))} left"

    def _due(self) -> bool:
        if self._silent or time.monotonic() - self._last < PLAIN_LINE_SECONDS:
            return False
        self._last = time.monotonic()
        return True


class NoProgress(PlainProgress):
    """Not a word: another process of the run says it."""

    def __init__(self) -> None:
        super().__init__(silent=True)

    def say(self, text: str) -> None:
        pass

    def step(self, step: int, steps: int, loss: float, tokens_per_second: float) -> None:
        pass


class BarProgress:
    """One line that redraws itself: step, loss, tokens/s, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: Any = None
        self._stage = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def prepare(self, what: str, done: int, total: int | None) -> None:
        self._show(what, done, total, "")

    def step(self, step: int, steps: int, loss: float, tokens_per_second: float) -> None:
        numbers = f"{step}/{steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self._show("training", step, steps, numbers)

    def _show(self, stage: str, done: int, total: int | None, numbers: str) -> None:
        if stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(stage, total=total, completed=done, numbers=numbers)
            self._stage = stage
        self._bar.update(self._task, completed=done, total=total, numbers=numbers)
