"""Attention over a sequence on several devices, by each kernel.

    python benchmarks/context.py                                  on 8 simulated CPU devices
    python benchmarks/context.py --topology v5e:4x4 --length 32768   compiled for TPUs

One layer's attention, forward and backward, over mesh.context = all devices. For each kernel: the
bytes that a device sends and the memory that its program needs beside arguments and results, read
from the compiled program, and on CPU the median time of a turn.

    plain      the definition, each device with the keys and values of all positions
    splash     the TPU's kernel, gathered alike
"""

import argparse
import collections
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--devices", type=int, default=8, help="simulated, on CPU")
    parser.add_argument("--topology", help="of TPUs, such as v5e:4x4; compiled, not run")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--ways", nargs="+", default=[])
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    measure(options)


def measure(options: Any) -> None:
    import jax

    from llm.config import MeshConfig
    from llm.model.sharding import make_mesh
    from llm.planning.collectives import read_collectives

    mesh = make_mesh(MeshConfig(data=1, context=-1), devices_of(options.topology))
    ways = ["plain", *(["splash"] if options.topology else [])]
    programs = {}
    for way in options.ways or ways:
        try:
            with jax.set_mesh(mesh):
                program = jax.jit(gradients_of(way)).lower(*abstract(options, mesh)).compile()
        except Exception as error:  # a program that the compiler finds too large, above all
            print(f"{way:<11} not compiled: {str(error).splitlines()[0][:150]}")
            continue
        memory = program.memory_analysis().temp_size_in_bytes
        sent = collections.Counter()
        for one in read_collectives(program.as_text()):
            sent[one.kind] += one.bytes * one.count
        sizes = ", ".join(f"{kind} {size / 2**20:.1f} MiB" for kind, size in sent.items())
        print(f"{way:<11} temporaries {memory / 2**20:,.0f} MiB a device; {sizes}", flush=True)
        programs[way] = program
    if not options.topology:
        take_turns(programs, abstract(options, mesh), options.turns)


def devices_of(topology: str | None) -> list[Any]:
    import jax
    from jax.experimental import topologies

    if topology is None:
        return jax.devices()
    return list(topologies.get_topology_desc(topology, platform="tpu").devices)


def abstract(options: Any, mesh: Any) -> list[Any]:
    """Shapes of queries, keys and values: bfloat16 for TPUs, float32 for CPUs."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from llm.model.kernels import KEYS, QUERIES

    dtype = jnp.bfloat16 if options.topology else jnp.float32
    return [
        jax.ShapeDtypeStruct(
            (options.rows, options.length, heads, options.head_size),
            dtype,
            sharding=NamedSharding(mesh, spec),
        )
        for heads, spec in (
            (options.heads, QUERIES),
            (options.kv_heads, KEYS),
            (options.kv_heads, KEYS),
        )
    ]


def gradients_of(way: str) -> Any:
    """Of the sum of the outputs' squares, for queries, keys and values."""
    import jax
    import jax.numpy as jnp

    from llm.model.attention import Places
    from llm.model.context import positions_on_devices
    from llm.model.kernels import self_attention
    from llm.model.sharding import shares

    def attention(query_BTNH, key_BTKH, value_BTKH):
        order_T = positions_on_devices(query_BTNH.shape[1], shares("sequence"))
        places = Places(jnp.asarray(order_T)[None])
        return self_attention(way, query_BTNH, key_BTKH, value_BTKH, places)

    def objective(*arrays):
        return jnp.sum(jnp.square(attention(*arrays).astype(jnp.float32)))

    return jax.grad(objective, argnums=(0, 1, 2))


def take_turns(programs: dict[str, Any], shapes: list[Any], turns: int) -> None:
    """Seconds of each program, one after the other, so that what else runs disturbs all alike."""
    import jax
    import numpy as np

    random = np.random.default_rng(0)
    arrays = [
        jax.device_put(random.normal(size=shape.shape).astype(shape.dtype), shape.sharding)
        for shape in shapes
    ]
    seconds: dict[str, list[float]] = {way: [] for way in programs}
    for _ in range(turns + 1):
        for way, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds[way].append(time.perf_counter() - start)
    for way, times in seconds.items():
        print(f"{way:<11} {1000 * statistics.median(times[1:]):,.0f} ms, median of {turns} turns")


if __name__ == "__main__":
    main()
