"""What the compiled step sends between devices, and that it is read right from HLO."""

import collections
import functools
import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_meshes import BATCH, OPTIMIZER, RECOMPUTED, SCANNED, SPEC

from llm.config import MeshConfig, OptimizerConfig, TrainingConfig
from llm.model.gpt import ModelSpec, abstract_params, bind, logical_axes
from llm.model.sharding import make_mesh, sharding_of, tree_shardings
from llm.model_config import ModelConfig
from llm.planning.collectives import Collective, read_collectives
from llm.text.batches import Batch
from llm.training.optimizer import make_optimizer, partition_labels
from llm.training.state import abstract_state
from llm.training.step import make_train_step

LAYERS, WIDTH = SPEC.config.n_layer, SPEC.config.d_model
# The inputs of all sequences, once through the model's width, in float32.
ACTIVATIONS = 4 * BATCH * SPEC.config.context_length * WIDTH


def sizes_of(spec):
    """Bytes of the float32 weights: of matrices inside blocks, of other matrices, of vectors."""
    leaves = {name: 4 * int(np.prod(leaf.shape)) for name, leaf in abstract_params(spec).items()}
    vectors = sum(size for name, size in leaves.items() if name.endswith(".scale"))
    blocks = sum(size for name, size in leaves.items() if name.startswith("blocks."))
    blocks -= sum(s for name, s in leaves.items() if "blocks." in name and name.endswith(".scale"))
    return blocks, sum(leaves.values()) - blocks - vectors, vectors


@functools.cache
def collectives_on(spec=SPEC, batch=BATCH, devices=None, training=(), **axes):
    mesh = make_mesh(MeshConfig(**axes), devices)
    config = TrainingConfig(batch_size=batch, steps=10, **{**SCANNED, **dict(training)})
    state = abstract_state(spec, make_optimizer(OPTIMIZER), mesh, stacked=True)
    windows = Batch(jax.ShapeDtypeStruct((batch, spec.config.context_length + 1), jnp.int32))
    lowered = make_train_step(spec, OPTIMIZER, config, mesh).lower(state, windows)
    return read_collectives(lowered.compile().as_text())


def total_bytes(collectives):
    """kind -> bytes of all collectives of that kind in one run of the program."""
    totals = collections.Counter()
    for one in collectives:
        totals[one.kind] += one.bytes * one.count
    return dict(totals)


def in_forward_pass(collective):
    return "jvp(" in collective.source and "transpose(" not in collective.source


def test_data_parallelism_all_reduces_each_gradient_once_and_nothing_else():
    """The tied table has two gradients, as the embedding's and as the head's."""
    totals = total_bytes(collectives_on(data=8, training=tuple(RECOMPUTED.items())))
    assert totals.keys() == {"all-reduce"}
    table = 4 * SPEC.padded_vocab_size * WIDTH
    assert totals["all-reduce"] == pytest.approx(sum(sizes_of(SPEC)) + table, rel=0.001)


@pytest.mark.thorough
def test_tensor_parallelism_all_reduces_activations_twice_a_block_forward():
    """After attention's and the MLP's second matrix (Shoeybi et al. 2019); and no weight."""
    found = collectives_on(data=1, tensor=8)
    forward = [one for one in found if in_forward_pass(one) and one.count == LAYERS]
    assert [one.bytes for one in forward if one.bytes >= ACTIVATIONS] == [ACTIVATIONS] * 2
    assert {one.kind for one in found} == {"all-reduce"}


@pytest.mark.thorough
def test_fully_sharded_weights_are_gathered_block_by_block():
    """Forward and backward, one block's at a time; the tables once each way.

    The CPU's compiler makes no reduce-scatter: gradients are all-reduced and cut. What a compiler
    with one does is the next test's.
    """
    blocks, tables, _ = sizes_of(SPEC)
    found = collectives_on(data=1, fsdp=8)
    in_loops = [one for one in found if one.kind == "all-gather" and one.count == LAYERS]
    assert max(one.bytes for one in in_loops) <= blocks / LAYERS / 2
    gathered = total_bytes(in_loops)["all-gather"]
    assert 1.5 * blocks < gathered < 2.1 * blocks
    assert total_bytes(found)["all-gather"] - gathered < 2.1 * tables
    summed = [one for one in found if one.kind == "all-reduce"]
    assert total_bytes(summed)["all-reduce"] == pytest.approx(sum(sizes_of(SPEC)), rel=0.05)


