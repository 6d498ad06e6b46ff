"""Which source gives window n of a mixture: exact proportions, a pure function of n.

Weights are whole numbers p_1 ... p_k in lowest terms. Of the first n windows, source i gives fewer
than one more or less than n p_i / D, with D = p_1 + ... + p_k, at every n. After D windows each
source has given exactly p_i, so the assignment has the period D, and window n is found without the
windows before it.

Source: Baruah, Cohen, Plaxton & Varvel 1996, "Proportionate Progress: A Notion of Fairness in
Resource Allocation". The j-th window of source i has to come after window floor((j - 1) D / p_i)
and no later than window ceil(j D / p_i), counted from 1. Such times exist for all windows at once,
and whoever serves the earliest deadline first finds them.
"""

import functools
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Numbers = npt.NDArray[np.int64]


class Phase(NamedTuple):
    """What decides which windows are read, from a step on: until then that many were complete."""

    from_step: int
    batch_size: int
    proportions: tuple[int, ...]

    def given(self, windows: int) -> _Numbers:
        """int64 [k]: how many of the phase's first windows each source gives."""
        sources, _ = schedule(self.proportions)
        rounds, rest = divmod(windows, len(sources))
        some = np.bincount(sources[:rest], minlength=len(self.proportions))
        return rounds * np.array(self.proportions) + some


class Mixture(NamedTuple):
    """The newest phase of a run, and the windows of each source that were read before it."""

    phase: Phase
    before: _Numbers

    def place(self, numbers: _Numbers) -> tuple[_Numbers, _Numbers]:
        """The source of each window of the phase, and its number among the source's windows."""
        sources, ranks = schedule(self.phase.proportions)
        rounds, places = np.divmod(numbers, len(sources))
        source = sources[places]
        within = rounds * np.array(self.phase.proportions)[source] + ranks[places]
        return source, within + self.before[source]

    def read(self, step: int) -> _Numbers:
        """int64 [k]: how many windows of each source were read when `step` steps are complete."""
        steps = step - self.phase.from_step
        return self.before + self.phase.given(steps * self.phase.batch_size)


def mixture_of(phases: Sequence[Phase]) -> Mixture:
    """The mixture of the newest phase: each phase goes on in every source where the last ended."""
    mixture = Mixture(phases[0], np.zeros(len(phases[0].proportions), np.int64))
    for phase in phases[1:]:
        mixture = Mixture(phase, mixture.read(phase.from_step))
    return mixture


@functools.lru_cache(maxsize=4)
def schedule(proportions: tuple[int, ...]) -> tuple[_Numbers, _Numbers]:
    """The source of each window of a period, and how many windows of that source came before it."""
    period = sum(proportions)
    sources, ranks = np.empty(period, np.int64), np.empty(period, np.int64)
    coming = [(0, i, 0) for i in range(len(proportions))]  # (released after, source, rank)
    ready: list[tuple[int, int, int]] = []  # (deadline, source, rank)
    for place in range(period):
        while coming and coming[0][0] <= place:
            _, i, rank = heapq.heappop(coming)
            heapq.heappush(ready, (-(-(rank + 1) * period // proportions[i]), i, rank))
        _, i, rank = heapq.heappop(ready)
        sources[place], ranks[place] = i, rank
        heapq.heappush(coming, ((rank + 1) * period // proportions[i], i, rank + 1))
    return sources, ranks
