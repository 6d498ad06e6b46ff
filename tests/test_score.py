"""Scores against float64 numpy and the training loss; windows that predict each token once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import NonFiniteError, UsageError
from llm.inference import score
from llm.inference.decode import Decoder, Request
from llm.inference.distribution import chunk_length, describe, describe_positions
from llm.inference.filters import Candidates
from llm.inference.numerics import cached_minus_full
from llm.inference.records import Sampling
from llm.inference.score import Scorer
from llm.model.gpt import ModelSpec, bind, initialise
from llm.model.loss import LossOptions, head_loss
from llm.model_config import ModelConfig
from llm.text.tokenizer import ByteTokenizer

CONTEXT, VOCAB = 32, 257
TOKENIZER = ByteTokenizer()
SPEC = ModelSpec(ModelConfig(n_layer=2, n_head=2, d_model=32, context_length=CONTEXT), VOCAB)


@pytest.fixture(scope="module")
def params():
    params = jax.jit(initialise, static_argnums=0)(SPEC, jax.random.key(0))
    return {name: 6.0 * w if w.ndim > 1 else w for name, w in params.items()}


@pytest.fixture(scope="module")
def oracle(params):
    """ids (at most a context) -> float64 log-softmax of one full pass, [T, V]."""
    full_pass = jax.jit(lambda params, ids: bind(SPEC, params)(ids))

    def logprobs(ids):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(full_pass(params, padded)[0, : len(ids)], np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    return logprobs


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, count).astype(np.int32)


def logprobs_of(predictions):
    assert predictions[0].logprob is None
    return np.array([prediction.logprob for prediction in predictions[1:]])


def test_every_number_equals_float64_numpy(params, oracle):
    ids, watch = random_ids(20), (0, 256, 9)
    [predictions] = Scorer(SPEC, params, TOKENIZER, top=5, watch=watch).score([ids])
    assert len(predictions) == 20
    for row, id_, said in zip(oracle(ids), ids[1:], predictions[1:], strict=False):
        order = np.lexsort((np.arange(VOCAB), -row))
        rank_of = {int(v): n for n, v in enumerate(order, start=1)}
        assert abs(said.logprob - row[id_]) < 1e-5
        assert said.rank == rank_of[id_]
        assert abs(said.entropy + (np.exp(row) * row).sum()) < 1e-5
        assert (said.sampling_logprob, said.kept_mass, said.kept_tokens) == (None, 1.0, VOCAB)
        expected = [*order[:5], *sorted((v for v in watch if rank_of[v] > 5), key=rank_of.get)]
        assert [(r.id, r.rank) for r in said.top] == [(int(v), rank_of[v]) for v in expected]


def test_minus_the_sum_is_the_training_loss(params):
    """On windows of context + 1 tokens, as training cuts them, to 1e-6 relative."""
    windows_BT = random_ids(8 * (CONTEXT + 1)).reshape(8, CONTEXT + 1)

    @jax.jit
    def training_loss(params, tokens_BT):
        model = bind(SPEC, params)
        weights_BT = jnp.ones((8, CONTEXT))
        hidden_BTD = model.hidden(tokens_BT[:, :-1])
        return head_loss(
            hidden_BTD, model.head_weight(), tokens_BT[:, 1:], weights_BT, LossOptions(VOCAB), 4
        ).nll

    total = -sum(logprobs_of(p).sum() for p in Scorer(SPEC, params, TOKENIZER).score(windows_BT))
    np.testing.assert_allclose(total, training_loss(params, windows_BT), rtol=1e-6)


@pytest.mark.thorough
def test_generated_tokens_score_as_they_were_drawn(params):
    decoder = Decoder.create(SPEC, params, ByteTokenizer())
    request = Request([104, 105], Sampling(1.3, top_k=90), max_new_tokens=25, top=0)
    tokens = [token for progress in decoder.generate([request]) for token in progress.tokens]
    drawn = tokens[1:]
    [scored] = Scorer(SPEC, params, TOKENIZER).score([[token.id for token in tokens]])
    np.testing.assert_allclose([said.logprob for said in drawn], logprobs_of(scored), atol=1e-4)
    assert [said.rank for said in drawn] == [said.rank for said in scored[1:]]


@pytest.mark.thorough
def test_cached_minus_full_is_measured(params):
    decoder = Decoder.create(SPEC, params, ByteTokenizer())
    assert cached_minus_full(SPEC, params, decoder, [104, 105]) < 1e-4
    # A decoder of other parameters is far away: the measure can tell.
    other = jax.tree.map(lambda w: 1.5 * w, params)
    assert cached_minus_full(SPEC, other, decoder, [104, 105]) > 1e-2


@pytest.mark.parametrize("stride", [1, 5, 16, CONTEXT])
def test_long_texts_are_predicted_with_the_context_of_their_windows(params, oracle, stride):
    ids = random_ids(70, seed=1)
    [predictions] = Scorer(SPEC, params, TOKENIZER, stride=stride).score([ids])
    found = logprobs_of(predictions)
    assert len(found) == 69
    end = min(CONTEXT, 69)
    expected = list(oracle(ids[:end])[np.arange(end), ids[1 : end + 1]])
    while end < 69:
        new = min(end + stride, 69)
        rows = oracle(ids[new - CONTEXT : new])
        expected += [rows[t - 1 - (new - CONTEXT), ids[t]] for t in range(end + 1, new + 1)]
        end = new
    np.testing.assert_allclose(found, expected, atol=1e-5)


@given(length=st.integers(0, 200), context=st.integers(1, 40), stride=st.integers(0, 40))
def test_windows_predict_each_token_once_with_enough_context(length, context, stride):
    stride = min(stride, context)
    config = ModelConfig(n_layer=1, n_head=1, d_model=1, context_length=context)
    scorer = Scorer(ModelSpec(config, VOCAB), {}, TOKENIZER, stride=stride)
    ids, predicted = np.arange(length), []
    step = stride or max(1, context // 2)
    for window in scorer.windows(ids):
        inputs = len(window.tokens) - 1
        start = int(window.tokens[0])
        assert window.tokens.tolist() == list(range(start, start + inputs + 1))
        assert inputs <= window.T <= context and window.predicted <= window.K <= window.T
        places = range(window.first, window.first + window.predicted)
        assert start + inputs == places[-1], "the last predicted token follows the inputs"
        for place in places:
            assert place - start >= min(place, context - step + 1)
        predicted += places
        inputs_BT, targets_BK = score.pad([window])
        part = score.predicted_slice(window)
        assert targets_BK[0, part].tolist() == [ids[place] for place in places]
        assert inputs_BT.shape[1] == window.T and targets_BK.shape[1] == window.K
    assert predicted == list(range(1, length))


@pytest.mark.thorough
def test_texts_of_all_lengths_together_score_as_each_alone(params, monkeypatch):
    monkeypatch.setattr(score, "GROUP_WINDOWS", 6)
    texts = [random_ids(n, seed=n) for n in (0, 3, 1, 90, 33, 2, 34, 16, 17, 5, 70)]
    scorer = Scorer(SPEC, params, TOKENIZER, top=2)
    together = list(scorer.score(iter(texts)))
    assert [len(predictions) for predictions in together] == [len(text) for text in texts]
    for text, predictions in zip(texts, together, strict=True):
        [alone] = scorer.score([text])
        assert [p.logprob is None for p in predictions] == [n == 0 for n in range(len(text))]
        for a, b in zip(alone[1:], predictions[1:], strict=True):
            assert abs(a.logprob - b.logprob) < 1e-5
            assert a.rank == b.rank


@pytest.mark.thorough
def test_distributions_sum_to_one_and_hold_the_scores(params):
    ids = random_ids(50, seed=2)
    scorer = Scorer(SPEC, params, TOKENIZER)
    logprobs = scorer.distributions(ids)
    assert logprobs.shape == (49, VOCAB) and logprobs.dtype == np.float32
    np.testing.assert_allclose(np.exp(logprobs.astype(np.float64)).sum(-1), 1.0, atol=1e-6)
    [predictions] = scorer.score([ids])
    np.testing.assert_allclose(
        logprobs[np.arange(49), ids[1:]], logprobs_of(predictions), atol=1e-5
    )
    assert scorer.distributions(ids[:1]).shape == (0, VOCAB)


@pytest.mark.thorough
def test_ranks_are_a_permutation_even_among_equals():
    logits = np.random.default_rng(3).integers(-3, 3, (1, 60)).astype(np.float32)
    logprobs = jnp.repeat(jax.nn.log_softmax(logits), 60, axis=0)
    candidates = Candidates.of(logprobs, 60)
    every = jnp.arange(60)
    described = describe(logprobs, every, every[:, None], 60, candidates)
    ranks = np.asarray(described.rank)
    assert sorted(ranks.tolist()) == list(range(1, 61))
    assert (described.watch_ranks[:, 0] == ranks).all()
    # The token of rank r is the r-th of the list, with equals in the order of their ids.
    np.testing.assert_array_equal(np.asarray(described.top_ids[0]), np.argsort(ranks))
    np.testing.assert_array_equal(ranks, 1 + np.argsort(np.argsort(-logits[0], kind="stable")))


def test_all_logits_never_exist_at_once(params):
    """Between hidden states and numbers no array holds every position's distribution."""
    B, T, V = 4, 64, 50_000
    length = chunk_length(B, T, V)
    assert 1 <= length < T and T % length == 0
    spec = ModelSpec(SPEC.config, V)
    shapes = jax.eval_shape(lambda: initialise(spec, jax.random.key(0)))
    targets, watch = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, 0), jnp.int32)
    jaxpr = jax.make_jaxpr(
        lambda params, hidden: describe_positions(bind(spec, params), hidden, targets, watch, 3)
    )(shapes, jnp.zeros((B, T, 32)))
    sizes = [
        variable.aval.size
        for inner in all_jaxprs(jaxpr.jaxpr)
        for equation in inner.eqns
        for variable in equation.outvars
        if hasattr(variable.aval, "size")
    ]
    assert B * length * V <= max(sizes) < B * T * V


def all_jaxprs(jaxpr):
    """A jaxpr and every jaxpr inside it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_jaxprs(inner)


def test_what_cannot_be_scored_says_why(params):
    with pytest.raises(UsageError, match=rf"stride = 33.*1 to {CONTEXT}"):
        Scorer(SPEC, params, TOKENIZER, stride=33)
    with pytest.raises(UsageError, match=r"257.*0 to 256"):
        Scorer(SPEC, params, TOKENIZER, watch=[257])
    broken = params | {"final_norm.scale": params["final_norm.scale"] * jnp.nan}
    with pytest.raises(NonFiniteError):
        list(Scorer(SPEC, broken, TOKENIZER).score([random_ids(20)]))
