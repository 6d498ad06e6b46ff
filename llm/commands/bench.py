"""python -m llm bench CONFIG [--parts PART ...] [--section.key VALUE ...]: how fast is each part?

Times the parts of a run of this configuration, and compares them with the limits of the machine:

    step         the train step: compile time, tokens/s, memory, MFU of the
                 measured peak of matrix products
    loop         what the loop adds to the step: data, dispatch, metrics
    decode       sampling with the key/value cache, and its share of the
                 measured memory bandwidth
    data         tokenising, and reading batches
    checkpoint   what a save adds, and how long it holds the loop
    start        from the command to the first step, with and without
                 compiled programs

Nothing is kept: the benchmark works in a temporary folder, with random weights and the corpus of
the configuration. Times are medians of --turns and hold for this machine at this moment. Every
setting is a flag too, such as --training.batch_size 8; `python train.py --help` lists them.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import PositiveInt

from llm.commands.flags import CommandLine, argument, parse
from llm.commands.init_from import source_tokenizer
from llm.config import Config
from llm.runtime import prepare_process
from llm.section import setting

Part = Literal["step", "loop", "decode", "data", "checkpoint", "start"]
PARTS = get_args(Part)


class Options(CommandLine):
    """The command line."""

    config: str = argument("CONFIG", "configuration file")
    parts: tuple[Part, ...] = setting(PARTS, "what to measure", "PART")
    turns: PositiveInt = setting(15, "times that each thing is measured")
    decode_batches: tuple[PositiveInt, ...] = setting((1, 64), "rows decoded together")
    as_json: bool = setting(False, "print one JSON object", flag="json")
    settings: Config = Config()


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    config = options.settings.resolved()
    with tempfile.TemporaryDirectory(prefix="llm-bench-") as name:
        folder = Path(name)
        # An empty store of compiled programs, so that compile times are those of compiling.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
        prepare_process()
        report: dict[str, Any] = {}
        for part, values in measure(config, options, folder):
            report[part] = values
            if not options.as_json:
                print(table(part, values), flush=True)
    if options.as_json:
        print(json.dumps(report))
    return 0


def measure(config: Config, options: Options, folder: Path) -> Iterator[tuple[str, Any]]:
    """The figures of the machine, the model and each part of --parts, as soon as they are known."""
    from llm.measure import data, decode, machine, training
    from llm.model.flops import flops_per_token, parameter_count
    from llm.run.display import make_display
    from llm.run.hosts import Hosts
    from llm.run.setup import make_setup
    from llm.text.shards import prepare
    from llm.training.loop import Job

    with make_display(config.logging.progress) as display:
        own = source_tokenizer(config)
        corpus = prepare(config.data, config.tokenizer, own=own, on_progress=display.prepare)
        corpus.check_windows(config.model.context_length, config.data.validation)
        setup = make_setup(config, corpus.tokenizer.vocab_size)
        job = Job(config, setup.spec, setup.mesh, corpus, Hosts())
        display.say("measuring the machine")
        limits = machine.measure_machine(job.mesh, job.spec.products_dtype)
        matmul, bandwidth = limits["matmul_flops"], limits["read_bytes_per_second"]
        yield "machine", limits
        yield (
            "model",
            {
                "parameters": parameter_count(job.spec),
                "flops_per_token": flops_per_token(job.spec),
                "tokens_per_step": job.tokens_per_step,
            },
        )
        turns, few = options.turns, max(3, options.turns // 5)
        measures: dict[str, Callable[[Path], Any]] = {
            "step": lambda _: training.measure_step(job, matmul, turns),
            "loop": lambda own: training.measure_loop(job, own),
            "decode": lambda _: [
                decode.measure_decoding(job, rows, bandwidth, few)
                for rows in options.decode_batches
            ],
            "data": lambda own: data.measure_data(job, own, few),
            "checkpoint": lambda own: training.measure_saves(job, own, max(3, turns // 3)),
            "start": lambda own: training.measure_start(config, own),
        }
        for part in PARTS:
            if part in options.parts:
                display.say(f"measuring {part}")
                (folder / part).mkdir()
                yield part, measures[part](folder / part)


def table(part: str, values: Any) -> str:
    """A part of the report for a person, with one line for each figure."""
    lines: list[str] = []
    for entry in values if isinstance(values, list) else [values]:
        lines.append(part if "batch_size" not in entry else f"{part}, {entry['batch_size']} rows")
        lines += [f"    {name:22} {_shown(name, value)}" for name, value in entry.items()]
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if not isinstance(value, int | float):
        return str(value or "one device")
    if name.startswith("mfu") or name.endswith("share"):
        return f"{100 * value:.1f} %"
    if name.endswith("flops"):
        return f"{value / 1e9:,.0f} GFLOP/s"
    if name.endswith("bytes_per_second"):
        return f"{value / 1e9:.3g} GB/s"
    if "bytes" in name:
        return f"{value / 2**20:,.1f} MiB"
    if "seconds" in name:
        return f"{1000 * value:,.2f} ms" if value < 1 else f"{value:.2f} s"
    return f"{value:,.0f}"
