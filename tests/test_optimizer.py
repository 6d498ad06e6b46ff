"""Update rules against float64 numpy, and learning rates against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import losses, run_process, saved_arrays, write_config

from llm.config import MeshConfig, OptimizerConfig, validate
from llm.model.products import rounded
from llm.model.sharding import make_mesh
from llm.model.stack import unstack_layers
from llm.training.optimizer import (
    jump_of_rate,
    learning_rate_factor,
    make_optimizer,
    muon_momentum,
    orthogonal,
)

STEPS = 100


def factors(**settings):
    config = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.1, **{"warmup_steps": 10, **settings}
    )
    return np.asarray(learning_rate_factor(config, STEPS, jnp.arange(STEPS + 1)))


def nanogpt_learning_rate(step, warmup=10, floor=0.1):
    """nanoGPT's get_lr: linear warmup from 1 / (warmup + 1), then half a cosine to the floor."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (STEPS - warmup)))


def test_cosine_schedule_is_nanogpts():
    expected = [nanogpt_learning_rate(step) for step in range(STEPS + 1)]
    np.testing.assert_allclose(factors(schedule="cosine"), expected, rtol=1e-6)


def test_linear_schedule_is_a_line_from_peak_to_floor():
    expected = np.interp(np.arange(10, 101), [10, 100], [1.0, 0.1])
    np.testing.assert_allclose(factors(schedule="linear")[10:], expected, rtol=1e-5)


def test_constant_schedule_stays_at_the_peak_after_warmup():
    assert np.all(factors(schedule="constant")[10:] == 1.0)


def test_warmup_stable_decay_is_flat_until_its_last_fraction():
    wsd = factors(schedule="wsd", decay_fraction=0.25)
    assert np.all(wsd[10:76] == 1.0)
    np.testing.assert_allclose(
        wsd[75:], np.interp(np.arange(75, 101), [75, 100], [1.0, 0.1]), rtol=1e-5
    )


def test_a_warmup_that_reaches_into_the_decay_makes_no_jump():
    wsd = factors(schedule="wsd", warmup_steps=90, decay_fraction=0.5)
    steps = np.arange(STEPS + 1)
    expected = np.minimum((steps + 1) / 91, np.interp(steps, [50, 100], [1.0, 0.1]))
    np.testing.assert_allclose(wsd, expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_decay_with_a_length_of_its_own_ends_there_and_is_held(schedule):
    whole, shorter = factors(schedule=schedule), factors(schedule=schedule, decay_steps=50)
    np.testing.assert_allclose(shorter[50:], 0.1, rtol=1e-6)
    assert shorter[49] > 0.1
    longer = factors(schedule=schedule, decay_steps=400)
    assert np.all(longer >= whole - 1e-6) and longer[-1] > 0.79
    if schedule == "cosine":
        expected = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (np.arange(10, 51) - 10) / 40))
        np.testing.assert_allclose(shorter[10:51], expected, rtol=1e-6)


@pytest.mark.parametrize(("least", "advice"), [(1e-3, True), (0.0, False)])
def test_a_jump_of_the_rate_is_said_with_a_way_to_hold_what_is_worth_holding(least, advice):
    optimizer = {"learning_rate": 1e-2, "min_learning_rate": least, "warmup_steps": 0}
    config = validate({"optimizer": optimizer, "training": {"steps": 20}}, where="test")
    said = jump_of_rate(config, {"training.steps": (10, 20)}, 10)
    half = least + (1e-2 - least) / 2
    assert f"step 11 is {half:.3g}, and was to be {least:.3g}" in said
    assert ("--optimizer.decay-steps 10" in said) == advice
    assert jump_of_rate(config, {}, 10) is None


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_no_warmup_starts_at_the_peak(schedule):
    assert factors(schedule=schedule, warmup_steps=0)[0] == 1.0


def example_params():
    random = np.random.default_rng(0)
    return {
        "embed.weight": random.normal(size=(7, 4)),
        "blocks.0.mlp.up.weight": random.normal(size=(4, 6)),
        "blocks.0.mlp.up.bias": random.normal(size=(6,)),
    }


def run_updates(config, params, gradients):
    optimizer = make_optimizer(config)
    params = jax.tree.map(jnp.float32, params)
    state = optimizer.init(params)
    for gradient in gradients:
        gradient = jax.tree.map(jnp.float32, gradient)
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def random_gradients(params, count, scale=1.0):
    random = np.random.default_rng(1)
    return [
        {name: scale * random.normal(size=value.shape) for name, value in params.items()}
        for _ in range(count)
    ]


