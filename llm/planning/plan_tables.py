"""A plan as a person reads it: tables of the facts that --json gives (llm/planning/plan.py)."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llm.planning.devices import GIB
from llm.planning.plan import Facts

Row = tuple[str, ...]
# Width of a table that is written to a file.
_WIDTH = 100


def make_console(file: Any = None) -> Console:
    """As wide as the terminal; elsewhere plain text of one width."""
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=_WIDTH, no_color=True)


def show_plan(facts: Facts, console: Console) -> None:
    """One plan, and who estimated which part of it."""
    console.print(_table("Estimated, not measured", [*_of_what(facts), *_times(facts)]))
    console.print(_table("Bytes on one device", _memory(facts["memory"])))
    if facts["collectives"]:
        rows = [
            (
                one["kind"],
                str(one["devices"]),
                f"{one['count']:,}",
                f"{one['bytes'] / GIB:.3f}",
                _number(one["seconds"], "{:.3g}"),
            )
            for one in facts["collectives"]
        ]
        title = "Sent in a step, as whole arrays of one device"
        console.print(_table(title, rows, ("collective", ">devices", ">times", ">GiB", ">s")))
    for note in _notes(facts):
        console.print(note, highlight=False)


def show_ranking(ranked: list[Facts], considered: int, console: Console) -> None:
    """The plans of a search, best first."""
    rows = [
        (
            str(place),
            _mesh(facts["mesh"]),
            facts["remat"],
            str(facts["micro_batch_size"]),
            f"{facts['memory']['needed_bytes'] / GIB:.2f}",
            {True: "yes", False: "no", None: "not known"}[facts["memory"]["fits"]],
            _number(facts["time"]["step_seconds"], "{:.3g}"),
            _number(facts["mfu"], "{:.1%}"),
        )
        for place, facts in enumerate(ranked, start=1)
    ]
    title = f"{len(ranked)} compiled of {considered} that arithmetic did not rule out"
    heads = (">", "mesh", "remat", ">micro-batch", ">GiB", "fits", ">s a step", ">MFU")
    console.print(_table(title, rows, heads))


def _table(title: str, rows: list[Row], heads: Row = ()) -> Table:
    """heads: names of the columns, those of numbers with > before them."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=bool(heads))
    for head in heads:
        table.add_column(head.lstrip(">"), justify="right" if head.startswith(">") else "left")
    if not heads:
        table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _of_what(facts: Facts) -> list[Row]:
    devices = f"{facts['devices']} x {facts['device_kind']}"
    if facts["target"] != devices:
        devices = f"{facts['target']}, {devices}"
    step = (
        f"{facts['tokens_per_step']:,} tokens: {facts['batch_size']} sequences, "
        f"{facts['micro_batch_size']} at once; remat {facts['remat']}, "
        f"{facts['compute_dtype']}, {facts['attention']} attention"
    )
    return [
        ("devices", devices),
        ("mesh", _mesh(facts["mesh"])),
        ("parameters", f"{facts['parameters']:,}"),
        ("step", step),
    ]


def _times(facts: Facts) -> list[Row]:
    time, flops = facts["time"], facts["flops"]
    executed = flops["executed_per_device_and_step"]
    rows = [
        ("model FLOPs a step", f"{flops['model_per_step']:.3e}, over all devices"),
        ("FLOPs executed", f"{executed:.3e} a device, with what is computed again"),
    ]
    if time["step_seconds"] is None:
        refused = facts["memory"]["temporaries_bytes"] is None
        why = "it does not fit" if refused else "no data sheet of this device"
        return [*rows, ("time", f"not known: {why}")]
    compiler = "gives no time"
    if time["compiler_seconds"] is not None:
        compiler = f"{time['compiler_seconds']:.3g} s, without collectives; kernels at the peak"
    return [
        *rows,
        (
            "least time (roofline)",
            f"{time['roofline_seconds']:.3g} s: the {time['binds']} bound. Arithmetic "
            f"{time['compute_seconds']:.3g}, memory {time['memory_seconds']:.3g}, links "
            f"{time['link_seconds']:.3g}",
        ),
        ("compiler's cost model", compiler),
        ("time of a step", f"{time['step_seconds']:.3g} s, the longer of these"),
        ("MFU", f"{facts['mfu']:.1%} at most"),
        (
            "whole run",
            f"{facts['steps']:,} steps, {facts['tokens']:.3e} tokens: {facts['days']:.3g} days, "
            f"{facts['device_hours']:,.0f} device-hours",
        ),
    ]


def _memory(memory: Facts) -> list[Row]:
    rows = [
        ("weights", _bytes(memory["weights_bytes"])),
        ("optimizer", _bytes(memory["optimizer_bytes"])),
    ]
    if memory["temporaries_bytes"] is not None:
        by = "by arithmetic" if memory["temporaries_from"] == "arithmetic" else "by the compiler"
        rows.append(("activations, gradients", f"{_bytes(memory['temporaries_bytes'])}, {by}"))
        rows.append(("program", _bytes(memory["program_bytes"])))
    rows.append(("needed", _bytes(memory["needed_bytes"])))
    if memory["fits"] is None:
        return [*rows, ("fits", "not known: no data sheet of this device")]
    over = memory["spare_bytes"]
    verdict = f"no: does not fit, by {_bytes(-over)}"
    if memory["fits"]:
        verdict = f"yes, {_bytes(over)} spare"
    return [*rows, ("available", _bytes(memory["available_bytes"])), ("fits", verdict)]


def _notes(facts: Facts) -> list[str]:
    notes = ["Nothing ran. docs/plan.md says how to read this, and what it cannot know."]
    memory = facts["memory"]
    if memory["temporaries_from"] == "arithmetic":
        notes.append(
            f"Compiled for CPU devices in place of {facts['device_kind']}. The collectives are "
            "those of that program: it sends more than a GPU's would, in float32 and without "
            "reduce-scatters. Activations and the time of links are by arithmetic (the CPU's "
            f"compiler counts {_bytes(memory['compiler_temporaries_bytes'])} of activations)."
        )
    if memory["temporaries_bytes"] is None:
        notes.append("The compiler refused the program for its memory, so it has no collectives.")
    return notes


def _mesh(sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def _bytes(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"


def _number(value: float | None, spelling: str) -> str:
    return "" if value is None else spelling.format(value)
