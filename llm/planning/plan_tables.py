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

# Each line of a table is a name, a bar, and a text with the names of facts.
_STEP = """\
mesh | {axes}
parameters | {parameters:,}
step | {tokens_per_step:,} tokens: {batch_size} sequences, {micro_batch_size} at once; \
remat {remat}, {compute_dtype}, {attention} attention
model FLOPs a step | {flops[model_per_step]:.3e}, over all devices
FLOPs executed | {executed:.3e} a device, with what is computed again"""
_TIME = """\
least time (roofline) | {time[roofline_seconds]:.3g} s: the {time[binds]} bound. Arithmetic \
{time[compute_seconds]:.3g}, memory {time[memory_seconds]:.3g}, links {time[link_seconds]:.3g}
compiler's cost model | {compiler}
time of a step | {time[step_seconds]:.3g} s, the longer of these
MFU | {mfu:.1%} at most
whole run | {steps:,} steps, {tokens:.3e} tokens: {days:.3g} days, \
{device_hours:,.0f} device-hours"""
_MEMORY = """\
weights | {weights_bytes}
optimizer | {optimizer_bytes}
activations, gradients | {temporaries_bytes}, by {source}
program | {program_bytes}
needed | {needed_bytes}
available | {available_bytes}
fits | {verdict}"""
_NOTE = "Nothing ran. docs/plan.md says how to read this, and what it cannot know."
_REFUSED = "The compiler refused the program for its memory, so it has no collectives."
_STANDS_IN = (
    "Compiled for CPU devices in place of {device_kind}. The collectives are that program's: it "
    "sends more than a GPU's would, in float32 and without reduce-scatters. Activations and the "
    "time of links are by arithmetic."
)


def make_console(file: Any = None) -> Console:
    """As wide as the terminal; elsewhere plain text of one width."""
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=_WIDTH, no_color=True)


def show_plan(facts: Facts, console: Console) -> None:
    """One plan, and who estimated which part of it."""
    time, memory = facts["time"], facts["memory"]
    devices = dict.fromkeys([facts["target"], f"{facts['devices']} x {facts['device_kind']}"])
    executed = facts["flops"]["executed_per_device_and_step"]
    rows: list[Row] = [("devices", ", ".join(devices))]
    rows += _filled(_STEP, facts, axes=axes(facts["mesh"]), executed=executed)
    refused = facts["collectives"] is None
    if time["step_seconds"] is None:
        why = "it does not fit" if refused else "no data sheet of this device"
        rows.append(("time", f"not known: {why}"))
    else:
        compiler = "gives no time"
        if seconds := time["compiler_seconds"]:
            compiler = f"{seconds:.3g} s, without collectives; kernels at the peak"
        rows += _filled(_TIME, facts, compiler=compiler)
    console.print(_table("Estimated, not measured", rows))
    console.print(_table("Bytes on one device", _memory(memory)))
    if facts["collectives"]:
        rows = [_sent(one) for one in facts["collectives"]]
        title = "Sent in a step, as whole arrays of one device"
        console.print(_table(title, rows, ("collective", ">devices", ">times", ">GiB", ">s")))
    console.print(_NOTE, highlight=False)
    if refused:
        console.print(_REFUSED, highlight=False)
    if memory["temporaries_from"] == "arithmetic":
        console.print(_STANDS_IN.format(**facts), highlight=False)


def show_ranking(ranked: list[Facts], considered: int, console: Console) -> None:
    """The plans of a search, best first."""
    rows: list[Row] = []
    for place, facts in enumerate(ranked, start=1):
        gib, fits = facts["memory"]["needed_bytes"] / GIB, facts["memory"]["fits"]
        seconds, mfu = facts["time"]["step_seconds"], facts["mfu"]
        speed = (f"{seconds:.3g}", f"{mfu:.1%}") if mfu else ("", "")
        setting = (axes(facts["mesh"]), facts["remat"], str(facts["micro_batch_size"]))
        rows.append((str(place), *setting, f"{gib:.2f}", "yes" if fits else "no", *speed))
    title = f"{len(ranked)} compiled of {considered} that arithmetic did not rule out"
    heads = (">", "mesh", "remat", ">micro-batch", ">GiB", "fits", ">s a step", ">MFU")
    console.print(_table(title, rows, heads))


def axes(sizes: dict[str, int]) -> str:
    """A mesh in words: its axes of more than one device."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"


def _table(title: str, rows: list[Row], heads: Row = ("", "")) -> Table:
    """heads: names of the columns, with > before the names of columns of numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(heads))
    for head in heads:
        table.add_column(head.lstrip(">"), justify="right" if head.startswith(">") else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _filled(lines: str, facts: Facts, **more: Any) -> list[Row]:
    return [tuple(line.split(" | ")) for line in lines.format(**facts, **more).splitlines()]


def _memory(memory: Facts) -> list[Row]:
    spare = memory["spare_bytes"]
    verdict = "not known: no data sheet of this device"
    if spare is not None:
        size = _bytes(abs(spare))
        verdict = f"yes, {size} spare" if spare >= 0 else f"no: does not fit, by {size}"
    source = "arithmetic" if memory["temporaries_from"] == "arithmetic" else "the compiler"
    sizes = {name: _bytes(value) for name, value in memory.items() if name.endswith("_bytes")}
    return _filled(_MEMORY, sizes, source=source, verdict=verdict)


def _sent(one: Facts) -> Row:
    seconds = "" if one["seconds"] is None else f"{one['seconds']:.3g}"
    size = f"{one['bytes'] / GIB:.3f}"
    return (one["kind"], str(one["devices"]), f"{one['count']:,}", size, seconds)


def _bytes(count: float | None) -> str:
    if count is None:
        return "not known"
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"
