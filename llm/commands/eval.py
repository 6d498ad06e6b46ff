"""python -m llm eval RUN --tasks TASK ...: run tasks of lm-evaluation-harness on a model.

A task is a name that the harness knows (`--tasks list` prints them), a pattern such as arc_*, or a
YAML file; --include-path adds a folder of them. A task fetches its data when it first runs; one
that reads local files needs no network. Prints a table on stderr, and with --json one JSON object
on stdout, which --output writes to a file.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.commands.texts import check_writable, open_and_say, with_dashes
from llm.errors import UsageError
from llm.files import write_output
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.interop.lm_eval import Options
    from llm.run.model import OpenedModel


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(arguments)
    prepare_process()  # before JAX is imported, as it is below
    harness = _harness()
    if options.tasks == ["list"]:
        print("\n".join(harness.task_names(options.include_path)))
        return 0

    opened = open_and_say(options.run, options.step)
    tasks = harness.load_tasks(options.tasks, options.include_path)
    how = _options(options, opened)
    harness.check_tasks(tasks, how, opened.spec.config.context_length)
    seeds = {} if options.seed is None else {"seed": options.seed}
    model = harness.HarnessModel(
        opened.spec, opened.params, opened.tokenizer, options.batch_size, **seeds
    )
    results, documents = harness.evaluate(model, tasks, how)
    said = described(opened) | {"settings": settings_of(options)} | results
    _report(options, said, documents)
    print(harness.table(results), file=sys.stderr)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; flags may be spelled with - or _ between words."""
    parser = argparse.ArgumentParser(
        prog="python -m llm eval",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory")
    add("--step", type=int, metavar="N", help="checkpoint to use; by default the newest")
    add(
        "--tasks",
        metavar="TASK",
        nargs="+",
        action="extend",
        required=True,
        help="tasks to run, also separated by commas; `list` prints all names",
    )
    add(
        "--include-path",
        metavar="FOLDER",
        nargs="+",
        action="extend",
        default=[],
        help="folders with more tasks; one may bring code of its own, which runs",
    )
    _add_harness_flags(parser)
    add("--output", metavar="FILE", help="write the results as one JSON object")
    add("--samples", metavar="FILE", help="write what was asked and answered, JSON lines")
    add("--json", action="store_true", help="print the results as one JSON object")
    options = parser.parse_args([with_dashes(word) for word in arguments])
    options.tasks = [name for words in options.tasks for name in words.split(",") if name]
    _check(options)
    return options


def _add_harness_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved examples before each question (what the task says)",
    )
    add(
        "--limit",
        type=float,
        metavar="N",
        help="documents of each task, or a share of them below 1; for trying out (all)",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        default=0,
        help="texts computed together (as many as suit the device)",
    )
    add(
        "--gen-kwargs",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="settings of generation that overrule the tasks': max_gen_toks, until, do_sample, "
        "temperature, top_k, top_p, min_p",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="seed of few-shot examples and of drawing (the harness's own)",
    )
    add("--cache", metavar="FOLDER", help="keep answers there, and find them again next time")
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="run tasks that execute what the model writes",
    )


def _check(options: argparse.Namespace) -> None:
    """Raise a UsageError for flags that cannot be used, before a model is loaded."""
    if not options.tasks:
        raise UsageError("--tasks names no task; `--tasks list` prints all names")
    if options.batch_size < 0:
        raise UsageError(f"--batch-size {options.batch_size}: expected 1 or more texts")
    if options.limit is not None and not options.limit > 0:
        raise UsageError(f"--limit {options.limit}: expected a number above 0")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UsageError(f"--num-fewshot {options.num_fewshot}: expected 0 or more examples")
    options.gen_kwargs = dict(_key_value(word) for word in options.gen_kwargs)
    for path in (options.output, options.samples):
        check_writable(path)


def _key_value(word: str) -> tuple[str, Any]:
    """temperature=0.8; the value is JSON where it can be read as such, else text."""
    key, equals, value = word.partition("=")
    if not key or not equals:
        raise UsageError(f"--gen-kwargs {word}: expected KEY=VALUE, such as max_gen_toks=64")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _harness() -> Any:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # its bars, before they are imported
    try:
        from llm.interop import lm_eval
    except ModuleNotFoundError as error:
        raise UsageError(
            f"eval runs lm-evaluation-harness, and the package {error.name} is not installed; "
            "install it with pip install 'glassbox-gpt[eval]'"
        ) from None
    return lm_eval


def _options(options: argparse.Namespace, opened: "OpenedModel") -> "Options":
    from llm.interop.lm_eval import Options

    cache = None
    if options.cache:
        # Answers of another model, precision or seed must not be found.
        seed = "" if options.seed is None else f"-seed{options.seed}"
        name = f"{opened.params_sha256[:16]}-{opened.tokenizer.sha256[:16]}"
        cache = str(Path(options.cache) / f"{name}-{opened.spec.compute_dtype}{seed}")
    return Options(
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        gen_kwargs=options.gen_kwargs,
        seed=options.seed,
        cache=cache,
        unsafe_code=options.confirm_run_unsafe_code,
    )


def described(opened: "OpenedModel") -> dict[str, Any]:
    """What was evaluated and how the numbers were computed, as the run record of --probs has it."""
    from llm.inference.records import RecordBuilder, numerics_of

    numerics = numerics_of(opened.spec, opened.params, "teacher_forced")
    run = RecordBuilder(opened.tokenizer).run(opened.checkpoint, None, numerics, 0)
    return {name: run[name] for name in ("checkpoint", "tokenizer", "numerics")}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide the results; None where the task or the harness does."""
    names = ("num_fewshot", "limit", "gen_kwargs", "seed", "batch_size")
    return {name: getattr(options, name) for name in names}


def _report(
    options: argparse.Namespace, results: dict[str, Any], documents: dict[str, list[Any]]
) -> None:
    line = json.dumps(results, allow_nan=False)
    if options.output:
        text = json.dumps(results, allow_nan=False, indent=1) + "\n"
        write_output(options.output, text.encode("ascii"), UsageError)
    if options.samples:
        rows = [{"task": task, **row} for task, of_task in documents.items() for row in of_task]
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        write_output(options.samples, text.encode("ascii"), UsageError)
    if options.json:
        print(line)
