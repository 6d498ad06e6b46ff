"""Mixture of experts: its definition in float64, and the same numbers however it is arranged."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from runs import STEPS, copied, losses, params_sha256, train, write_config

from llm.config import MeshConfig, OptimizerConfig, TrainingConfig, validate
from llm.errors import UsageError
from llm.inference.programs import for_decoding
from llm.model.experts import Experts
from llm.model.flops import flops_per_token, parameter_count
from llm.model.gpt import KVCache, ModelSpec, abstract_params, bind, initialise, logical_axes
from llm.model.grouped import block_rows, lay_out
from llm.model.sharding import check_divisible, make_mesh, sharding_of, tree_shardings
from llm.model_config import ModelConfig
from llm.text.batches import Batch
from llm.training.optimizer import make_optimizer, partition_labels
from llm.training.step import BATCH_AXES, accumulate_gradients

SIZES = {"n_layer": 1, "n_head": 2, "d_model": 8, "d_ff": 6, "context_length": 12}
ROWS, LENGTH = 3, 10
MIXTRAL = {"n_expert": 4, "n_expert_active": 2, "activation": "swiglu", "bias": False}
CASES = {
    "mixtral": MIXTRAL,
    "biases": {**MIXTRAL, "bias": True},
    "biases, exact gelu": {**MIXTRAL, "activation": "gelu", "bias": True},
    "switch": {**MIXTRAL, "n_expert_active": 1, "normalize_gates": False},
    "all of three experts": {**MIXTRAL, "n_expert": 3, "n_expert_active": 3},
}


@functools.cache
def case(name):
    """(configuration, compiled (weights, x) -> (y, routing), weights, x)"""
    config = ModelConfig(**SIZES, **CASES[name]).resolved()
    graph, state = nnx.split(Experts(config, "float32"))
    random = np.random.default_rng(3)
    state = jax.tree.map(lambda leaf: jnp.float32(0.5 * random.normal(size=leaf.shape)), state)
    apply = jax.jit(lambda state, x_BTD: nnx.merge(graph, state)(x_BTD))
    x_BTD = np.float32(random.normal(size=(ROWS, LENGTH, config.d_model)))
    return config, apply, state, x_BTD


def named(state):
    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def gelu(u):
    return u * 0.5 * (1.0 + np.vectorize(math.erf)(u / np.sqrt(2.0)))


def expert(config, weights, e, x):
    """One MLP on one row, in float64."""

    def linear(name, x):
        bias = weights[f"{name}.bias"][e] if config.bias else 0.0
        return x @ weights[f"{name}.weight"][e] + bias

    up = linear("up", x)
    if config.activation == "swiglu":
        gate = linear("gate", x)
        return linear("down", gate / (1.0 + np.exp(-gate)) * up)
    return linear("down", gelu(up))


def reference(config, state, x_BTD):
    """y and the numbers of Routing, choice after choice, in float64."""
    weights = {name: np.float64(leaf) for name, leaf in named(state).items()}
    B, T, _ = x_BTD.shape
    E, K = config.n_expert, config.n_expert_active
    y, counts = np.zeros(x_BTD.shape), np.zeros(E)
    probabilities, log_z = np.zeros(E), []
    for b in range(B):
        for t in range(T):
            z = np.float64(x_BTD[b, t]) @ weights["router.weight"]
            p = np.exp(z) / np.exp(z).sum()
            chosen = sorted(range(E), key=lambda e: -z[e])[:K]
            total = p[chosen].sum() if config.normalize_gates else 1.0
            for e in chosen:
                counts[e] += 1
                y[b, t] += p[e] / total * expert(config, weights, e, np.float64(x_BTD[b, t]))
            probabilities += p / (B * T)
            log_z.append(np.log(np.exp(z).sum()))
    share = counts / (B * T * K)
    return y, {
        "load_balancing": E * (share * probabilities).sum(),
        "z_loss": np.mean(np.square(log_z)),
        "load_max": E * share.max(),
    }


@pytest.mark.parametrize("name", CASES)
def test_it_is_its_definition(name):
    config, apply, state, x_BTD = case(name)
    y_BTD, routing = apply(state, x_BTD)
    expected, numbers = reference(config, state, x_BTD)
    assert np.std(expected) > 0.2
    np.testing.assert_allclose(y_BTD, expected, atol=2e-5)
    for field, value in numbers.items():
        assert float(getattr(routing, field)) == pytest.approx(value, rel=1e-5), field


def test_no_position_depends_on_later_ones_nor_on_other_texts():
    _, apply, state, x_BTD = case("biases")
    before = np.asarray(apply(state, x_BTD)[0])
    other = x_BTD.copy()
    other[0, 6:], other[1] = -other[0, 6:], 2.0
    after = np.asarray(apply(state, other)[0])
    np.testing.assert_array_equal(after[0, :6], before[0, :6])
    np.testing.assert_array_equal(after[2], before[2])
    assert not np.allclose(after[0, 6:], before[0, 6:])


def dense_formula(config, state, x_BTD):
    """Every expert on every row, weighted by a gate that is zero for those not chosen."""
    weights = named(state)
    scores_BTE = x_BTD @ weights["router.weight"]
    least = jnp.sort(scores_BTE, axis=-1)[..., -config.n_expert_active, None]
    gates_BTE = jax.nn.softmax(jnp.where(scores_BTE >= least, scores_BTE, -jnp.inf), axis=-1)
    up = jnp.einsum("BTD,EDF->BTEF", x_BTD, weights["up.weight"])
    gate = jnp.einsum("BTD,EDF->BTEF", x_BTD, weights["gate.weight"])
    down = jnp.einsum("BTEF,EFD->BTED", jax.nn.silu(gate) * up, weights["down.weight"])
    return jnp.einsum("BTE,BTED->BTD", gates_BTE, down)


def test_gradients_are_those_of_the_formula_and_reach_the_router():
    config, _, state, x_BTD = case("mixtral")
    graph, _ = nnx.split(Experts(config, "float32"))
    probe = np.float32(np.random.default_rng(5).normal(size=x_BTD.shape))

    def found(state, x_BTD):
        return jnp.sum(probe * nnx.merge(graph, state)(x_BTD)[0])

    def expected(state, x_BTD):
        return jnp.sum(probe * dense_formula(config, state, x_BTD))

    gradients = [jax.jit(jax.grad(f, (0, 1)))(state, x_BTD) for f in (found, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), *gradients)
    assert np.abs(named(gradients[0][0])["router.weight"]).max() > 0.1


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("groups", [[0] * 40, [3] * 39 + [1], [0, 1, 2, 3] * 10, [2, 0]], ids=str)
def test_rows_lie_in_blocks_of_one_group_however_they_are_spread(groups):
    group_R = np.array(groups)
    slot_R, row_S, group_N = map(np.asarray, lay_out(jnp.array(groups), 4))
    M = block_rows(len(groups), 4)
    assert (4 if len(groups) == 40 else 1) == M and len(row_S) == M * len(group_N)
    np.testing.assert_array_equal(row_S[slot_R], np.arange(len(groups)))
    np.testing.assert_array_equal(group_N[slot_R // M], group_R)
    assert (row_S < len(groups)).sum() == len(groups)


# Whole models


def spec_of(**settings):
    sizes = {"n_layer": 2, "n_head": 4, "d_model": 16, "d_ff": 24, "context_length": 16}
    return ModelSpec(ModelConfig(**{**sizes, "vocab_multiple": 16, **settings}), 70)


def random_params(spec):
    random = np.random.default_rng(0)
    return {
        name: jnp.float32(0.3 * random.normal(size=leaf.shape) + name.endswith("scale"))
        for name, leaf in abstract_params(spec).items()
    }


TOKENS = np.random.default_rng(1).integers(0, 70, (2, 9), dtype=np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(spec, params, tokens):
    return bind(spec, params)(tokens)


@pytest.mark.thorough
def test_a_model_whose_experts_are_alike_is_the_dense_model():
    dense, mixture = spec_of(), spec_of(n_expert=4)
    params = random_params(dense)
    routers = {name: leaf for name, leaf in random_params(mixture).items() if "router" in name}
    alike = {
        name: jnp.stack([leaf] * 4) if ".mlp." in name else leaf for name, leaf in params.items()
    }
    expected = np.asarray(forward(dense, params, TOKENS))
    assert np.std(expected) > 0.3
    np.testing.assert_allclose(forward(mixture, alike | routers, TOKENS), expected, atol=2e-5)


def test_one_expert_is_the_dense_model_and_no_router():
    """ModelConfig's default, so that every test of a dense model is one of n_expert = 1."""
    assert spec_of(n_expert=1) == spec_of()
    assert not any("router" in name for name in abstract_params(spec_of(n_expert=1)))
    assert abstract_params(spec_of())["blocks.0.mlp.up.weight"].shape == (16, 24)


