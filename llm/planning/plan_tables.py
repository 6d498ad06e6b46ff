"""A plan as a person reads it: tables of the facts that --json gives (llm/planning/plan.py)."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llm.model.devices import GIB

Facts = dict[str, Any]
Rows = list[tuple[str, str]]
# Where nobody watches, tables are files, and a file has one width.
_WIDTH = 100


def make_console(file: Any = None) -> Console:
    """On a terminal as wide as it is; elsewhere plain text of one width."""
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=_WIDTH, no_color=True)


def show_plan(facts: Facts, console: Console) -> None:
    """One plan, with what is an estimate of whom."""
    console.print(_table("Estimated, not measured", [*_of_what(facts), *_times(facts)]))
    console.print(_table("Bytes on one device", _memory(facts)))
    if facts["collectives"]:
        console.print(_collectives(facts["collectives"]))
    for note in _notes(facts):
        console.print(note, highlight=False)


def show_ranking(ranked: list[Facts], considered: int, console: Console) -> None:
    """The plans of a search, the best first."""
    table = Table(
        title=f"{len(ranked)} compiled of {considered} that arithmetic did not rule out",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("", "mesh", "remat", "micro-batch", "GiB", "fits", "s a step", "MFU"):
        table.add_column(name, justify="left" if name in ("mesh", "remat", "fits") else "right")
    for place, facts in enumerate(ranked, start=1):
        table.add_row(
            str(place),
            _mesh(facts["mesh"]),
            facts["remat"],
            str(facts["micro_batch_size"]),
            f"{facts['memory']['needed_bytes'] / GIB:.2f}",
            _yes(facts["memory"]["fits"]),
            _number(facts["time"]["step_seconds"], "{:.3g}"),
            _number(facts["mfu"], "{:.1%}"),
        )
    console.print(table)


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def _of_what(facts: Facts) -> Rows:
    return [
        ("devices", _devices(facts)),
        ("mesh", _mesh(facts["mesh"])),
        ("parameters", f"{facts['parameters']:,}"),
        (
            "step",
            f"{facts['tokens_per_step']:,} tokens: {facts['batch_size']} sequences, "
            f"{facts['micro_batch_size']} at once; remat {facts['remat']}, "
            f"{facts['compute_dtype']}, {facts['attention']} attention",
        ),
    ]


def _devices(facts: Facts) -> str:
    counted = f"{facts['devices']} x {facts['device_kind']}"
    return counted if facts["target"] == counted else f"{facts['target']}, {counted}"


def _times(facts: Facts) -> Rows:
    time, flops = facts["time"], facts["flops"]
    rows = [("model FLOPs a step", f"{flops['model_per_step']:.3e}, over all devices")]
    if flops["executed_per_device_and_step"]:
        executed = flops["executed_per_device_and_step"]
        rows.append(("FLOPs executed", f"{executed:.3e} a device, with what is computed again"))
    if time["step_seconds"] is None:
        return [*rows, ("time", _why_no_time(facts))]
    rows += [
        (
            "least time (roofline)",
            f"{time['roofline_seconds']:.3g} s: the {time['binds']} bound. Arithmetic "
            f"{time['compute_seconds']:.3g}, memory {time['memory_seconds']:.3g}, links "
            f"{time['link_seconds']:.3g}",
        ),
        ("compiler's cost model", _compiler_time(time["compiler_seconds"])),
        ("time of a step", f"{time['step_seconds']:.3g} s, the longer of these"),
        ("MFU", f"{facts['mfu']:.1%} at most"),
        (
            "whole run",
            f"{facts['steps']:,} steps, {facts['tokens']:.3e} tokens: {facts['days']:.3g} days, "
            f"{facts['device_hours']:,.0f} device-hours",
        ),
    ]
    return rows


def _why_no_time(facts: Facts) -> str:
    refused = facts["memory"]["temporaries_bytes"] is None
    return "not known: " + ("it does not fit" if refused else "no data sheet of this device")


def _compiler_time(seconds: float | None) -> str:
    return (
        "gives no time"
        if seconds is None
        else f"{seconds:.3g} s, without collectives; kernels at the peak"
    )


def _memory(facts: Facts) -> Rows:
    memory = facts["memory"]
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
    verdict = (
        f"yes, {_bytes(over)} spare" if memory["fits"] else f"no: does not fit, by {_bytes(-over)}"
    )
    return [*rows, ("available", _bytes(memory["available_bytes"])), ("fits", verdict)]


def _collectives(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Sent in a step, as whole arrays of one device",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("collective", "devices", "times", "GiB", "s"):
        table.add_column(name, justify="left" if name == "collective" else "right")
    for row in rows:
        table.add_row(
            row["kind"],
            str(row["devices"]),
            f"{row['count']:,}",
            f"{row['bytes'] / GIB:.3f}",
            _number(row["seconds"], "{:.3g}"),
        )
    return table


def _notes(facts: Facts) -> list[str]:
    notes = ["Nothing ran. docs/plan.md says how to read this, and what it cannot know."]
    memory = facts["memory"]
    if memory["temporaries_from"] == "arithmetic":
        notes.append(
            f"Compiled for CPU devices in place of {facts['device_kind']}. FLOPs are that "
            "program's, with those of attention as it is planned. Collectives are too: it sends "
            "more than a GPU's would, in float32 and without reduce-scatters. Activations, memory "
            "traffic and the time of links are by arithmetic "
            f"(the CPU's compiler counts {_bytes(memory['compiler_temporaries_bytes'])} of "
            "activations)."
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


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not known"}[value]
