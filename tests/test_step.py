"""The training step: gradients, accumulation, masking of bad updates; meshes: test_meshes.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm.config import MeshConfig, OptimizerConfig, TrainingConfig
from llm.model.gpt import ModelSpec, bind
from llm.model.sharding import make_mesh, shard_batch
from llm.model_config import ModelConfig
from llm.text.batches import Batch
from llm.training.evaluate import evaluate, make_evaluation_step
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state, create_state, from_groups, to_groups
from llm.training.step import BATCH_AXES, is_spike, make_train_step

SPEC = ModelSpec(
    ModelConfig(n_layer=1, n_head=4, d_model=32, context_length=16, vocab_multiple=16), 70
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2)
BATCH = 8


def tokens(seed=0, batch=BATCH):
    return np.random.default_rng(seed).integers(0, 70, (batch, 17), dtype=np.int32)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


# Compiling takes seconds and running milliseconds: tests that need the same program share it.
compiled_step = functools.lru_cache(make_train_step)


@functools.lru_cache
def created_state(spec, optimizer, mesh):
    return create_state(spec, make_optimizer(optimizer), 0, mesh)


def fresh_state(spec=SPEC, optimizer=OPTIMIZER, mesh=None):
    """A copy, because a step takes its state's buffers. Dropout changes nothing of a beginning."""
    spec = dataclasses.replace(spec, config=spec.config.model_copy(update={"dropout": 0.0}))
    state = created_state(spec, optimizer, mesh or one_device())
    return jax.tree.map(jnp.copy, state)


def train(mesh=None, spec=SPEC, optimizer=OPTIMIZER, batches=None, **training):
    """(final state, metrics of each step)"""
    mesh = mesh or one_device()
    config = TrainingConfig(**{"steps": 10, "batch_size": BATCH, **training})
    step = compiled_step(spec, optimizer, config, mesh)
    state = fresh_state(spec, optimizer, mesh)
    rows = []
    for batch in batches if batches is not None else [tokens(n) for n in range(3)]:
        state, metrics = step(state, shard_batch(mesh, Batch(batch), BATCH_AXES))
        rows.append(jax.device_get(metrics))
    return state, rows


def losses(rows):
    return np.array([row["loss"] for row in rows])


@jax.jit
def _logits(params, tokens_BT):
    return bind(SPEC, params)(tokens_BT)


def forward(params, tokens_BT):
    return np.asarray(_logits(params, tokens_BT), np.float64)


def assert_params_close(one, other, rtol=1e-5, atol=1e-6):
    for name in one.params:
        np.testing.assert_allclose(
            one.params[name], other.params[name], rtol=rtol, atol=atol, err_msg=name
        )


@pytest.fixture(scope="module")
def whole_batch():
    return train()