@pytest.mark.thorough
def test_cached_decoding_equals_the_full_forward_whatever_else_is_in_the_batch():
    spec = spec_of(n_expert=4, positions="rotary")
    params = random_params(spec)

    @jax.jit
    def extend(params, tokens, cache):
        model = bind(spec, params)
        hidden, cache = model.extend(tokens, cache)
        return model.logits(hidden), cache

    full = np.asarray(forward(spec, params, TOKENS))
    cache, found = KVCache.create(spec, 2, 16), []
    for start in range(0, 9, 3):
        logits, cache = extend(params, TOKENS[:, start : start + 3], cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), full, atol=2e-5)
    alone = forward(spec, params, np.stack([TOKENS[0], TOKENS[0]]))
    np.testing.assert_allclose(alone[0], full[0], atol=2e-5)


def test_decoding_in_bfloat16_leaves_the_router_in_float32():
    spec = dataclasses.replace(spec_of(n_expert=4), compute_dtype="bfloat16")
    _, params = for_decoding(spec, random_params(spec))
    assert params["blocks.0.mlp.router.weight"].dtype == jnp.float32
    assert params["blocks.0.mlp.up.weight"].dtype == jnp.bfloat16


def test_gradients_of_biases_in_bfloat16_are_summed_in_float32():
    """One expert, so that each of 16,384 rows adds 1 to what is a sum of them all."""
    config = ModelConfig(**SIZES, n_expert=1, n_expert_active=1, bias=True).resolved()
    graph, state = nnx.split(Experts(config, "bfloat16"))
    x_BTD = jnp.ones((64, 256, config.d_model), jnp.bfloat16)

    def total(state, x_BTD, one):
        return jnp.sum((one * nnx.merge(graph, state)(x_BTD)[0]).astype(jnp.float32))

    # One is an argument: the sum of a constant would be multiplied out.
    one = jnp.ones((64, 256, 1), jnp.bfloat16)
    gradient = named(jax.jit(jax.grad(total))(state, x_BTD, one))["down.bias"]
    np.testing.assert_allclose(gradient, np.full((1, config.d_model), 16384.0), rtol=0.005)


