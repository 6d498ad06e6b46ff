"""python -m llm verify RUN [--step N | --all] [--json]: is a checkpoint what was saved?

Prints one JSON object for each step: step, params_sha256, manifest_ok, receipt_max_abs_diff. Every
file is compared with the manifest; then the model is opened, and its parameters are compared with
their sha256 and with what they predicted. Any machine will do, also one without the accelerator
that trained the run.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pydantic
from pydantic import NonNegativeInt

from llm.commands.flags import CommandLine, argument, parse
from llm.config import setting
from llm.errors import CheckpointError, UsageError
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.run.directory import RunDirectory

# A run that trains may remove a step while it is read, but only when a newer step is whole: even
# the second try hardly ever fails.
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
    """0 if everything holds.

    Raises:
      CheckpointError: something does not hold; the message has every problem.
    """
    chosen = parse(Options, arguments)
    prepare_process()
    results = verify(chosen)
    problems = [result.pop("problem") for result in results]
    for result, problem in zip(results, problems, strict=True):
        print(json.dumps(result))
        if problem is None and not chosen.as_json:
            print(f"step {result['step']}: manifest, parameters and receipt hold", file=sys.stderr)
    if any(problems):
        raise CheckpointError("\n  ".join(filter(None, problems)))
    return 0


def verify(chosen: Options) -> list[dict[str, Any]]:
    """`verify_step` of each chosen step, except those that the run removes meanwhile."""
    from llm.run.checkpoint import saved_steps
    from llm.run.directory import RunDirectory

    run = RunDirectory(Path(chosen.run))
    run.read_config()
    newest = chosen.step is None and not chosen.all
    for _ in range(ATTEMPTS if newest else 1):
        there = saved_steps(run.checkpoints)
        if not there:
            raise CheckpointError(f"{run.path} has no checkpoint yet")
        steps = there if chosen.all else [there[-1] if chosen.step is None else chosen.step]
        if steps[0] not in there:
            raise UsageError(
                f"{run.path} has no checkpoint of step {chosen.step}; there are: "
                f"{', '.join(map(str, there))}"
            )
        found = {step: verify_step(run, step) for step in steps}
        results = [result for result in found.values() if result is not None]
        removed = ", ".join(str(step) for step, result in found.items() if result is None)
        said = f"removed by the run meanwhile, which is no damage: step {removed}"
        if results:
            if removed:
                print(said, file=sys.stderr)
            return results
    if newest:
        raise UsageError(
            f"{chosen.run} removes its steps while they are read: the newest was gone {ATTEMPTS} "
            "times, expected one to stay; set a larger checkpoint.keep, or verify when training "
            "has ended"
        )
    raise UsageError(f"{said}; leave --step and --all out to verify the newest")


def verify_step(run: "RunDirectory", step: int) -> dict[str, Any] | None:
    """The JSON object of one step, and its `problem`, text or None. None: the run removed it."""
    from llm.run.checkpoint import DamageError, read_receipt, verify_files
    from llm.run.open import open_model

    folder = run.checkpoints / str(step)
    keys = ("params_sha256", "manifest_ok", "receipt_max_abs_diff", "problem")
    result: dict[str, Any] = {"step": step, **dict.fromkeys(keys), "manifest_ok": False}
    try:
        try:
            verify_files(folder, ["training", "params"])  # opening verifies the receipt
            opened = open_model(run.path, step)
            result["params_sha256"] = opened.params_sha256
            result["receipt_max_abs_diff"] = opened.receipt_max_abs_diff
        except CheckpointError as error:
            result["problem"] = str(error)
            verify_files(folder)  # a damaged step is read again, to name the file
            result["params_sha256"] = read_receipt(folder)["params_sha256"]
        result["manifest_ok"] = True
    except Exception as error:
        # Files that go away while they are read can raise anything.
        if not folder.exists():
            return None
        if not isinstance(error, DamageError):
            raise
        result["problem"] = str(error)
    return result
