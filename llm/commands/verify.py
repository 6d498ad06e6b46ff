"""python -m llm verify RUN [--step N | --all] [--json]: is a checkpoint what was saved?

Prints one JSON object for each step: step, params_sha256, manifest_ok, receipt_max_abs_diff, and
ancestor if the run came from another, with which its step 0 is compared. Every
file is compared with the manifest; then the model is opened, and its parameters are compared with
their sha256 and with what they predicted. Any machine will do, also one without the accelerator
that trained the run.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pydantic

from llm.commands.flags import parse
from llm.commands.shared import RunOptions
from llm.console import say, say_result
from llm.errors import CheckpointError, UsageError
from llm.runtime import prepare_process
from llm.section import setting

if TYPE_CHECKING:
    from llm.run.directory import RunDirectory

# A run that trains may remove a step while this command reads it, but only after it has saved a
# newer one. Even the second attempt hardly ever fails.
ATTEMPTS = 5


class Options(RunOptions):
    """The command line."""

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
    from llm.run.provenance import came_from

    problems = []
    for result in verify(chosen):
        problem = result.pop("problem")
        print(json.dumps(result))
        if problem:
            problems.append(problem)
        elif not chosen.as_json:
            say_result(f"step {result['step']}: manifest, parameters and receipt hold")
            if "ancestor" in result:
                say_result(f"the run {came_from(result['ancestor'])}")
    if problems:
        raise CheckpointError("\n  ".join(problems))
    return 0


def verify(chosen: Options) -> list[dict[str, Any]]:
    """The results of `verify_step` for the chosen steps, without steps that the run removes
    meanwhile."""
    from llm.run.directory import RunDirectory, saved_steps

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
        results = [result for step in steps if (result := verify_step(run, step))]
        removed = [str(step) for step in steps if step not in [of["step"] for of in results]]
        said = f"removed by the run meanwhile, which is no damage: step {', '.join(removed)}"
        if results and removed:
            say(said)
        if results:
            return results
    if newest:
        raise UsageError(
            f"{chosen.run} removes its steps while they are read: the newest was gone {ATTEMPTS} "
            "times, expected one to stay; set a larger checkpoint.keep, or verify when training "
            "has ended"
        )
    raise UsageError(f"{said}; leave --step and --all out to verify the newest")


def verify_step(run: "RunDirectory", step: int) -> dict[str, Any] | None:
    """The JSON object of one step with its `problem`, a text or None. None if the run removed the
    step."""
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
            if ancestor := run.read_provenance().get("ancestor"):
                named = ("from", "step", "params_sha256", "members")
                result["ancestor"] = {x: ancestor[x] for x in named if x in ancestor}
                if step == 0 and opened.params_sha256 != ancestor["step_0_sha256"]:
                    result["problem"] = (
                        f"{folder} does not hold what the run began with, from {ancestor['from']}: "
                        f"expected sha256 {ancestor['step_0_sha256']}, found {opened.params_sha256}"
                    )
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
