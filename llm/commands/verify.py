"""python -m llm verify RUN [--step N | --all] [--json]: is a checkpoint what was saved?

Prints one JSON object a step: step, params_sha256, manifest_ok, receipt_max_abs_diff. It works on
any machine, also without the accelerator that trained the run.
"""

import json
import sys
from pathlib import Path
from typing import Any, Self

import pydantic
from pydantic import NonNegativeInt

from llm.commands.flags import CommandLine, argument, parse
from llm.config import setting
from llm.errors import CheckpointError, UsageError
from llm.runtime import prepare_process

# A run that trains may remove a step while it is read, but only when a newer one is whole: even the
# second try hardly ever fails.
ATTEMPTS = 5


class Options(CommandLine):
    """The command line."""

    run: str = argument("RUN", "run directory")
    step: NonNegativeInt | None = setting(None, "verify this step; by default the newest")
    all: bool = setting(False, "verify every step")
    as_json: bool = setting(False, "print nothing but the JSON objects", flag="json")

    @pydantic.model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.all and self.step is not None:
            raise UsageError("--all verifies every step; leave out --step")
        return self


def main(arguments: list[str]) -> int:
    """0 when everything holds.

    Raises:
      CheckpointError: something does not; every problem is named.
    """
    chosen = parse(Options, arguments)
    prepare_process()
    results = _verify(chosen)
    for result in results:
        print(json.dumps({name: value for name, value in result.items() if name != "problem"}))
        if result["problem"] is None and not chosen.as_json:
            print(f"step {result['step']}: manifest, parameters and receipt hold", file=sys.stderr)
    problems = [result["problem"] for result in results if result["problem"]]
    if problems:
        raise CheckpointError("\n  ".join(problems))
    return 0


def _verify(chosen: Options) -> list[dict[str, Any]]:
    """`verify_step` of each step that was asked for, except those that are removed meanwhile."""
    newest = chosen.step is None and not chosen.all
    for _ in range(ATTEMPTS if newest else 1):
        found = {step: verify_step(Path(chosen.run), step) for step in _steps(chosen)}
        results = [result for result in found.values() if result is not None]
        removed = ", ".join(str(step) for step, result in found.items() if result is None)
        said = f"removed by the run meanwhile, which is no damage: step {removed}"
        if results and removed:
            print(said, file=sys.stderr)
        if results:
            return results
    if not newest:
        raise UsageError(f"{said}; leave --step and --all out to verify the newest")
    raise UsageError(
        f"{chosen.run} removes its steps while they are read: the newest was gone {ATTEMPTS} "
        "times, expected one to stay; set a larger checkpoint.keep, or verify when training has "
        "ended"
    )


def verify_step(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The JSON object of one step, and its problem as text or None; None: the run removed it."""
    from llm.run.checkpoint import read_receipt, verify_files
    from llm.run.directory import RunDirectory
    from llm.run.open import open_model

    folder = RunDirectory(run_dir).checkpoints / str(step)
    result: dict[str, Any] = {
        "step": step,
        "params_sha256": None,
        "manifest_ok": False,
        "receipt_max_abs_diff": None,
        "problem": None,
    }
    try:
        verify_files(folder)
        result["manifest_ok"] = True
        result["params_sha256"] = read_receipt(folder)["params_sha256"]
        opened = open_model(run_dir, step)
        result["receipt_max_abs_diff"] = opened.receipt_max_abs_diff
    except Exception as error:
        # Files that go away while they are read can raise anything.
        if not folder.exists():
            return None
        if not isinstance(error, CheckpointError):
            raise
        result["problem"] = str(error)
    return result


def _steps(chosen: Options) -> list[int]:
    from llm.run.checkpoint import saved_steps
    from llm.run.directory import RunDirectory

    run = RunDirectory(Path(chosen.run))
    run.read_config()
    steps = saved_steps(run.checkpoints)
    if not steps:
        raise CheckpointError(f"{run.path} has no checkpoint yet")
    if chosen.step is not None and chosen.step not in steps:
        raise UsageError(
            f"{run.path} has no checkpoint of step {chosen.step}; there are: "
            f"{', '.join(map(str, steps))}"
        )
    if chosen.all:
        return steps
    return [steps[-1] if chosen.step is None else chosen.step]
