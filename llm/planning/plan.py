"""What a training step will need, from the compiler that will compile it: before anyone pays.

The real step is compiled ahead of time for devices that need not be here, and its memory, its
collectives and its costs are read. Nothing runs, so nothing here is a measurement.
"""

import dataclasses
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm.config import Config
from llm.model.devices import GIB, sheet_of
from llm.model.flops import flops_per_token, parameter_count
from llm.model.gpt import ModelSpec
from llm.model.kernels import choose_attention
from llm.model.sharding import check_sizes, make_mesh
from llm.planning.collectives import Collective, read_collectives
from llm.planning.cost import Cost, read_cost
from llm.planning.estimate import Arithmetic, StateBytes, state_bytes
from llm.planning.roofline import Roofline, link_seconds, roofline
from llm.planning.targets import Target
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state
from llm.training.step import make_train_step

# Of a GPU's memory JAX takes this share unless $XLA_PYTHON_CLIENT_MEM_FRACTION says another:
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
GPU_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    temporaries: activations, gradients and all else that lives within a step. source: who says so,
    "compiler" or "arithmetic". compiler_temporaries: the compiler's count where the source is
    another. program: the compiled code. needed: all of them together; of a program that the
    compiler refused, its figure. available: what a program can have; None where not known.
    """

    state: StateBytes
    temporaries: float | None
    source: str
    compiler_temporaries: int | None
    program: int
    needed: float
    available: float | None

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.needed <= self.available


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step on its devices. collectives, cost and what follows are None where it was refused."""

    config: Config
    spec: ModelSpec
    target: Target
    mesh: dict[str, int]
    memory: Memory
    collectives: list[Collective] | None
    collective_seconds: list[float] | None
    cost: Cost | None
    roofline: Roofline | None
    compile_seconds: float

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.model.context_length

    @property
    def compiler_seconds(self) -> float | None:
        """A step's time by the compiler's cycles; collectives are not in it.

        It gives no cycles for kernels, which are taken at the device's peak.
        """
        sheet = sheet_of(self.target.kind)
        if self.target.stands_in or not (self.cost and self.cost.cycles and sheet and sheet.clock):
            return None
        return self.cost.cycles / sheet.clock + self.cost.kernel_flops / sheet.bfloat16_flops

    @property
    def step_seconds(self) -> float | None:
        """The longer of the compiler's time and the roofline's."""
        if self.roofline is None:
            return None
        return max(self.roofline.seconds, self.compiler_seconds or 0.0)

    @property
    def mfu(self) -> float | None:
        sheet = sheet_of(self.target.kind)
        if self.step_seconds is None or sheet is None:
            return None
        peak = sheet.bfloat16_flops * len(self.target.devices)
        return self.tokens_per_step * flops_per_token(self.spec) / (peak * self.step_seconds)

    @property
    def days(self) -> float | None:
        """Of the whole run: training.steps, without evaluations and saves."""
        seconds = self.step_seconds
        return None if seconds is None else seconds * self.config.training.steps / 86400


def model_spec(
    config: Config, vocab_size: int, target: Target, sizes: Mapping[str, int]
) -> ModelSpec:
    """The model as the devices of the target would compute it on a mesh of these sizes.

    Raises:
      UsageError: they cannot compute attention by what training.attention asks for.
    """
    dtype = config.training.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if target.is_accelerator else "float32"
    wanted, outline = config.training.attention, target.outline(sizes)
    kernel = choose_attention(wanted, config.first_model.resolved(), dtype, outline)
    return ModelSpec(config.model, vocab_size, dtype, kernel)


