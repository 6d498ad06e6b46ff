"""python -m llm bench CONFIG [--parts PART ...] [--section.key VALUE ...]: how fast is each part?

Times what a run of this configuration does, and compares it with what the machine can do at most:

    step         the train step: compile time, tokens/s, memory, MFU of the
                 measured peak of matrix products
    loop         what the loop adds to the step: data, dispatch, metrics
    decode       sampling with the key/value cache, and the share of the
                 measured memory bandwidth that it reaches
    data         tokenising, and reading batches
    checkpoint   what a save adds, and how long it holds the loop
    start        from the command to the first step, with and without
                 compiled programs

Nothing is kept: the benchmark works in a temporary folder, with random weights and the corpus of
the configuration. Times are medians of --turns and hold for this machine at this moment.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import PositiveInt

from llm.commands.flags import CommandLine, argument, parse
from llm.config import Config, setting
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.measure.workload import Workload

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
        # Its own store of compiled programs: compile times are of compiling.
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
    """machine, model, and one object for each part that was asked for, each once it is measured."""
    from llm.measure import machine
    from llm.measure.workload import make_workload
    from llm.model.flops import flops_per_token, parameter_count
    from llm.run.progress import make_progress

    with make_progress(config.logging.progress) as progress:
        workload = make_workload(config, progress.prepare)
        say = progress.say
        say("measuring the machine")
        matmul, bandwidth = (
            machine.matmul_peak(workload.spec.compute_dtype),
            machine.read_bandwidth(),
        )
        peaks = {"matmul_flops": matmul, "read_bytes_per_second": bandwidth}
        yield "machine", _machine(workload) | peaks
        model = {
            "parameters": parameter_count(workload.spec),
            "flops_per_token": flops_per_token(workload.spec),
            "tokens_per_step": workload.tokens_per_step,
        }
        yield "model", model
        for part in PARTS:
            if part in options.parts:
                say(f"measuring {part}")
                (folder / part).mkdir()
                yield part, _part(part, workload, options, folder / part, matmul, bandwidth)


def _part(
    part: str,
    workload: "Workload",
    options: Options,
    folder: Path,
    matmul: float,
    bandwidth: float,
) -> Any:
    from llm.measure.data import measure_data
    from llm.measure.decode import measure_decoding
    from llm.measure.loop import measure_loop
    from llm.measure.saves import measure_saves
    from llm.measure.start import measure_start
    from llm.measure.step import measure_step

    turns = options.turns
    match part:
        case "step":
            return measure_step(workload, matmul, turns)
        case "loop":
            return measure_loop(workload, folder)
        case "decode":
            return [
                measure_decoding(workload, batch_size, bandwidth, max(3, turns // 5))
                for batch_size in options.decode_batches
            ]
        case "data":
            return measure_data(workload, folder, max(3, turns // 5))
        case "checkpoint":
            return measure_saves(workload, folder, max(3, turns // 3))
        case "start":
            return measure_start(workload.config, folder)


def _machine(workload: "Workload") -> dict[str, Any]:
    import jax

    devices = list(workload.mesh.devices.flat)
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "mesh": {name: size for name, size in workload.mesh.shape.items() if size > 1},
        "platform": devices[0].platform,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "compute_dtype": workload.spec.compute_dtype,
        "jax": jax.__version__,
    }


def table(part: str, values: Any) -> str:
    """A part of the report for a person, a line a figure."""
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
