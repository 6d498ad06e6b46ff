"""What a training step will need, from the compiler that will compile it, before anyone pays.

The real step is compiled ahead of time for devices that need not be here. Its memory and its
collectives are read from the program; FLOPs and memory traffic are arithmetic (estimate.py).
Nothing runs, so nothing here is a measurement.
"""

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm.config import Config
from llm.model.flops import flops_per_token, parameter_count, peak_flops
from llm.model.sharding import make_mesh
from llm.planning.collectives import Collective, read_collectives
from llm.planning.devices import GIB, sheet_of
from llm.planning.estimate import Arithmetic
from llm.planning.hlo import cycles
from llm.planning.roofline import link_seconds
from llm.planning.targets import Target
from llm.run.setup import make_setup
from llm.text.batches import Batch
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state
from llm.training.step import make_train_step

Facts = dict[str, Any]


def plan_step(config: Config, vocab_size: int, target: Target, memory_fraction: float) -> Facts:
    """Compile a configuration's step for devices, and say what it needs.

    Args:
      memory_fraction: the share of a GPU's memory that a program can have.
    Returns:
      what `--json` prints (docs/plan.md): strict JSON with units in the names, and None for what is
      not known. A device without a data sheet has no time, and `fits` is None. A program that the
      compiler refuses for its memory has neither a time nor collectives.
    Raises:
      UsageError: the mesh does not fit the devices or the model.
    """
    mesh, training = make_mesh(config.mesh, target.devices), config.training
    sizes = {str(axis): size for axis, size in mesh.shape.items()}
    spec = make_setup(config, vocab_size, target.outline(sizes)).spec
    # CPU devices that stand in for a GPU cannot compile its kernels.
    compiled_spec = dataclasses.replace(spec, attention="plain") if target.stands_in else spec
    arithmetic = Arithmetic(spec, config.optimizer, training, sizes, target.kind)
    optimizer = make_optimizer(config.optimizer)
    state = abstract_state(spec, optimizer, mesh, stacked=training.scan_layers)
    windows = (training.batch_size, config.model.context_length + 1)
    batch = Batch(jax.ShapeDtypeStruct(windows, jnp.int32))
    started = time.monotonic()
    lowered = make_train_step(compiled_spec, config.optimizer, training, mesh).lower(state, batch)
    memory, text = _compile(lowered, arithmetic, target, available_memory(target, memory_fraction))
    return {
        "estimate": True,
        "target": target.name,
        "devices": len(target.devices),
        "device_kind": target.kind,
        "compiled_for": "cpu" if target.stands_in else target.kind,
        "compile_seconds": round(time.monotonic() - started, 1),
        "mesh": sizes,
        "remat": training.remat,
        "batch_size": training.batch_size,
        "micro_batch_size": training.micro_batch_size or training.batch_size,
        "compute_dtype": spec.products_dtype,
        "attention": spec.attention,
        "parameters": parameter_count(spec),
        "memory": memory,
        **_work_and_time(arithmetic, target, list(mesh.devices.flat), text),
    }


def _compile(
    lowered: Any, arithmetic: Arithmetic, target: Target, limit: float | None
) -> tuple[Facts, str | None]:
    """What the step needs of one device's memory, and the compiled program as text.

    A program that the compiler refuses for its memory has no text; the compiler's own limit counts.
    For a stand-in the temporaries (activations, gradients and all else that lives within a step)
    are arithmetic, because the CPU compiler keeps other arrays and keeps them in float32.
    """
    text, temporaries, code = None, None, 0
    try:
        compiled = lowered.compile()
        sizes = compiled.memory_analysis()
        temporaries, code = sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes
        if target.stands_in:
            temporaries, code = arithmetic.temporaries(), 0
        kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        needed = kept + temporaries + code
        text = program_text(lowered, compiled)
    except jax.errors.JaxRuntimeError as error:
        needed, most = refused_memory(str(error))
        limit = min(most, limit or most)
    spare = None if limit is None else limit - needed
    memory = {
        "weights_bytes": arithmetic.state.weights,
        "optimizer_bytes": arithmetic.state.optimizer,
        "other_state_bytes": arithmetic.state.other,
        "temporaries_bytes": temporaries,
        "temporaries_from": "arithmetic" if target.stands_in and text else "compiler",
        "program_bytes": code,
        "needed_bytes": needed,
        "available_bytes": limit,
        "fits": None if spare is None else spare >= 0,
        "spare_bytes": spare,
    }
    return memory, text


