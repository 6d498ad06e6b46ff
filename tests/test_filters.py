"""What is drawn from, against numpy in float64, Hugging Face's processors and counted draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.inference.filters import (
    CANDIDATES,
    Candidates,
    RowSettings,
    Steering,
    apply_filters,
    draw,
    steer,
)
from llm.inference.records import Sampling

VOCAB = 700  # more than twice CANDIDATES: some kept sets end beyond them


@jax.jit
def filtered(logprobs, settings):
    return apply_filters(logprobs, Candidates.of(logprobs), settings)


def run(logits, samplings):
    """Filtered, as numpy, of float32 log-probabilities [R, V] under one Sampling a row."""
    logprobs = np.asarray(jax.nn.log_softmax(jnp.float32(logits), axis=-1))
    settings = RowSettings.stack(samplings, range(len(samplings)))
    return logprobs, jax.device_get(filtered(logprobs, settings))


def reference(logprobs, sampling):
    """(kept ids as a set, probabilities drawn from) by sorting, in float64."""
    order = np.lexsort((np.arange(len(logprobs)), -logprobs))
    sorted_ = logprobs[order].astype(np.float64)
    if sampling.temperature == 0.0:
        kept = 1
        weights = np.ones(1)
    else:
        weights = np.exp((sorted_ - sorted_[0]) / sampling.temperature)
        kept = min(sampling.top_k or len(weights), len(weights))
        if sampling.top_p < 1.0:
            sums = np.cumsum(weights[:kept]) / weights[:kept].sum()
            assert np.abs(sums - sampling.top_p).min() > 1e-6, "too close for float32 to tell"
            kept = 1 + int((sums < sampling.top_p).sum())
        kept = min(kept, int((weights >= sampling.min_p).sum()))
        weights = weights[:kept]
    probabilities = np.zeros(len(logprobs))
    probabilities[order[:kept]] = weights / weights.sum()
    return set(order[:kept].tolist()), probabilities


def drawable(probabilities):
    """Without what is kept but less likely than float32 can say: at temperature 0.3 e^-26 is
    e^-87."""
    return set(np.flatnonzero(probabilities > 1e-36).tolist())


def random_rows(count, seed):
    """Logits from nearly certain to nearly flat, some rounded so that many are equal."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, VOCAB)) * random.choice([0.05, 1.0, 4.0], (count, 1))
    tied = np.arange(count) % 2 == 1
    return np.where(tied[:, None], np.round(logits * 2) / 2, logits)


def random_samplings(count, seed):
    random = np.random.default_rng(seed)
    return [
        Sampling(
            temperature=float(random.choice([0.0, 0.3, 0.8, 1.0, 2.5])),
            top_k=int(random.choice([0, 1, 2, 50, 256, 257, 400, 699, 700, 10**6])),
            top_p=float(random.choice([1.0, random.uniform(0.01, 0.999), 0.987, 1e-8])),
            min_p=float(random.choice([0.0, 0.0, 0.03, 0.6, 1.0])),
        )
        for _ in range(count)
    ]


def test_filters_equal_a_sort_in_float64():
    samplings = random_samplings(256, seed=1)
    logprobs, found = run(random_rows(256, seed=0), samplings)
    beyond = 0
    for row, sampling in enumerate(samplings):
        kept, probabilities = reference(logprobs[row], sampling)
        weights = found.weights_RV[row]
        assert drawable(weights / weights.sum()) == drawable(probabilities), sampling
        assert found.kept_tokens_R[row] == len(kept)
        np.testing.assert_allclose(weights / weights.sum(), probabilities, rtol=2e-5, atol=1e-9)
        mass = np.exp(logprobs[row].astype(np.float64))[sorted(kept)].sum()
        np.testing.assert_allclose(found.kept_mass_R[row], mass, rtol=1e-5)
        beyond += CANDIDATES < len(kept) < VOCAB
    assert beyond >= 20, "bisection was hardly tried"