def test_initial_experts_are_drawn_apart_by_the_rules_of_the_mlp():
    spec = spec_of(n_expert=4, zero_init_projections=True, d_ff=256)
    params = initialise(spec, jax.random.key(0))
    up = np.asarray(params["blocks.1.mlp.up.weight"])
    assert up.shape == (4, 16, 256)
    np.testing.assert_allclose(up.std(axis=(1, 2)), 0.02, rtol=0.1)
    assert np.abs(np.corrcoef(up.reshape(4, -1)) - np.eye(4)).max() < 0.1
    assert not np.any(params["blocks.1.mlp.down.weight"])
    assert np.std(params["blocks.1.mlp.router.weight"]) == pytest.approx(0.02, rel=0.3)


def test_parameters_and_flops_count_the_experts_that_a_token_goes_through():
    spec = spec_of(n_expert=8, n_expert_active=2, bias=False, activation="swiglu")
    dense = spec_of(bias=False, activation="swiglu")
    router, one = 16 * 8, 3 * 16 * 24
    assert parameter_count(spec) == parameter_count(dense) + 2 * (router + 7 * one)
    assert parameter_count(spec, active=True) == parameter_count(dense) + 2 * (router + one)
    assert parameter_count(dense, active=True) == parameter_count(dense)
    assert flops_per_token(spec) == flops_per_token(dense) + 6 * 2 * (router + one)


# Optimizer and mesh


def test_muon_moves_each_expert_as_a_matrix_of_its_own_and_leaves_the_router_to_adamw():
    optimizer = make_optimizer(OptimizerConfig(kind="muon", grad_clip=0.0))
    random = np.random.default_rng(0)
    gradient = np.float32(random.normal(size=(3, 4, 6)))
    weight = np.float32(random.normal(size=(3, 4, 6)))

    def moved(weight, gradient):
        params = {"blocks.0.mlp.up.weight": weight}
        return optimizer.update(
            {"blocks.0.mlp.up.weight": gradient}, optimizer.init(params), params
        )[0]["blocks.0.mlp.up.weight"]

    together = moved(weight, gradient)
    for e in range(3):
        np.testing.assert_allclose(together[e], moved(weight[e], gradient[e]), atol=1e-6)
    labels = partition_labels(abstract_params(spec_of(n_expert=4)))
    assert labels["blocks.0.mlp.router.weight"] == "adamw"
    assert labels["blocks.0.mlp.up.bias"] == "adamw"
    assert labels["blocks.0.mlp.down.weight"] == "muon"


def test_experts_are_divided_over_the_mesh_in_all_three_dimensions():
    spec = spec_of(n_expert=4)
    mesh = make_mesh(MeshConfig(data=1, expert=2, fsdp=2, tensor=2))
    shardings = tree_shardings(mesh, logical_axes(spec))
    assert shardings["blocks.0.mlp.up.weight"].spec == PartitionSpec("expert", "fsdp", "tensor")
    for name in ("up.weight", "down.weight"):
        assert math.prod(shardings[f"blocks.0.mlp.{name}"].shard_shape((4, 16, 24))) == 4 * 48


LEARNT = spec_of(n_layer=1, n_expert=8, norm="rmsnorm")
SCANNED = {"scan_layers": True, "remat": "dots"}
EXPERT_8 = {"data": 1, "expert": 8}
MIXED = {"data": 1, "expert": 2, "fsdp": 2, "tensor": 2}


