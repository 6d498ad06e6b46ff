"""Scanning over stacked layers: the same training as layer by layer, in a program of one size."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from runs import STEPS, losses, train
from test_step import BATCH, OPTIMIZER, tokens

from llm.config import MeshConfig, OptimizerConfig, TrainingConfig
from llm.model.gpt import ModelSpec, initialise
from llm.model.sharding import make_mesh, shard_batch
from llm.model.stack import is_stacked, stack_layers, unstack_layers
from llm.model_config import ModelConfig
from llm.text.batches import Batch
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state, create_state, from_groups, to_groups
from llm.training.step import BATCH_AXES, make_train_step


def spec_of(n_layer=3, **settings):
    sizes = {"n_head": 2, "d_model": 16, "context_length": 16, "vocab_multiple": 16}
    return ModelSpec(ModelConfig(n_layer=n_layer, **sizes, **settings), 70)


SPEC = spec_of()


@functools.cache
def mesh_of(**axes):
    return make_mesh(MeshConfig(**axes), None if axes else jax.devices()[:1])


def test_stacked_initial_weights_are_those_of_the_single_layers_bit_for_bit():
    key = jax.random.key(0)
    single = initialise(SPEC, key)
    again = unstack_layers(initialise(SPEC, key, stacked=True))
    assert again.keys() == single.keys()
    for name, value in single.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_a_stack_lies_on_the_mesh_as_each_of_its_layers():
    """Nothing is divided by layers, and no layer is put together on its way out of the stack."""
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    state = create_state(SPEC, make_optimizer(OPTIMIZER), 0, mesh, stacked=True)
    assert sum(map(is_stacked, state.weights)) > 8
    up = state.weights["blocks.*.mlp.up.weight"]
    assert up.shape == (3, 16, 64)
    assert up.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert up.addressable_shards[0].data.shape == (3, 8, 32)
    for arrays in to_groups(state).values():
        for name, layer in arrays.items():
            if name.endswith(("blocks.2.mlp.up.weight", "['blocks.2.mlp.up.weight']")):
                assert layer.sharding.spec == PartitionSpec("fsdp", "tensor"), name
                assert layer.addressable_shards[0].data.shape == (8, 32)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_does_not_know_whether_it_was_stacked(kind):
    """Names, shapes and bits of parameters and moments; each opens as the other."""
    optimizer, mesh = make_optimizer(OptimizerConfig(kind=kind)), mesh_of(data=2, fsdp=4)
    states = [create_state(SPEC, optimizer, 3, mesh, stacked=stacked) for stacked in (False, True)]
    single, stacked = map(to_groups, states)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(stacked), jax.device_get(single))
    described = to_groups(abstract_state(SPEC, optimizer, mesh, stacked=True))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), described) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), single
    )
    again = from_groups(abstract_state(SPEC, optimizer, mesh, stacked=True), single)
    assert jax.tree.structure(again) == jax.tree.structure(states[1])
    for one, other in zip(
        jax.tree.leaves(again.opt_state), jax.tree.leaves(states[1].opt_state), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_layers_keep_their_order_through_ten_and_more():
    """As text "10" comes before "2"."""
    like = {"m['blocks.*.x']": jax.ShapeDtypeStruct((12, 2), jnp.float32)}
    whole = {"m['blocks.*.x']": jnp.arange(24.0).reshape(12, 2)}
    single = unstack_layers(whole)
    np.testing.assert_array_equal(single["m['blocks.10.x']"], [20.0, 21.0])
    np.testing.assert_array_equal(
        stack_layers(single, like)["m['blocks.*.x']"], whole["m['blocks.*.x']"]
    )


def train_steps(*, scan):
    spec = spec_of(dropout=0.2)
    config = TrainingConfig(steps=10, batch_size=BATCH, scan_layers=scan)
    state = create_state(spec, make_optimizer(OPTIMIZER), 0, mesh_of(), stacked=scan)
    step = make_train_step(spec, OPTIMIZER, config, mesh_of())
    rows = []
    for number in range(3):
        state, metrics = step(state, shard_batch(mesh_of(), Batch(tokens(number)), BATCH_AXES))
        rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return state, np.array(rows)


@pytest.mark.thorough
def test_training_is_the_same_with_the_same_dropout():
    (one, rows), (other, scanned) = (train_steps(scan=scan) for scan in (False, True))
    np.testing.assert_allclose(scanned, rows, rtol=1e-5)
    for name, value in one.params.items():
        np.testing.assert_allclose(other.params[name], value, rtol=1e-3, atol=2e-5, err_msg=name)


def lowered(n_layer, kind="adamw", *, scan):
    spec, optimizer = spec_of(n_layer, dropout=0.1), OptimizerConfig(kind=kind)
    config = TrainingConfig(batch_size=BATCH, scan_layers=scan)
    state = abstract_state(spec, make_optimizer(optimizer), mesh_of(), stacked=scan)
    windows = Batch(jax.ShapeDtypeStruct((BATCH, 17), jnp.int32))
    return make_train_step(spec, optimizer, config, mesh_of()).lower(state, windows)


def instructions(program):
    return program.as_text().count(" = ")


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_step_is_as_long_for_eight_layers_as_for_two(kind):
    """Forward, backward and the update; without a scan it grows."""
    two, eight = (instructions(lowered(n, kind, scan=True)) for n in (2, 8))
    assert two == eight
    two, eight = (instructions(lowered(n, kind, scan=False)) for n in (2, 8))
    assert eight > 2.5 * two


@pytest.mark.thorough
def test_the_compiler_does_not_unroll_the_scan():
    two, eight = (instructions(lowered(n, scan=True).compile()) for n in (2, 8))
    assert eight == pytest.approx(two, rel=0.01)


@pytest.mark.thorough
def test_a_run_goes_on_with_the_other_setting_of_scan_layers(copy, unbroken):
    """Off to step 8, on to 10, off to 12: the same losses to rounding, one kind of checkpoint."""
    run = copy / "run"
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    assert train(copy / "config.toml", "--training.scan-layers", "--checkpoint.every", "2") == 0
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert starts[-1]["from_step"] == 8
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    assert train(copy / "config.toml") == 0
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert starts[-1]["from_step"] == 10
    expected, found = losses(unbroken / "run"), losses(run)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([r[2] for r in found], [r[2] for r in expected], rtol=1e-5)
