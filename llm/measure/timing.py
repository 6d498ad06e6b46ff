"""Many turns of one thing, and what is said of them: the median, since machines are shared."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each turn, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)


def time_turns(turn: Callable[[], object], turns: int, warm_up: int = 1) -> Timing:
    """The seconds of each of `turns` calls, after `warm_up` that do not count.

    Args:
      turn: returns when its work is done; whoever gives work to a device waits for it in here.
    """
    for _ in range(warm_up):
        turn()
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        turn()
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds))