@pytest.mark.parametrize("stacked", [False, True])
def test_muon_trades_rows_for_whole_matrices_once_and_back(stacked):
    """One all-to-all each way for each shape, and nothing else but a norm for clipping."""
    optimizer = make_optimizer(OptimizerConfig(kind="muon"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    state = abstract_state(SPEC, optimizer, mesh, stacked=stacked)
    placed = jax.tree.map(lambda leaf: leaf.sharding, (state.weights, state.opt_state))
    update = jax.jit(optimizer.update, out_shardings=placed)
    with jax.set_mesh(mesh):
        lowered = update.lower(state.weights, state.opt_state, state.weights)
    found = read_collectives(lowered.compile().as_text())
    params = abstract_params(SPEC)
    of_muon = [name for name, kind in partition_labels(params).items() if kind == "muon"]
    shapes = collections.Counter(params[name].shape for name in of_muon)
    # A device's share of a stack, which is filled up to a multiple of eight matrices.
    shares = [4 * math.prod(shape) * -(-count // 8) for shape, count in shapes.items()]
    trades = [one.bytes for one in found if one.kind == "all-to-all"]
    assert sorted(trades) == sorted(shares * 2)
    assert sum(one.bytes * one.count for one in found if one.kind != "all-to-all") < 1000


@pytest.mark.parametrize(
    "axes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_muon_copies_no_stack_whole_on_a_mesh_of_several_axes(axes, capfd):
    """Else the compiler warns on standard error that it replicates what it cannot move."""
    optimizer = make_optimizer(OptimizerConfig(kind="muon"))
    mesh = make_mesh(MeshConfig(**axes))
    state = abstract_state(SPEC, optimizer, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, (state.weights, state.opt_state))
    update = jax.jit(optimizer.update, out_shardings=placed)
    with jax.set_mesh(mesh):
        found = update.lower(state.weights, state.opt_state, state.weights).compile()
    assert "all-to-all" in {one.kind for one in read_collectives(found.as_text())}
    assert "rematerialization" not in capfd.readouterr().err


def test_the_embedding_trades_columns_for_rows_and_copies_no_activation_whole(capfd):
    """Else the compiler warns on standard error, and gathers what it cannot move. Where the mesh
    has both fsdp and expert, and where it has tensor and context."""
    for axes in ({"data": 2, "fsdp": 2, "expert": 2}, {"data": 1, "fsdp": 2, "context": 4}):
        mesh = make_mesh(MeshConfig(**axes))
        shardings = tree_shardings(mesh, logical_axes(SPEC))
        tokens = jax.ShapeDtypeStruct(
            (BATCH, SPEC.config.context_length),
            jnp.int32,
            sharding=sharding_of(mesh, ("batch", "sequence")),
        )

        def objective(params, tokens):
            x_BTD = bind(SPEC, params).embedded(tokens)[0]
            return jnp.sum(jnp.square(x_BTD))

        params = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in abstract_params(SPEC).items()
        }
        with jax.set_mesh(mesh):
            program = jax.jit(jax.grad(objective), out_shardings=shardings).lower(params, tokens)
            found = read_collectives(program.compile().as_text())
        assert "rematerialization" not in capfd.readouterr().err
        assert max(one.bytes for one in found if one.kind == "all-gather") < ACTIVATIONS
        assert any(one.kind == "all-to-all" for one in found)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, extra 'plan'")
def test_fully_sharded_gradients_are_reduce_scattered_on_tpu(monkeypatch):
    """Each matrix's once; what is all-reduced is the norms' gains and a few scalars."""
    from jax.experimental import topologies

    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    config = ModelConfig(
        n_layer=3, n_head=8, d_model=1024, context_length=128, norm="rmsnorm", bias=False
    )
    spec = ModelSpec(config, 1000, "bfloat16")
    found = collectives_on(spec, 8, tuple(topology.devices), data=1, fsdp=8)
    blocks, tables, vectors = sizes_of(spec)
    totals = total_bytes(found)
    # Blocks' gradients travel in bfloat16, the tables' in float32; with some padding.
    assert blocks / 2 + tables <= totals["reduce-scatter"] < 1.15 * (blocks / 2 + tables)
    assert totals["all-reduce"] < vectors + 1024
    assert max(one.bytes for one in found if one.kind == "all-reduce") <= vectors
    gathered = [one for one in found if one.kind == "all-gather" and one.count == 3]
    assert blocks / 2 < total_bytes(gathered)["all-gather"] < 2.1 * blocks / 2
    # The loss takes two chunks; the head is gathered before the first.
    assert not [one for one in found if one.kind == "all-gather" and one.count == 2]


HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %g = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%h), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}, metadata={op_name="jit(step)/gather"}
}

%inner_condition (p: (s32[], f32[2,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %w = (s32[], f32[2,4]) while(%t), condition=%inner_condition, body=%inner
  %r = f32[4]{0} reduce-scatter(%x), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
}

%never (p: (s32[], f32[2,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %j), direction=LT
}

%all-reduce-scatter.1 (p: f32[16]) -> f32[2] {
  %a = f32[16]{0} all-reduce(%p), channel_id=3, replica_groups=mesh['data'=1,'fsdp'=8] {'fsdp'}, to_apply=%add
  ROOT %d = f32[2]{0} dynamic-slice(%a, %o), dynamic_slice_sizes={2}
}

%piece.1 (p: f32[4]) -> f32[32] {
  ROOT %b = f32[32]{0} all-gather(%p), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%piece.2 (p: f32[4]) -> f32[32] {
  ROOT %b = f32[32]{0} all-gather(%p), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

ENTRY %main (x: f32[2,4]) -> f32[2,4] {
  %l = (s32[], f32[2,4]) while(%t), condition=%never, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %f = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %s = (f32[2]{0}, /*index=1*/f32[32]{0}) fusion(%x), kind=kCustom, calls=%piece.1
  %e = f32[32]{0} fusion(%s), kind=kCustom, calls=%piece.2
  %c = (f32[], pred[3]{0}) all-reduce(%y, %z), channel_id=5, replica_groups={{0,1}}, to_apply=%add
  %k = ((f32[2]{0}, bf16[3]{0}), (f32[16]{0}, bf16[24]{0})) all-gather-start(%y, %z), channel_id=6, replica_groups=[1,8]<=[8], dimensions={0}
  %m = (f32[16]{0}, bf16[24]{0}) all-gather-done(%k)
  %q = f32[2,4]{1,0} collective-permute(%x), channel_id=7, source_target_pairs={{0,1},{1,2},{2,0}}
  %v = f32[5]{0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %w = f32[5]{0} all-reduce(%f), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  %one = f32[2,4]{1,0} all-reduce(%x), channel_id=8, replica_groups={{0},{1}}, to_apply=%add
}
"""  # noqa: E501 (as compilers write it)


def test_collectives_are_read_with_their_bytes_turns_and_groups():
    """Loops inside loops, fused reduce-scatters, pieces of one, tuples, groups as written.

    Channel 1 is given three times, as TPU compilers do to what they have joined, and as JAX does to
    all that comes from shard_map.
    """
    assert read_collectives(HLO) == [
        Collective("all-gather", 2 * 8 * 2, 3 * 5, 4, "jit(step)/gather"),
        Collective("reduce-scatter", 4 * 4 * 4, 5, 4, ""),
        Collective("reduce-scatter", 16 * 4, 1, 8, ""),
        Collective("all-gather", 32 * 4, 1, 8, ""),
        Collective("all-reduce", 4 + 3, 1, 2, ""),
        Collective("all-gather", 16 * 4 + 24 * 2, 1, 8, ""),
        Collective("collective-permute", 2 * 4 * 4, 1, 3, ""),
        Collective("all-reduce", 5 * 4, 1, 8, ""),
        Collective("all-reduce", 5 * 4, 1, 8, ""),
    ]
    assert total_bytes(read_collectives(HLO)) == {
        "all-gather": 32 * 15 + 128 + 112,
        "reduce-scatter": 64 * 5 + 64,
        "all-reduce": 7 + 20 + 20,
        "collective-permute": 32,
    }


def test_a_loop_of_unknown_turns_is_not_guessed():
    with pytest.raises(ValueError, match=r"how often this loop runs .* body=%outer"):
        read_collectives(HLO.replace("known_trip_count", "unknown"))


# As TPU compilers unroll the loop of a matrix product that gathers as it multiplies.
UNROLLED = """HloModule jit_step

%body (t: (u32[], f32[8])) -> (u32[], f32[8]) {
  %t = (u32[], f32[8]{0}) parameter(0)
  %one = u32[] constant(1)
  %i = u32[] get-tuple-element(%t), index=0
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %j = u32[] add(%i, %one)
  %k = u32[] add(%one, %j)
  %p = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %r = (u32[], f32[8]{0}) tuple(%k, %p)
}

%condition (t: (u32[], f32[8])) -> pred[] {
  %n = u32[] constant(9)
  %t = (u32[], f32[8]{0}) parameter(0)
  %i = u32[] get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %three = u32[] constant(3)
  %s = (u32[], f32[8]{0}) tuple(%three, %x)
  %w = (u32[], f32[8]{0}) while(%s), condition=%condition, body=%body
  ROOT %o = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_a_loop_takes_the_turns_that_its_counter_needs():
    """From 3 by two to below 9: three."""
    (permute,) = read_collectives(UNROLLED)
    assert permute.count == 3