def refused_memory(message: str) -> tuple[float, float]:
    """The bytes that are needed and those of a device, in the words of a TPU compiler that ran out
    of memory.

    Raises:
      jax.errors.JaxRuntimeError: the message is about something else.
    """
    # "(43.99G) exceeds available HBM (15.75G)" or "Used 20.11G of 15.75G hbm".
    figures = re.search(
        r"([\d.]+)([KMGT]?)\)?(?: exceeds available \w+ \(| of )([\d.]+)([KMGT]?)", message
    )
    if "RESOURCE_EXHAUSTED" not in message or figures is None:
        raise jax.errors.JaxRuntimeError(message)
    units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    needed, unit, most, unit_of_most = figures.groups()
    return float(needed) * units[unit], float(most) * units[unit_of_most]


def available_memory(target: Target, memory_fraction: float) -> float | None:
    """Bytes of one device that a program can have; None if its data sheet is not here."""
    if not (sheet := sheet_of(target.kind)):
        return None
    return sheet.memory_gib * GIB * (memory_fraction if sheet.domain else 1.0)


def program_text(lowered: Any, compiled: Any) -> str:
    """The program's HLO after optimisation.

    Executables for absent TPUs do not give it; for them the program is compiled again and dumped.
    """
    try:
        return compiled.as_text()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        with tempfile.TemporaryDirectory() as folder:
            lowered.compile(compiler_options={"xla_dump_to": folder})
            dumped = sorted(Path(folder).glob("*train_step*after_optimizations.txt"))
            if not dumped:
                raise
            return dumped[-1].read_text()


def _work_and_time(
    arithmetic: Arithmetic, target: Target, placed: list[jax.Device], text: str | None
) -> Facts:
    """Tokens, FLOPs, collectives and the least time of a step and of the whole run.

    A stand-in's links are arithmetic: the CPU compiler gathers in float32 and has no
    reduce-scatter, and its collectives have no seconds.

    Args:
      placed: the devices in the order of the mesh.
      text: the program; None if the compiler refused it.
    """
    training, count = arithmetic.training, len(target.devices)
    tokens = training.batch_size * arithmetic.spec.config.context_length
    work = tokens * flops_per_token(arithmetic.spec)
    sheet, peak = sheet_of(target.kind), peak_flops(target.kind)
    found = None if text is None else read_collectives(text)
    bound: dict[str, float] = {}
    by_compiler = over_links = None
    if sheet and peak and text is not None and found is not None:
        bound = arithmetic.roofline(sheet)
        if not target.stands_in:
            over_links = [link_seconds(one, sheet, placed) for one in found]
            bound["links"] = sum(over_links)
            if sheet.clock and (counted := cycles(text)):
                # The compiler has no cycles for kernels; they are taken at the peak.
                is_kernel = arithmetic.spec.attention != "plain"
                kernels = is_kernel * arithmetic.tokens * arithmetic.attention_flops_per_token()
                by_compiler = counted / sheet.clock + kernels / peak
    seconds = max(*bound.values(), by_compiler or 0.0) if bound else None
    days = seconds and seconds * training.steps / 86400
    return {
        "tokens_per_step": tokens,
        "steps": training.steps,
        "tokens": tokens * training.steps,
        "collectives": None if found is None else _summed(found, over_links),
        "flops": {
            "model_per_step": work,
            "executed_per_device_and_step": arithmetic.tokens * arithmetic.flops_per_token(),
        },
        "time": {
            "compute_seconds": bound.get("compute"),
            "memory_seconds": bound.get("memory"),
            "link_seconds": bound.get("links"),
            "roofline_seconds": max(bound.values(), default=None),
            "binds": max(bound, key=bound.__getitem__, default=None),
            "compiler_seconds": by_compiler,
            "step_seconds": seconds,
        },
        "mfu": work / (peak * count * seconds) if seconds and peak else None,
        "days": days,
        "device_hours": days and days * 24 * count,
    }


def _summed(collectives: list[Collective], seconds: list[float] | None) -> list[Facts]:
    """By kind and size of the group, the most bytes first. bytes: whole arrays of one device."""
    rows: dict[tuple[str, int], Facts] = {}
    for place, one in enumerate(collectives):
        empty = {"kind": one.kind, "devices": one.group, "count": 0, "bytes": 0, "seconds": None}
        row = rows.setdefault((one.kind, one.group), empty)
        row["count"] += one.count
        row["bytes"] += one.count * one.bytes
        if seconds is not None:
            row["seconds"] = (row["seconds"] or 0.0) + seconds[place]
    return sorted(rows.values(), key=lambda row: -row["bytes"])
