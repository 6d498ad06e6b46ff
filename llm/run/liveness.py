"""Which process of a run has died, stopped or hangs, by the signs of life that each gives."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple


class Said(NamedTuple):
    """What a process says of itself, about once a second.

    beats: rises while the process runs at all. moves: rises while its main thread does anything.
    marks: rises at places that all processes pass in the same order; place: the newest of them.
    suspicious: a collective failed here, so that another process may be gone.
    """

    beats: int
    moves: int
    marks: int
    place: str
    suspicious: bool


_NOTHING = Said(-1, -1, 0, "the beginning", False)


@dataclasses.dataclass(frozen=True)
class Sign:
    """The newest that a process said, and since when (monotonic seconds) it says the same."""

    beaten_at: float
    moved_at: float
    said: Said = _NOTHING

    def after(self, said: Said, now: float) -> "Sign":
        return Sign(
            beaten_at=self.beaten_at if said.beats == self.said.beats else now,
            moved_at=self.moved_at if said.moves == self.said.moves else now,
            said=said,
        )


class Lost(NamedTuple):
    """A process, whether it is silent altogether (and not only its main thread), and the words."""

    process: int
    silent: bool
    why: str


def find_lost(
    signs: Mapping[int, Sign], now: float, timeout: float, patience: float
) -> Lost | None:
    """The first process that is lost, or None.

    Args:
      timeout: seconds without a beat after which a process is dead or stopped, and without a move
        after which one that is behind the others hangs. One that is not behind may compile, or wait
        for the one that is.
      patience: in place of it, without a beat, once a collective has failed.
    """
    suspicious = any(sign.said.suspicious for sign in signs.values())
    silence = patience if suspicious else timeout
    furthest = max(sign.said.marks for sign in signs.values())
    for index, sign in sorted(signs.items()):
        beaten, moved = now - sign.beaten_at, now - sign.moved_at
        if beaten >= silence:
            why = f"gave no sign of life for {beaten:.0f} s, after {sign.said.place}"
            return Lost(index, True, why)
        if sign.said.marks < furthest and moved >= timeout:
            why = f"hangs: it did nothing for {moved:.0f} s, after {sign.said.place}"
            return Lost(index, False, why)
    return None
