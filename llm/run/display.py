"""What a person sees of a run while it goes on: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from datetime import timedelta
from typing import Any, Literal, Self

from llm.console import for_terminal, never_wait, say

PLAIN_LINE_SECONDS = 10.0


def make_display(choice: Literal["auto", "bar", "plain", "none"], speaks: bool = True) -> "Display":
    """The display that logging.progress asks for; a silent one in a process that does not speak."""
    never_wait()  # training goes on, whether or not anybody reads what it says
    if not speaks:
        return Display(speaks=False)
    if choice == "bar" or (choice == "auto" and sys.stderr.isatty()):
        return Bar()
    return Display(counts=choice != "none")


class Display:
    """Lines of text, and now and then one that counts, for logs.

    Args:
      counts: whether it counts steps and stages of preparation.
      speaks: whether it writes anything at all; of several processes, one does.
    """

    def __init__(self, counts: bool = True, speaks: bool = True):
        self._counts, self._speaks = counts and speaks, speaks
        self._last = time.monotonic()
        self._started: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def say(self, text: str) -> None:
        """Show text that the person should read."""
        if self._speaks:
            say(text)

    def prepare(self, what: str, done: int, total: int | None) -> None:
        """Show how far a stage of preparation is; `total` is None if its end is unknown."""
        if self._due():
            share = f" {100 * done / total:.0f} %" if total else ""
            self.say(f"{what}{share}")

    def step(self, step: int, steps: int, loss: float, tokens_per_second: float) -> None:
        """Show that a step of training is complete."""
        started, first = self._started = self._started or (time.monotonic(), step)
        if self._due() or step == steps:
            left = ""
            if step not in (first, steps):
                per_step = (time.monotonic() - started) / (step - first)
                left = f"  {timedelta(seconds=round(per_step * (steps - step)))} left"
            self.say(f"step {_numbers(step, steps, loss, tokens_per_second)}{left}")

    def _due(self) -> bool:
        if not self._counts or time.monotonic() - self._last < PLAIN_LINE_SECONDS:
            return False
        self._last = time.monotonic()
        return True


class Bar(Display):
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

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.console.print(for_terminal(text), markup=False, highlight=False, soft_wrap=True)

    def prepare(self, what: str, done: int, total: int | None, numbers: str = "") -> None:
        if what != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total, completed=done, numbers=numbers)
            self._stage = what
        self._bar.update(self._task, completed=done, total=total, numbers=numbers)

    def step(self, step: int, steps: int, loss: float, tokens_per_second: float) -> None:
        self.prepare("training", step, steps, _numbers(step, steps, loss, tokens_per_second))


def _numbers(step: int, steps: int, loss: float, tokens_per_second: float) -> str:
    return f"{step}/{steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