def test_what_is_kept_is_the_first_kept_tokens_ranks():
    samplings = random_samplings(256, seed=3)
    logprobs, found = run(random_rows(256, seed=2), samplings)
    for row in range(len(samplings)):
        order = np.lexsort((np.arange(VOCAB), -logprobs[row]))
        first = order[: int(found.kept_tokens_R[row])]
        weights = found.weights_RV[row]
        assert drawable(weights) <= set(first.tolist())


def test_a_row_does_not_depend_on_its_companions():
    """Bisection runs for the whole batch when one row needs it; the others must not notice."""
    samplings = random_samplings(256, seed=5)
    logits = random_rows(256, seed=4)
    easy = [Sampling(top_k=3)] * 256
    together = run(logits, samplings)[1]
    for row in range(0, 256, 37):
        alone = run(logits, [*easy[:row], samplings[row], *easy[row + 1 :]])[1]
        np.testing.assert_array_equal(alone.weights_RV[row], together.weights_RV[row])


@pytest.mark.parametrize("k", [1, 3, 256, 300, 699, 700])
def test_top_k_keeps_exactly_k_of_equal_tokens_by_lower_id(k):
    _, found = run(np.zeros((256, VOCAB)), [Sampling(top_k=k)] * 256)
    assert np.flatnonzero(found.weights_RV[0]).tolist() == list(range(k))


def test_top_p_cuts_equal_tokens_by_lower_id():
    samplings = [Sampling(top_p=p) for p in (0.4999, 0.01, 1e-9)] + [Sampling()] * 253
    _, found = run(np.zeros((256, VOCAB)), samplings)
    # 0.4999 * 700 = 349.93, beyond the candidates; 0.01 * 700 = 7 up to rounding.
    assert found.kept_tokens_R[0] == 350
    assert found.kept_tokens_R[1] in (7, 8)
    assert found.kept_tokens_R[2] == 1
    assert np.flatnonzero(found.weights_RV[0]).tolist() == list(range(350))


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize("candidates", [1, CANDIDATES])  # with 1, bisection finds the last kept
@pytest.mark.parametrize("first, second", [(3, 9), (9, 3)])
def test_neighbouring_floats_are_told_apart(candidates, first, second):
    """Their distance to the likeliest is rounded to one and the same number; their rank is not."""
    likeliest, higher, lower = neighbours_at_one_distance()
    logprobs = np.full((1, VOCAB), -12.0, np.float32)
    logprobs[0, [7, first, second]] = likeliest, higher, lower
    for k, kept in ((2, {7, first}), (3, {7, first, second})):
        settings = RowSettings.stack([Sampling(top_k=k)], [0])
        found = apply_filters(logprobs, Candidates.of(logprobs, candidates), settings)
        assert set(np.flatnonzero(found.weights_RV[0]).tolist()) == kept
        assert found.kept_tokens_R[0] == k


def neighbours_at_one_distance():
    """float32 log-probabilities: a, then b > c next to each other, with a - b == a - c."""
    b = np.float32(-5.0)
    c = np.nextafter(b, np.float32(-9.0))
    for a in np.linspace(-0.02, -0.9, 4001, dtype=np.float32):
        if a - b == a - c:
            return a, b, c
    raise AssertionError("no such numbers")


def test_where_all_is_kept_the_mass_is_one():
    """The sum of 700 probabilities in float32 is not."""
    _, found = run(random_rows(8, seed=5), [Sampling()] * 8)
    assert found.kept_tokens_R.tolist() == [VOCAB] * 8
    assert found.kept_mass_R.tolist() == [1.0] * 8