@pytest.mark.thorough
def test_reported_loss_is_the_mean_nll_of_the_batch_before_the_update(whole_batch):
    batch = tokens(0)
    logits = forward(fresh_state().params, batch[:, :-1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, batch[:, 1:, None], -1).mean()
    np.testing.assert_allclose(losses(whole_batch[1])[0], expected, rtol=1e-6)


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_accumulation_gives_the_update_of_the_whole_batch(whole_batch, micro_batch_size):
    state, rows = train(micro_batch_size=micro_batch_size)
    np.testing.assert_allclose(losses(rows), losses(whole_batch[1]), rtol=1e-6)
    np.testing.assert_allclose(
        [row["grad_norm"] for row in rows], [row["grad_norm"] for row in whole_batch[1]], rtol=1e-5
    )
    # Adam divides by the root of tiny second moments: compare where it is well conditioned.
    assert_params_close(state, whole_batch[0], rtol=1e-3, atol=2e-5)


def test_the_state_is_sharded_from_birth_and_moments_lie_as_their_weights():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = created_state(SPEC, OPTIMIZER, mesh)
    name = "blocks.0.mlp.up.weight"
    assert state.params[name].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert state.params[name].addressable_shards[0].data.shape == (16, 64)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if name in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 2
    assert all(leaf.sharding == state.params[name].sharding for leaf in moments)


DROPOUT_SPEC = dataclasses.replace(SPEC, config=SPEC.config.model_copy(update={"dropout": 0.2}))


@pytest.mark.thorough
def test_two_runs_of_one_seed_are_equal_bit_for_bit():
    one, _ = train(spec=DROPOUT_SPEC)
    other, _ = train(spec=DROPOUT_SPEC)
    assert all(np.array_equal(one.params[name], other.params[name]) for name in one.params)


def test_dropout_depends_on_the_step_and_on_nothing_drawn_before():
    """The same weights and tokens: another loss at another step, the same loss at the same step."""
    step = compiled_step(
        DROPOUT_SPEC, OPTIMIZER, TrainingConfig(steps=10, batch_size=BATCH), one_device()
    )

    def loss_at(number):
        state = fresh_state(DROPOUT_SPEC)
        state = dataclasses.replace(state, step=state.step + number)
        batch = shard_batch(one_device(), Batch(tokens(0)), BATCH_AXES)
        return float(step(state, batch)[1]["loss"])

    assert len({loss_at(number) for number in (0, 1, 2, 1)}) == 3


def test_an_update_that_is_not_finite_changes_nothing_but_the_step():
    state = fresh_state()
    params = dict(state.params)
    params["final_norm.scale"] = params["final_norm.scale"].at[0].set(jnp.nan)
    before = jax.device_get(to_groups(dataclasses.replace(state, weights=params)))
    step = compiled_step(SPEC, OPTIMIZER, TrainingConfig(steps=10, batch_size=BATCH), one_device())
    batch = shard_batch(one_device(), Batch(tokens(0)), BATCH_AXES)
    after, metrics = step(dataclasses.replace(state, weights=params), batch)
    assert not metrics["finite"]
    after = jax.device_get(to_groups(after))
    assert before["training"].pop("step") + 1 == after["training"].pop("step")
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.thorough
def test_a_finite_gradient_that_carries_a_weight_out_of_range_is_masked():
    """Only the decay of a huge weight overflows, one of the vocabulary's padding."""
    optimizer = OPTIMIZER.model_copy(update={"weight_decay": 1e3, "warmup_steps": 0})
    state = fresh_state(optimizer=optimizer)
    params = {
        **state.params,
        "embed.weight": state.params["embed.weight"].at[SPEC.vocab_size + 1].set(3e38),
    }
    before = jax.device_get(params)
    step = compiled_step(SPEC, optimizer, TrainingConfig(steps=10, batch_size=BATCH), one_device())
    batch = shard_batch(one_device(), Batch(tokens(0)), BATCH_AXES)
    after, metrics = step(dataclasses.replace(state, weights=params), batch)
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(dict(after.params)))


@pytest.mark.thorough
def test_a_state_survives_the_way_through_named_groups():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    optimizer = make_optimizer(OptimizerConfig(kind="muon"))
    state = create_state(SPEC, optimizer, 3, mesh)
    again = from_groups(abstract_state(SPEC, optimizer, mesh), to_groups(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert jax.random.bits(again.key) == jax.random.bits(state.key)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(to_groups(again)),
        jax.device_get(to_groups(state)),
    )


def test_abstract_groups_describe_the_groups():
    mesh = one_device()
    described = to_groups(abstract_state(SPEC, make_optimizer(OPTIMIZER), mesh))
    actual = to_groups(created_state(SPEC, OPTIMIZER, mesh))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), described) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), actual
    )


def weighted():
    """A batch of the same tokens twice in a window, apart, with weights."""
    text = tokens(0)[:, :8]
    rows = np.concatenate([text, text, text[:, :1]], axis=1)
    weights = np.random.default_rng(1).uniform(0, 2, (BATCH, 16)).astype(np.float32)
    weights[:, 7] = 0.0  # the target of a document's last token is another one's first
    weights[0] = 0.0
    return Batch(rows, weights, np.repeat(np.arange(2), 8)[None].repeat(BATCH, 0).astype(np.int32))


@pytest.mark.parametrize("micro_batch_size", [0, BATCH // 4])
def test_targets_count_by_their_weights_and_documents_see_themselves(micro_batch_size):
    """Against float64 numpy, from each document's own pass."""
    batch = weighted()
    config = TrainingConfig(steps=10, batch_size=BATCH, micro_batch_size=micro_batch_size)
    _, metrics = compiled_step(SPEC, OPTIMIZER, config, one_device())(fresh_state(), batch)
    logits = forward(fresh_state().params, np.pad(batch.tokens[:, :8], ((0, 0), (0, 8))))[:, :8]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, batch.tokens[:, 1:9, None], -1)[..., 0]
    expected = (np.tile(nll, 2) * batch.weights).sum() / batch.weights.sum()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)
    evaluated = make_evaluation_step(SPEC, one_device())(fresh_state().params, batch)
    assert float(evaluated) == pytest.approx(expected * batch.weights.sum(), rel=1e-6)


