"""Products of 8-bit floats against ml_dtypes and float64, and a model that trains with them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_step import losses, tokens, train

from llm.model.float8 import float8_product

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def rounded(x, dtype):
    """x as 8 bits hold it, times its scale: float64."""
    scale = np.float32(np.abs(x).max()) / np.float32(ml_dtypes.finfo(dtype).max)
    return (np.float32(x) / scale).astype(dtype).astype(np.float64) * np.float64(scale)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_products_and_gradients_are_of_the_rounded_factors(scale):
    random = np.random.default_rng(0)
    x = scale * random.normal(size=(2, 5, 16))
    weight, up = random.normal(size=(16, 12)), random.normal(size=(2, 5, 12))
    y, gradient = jax.vjp(float8_product, jnp.float32(x), jnp.float32(weight))
    d_x, d_weight = gradient(jnp.float32(up))
    x8, weight8, up8 = rounded(x, E4M3), rounded(weight, E4M3), rounded(up, E5M2)
    np.testing.assert_allclose(y, x8 @ weight8, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(d_x, up8 @ weight8.T, rtol=1e-4, atol=1e-5)
    expected = np.einsum("btd,btf->df", x8, up8)
    np.testing.assert_allclose(d_weight, expected, rtol=1e-4, atol=1e-5 * scale)
    # Eight bits are a coarse ruler: no accident makes this pass with the factors themselves.
    assert np.abs(np.asarray(y) - x @ weight).max() > 1e-3 * scale


def test_nothing_times_something_is_nothing():
    y, gradient = jax.vjp(float8_product, jnp.zeros((3, 4)), jnp.ones((4, 2)))
    np.testing.assert_array_equal(y, np.zeros((3, 2)))
    for part in gradient(jnp.zeros((3, 2))):
        assert np.all(np.asarray(part) == 0.0)


@pytest.mark.parametrize("tiny", [1e-36, 1e-30])
def test_what_has_no_scale_in_float32_is_nothing_and_not_infinite(tiny):
    y, gradient = jax.vjp(float8_product, jnp.full((3, 4), tiny), jnp.ones((4, 2)))
    for part in (y, *gradient(jnp.full((3, 2), tiny))):
        assert np.all(np.abs(np.asarray(part)) <= 8 * tiny)


def test_training_with_8_bits_is_near_to_training_without_and_not_the_same():
    """The same few sequences again and again, which are learnt."""
    batches = [tokens(0)] * 12
    _, whole = train(batches=batches)
    _, narrow = train(batches=batches, float8=True)
    difference = np.abs(losses(narrow) - losses(whole))
    assert losses(narrow)[-1] < 0.8 * losses(narrow)[0]
    assert 1e-5 < difference[0] < 0.02 and difference.max() < 0.1
