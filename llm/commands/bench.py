"""python -m llm bench CONFIG [--parts PART ...] [--json] [--section.key VALUE ...]: how fast it is.

Times what a run of this configuration does, part by part, beside what the machine can do at most:

    step         the train step: compile time, tokens/s, MFU of the measured matmul peak, memory
    loop         what the loop around it adds: data, dispatch, metrics
    decode       sampling with the key/value cache, against the measured bandwidth of memory
    data         tokenising, and reading batches
    checkpoint   what a save adds, and how long it holds the loop
    start        from the command to the first step, with and without compiled programs

Nothing is kept: it works in a temporary folder, with random weights and the configuration's corpus.
Times are of this machine and moment; medians of --turns.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.config import Config, load_config
from llm.runtime import prepare_process

if TYPE_CHECKING:
    from llm.measure.workload import Workload

PARTS = ("step", "loop", "decode", "data", "checkpoint", "start")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options, flags = parse(arguments)
    config = load_config(options.config, flags, "python -m llm bench").resolved()
    with tempfile.TemporaryDirectory(prefix="llm-bench-") as name:
        folder = Path(name)
        # Its own store of compiled programs: compile times are of compiling.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
        prepare_process()
        report: dict[str, Any] = {}
        for part, values in measure(config, options, folder):
            report[part] = values
            if not options.json:
                print(table(part, values), flush=True)
    if options.json:
        print(json.dumps(report))
    return 0


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, and the settings among them that overrule the file's."""
    parser = argparse.ArgumentParser(
        "python -m llm bench",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="configuration file")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="all by default")
    add("--turns", type=_positive, default=15, metavar="N", help="of each thing that is timed (15)")
    add(
        "--decode-batches",
        type=_positive,
        nargs="+",
        default=(1, 64),
        metavar="N",
        help="rows decoded together (1 64)",
    )
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_known_args(arguments)


def measure(config: Config, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Any]]:
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
    options: argparse.Namespace,
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value
