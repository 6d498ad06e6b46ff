"""Two or more programs that take turns on one machine, so that other work on it falls on all.

Each side runs in a process of its own and waits while another has the machine. The ratio of what
they measure in neighbouring turns means more than either time.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence


class Side:
    """A process that takes turns: a line to it starts one, its line back holds the times.

    It begins to set itself up when it is made, beside the others; `wait` until it is ready.

    Args:
      command: a program that ends in `serve`.
      settings: what its `make_step` is given.

    Attributes:
      version: of what it measures, once it is ready.
      milliseconds: of every step.
      turns: median milliseconds of each turn.
    """

    def __init__(self, name: str, command: Sequence[str], settings: dict):
        self.name = name
        self.milliseconds: list[float] = []
        self.turns: list[float] = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = ""
        self._tell(json.dumps(settings))

    def wait(self) -> None:
        self.version = self._answer()

    def take_turn(self) -> None:
        self._tell("go")
        times = json.loads(self._answer())
        self.milliseconds += times
        self.turns.append(statistics.median(times))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        if not answer:
            sys.exit(f"{self.name} stopped; what it printed stands above")
        return answer


def take_turns(sides: Sequence[Side], rounds: int) -> None:
    """Each in turn, `rounds` times; then print what each took, and the first beside the others."""
    for side in sides:
        side.wait()
    for _ in range(rounds):
        for side in sides:
            side.take_turn()
    for side in sides:
        side.close()
        low, middle = min(side.milliseconds), statistics.median(side.milliseconds)
        print(f"{side.name:13} {side.version:20} {low:9.1f} ms fastest {middle:9.1f} ms median")
    ours = sides[0]
    for other in sides[1:]:
        turns = [a / b for a, b in zip(ours.turns, other.turns, strict=True)]
        print(
            f"{ours.name} / {other.name}: "
            f"{min(ours.milliseconds) / min(other.milliseconds):.2f} of the fastest, "
            f"{statistics.median(turns):.2f} median over {len(turns)} turns side by side"
        )
    print(json.dumps({side.name: min(side.milliseconds) for side in sides}))


def serve(
    make_step: Callable[[dict], tuple[str, Callable[[], object]]], warm_up: int, steps_per_turn: int
) -> None:
    """The side's own process: warm up, then some steps for each line that comes.

    Args:
      make_step: settings -> version of what is measured, and a function that takes one step and
        waits for it.
    """
    settings = json.loads(sys.stdin.readline())
    # What is printed while setting up is not an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    version, step = make_step(settings)
    for _ in range(warm_up):
        step()
    print(version, file=answers, flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(steps_per_turn):
            start = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - start))
        print(json.dumps(times), file=answers, flush=True)