@pytest.mark.thorough
def test_training_on_one_batch_learns_it():
    _, rows = train(batches=[tokens(0)] * 30, steps=30)
    assert losses(rows)[0] == pytest.approx(np.log(70), abs=0.2)
    assert losses(rows)[-1] < 0.5 * losses(rows)[0]


@pytest.mark.thorough
def test_evaluation_weighs_tokens_not_batches():
    """Two batches, one nearly empty: the mean is over tokens, against float64 numpy."""
    mesh, params = one_device(), fresh_state().params
    byte_lengths = np.arange(70) % 3
    masks = [np.ones((BATCH, 16), np.float32), np.zeros((BATCH, 16), np.float32)]
    masks[1][0, :3] = 1.0
    batches = [Batch(tokens(0), masks[0]), Batch(tokens(1), masks[1])]
    result = evaluate(make_evaluation_step(SPEC, mesh), params, batches, byte_lengths)
    nats, lengths = [], []
    for rows, mask, _ in batches:
        logits = forward(params, rows[:, :-1])
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = rows[:, 1:]
        nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        nats.append(nll[mask > 0])
        lengths.append(byte_lengths[targets[mask > 0]])
    nats, lengths = np.concatenate(nats), np.concatenate(lengths)
    assert result.tokens == BATCH * 16 + 3
    assert result.loss_nats == pytest.approx(nats.mean(), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats.sum() / lengths.sum() / np.log(2), rel=1e-6)


def test_an_evaluation_is_one_batch_ahead_of_the_device():
    """What was sent cannot be called back by a stop, and lies in the device's memory."""
    events = []

    class Loss:
        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            events.append(f"waited for {self.number}")

        def __array__(self, *_, **__):
            return np.float32(1.0)

    def step(_params, batch):
        events.append(f"sent {batch.tokens[0, 0]}")
        return Loss(batch.tokens[0, 0])

    batches = [Batch(np.full((1, 3), n), np.ones((1, 2))) for n in range(4)]
    assert evaluate(step, {}, batches, np.ones(4, np.int32)).tokens == 8
    assert events[:6] == ["sent 0", "sent 1", "waited for 0", "sent 2", "waited for 1", "sent 3"]


@pytest.mark.thorough
def test_a_loss_spike_is_skipped_and_does_not_enter_the_history():
    """64 ordinary losses, then weights that make the next one huge: the update is masked."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = create_state(SPEC, make_optimizer(OPTIMIZER), 0, mesh)
    usual = 1.0 + 0.01 * np.random.default_rng(0).normal(size=64)
    state = dataclasses.replace(state, loss_history=jnp.float32(usual))
    before = jax.device_get(to_groups(state))
    config = TrainingConfig(batch_size=BATCH, spike_zscore=6.0)
    after, metrics = make_train_step(SPEC, OPTIMIZER, config, mesh)(state, Batch(tokens(0)))
    assert metrics["spike"]
    after = jax.device_get(to_groups(after))
    assert before["training"].pop("step") + 1 == after["training"].pop("step")
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_spike_needs_a_full_history_and_a_threshold():
    usual = np.float32(1.0 + 0.01 * np.random.default_rng(0).normal(size=64))
    z = (1.05 - usual.mean()) / usual.std()
    assert is_spike(jnp.float32(1.05), jnp.asarray(usual), z - 0.01)
    assert not is_spike(jnp.float32(1.05), jnp.asarray(usual), z + 0.01)
    assert not is_spike(jnp.float32(9.0), jnp.asarray(usual), 0.0)
    assert not is_spike(jnp.float32(9.0), jnp.asarray(usual).at[0].set(jnp.nan), 3.0)


@pytest.mark.thorough
def test_the_step_uses_the_momentum_of_its_number():
    """Warming up for ever from 0.85: the weights of a run whose momentum is 0.85."""
    shared = OPTIMIZER.model_dump() | {"kind": "muon"}
    rising = OptimizerConfig(**shared | {"muon_momentum_warmup_steps": 10**9})
    low = OptimizerConfig(**shared | {"muon_momentum": 0.85})
    states = [train(optimizer=each)[0] for each in (rising, low)]
    name = "blocks.0.mlp.up.weight"
    one, other = (np.asarray(state.params[name]) for state in states)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    high = train(optimizer=OptimizerConfig(**shared))[0].params[name]
    assert np.abs(np.asarray(high) - one).max() > 1e-4