@functools.cache
def compiled_on(axes, training):
    """The gradient of a step on a mesh: (weights, int32 [8, 17]) -> (gradients, terms)."""
    mesh = make_mesh(MeshConfig(**dict(axes)), None if axes else jax.devices()[:1])
    config = TrainingConfig(batch_size=8, **dict(training))
    shardings = tree_shardings(mesh, logical_axes(LEARNT, stacked=config.scan_layers))

    def program(weights, tokens_BT):
        return accumulate_gradients(LEARNT, config, weights, Batch(tokens_BT), None)

    jitted = jax.jit(
        program,
        in_shardings=(shardings, sharding_of(mesh, BATCH_AXES)),
        out_shardings=(shardings, None),
    )
    shapes = jax.eval_shape(
        lambda: initialise(LEARNT, jax.random.key(0), stacked=config.scan_layers)
    )
    with jax.set_mesh(mesh):
        return jitted.lower(shapes, jax.ShapeDtypeStruct((8, 17), jnp.int32)).compile()


def losses_on(axes, training):
    """float64 [6, 2] of plain gradient descent: loss and load balancing."""
    compiled = compiled_on(tuple(axes.items()), tuple(training.items()))
    weights = random_params(LEARNT)
    if training.get("scan_layers"):
        weights = {name.replace("blocks.0", "blocks.*"): leaf for name, leaf in weights.items()}
        weights = {n: leaf[None] if "*" in n else leaf for n, leaf in weights.items()}
    random = np.random.default_rng(0)
    pool = random.integers(0, 70, (12, 17), dtype=np.int32)
    rows = []
    for _ in range(6):
        windows = pool[random.permutation(len(pool))[:8]]
        gradients, terms = compiled(weights, windows)
        weights = {name: leaf - 0.3 * np.asarray(gradients[name]) for name, leaf in weights.items()}
        rows.append([float(terms.nll), float(terms.routing.load_balancing)])
    return np.array(rows)


@functools.cache
def losses_of_one_device():
    return losses_on({}, {})


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    ("axes", "training"), [(EXPERT_8, {}), (MIXED, SCANNED), (MIXED, {})], ids=str
)
def test_losses_are_those_of_one_device(axes, training):
    expected = losses_of_one_device()
    assert expected[-1, 0] < 0.97 * expected[0, 0]
    np.testing.assert_allclose(losses_on(axes, training), expected, rtol=1e-5)


# Runs


@pytest.fixture(scope="module")
def mixture_run(tmp_path_factory):
    """The folder of a run of a model with experts."""
    folder = tmp_path_factory.mktemp("experts")
    config = write_config(
        folder,
        model={"n_layer": 1, "n_expert": 4},
        data={"validation": "none"},
        sample={"max_new_tokens": 0},
    )
    assert train(config) == 0
    return folder


@pytest.mark.thorough
def test_metrics_tell_how_the_experts_are_used(mixture_run):
    lines = (mixture_run / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert len(rows) == STEPS
    for row in rows:
        assert 0.9 < row["load_balancing_loss"] < 4.0 and row["router_z_loss"] > 0.0
        assert 1.0 <= row["router_load_max"] <= 2.0 and "router_dropped" not in row


@pytest.mark.thorough
def test_a_resumed_run_is_bit_for_bit_one_that_was_not_stopped(mixture_run, tmp_path):
    config = copied(mixture_run, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    assert train(config) == 0
    assert losses(tmp_path / "run") == losses(mixture_run / "run")
    assert params_sha256(tmp_path / "run") == params_sha256(mixture_run / "run")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_expert": 4, "n_expert_active": 5}, ["5 is more than model.n_expert = 4"]),
        ({"n_expert_active": 2}, ["n_expert_active = 2", "n_expert = 1 is a dense model"]),
        ({"n_expert": 4, "n_expert_active": 1}, ["always 1", "normalize_gates = false"]),
        ({"n_expert": 0}, ["model.n_expert", "greater than 0"]),
        ({"n_experts": 4}, ["did you mean model.n_expert?"]),
    ],
    ids=str,
)
def test_wrong_settings_of_experts_are_refused(settings, words):
    with pytest.raises(UsageError) as error:
        validate({"model": settings}, where="test")
    for word in words:
        assert word in str(error.value)


def test_experts_that_a_mesh_cannot_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    with pytest.raises(UsageError, match=r"n_expert = 6 .* 4 devices .* axis expert; .* 4 or 8"):
        check_divisible(mesh, spec_of(n_expert=6).config, 80, 8)
    with pytest.raises(UsageError, match=r"n_expert = 1 .* axis expert; nearest that can: 4"):
        check_divisible(mesh, spec_of().config, 80, 8)