def test_adamw_equals_its_definition_and_decays_matrices_only():
    config = OptimizerConfig(
        learning_rate=0.01, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=0.0
    )
    params = example_params()
    gradients = random_gradients(params, 3)
    result = run_updates(config, params, gradients)
    for name, p in params.items():
        m = v = 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = gradient[name]
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
            p = p - 0.01 * (update + (0.1 * p if p.ndim == 2 else 0.0))
        np.testing.assert_allclose(result[name], p, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_to_the_global_norm():
    """Adam forgets the scale of gradients, so clipping shows between a large and a small one."""
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, grad_clip=1.0)
    params = example_params()
    small, large = random_gradients(params, 1, 1e-3)[0], random_gradients(params, 1, 1e3)[0]
    norm = np.sqrt(sum((g**2).sum() for g in large.values()))
    clipped = {name: g / norm for name, g in large.items()}
    unclipped = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, grad_clip=0.0)
    with_clipping = run_updates(config, params, [large, small])
    by_hand = run_updates(unclipped, params, [clipped, small])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), with_clipping, by_hand)


def test_muon_moves_hidden_matrices_by_an_orthogonal_matrix_and_the_rest_by_adamw():
    muon = OptimizerConfig(
        kind="muon", learning_rate=0.01, muon_learning_rate=0.02, weight_decay=0.0, grad_clip=0.0
    )
    params = example_params()
    gradients = random_gradients(params, 1)
    moved = run_updates(muon, params, gradients)
    update = np.asarray(moved["blocks.0.mlp.up.weight"]) - params["blocks.0.mlp.up.weight"]
    left, _, right = np.linalg.svd(gradients[0]["blocks.0.mlp.up.weight"], full_matrices=False)
    nearest_orthogonal = -0.02 * np.sqrt(6 / 4) * left @ right
    # Newton-Schulz with Jordan's coefficients brings singular values to 1 within about 0.3.
    cosine = (update * nearest_orthogonal).sum() / (
        np.linalg.norm(update) * np.linalg.norm(nearest_orthogonal)
    )
    assert cosine > 0.95
    assert 0.7 < np.linalg.norm(update) / np.linalg.norm(nearest_orthogonal) < 1.3
    adamw = run_updates(muon.model_copy(update={"kind": "adamw"}), params, gradients)
    for name in ("embed.weight", "blocks.0.mlp.up.bias"):
        np.testing.assert_array_equal(moved[name], adamw[name])


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("iterations", [5, 1, 7])
def test_matrices_in_stacks_are_orthogonalised_as_optax_does_one_by_one(iterations):
    """Both ways up, layers and experts in stacks, singular values that fall to nothing, zeros; on
    one device, where large matrices take turns, and divided over eight, which they do not fill."""
    random = np.random.default_rng(0)
    shapes = {
        "blocks.0.attention.query.weight": (16, 16),
        "blocks.0.attention.output.weight": (16, 16),
        "blocks.0.mlp.up.weight": (16, 48),
        "blocks.0.mlp.down.weight": (48, 16),
        "blocks.1.mlp.up.weight": (3, 16, 48),
        "blocks.*.attention.key.weight": (3, 16, 8),
        "blocks.*.mlp.down.weight": (3, 2, 48, 16),
        "blocks.0.large.weight": (256, 512),
        "blocks.1.large.weight": (256, 512),
    }
    updates = {name: jnp.float32(random.normal(size=shape)) for name, shape in shapes.items()}
    left, _, right = np.linalg.svd(random.normal(size=(16, 16)))
    updates["blocks.0.attention.output.weight"] = jnp.float32(left * np.logspace(0, -9, 16) @ right)
    updates["blocks.0.mlp.down.weight"] *= 0
    rule = optax.contrib.scale_by_muon(
        ns_steps=iterations,
        beta=0.0,
        weight_dimension_numbers=jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates
        ),
    )
    expected, _ = rule.update(updates, rule.init(updates))
    for axes in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8}):
        size = math.prod(axes.values())
        with jax.set_mesh(make_mesh(MeshConfig(**axes), jax.devices()[:size])):
            found = jax.jit(orthogonal, static_argnums=1)(updates, iterations)
        for name, matrix in expected.items():
            scale = np.abs(matrix).max() or 1.0
            np.testing.assert_allclose(found[name] / scale, matrix / scale, atol=2e-4, err_msg=name)


