"""What Muon takes of a step: matrices of one shape stacked, as here, and one by one, as optax does.

    python benchmarks/muon.py [--turns 15] [--scan]    on this machine
    python benchmarks/muon.py --devices                on eight devices

The model is configs/quickstart.toml's. On this machine: the update by itself and whole steps, in
turns, so that other work falls on all. The optimizer's share is its update's time of its step's.
On eight devices nothing is computed: FLOPs of a device and bytes that it sends are those of the
compiled update, for several meshes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if "--devices" in sys.argv:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(ROOT))

from llm.runtime import prepare_process  # noqa: E402

prepare_process()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import llm.training.optimizer as rule  # noqa: E402
from llm.config import Config, MeshConfig, load_config  # noqa: E402
from llm.model.products import rounded  # noqa: E402
from llm.model.sharding import make_mesh  # noqa: E402
from llm.planning.collectives import read_collectives  # noqa: E402
from llm.run.setup import make_setup  # noqa: E402
from llm.text.batches import Batch  # noqa: E402
from llm.training.state import abstract_state, create_state, state_shardings  # noqa: E402
from llm.training.step import make_train_step  # noqa: E402

BYTES = 256
MESHES = (
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"data": 8},
    {"data": 1, "fsdp": 4, "tensor": 2},
)


def one_by_one(updates: Mapping[str, Any], iterations: int) -> dict[str, Any]:
    """`orthogonal` by optax: each weight apart, in float32."""
    of_matrices = {name: u for name, u in updates.items() if isinstance(u, jax.Array)}
    axes = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), of_matrices)
    muon = optax.contrib.scale_by_muon(
        rule.COEFFICIENTS, iterations, beta=0.0, nesterov=False, weight_dimension_numbers=axes
    )
    return {**updates, **muon.update(of_matrices, muon.init(of_matrices))[0]}


WAYS = {"stacks": rule.orthogonal, "one by one": one_by_one}


def main() -> None:
    parser = argparse.ArgumentParser(description="What Muon takes of a step.")
    parser.add_argument("--devices", action="store_true", help="eight devices, compiled only")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--scan", action="store_true", help="with training.scan_layers")
    options = parser.parse_args()
    flags = {"training.scan_layers": options.scan}
    config = load_config(ROOT / "configs" / "quickstart.toml", flags).resolved()
    if options.devices:
        for axes in MESHES:
            for way in WAYS:
                print(json.dumps(program_of(config, axes, way)), flush=True)
    else:
        print_times(config, options.turns)


def program_of(config: Config, axes: dict[str, int], way: str) -> dict[str, Any]:
    """What one device of a mesh computes and sends in an update."""
    rule.orthogonal = WAYS[way]
    mesh, spec = make_mesh(MeshConfig(**axes)), make_setup(config, BYTES).spec
    optimizer = rule.make_optimizer(config.optimizer)
    state = abstract_state(spec, optimizer, mesh)
    shardings = state_shardings(spec, optimizer, mesh)
    placed = shardings.weights, shardings.opt_state
    with jax.set_mesh(mesh):
        update = jax.jit(optimizer.update, out_shardings=placed)
        compiled = update.lower(state.weights, state.opt_state, state.weights).compile()
    sent = read_collectives(compiled.as_text())
    return {
        "mesh": axes,
        "way": way,
        "million FLOPs of a device": round(compiled.cost_analysis()["flops"] / 1e6),
        "MB sent": round(sum(one.bytes * one.count for one in sent) / 1e6, 1),
        "collectives": sum(one.count for one in sent),
    }


def print_times(config: Config, turns: int) -> None:
    calls = {
        f"{part}, {way}": make(config, way)
        for way in WAYS
        for part, make in (("update", update_of), ("step", step_of))
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name] += [1000 * (time.perf_counter() - begun)] * (turn > 0)
    for name, of_call in times.items():
        print(f"{name:20} {min(of_call):8.1f} ms fastest {statistics.median(of_call):8.1f} median")
    for way in WAYS:
        update, step = times[f"update, {way}"], times[f"step, {way}"]
        shares = min(update) / min(step), statistics.median(update) / statistics.median(step)
        print(f"share of a step, {way}: {shares[0]:.3f} of the fastest, {shares[1]:.3f} median")
    ratio = min(times["update, stacks"]) / min(times["update, one by one"])
    print(f"update, stacks / one by one: {ratio:.2f} of the fastest")


def update_of(config: Config, way: str) -> Callable[[], object]:
    """The optimizer's update of gradients as the model has them, and nothing else."""
    rule.orthogonal = WAYS[way]
    setup = make_setup(config, BYTES)
    optimizer, stacked = rule.make_optimizer(config.optimizer), config.training.scan_layers
    state = create_state(setup.spec, optimizer, 0, setup.mesh, stacked=stacked)
    random = np.random.default_rng(0)
    gradients = {
        name: jax.numpy.float32(random.normal(size=weight.shape))
        for name, weight in state.weights.items()
    }
    opt_state = state.opt_state
    with jax.set_mesh(setup.mesh), rounded(setup.spec.rounded and way == "stacks"):
        update = jax.jit(optimizer.update, donate_argnums=1)
        compiled = update.lower(gradients, opt_state, state.weights).compile()

    def call() -> None:
        nonlocal opt_state
        updates, opt_state = compiled(gradients, opt_state, state.weights)
        jax.block_until_ready(updates)

    return call


def step_of(config: Config, way: str) -> Callable[[], object]:
    rule.orthogonal = WAYS[way]
    setup, stacked = make_setup(config, BYTES), config.training.scan_layers
    step = make_train_step(setup.spec, config.optimizer, config.training, setup.mesh)
    optimizer = rule.make_optimizer(config.optimizer)
    state = create_state(setup.spec, optimizer, 0, setup.mesh, stacked=stacked)
    shape = config.training.batch_size, config.model.context_length + 1
    batch = Batch(np.random.default_rng(0).integers(0, BYTES, shape).astype(np.int32))

    def call() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        float(metrics["loss"])

    call()  # compiles, while the way is set
    return call


if __name__ == "__main__":
    main()