def plan_step(config: Config, vocab_size: int, target: Target, memory_fraction: float) -> Plan:
    """Compile a configuration's step for devices, and read what it needs.

    Args:
      memory_fraction: of a GPU's memory, what a program can have.
    Raises:
      UsageError: the mesh does not fit the devices or the model.
    """
    mesh, training = make_mesh(config.mesh, target.devices), config.training
    sizes = {str(axis): size for axis, size in mesh.shape.items()}
    spec = model_spec(config, vocab_size, target, sizes)
    # What stands in for another device cannot compile its kernels.
    compiled_spec = dataclasses.replace(spec, attention="plain") if target.stands_in else spec
    check_sizes(mesh, config, spec.padded_vocab_size)
    optimizer = make_optimizer(config.optimizer)
    state = abstract_state(spec, optimizer, mesh, stacked=training.scan_layers)
    windows = jax.ShapeDtypeStruct(
        (training.batch_size, config.model.context_length + 1), jnp.int32
    )
    started = time.monotonic()
    step = make_train_step(compiled_spec, config.optimizer, training, mesh)
    lowered = step.lower(state, windows)
    arithmetic = Arithmetic(spec, config.optimizer, training, sizes, target.kind)
    available = available_memory(target, memory_fraction)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = _refused(str(error), state_bytes(state), available)
        seconds = time.monotonic() - started
        return Plan(config, spec, target, sizes, memory, None, None, None, None, seconds)
    seconds = time.monotonic() - started
    memory = _memory(compiled, state_bytes(state), arithmetic, target, available)
    text = program_text(lowered, compiled)
    collectives, cost = read_collectives(text), read_cost(text)
    if target.stands_in:
        cost = _with_kernel(cost, arithmetic)
    bound, over_links = _bound(cost, collectives, arithmetic, target, list(mesh.devices.flat))
    return Plan(config, spec, target, sizes, memory, collectives, over_links, cost, bound, seconds)


def _with_kernel(cost: Cost, arithmetic: Arithmetic) -> Cost:
    """Of a program with plain attention, what it costs with the kernel that is meant."""
    plain = dataclasses.replace(arithmetic.spec, attention="plain")
    kernel, replaced = (
        one.attention_flops_per_token() * one.tokens
        for one in (arithmetic, dataclasses.replace(arithmetic, spec=plain))
    )
    return dataclasses.replace(cost, flops=cost.flops + kernel - replaced)


def _bound(
    cost: Cost,
    collectives: list[Collective],
    arithmetic: Arithmetic,
    target: Target,
    placed: list[jax.Device],
) -> tuple[Roofline | None, list[float] | None]:
    """The roofline, and the seconds of each collective.

    The CPU's compiler joins other operations, gathers in float32 and has no reduce-scatter. So of a
    stand-in, memory traffic and links are by arithmetic.
    """
    sheet = sheet_of(target.kind)
    if sheet is None:
        return None, None
    if target.stands_in:
        found = Roofline(
            compute=cost.flops / sheet.bfloat16_flops,
            memory=arithmetic.traffic() / sheet.memory_bandwidth,
            links=arithmetic.link_seconds(sheet),
        )
        return found, None
    over_links = [link_seconds(one, sheet, placed) for one in collectives]
    return roofline(cost, collectives, sheet, placed), over_links


def program_text(lowered: Any, compiled: Any) -> str:
    """The program's HLO after optimisation.

    TPU executables of JAX 0.10 do not give it; there the program is compiled once more and dumped.
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


def available_memory(target: Target, memory_fraction: float) -> float | None:
    """Bytes of one device that a program can have; None where its data sheet is not here."""
    sheet = sheet_of(target.kind)
    if sheet is None:
        return None
    return sheet.memory * (memory_fraction if sheet.domain else 1.0)


def _memory(
    compiled: Any,
    state: StateBytes,
    arithmetic: Arithmetic,
    target: Target,
    available: float | None,
) -> Memory:
    """From the compiler's analysis; of a stand-in, temporaries from arithmetic."""
    analysis = compiled.memory_analysis()
    kept = analysis.argument_size_in_bytes
    kept += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    if target.stands_in:
        guess = arithmetic.temporaries()
        return Memory(
            state, guess, "arithmetic", analysis.temp_size_in_bytes, 0, kept + guess, available
        )
    temporaries, code = analysis.temp_size_in_bytes, analysis.generated_code_size_in_bytes
    return Memory(state, temporaries, "compiler", None, code, kept + temporaries + code, available)