def test_extreme_settings_stay_finite():
    samplings = [
        Sampling(temperature=1e-45), Sampling(temperature=1e-30), Sampling(temperature=1e300),
        Sampling(temperature=1e-30, top_p=0.5), Sampling(min_p=1.0), Sampling(top_p=1e-12),
        Sampling(temperature=0.0, top_k=5, top_p=0.3, min_p=0.2),
    ]  # fmt: skip
    logits = np.random.default_rng(0).normal(size=(256, VOCAB)) * 3
    logits[:, 0] = -1e30
    _, found = run(logits, samplings + [Sampling()] * (256 - len(samplings)))
    for numbers in (found.weights_RV, found.total_R, found.kept_mass_R):
        assert np.isfinite(numbers).all()
    assert found.kept_tokens_R[:7].tolist() == [1, VOCAB, VOCAB, 1, 1, 1, 1]
    assert (found.weights_RV[1] > 0).sum() == 1
    np.testing.assert_allclose(found.weights_RV[2][1:], 1.0, rtol=1e-6)


def test_greedy_draws_the_likeliest_with_certainty():
    logits = random_rows(256, seed=6)
    logprobs, found = run(logits, [Sampling(temperature=0.0, min_p=0.5, top_p=0.2)] * 256)
    best = np.argmax(logprobs, axis=-1)
    assert (np.argmax(found.weights_RV, axis=-1) == best).all()
    assert (found.logprob(jnp.asarray(best)) == 0.0).all()


def test_filters_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = np.random.default_rng(7).normal(size=(256, VOCAB)).astype(np.float32) * 3
    samplings = [s for s in random_samplings(400, seed=8) if s.temperature > 0][:256]
    _, found = run(logits, samplings)
    for row, sampling in enumerate(samplings):
        scores = processors.TemperatureLogitsWarper(sampling.temperature)(
            None, torch.tensor(logits[row : row + 1], dtype=torch.float64)
        )
        if sampling.top_k:
            scores = processors.TopKLogitsWarper(min(sampling.top_k, VOCAB))(None, scores)
        if sampling.top_p < 1.0:
            scores = processors.TopPLogitsWarper(sampling.top_p)(None, scores)
        if sampling.min_p:
            scores = processors.MinPLogitsWarper(sampling.min_p)(None, scores)
        expected = torch.softmax(scores, dim=-1)[0].numpy()
        weights = found.weights_RV[row]
        assert drawable(weights / weights.sum()) == drawable(expected), sampling
        np.testing.assert_allclose(weights / weights.sum(), expected, rtol=5e-5, atol=1e-9)


def test_steering_adds_to_its_row_and_leaves_others_to_the_bit():
    logprobs = np.asarray(jax.nn.log_softmax(jnp.float32(random_rows(64, seed=12)), axis=-1))
    nothing, rest = 2**31 - 1, [[0] * 3] * 61  # stands for no token; rows that nothing steers
    steering = Steering(
        ids_RK=np.int32([[nothing] * 3, [5, 9, 600], [7, 8, nothing], *np.add(rest, nothing)]),
        values_RK=np.float32([[0] * 3, [3.0, -100.0, 50.0], [-np.inf, -np.inf, 0], *rest]),
        floors_RK=np.int32([[0] * 3, [-1, -1, -1], [4, 10, 0], *rest]),
    )
    left = jnp.full(64, 20, jnp.int32).at[2].set(10)
    scores, candidates = jax.jit(steer)(logprobs, Candidates.of(logprobs), steering, left)
    for row in (0, *range(3, 64)):
        np.testing.assert_array_equal(scores[row], logprobs[row])
    expected = logprobs[1].astype(np.float64)
    expected[[5, 9, 600]] += [3.0, -100.0, 50.0]
    expected -= np.log(np.exp(expected).sum())
    np.testing.assert_allclose(scores[1], expected, atol=1e-4)
    assert candidates.ids_RC[1][0] == 600
    # Of row 2, ten tokens are left: the second ban counts while there are more, the first still.
    forbidden = np.flatnonzero(~np.isfinite(np.asarray(scores[2])))
    assert forbidden.tolist() == [7]
    settings = RowSettings.stack([Sampling(temperature=1e30)] * 64, range(64))
    found = apply_filters(scores, candidates, settings, logprobs)
    assert found.kept_tokens_R[:4].tolist() == [VOCAB, VOCAB, VOCAB - 1, VOCAB]
    assert not found.kept_RV[2, 7] and found.weights_RV[2, 7] == 0.0
    np.testing.assert_allclose(found.kept_mass_R[2], 1 - np.exp(logprobs[2, 7]), rtol=1e-5)


