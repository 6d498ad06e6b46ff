"""python -m llm eval RUN --tasks TASK ...: run tasks of lm-evaluation-harness on a model.

A task is a name that the harness knows (`--tasks list` prints them), a pattern such as arc_*, or a
YAML file; --include-path adds a folder of them. A task fetches its data when it first runs; a task
that reads local files needs no network. The results are printed as a table on stderr, and with
--json as one JSON object on stdout.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, NonNegativeInt, PositiveFloat

from llm.commands.flags import InputFiles, OutputFile, parse
from llm.commands.shared import RunOptions
from llm.console import say_result
from llm.errors import UsageError, needing
from llm.files import write_output
from llm.runtime import prepare_process
from llm.section import setting

if TYPE_CHECKING:
    from llm.run.open import OpenedModel


def _names(words: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name for word in words for name in word.split(",") if name)
    if not names:
        raise UsageError("--tasks names no task; `--tasks list` prints all names")
    return names


def _settings(words: tuple[str, ...]) -> dict[str, Any]:
    """temperature=0.8; the value is read as JSON if it is JSON, else as text."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UsageError(f"--gen-kwargs {word}: expected KEY=VALUE, such as max_gen_toks=64")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


class Options(RunOptions):
    """The command line."""

    tasks: Annotated[InputFiles, AfterValidator(_names)] = setting(
        ..., "tasks to run, also separated by commas; `list` prints all names", "TASK"
    )
    include_path: tuple[str, ...] = setting(
        (), "folders with more tasks; a task may bring code of its own, which runs", "FOLDER"
    )
    num_fewshot: NonNegativeInt | None = setting(
        None, "solved examples before each question; by default what the task says"
    )
    limit: PositiveFloat | None = setting(
        None, "documents of each task, or a share of them below 1; by default all", "N"
    )
    batch_size: NonNegativeInt = setting(
        0, "texts computed together; 0: as many as suit the device"
    )
    gen_kwargs: Annotated[dict[str, Any], BeforeValidator(_settings)] = setting(
        {},
        "settings of generation that overrule the tasks': max_gen_toks, until, do_sample, "
        "temperature, top_k, top_p, min_p",
        "KEY=VALUE",
    )
    seed: int | None = setting(
        None, "seed of few-shot examples and of sampling; by default the harness's own"
    )
    cache: str | None = setting(None, "keep answers there, and find them again", "FOLDER")
    confirm_run_unsafe_code: bool = setting(False, "run tasks that execute what the model writes")
    output: OutputFile = setting(None, "write the results as one JSON object", "FILE")
    samples: OutputFile = setting(None, "write questions and answers as JSON lines", "FILE")
    as_json: bool = setting(False, "print the results as one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    prepare_process()  # before JAX is imported, as it is below
    harness = _harness()
    if options.tasks == ("list",):
        print("\n".join(harness.task_manager(include=options.include_path).all_tasks))
        return 0

    opened = options.open()
    tasks = harness.load_tasks(options.tasks, options.include_path)
    unsafe_code = options.confirm_run_unsafe_code
    harness.check_tasks(tasks, opened.spec.config.context_length, options.gen_kwargs, unsafe_code)
    cache = None
    if options.cache:
        # Answers of another model, precision or seed must not be found.
        name = f"{opened.params_sha256[:16]}-{opened.tokenizer.sha256[:16]}"
        seed = "" if options.seed is None else f"-seed{options.seed}"
        cache = str(Path(options.cache, f"{name}-{opened.spec.compute_dtype}{seed}"))
    results, documents = harness.run_tasks(
        harness.HarnessModel(
            opened.spec, opened.params, opened.tokenizer, options.batch_size, options.seed
        ),
        tasks,
        options.seed,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        gen_kwargs=options.gen_kwargs or None,
        use_cache=cache,
        confirm_run_unsafe_code=unsafe_code,
    )
    # The flags that decide the results; None if the task or the harness does.
    names = ("num_fewshot", "limit", "gen_kwargs", "seed", "batch_size")
    settings = {name: getattr(options, name) for name in names}
    _report(options, described(opened) | {"settings": settings} | results, documents)
    say_result(harness.table(results))
    return 0


def _harness() -> Any:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # before the harness is imported
    with needing("eval runs lm-evaluation-harness, which", "'glassbox-gpt[eval]'"):
        from llm.interop import lm_eval
    return lm_eval


def described(opened: "OpenedModel") -> dict[str, Any]:
    """What was evaluated and how the numbers were computed, as the run record of --probs has it."""
    from llm.inference.numerics import numerics_of
    from llm.inference.records import RunRecord, as_json

    numerics = numerics_of(opened.spec, opened.params, "teacher_forced")
    run = as_json(RunRecord.of(opened.checkpoint, opened.tokenizer, None, numerics, 0))
    return {name: run[name] for name in ("checkpoint", "tokenizer", "numerics")}


def _report(options: Options, results: dict[str, Any], documents: dict[str, list[Any]]) -> None:
    line = json.dumps(results, allow_nan=False)
    if options.output:
        text = json.dumps(results, allow_nan=False, indent=1) + "\n"
        write_output(options.output, text.encode("ascii"), UsageError)
    if options.samples:
        rows = [{"task": task, **row} for task, of_task in documents.items() for row in of_task]
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        write_output(options.samples, text.encode("ascii"), UsageError)
    if options.as_json:
        print(line)