def _refused(message: str, state: StateBytes, available: float | None) -> Memory:
    """Of a program that the TPU compiler found too large for the memory.

    Raises:
      jax.errors.JaxRuntimeError: the message is about something else.
    """
    figures = re.search(
        r"\(([\d.]+[KMGT]?)\) exceeds available \w+ \(([\d.]+[KMGT]?)\)", message
    ) or re.search(r"[Uu]sed ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?)", message)
    if "RESOURCE_EXHAUSTED" not in message or figures is None:
        raise jax.errors.JaxRuntimeError(message)
    needed, limit = map(_spelled_bytes, figures.groups())
    return Memory(state, None, "compiler", None, 0, needed, min(limit, available or limit))


def _spelled_bytes(text: str) -> float:
    """ "15.75G" as the compiler writes it, in powers of 1024."""
    unit = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}.get(text[-1], 1)
    return float(text.rstrip("KMGT")) * unit


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object: strict, units in the names."""
    training = plan.config.training
    count = len(plan.target.devices)
    return {
        "estimate": True,
        "target": plan.target.name,
        "devices": count,
        "device_kind": plan.target.kind,
        "compiled_for": "cpu" if plan.target.stands_in else plan.target.kind,
        "compile_seconds": round(plan.compile_seconds, 1),
        "mesh": plan.mesh,
        "remat": training.remat,
        "batch_size": training.batch_size,
        "micro_batch_size": training.micro_batch_size or training.batch_size,
        "compute_dtype": plan.spec.compute_dtype,
        "attention": plan.spec.attention,
        "parameters": parameter_count(plan.spec),
        "tokens_per_step": plan.tokens_per_step,
        "steps": training.steps,
        "tokens": plan.tokens_per_step * training.steps,
        "memory": _describe_memory(plan.memory),
        "collectives": _describe_collectives(plan),
        "flops": _describe_flops(plan),
        "time": _describe_time(plan),
        "mfu": plan.mfu,
        "days": plan.days,
        "device_hours": None if plan.days is None else plan.days * 24 * count,
    }


def _describe_memory(memory: Memory) -> dict[str, Any]:
    spare = None if memory.available is None else memory.available - memory.needed
    return {
        "weights_bytes": memory.state.weights,
        "optimizer_bytes": memory.state.optimizer,
        "other_state_bytes": memory.state.other,
        "temporaries_bytes": memory.temporaries,
        "temporaries_from": memory.source,
        "compiler_temporaries_bytes": memory.compiler_temporaries,
        "program_bytes": memory.program,
        "needed_bytes": memory.needed,
        "available_bytes": memory.available,
        "fits": memory.fits,
        "spare_bytes": spare,
    }


def _describe_collectives(plan: Plan) -> list[dict[str, Any]] | None:
    """By kind and size of the group."""
    if plan.collectives is None:
        return None
    unknown: list[float | None] = [None] * len(plan.collectives)
    seconds = plan.collective_seconds or unknown
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for one, time_ in zip(plan.collectives, seconds, strict=True):
        row = rows.setdefault(
            (one.kind, one.group),
            {"kind": one.kind, "devices": one.group, "count": 0, "bytes": 0, "seconds": None},
        )
        row["count"] += one.count
        row["bytes"] += one.count * one.bytes
        if time_ is not None:
            row["seconds"] = (row["seconds"] or 0.0) + time_
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _describe_flops(plan: Plan) -> dict[str, Any]:
    """model: what the model's arithmetic takes; executed: with what is computed again."""
    return {
        "model_per_step": plan.tokens_per_step * flops_per_token(plan.spec),
        "executed_per_device_and_step": plan.cost.flops if plan.cost else None,
    }


def _describe_time(plan: Plan) -> dict[str, Any]:
    bound = plan.roofline
    return {
        "compute_seconds": bound.compute if bound else None,
        "memory_seconds": bound.memory if bound else None,
        "link_seconds": bound.links if bound else None,
        "roofline_seconds": bound.seconds if bound else None,
        "binds": bound.binds if bound else None,
        "compiler_seconds": plan.compiler_seconds,
        "step_seconds": plan.step_seconds,
    }