@pytest.mark.thorough
def test_a_run_of_stacked_matrices_is_killed_and_resumed_bit_for_bit(tmp_path):
    """Killed in a step and before a save is whole: losses, parameters, momenta and moments."""
    settings = {
        "model": {"activation": "swiglu", "bias": False},
        "optimizer": {"kind": "muon", "muon_momentum_warmup_steps": 6},
        "training": {"compute_dtype": "bfloat16"},
    }
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder, faults in ((unbroken, ()), (broken, ("step:step=7", "checkpoint.before_commit"))):
        folder.mkdir()
        config = write_config(folder, **settings)
        for fault in faults:
            assert run_process(config, fault=f"{fault}:kill")[0] == -9
        code, output = run_process(config)
        assert code == 0, output
    assert losses(broken / "run") == losses(unbroken / "run")
    for group in ("params", "training"):
        expected, found = (
            saved_arrays(folder / "run" / "checkpoints" / "12" / group)
            for folder in (unbroken, broken)
        )
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        momenta = [name for name in expected if "muon" in name and "mlp.gate" in name]
        assert group == "params" or len(momenta) == 2, sorted(expected)


def test_rounded_products_orthogonalise_to_the_rounding_of_bfloat16():
    """Against the same in float64: singular values of a gradient, which fall over five decades."""
    random = np.random.default_rng(0)
    left, _, right = np.linalg.svd(random.normal(size=(48, 128)), full_matrices=False)
    matrix = left * np.logspace(0, -5, 48) @ right
    expected = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.775 * gram + 2.0315 * gram @ gram) @ expected
    for on, largest in ((False, 1e-4), (True, 2e-2)):
        with rounded(on):
            found = orthogonal({"blocks.0.mlp.up.weight": jnp.float32(matrix)}, 5)
        error = np.linalg.norm(found["blocks.0.mlp.up.weight"] - expected)
        assert largest / 1e3 < error / np.linalg.norm(expected) < largest


def test_momentum_rises_by_a_tenth_to_its_final_value():
    config = OptimizerConfig(muon_momentum=0.95, muon_momentum_warmup_steps=40)
    found = [muon_momentum(config, jnp.asarray(step)) for step in (0, 10, 40, 1000)]
    np.testing.assert_allclose(found, [0.85, 0.875, 0.95, 0.95], rtol=1e-6)
    assert muon_momentum(OptimizerConfig(muon_momentum=0.95), jnp.asarray(0)) == 0.95


def test_the_momentum_of_an_update_is_the_one_given():
    """Two updates, the second with another momentum: of the state both have the same."""
    params = example_params()
    gradients = [jax.tree.map(jnp.float32, g) for g in random_gradients(params, 2)]
    high, low = (
        OptimizerConfig(kind="muon", muon_momentum=momentum, grad_clip=0.0)
        for momentum in (0.95, 0.5)
    )
    _, state = make_optimizer(high).update(gradients[0], make_optimizer(high).init(params), params)
    given, _ = make_optimizer(high, 0.5).update(gradients[1], state, params)
    expected, _ = make_optimizer(low).update(gradients[1], state, params)
    other, _ = make_optimizer(high).update(gradients[1], state, params)
    name = "blocks.0.mlp.up.weight"
    np.testing.assert_allclose(given[name], expected[name], rtol=1e-6)
    assert np.abs(given[name] - other[name]).max() > 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_stacked_weights_get_the_updates_of_single_ones(kind):
    """Norms of a stack have two dimensions and are still neither decayed nor Muon's."""
    config = OptimizerConfig(
        kind=kind, learning_rate=0.01, muon_learning_rate=0.02, weight_decay=0.1
    )
    random = np.random.default_rng(0)
    shapes = {
        "embed.weight": (7, 4),
        "blocks.*.mlp.up.weight": (3, 4, 6),
        "blocks.*.mlp.down.weight": (3, 6, 4),
        "blocks.*.mlp.up.bias": (3, 6),
        "blocks.*.mlp_norm.scale": (3, 4),
    }
    stacked = {name: jnp.float32(random.normal(size=shape)) for name, shape in shapes.items()}
    gradients = [jax.tree.map(jnp.float32, g) for g in random_gradients(stacked, 3)]
    moved = unstack_layers(run_updates(config, stacked, gradients))
    singles = run_updates(config, unstack_layers(stacked), [unstack_layers(g) for g in gradients])
    assert moved.keys() == singles.keys()
    for name, value in singles.items():
        np.testing.assert_allclose(moved[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
