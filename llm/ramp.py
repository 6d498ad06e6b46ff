"""A size that grows over the first steps of a run: an eighth, a quarter, a half, the whole.

Four sizes, so that a step is compiled four times and not once for each size.
"""

import dataclasses

DOUBLINGS = 3


@dataclasses.dataclass(frozen=True)
class Ramp:
    """The size of each step, counted from 0.

    full: the size from step `steps` on; with steps > 0 a multiple of 8.
    steps: how many the ramp takes; 0: full from the start.
    """

    full: int
    steps: int = 0

    def at(self, step: int) -> int:
        """Step s of S has full / 2^(3 - floor(3 s / S))."""
        if step >= self.steps:
            return self.full
        return self.full >> (DOUBLINGS - DOUBLINGS * step // self.steps)

    def sizes(self) -> list[int]:
        """Every size that some step has, ascending."""
        return sorted({self.at(step) for step in range(self.steps)} | {self.full})

    def before(self, step: int) -> int:
        """The sizes of all earlier steps together."""
        early = sum(map(self.at, range(min(step, self.steps))))
        return early + self.full * max(0, step - self.steps)