DRAWS = 100_000


@functools.partial(jax.jit, static_argnames="count")
def counts_of_draws(one, settings, count):
    """How often each token is drawn at the positions 0 to count - 1: int32 [V]."""
    rows = 1000
    many = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), (one, settings))

    def draw_some(counts, first):
        ids = draw(*many, first + jnp.arange(rows))
        return counts.at[ids].add(1), None

    counts = jnp.zeros(one.weights_RV.shape[-1], jnp.int32)
    return jax.lax.scan(draw_some, counts, jnp.arange(0, count, rows))[0]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=11),
        Sampling(temperature=0.7, top_k=40, top_p=0.95, seed=12),
        Sampling(temperature=1.5, min_p=0.02, seed=-13),
        Sampling(temperature=0.0, seed=2**63),
    ],
    ids=str,
)
def test_100_000_draws_fit_the_stated_probabilities(sampling):
    """Chi-squared over tokens with at least 5 expected draws, the rest as one class."""
    logprobs = jax.nn.log_softmax(random_rows(1, seed=9) * 1.0).astype(jnp.float32)
    settings = RowSettings.stack([sampling], [0])
    one = filtered(logprobs, settings)
    every = jax.vmap(lambda v: one.logprob(v[None])[0])(jnp.arange(VOCAB))
    kept = np.asarray(one.weights_RV[0]) > 0
    expected = np.where(kept, np.exp(np.asarray(every, np.float64)), 0.0) * DRAWS
    np.testing.assert_allclose(expected.sum(), DRAWS, rtol=1e-5)

    observed = np.asarray(counts_of_draws(one, settings, DRAWS))
    assert observed.sum() == DRAWS
    assert (observed[~kept] == 0).all()
    common = expected >= 5
    classes = [*zip(observed[common], expected[common], strict=True)]
    if expected[~common].sum() > 0:
        classes.append((observed[~common].sum(), expected[~common].sum()))
    chi_squared = sum((o - e) ** 2 / e for o, e in classes)
    degrees = len(classes) - 1
    # Its mean is `degrees` and its variance 2 * degrees; the seeds are fixed, 4 deviations are far.
    assert abs(chi_squared - degrees) <= 4 * np.sqrt(2 * degrees)


@pytest.mark.thorough
def test_noise_belongs_to_seed_index_and_position_and_not_to_the_row():
    logprobs = jax.nn.log_softmax(jnp.zeros((6, VOCAB)))
    seeds, indices, positions = [1, 1, 1, 2, 2**40 + 1, 1], [0, 1, 0, 0, 0, 0], [5, 5, 6, 5, 5, 5]

    @jax.jit
    def ids(order):
        settings = jax.tree.map(lambda x: x[order], stacked)
        return draw(
            apply_filters(logprobs, Candidates.of(logprobs), settings), settings,
            jnp.int32(positions)[order],
        )  # fmt: skip

    stacked = jax.tree.map(
        jnp.asarray, RowSettings.stack([Sampling(seed=seed) for seed in seeds], indices)
    )
    straight, turned = ids(jnp.arange(6)), ids(jnp.arange(6)[::-1])
    np.testing.assert_array_equal(straight, turned[::-1])
    assert straight[0] == straight[5]
    assert len(set(straight[:5].tolist())) == 5


def test_the_key_is_fold_in_of_the_documented_one():
    stacked = RowSettings.stack([Sampling(seed=1234)], [7])
    expected = jax.random.fold_in(jax.random.key(1234, impl="threefry2x32"), 7)
    np.testing.assert_array_equal(stacked.key_R2[0], jax.random.key_data(expected))
