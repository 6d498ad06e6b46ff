"""Named places where the tests make a run fail, to prove that it cannot be lost.

    LLM_FAULT="checkpoint.before_commit:step=20:kill" python train.py ...

A fault is PLACE[:step=N]:ACTION; commas separate several faults. Without the variable nothing
happens. Actions: kill (SIGKILL, nothing is cleaned up), term, int, hup and usr1 (the signals),
enospc (no space left on device), raise (an unexpected error), hang (nothing more happens). Any
other word is returned to the place, which carries it out, such as torn at metrics.write.
"""

import errno
import os
import signal
import time

_SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "hup": signal.SIGHUP,
    "usr1": signal.SIGUSR1,
}


def fault_point(place: str, step: int | None = None) -> str | None:
    """Fail here if that is planned; the action's name if the caller is to carry it out."""
    for fault in filter(None, os.environ.get("LLM_FAULT", "").split(",")):
        planned, *at, action = fault.split(":")
        if planned == place and at in ([], [f"step={step}"]):
            return _carry_out(action, place)
    return None


def _carry_out(action: str, place: str) -> str | None:
    match action:
        case _ if action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[action])
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "hang":
            time.sleep(3600)
        case "raise":
            raise RuntimeError(f"planned fault at {place}")
        case _:
            return action
    return None
