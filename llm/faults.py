"""Named places where the tests make a run fail, to prove that it cannot be lost.

    LLM_FAULT="checkpoint.before_commit:step=20:kill" python train.py ...

A fault is PLACE[:step=N]:ACTION; several are separated by commas. Without the variable nothing
happens. Actions: kill (SIGKILL, nothing is cleaned up), term and int (the signals), enospc (no
space left on device), raise (an unexpected error), hang (nothing more happens); any other word is
handed to the place, such as torn at metrics.write.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One planned failure: `step` None is every step."""

    place: str
    step: int | None
    action: str


def planned() -> list[Fault]:
    """The faults in $LLM_FAULT."""
    faults = []
    for text in filter(None, os.environ.get("LLM_FAULT", "").split(",")):
        place, *middle, action = text.split(":")
        step = next((int(word[5:]) for word in middle if word.startswith("step=")), None)
        faults.append(Fault(place, step, action))
    return faults


def fault_point(place: str, step: int | None = None) -> str | None:
    """Fail here if that is planned; the action's name when the caller is to carry it out."""
    if "LLM_FAULT" not in os.environ:
        return None
    for fault in planned():
        if fault.place == place and fault.step in (None, step):
            return _carry_out(fault)
    return None


def _carry_out(fault: Fault) -> str | None:
    match fault.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "int":
            os.kill(os.getpid(), signal.SIGINT)
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "hang":
            time.sleep(3600)
        case "raise":
            raise RuntimeError(f"planned fault at {fault.place}")
        case other:
            return other
    return None
