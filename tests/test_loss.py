"""The loss against float64 numpy, and its promise never to hold all logits at once."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.config import MeshConfig
from llm.model import loss
from llm.model.gpt import ModelSpec, bind, initialise
from llm.model.loss import (
    LossOptions,
    chunks_for,
    head_loss,
    log_sum_exp,
    log_sum_exp_in_one_pass,
    next_token_loss,
    token_log_likelihood,
)
from llm.model.sharding import make_mesh, sharding_of
from llm.model_config import ModelConfig

B, T, D, VOCAB, PADDED = 3, 8, 5, 7, 10
PLAIN = LossOptions(VOCAB)
ALL_OPTIONS = LossOptions(VOCAB, logit_soft_cap=5.0, label_smoothing=0.1, z_loss=1e-2)


@pytest.fixture(scope="module")
def example():
    random = np.random.default_rng(0)
    hidden = random.normal(size=(B, T, D))
    head = random.normal(size=(D, PADDED)) * 2.0
    targets = random.integers(0, VOCAB, (B, T))
    mask = random.random((B, T)) < 0.7
    return hidden, head, targets, mask


def reference_loss(hidden, head, targets, weights, options):
    """The objective and the nll in float64, straight from their definitions."""
    logits = hidden @ head
    if options.logit_soft_cap:
        logits = options.logit_soft_cap * np.tanh(logits / options.logit_soft_cap)
    logits = logits[..., : options.vocab_size]
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    e = options.label_smoothing
    objective = (1 - e) * nll - e * log_p.mean(-1) + options.z_loss * log_z**2
    return (weights * objective).sum(), (weights * nll).sum()


def run(example, options, chunks):
    hidden, head, targets, mask = example
    arguments = (jnp.float32(hidden), jnp.float32(head), jnp.int32(targets))
    weights = jnp.float32(mask / mask.sum())
    return jax.value_and_grad(
        lambda hidden, head: tuple(head_loss(hidden, head, arguments[2], weights, options, chunks)),
        argnums=(0, 1),
        has_aux=True,
    )(*arguments[:2])


@pytest.mark.parametrize("chunks", [1, 2, 3, 8])
@pytest.mark.parametrize("options", [PLAIN, ALL_OPTIONS], ids=["plain", "all options"])
def test_loss_equals_float64_numpy(example, options, chunks):
    hidden, head, targets, mask = example
    (objective, nll), _ = run(example, options, chunks)
    expected = reference_loss(hidden, head, targets, mask / mask.sum(), options)
    np.testing.assert_allclose([objective, nll], expected, rtol=1e-6)


@pytest.mark.parametrize("chunks", [1, 3, 4])
@pytest.mark.parametrize("options", [PLAIN, ALL_OPTIONS], ids=["plain", "all options"])
def test_gradient_equals_central_differences_in_float64(example, options, chunks):
    hidden, head, targets, mask = example
    weights = mask / mask.sum()
    _, gradients = run(example, options, chunks)
    random = np.random.default_rng(1)
    for position, gradient in enumerate(gradients):
        direction = random.normal(size=gradient.shape)
        step = 1e-5
        ends = []
        for sign in (step, -step):
            point = [hidden, head]
            point[position] = point[position] + sign * direction
            ends.append(reference_loss(*point, targets, weights, options)[0])
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-5)


def test_padding_of_the_vocabulary_gets_no_probability_and_no_gradient(example):
    _, (_, d_head) = run(example, ALL_OPTIONS, 2)
    assert np.all(d_head[:, VOCAB:] == 0.0)
    hidden, head, targets, mask = example
    louder = head.copy()
    louder[:, VOCAB:] += 100.0
    before = run(example, PLAIN, 2)[0]
    after = run((hidden, louder, targets, mask), PLAIN, 2)[0]
    assert before == after


def test_masked_tokens_do_not_count(example):
    hidden, head, targets, mask = example
    elsewhere = np.where(mask, targets, (targets + 1) % VOCAB)
    same = run((hidden, head, elsewhere, mask), PLAIN, 2)[0]
    assert same == run(example, PLAIN, 2)[0]


def test_loss_is_minus_the_mean_token_log_likelihood(example):
    hidden, head, targets, mask = example
    logits = jnp.float32(hidden @ head)[..., :VOCAB]
    log_p = token_log_likelihood(logits, jnp.int32(targets))
    (_, nll), _ = run(example, PLAIN, 2)
    np.testing.assert_allclose(nll, -np.asarray(log_p)[mask].mean(), rtol=1e-6)


def test_all_logits_never_exist_at_once():
    """No float32 intermediate of value or gradient has B T V elements, at any vocabulary size."""
    batch, length, width, vocab = 4, 16, 8, 512
    chunks = chunks_for(batch, length, vocab)
    assert chunks >= 2

    def loss(hidden, head):
        targets = jnp.zeros((batch, length), jnp.int32)
        weights = jnp.ones((batch, length)) / (batch * length)
        return head_loss(hidden, head, targets, weights, LossOptions(vocab), chunks).objective

    arguments = (jnp.ones((batch, length, width)), jnp.ones((width, vocab)))
    for function in (loss, jax.grad(loss, argnums=(0, 1))):
        largest = max(
            variable.aval.size
            for jaxpr in all_jaxprs(jax.make_jaxpr(function)(*arguments).jaxpr)
            for equation in jaxpr.eqns
            for variable in equation.outvars
            if hasattr(variable.aval, "size")
        )
        assert largest <= batch * length * vocab // chunks


def all_jaxprs(jaxpr):
    """A jaxpr and every jaxpr inside it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from all_jaxprs(inner)


@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"data": 2, "context": 4}], ids=str)
def test_a_mesh_adds_up_the_heads_gradient_once_and_not_in_every_chunk(axes):
    """In the compiled program, what is exchanged inside the loop over chunks is a few numbers."""
    batch, length, width, vocab = 8, 16, 8, 64
    mesh = make_mesh(MeshConfig(**axes))

    def gradient(hidden, head, targets):
        weights = jnp.ones((batch, length)) / (batch * length)
        return jax.grad(
            lambda *arrays: head_loss(*arrays, targets, weights, LossOptions(vocab), 4).objective,
            argnums=(0, 1),
        )(hidden, head)

    def array(shape, dtype, *logical_axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(mesh, logical_axes))

    arguments = (
        array((batch, length, width), jnp.float32, "batch", "sequence", None),
        array((width, vocab), jnp.float32, "embed", "vocab"),
        array((batch, length), jnp.int32, "batch", "sequence"),
    )
    with jax.set_mesh(mesh):
        program = jax.jit(gradient).lower(*arguments).compile().as_text()
    inside, outside = exchanged_elements(program)
    assert max(outside) >= width * vocab // 8
    assert max(inside, default=0) <= 2


def exchanged_elements(program):
    """Elements of each array that a collective gives, inside called computations and in main."""
    inside, outside, where = [], [], []
    for line in program.splitlines():
        if line.endswith("{"):
            where = outside if line.startswith("ENTRY") else inside
        found = re.search(r" = (.*?) (all-|reduce-scatter|collective-)[a-z-]*\(", line)
        if found:
            shapes = re.findall(r"\[([\d,]*)\]", found.group(1))
            where += [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
    return inside, outside


def test_an_id_that_no_column_has_has_no_loss():
    """An id out of range is a corpus that does not belong to the model: NaN, not some number."""
    hidden, head, weights = np.ones((1, 4, 8), "float32"), np.ones((8, 10), "float32"), [[1.0] * 4]
    for id_, known in ((9, True), (10, False), (-1, False)):
        targets = np.array([[1, 2, 3, id_]], np.int32)
        found = head_loss(hidden, head, targets, np.float32(weights), LossOptions(10), 2).nll
        assert bool(np.isfinite(found)) == known


def test_one_pass_gives_the_logarithm_of_the_sum():
    rng = np.random.default_rng(0)
    logits = 20.0 * rng.normal(size=(3, 5, 1000)).astype(np.float32)
    logits[..., 900:] = -np.inf  # padding
    logits[0, 0] = -np.inf
    logits[0, 0, 7] = 3.0  # one alone
    logits[1, 1] += 300.0  # exp would overflow
    exact = logits.astype(np.float64)
    largest = exact.max(-1)
    expected = largest + np.log(np.exp(exact - largest[..., None]).sum(-1))
    np.testing.assert_allclose(log_sum_exp_in_one_pass(logits), expected, rtol=3e-7)
    np.testing.assert_allclose(log_sum_exp(logits), expected, rtol=3e-7)
    traced = jax.jit(log_sum_exp).trace(jax.ShapeDtypeStruct(logits.shape, "float32"))
    on = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu")}
    assert on["cuda"].count("stablehlo.reduce") == 1 and on["cpu"].count("stablehlo.reduce") > 1


def test_chunks_divide_the_length_where_they_can_and_respect_the_choice():
    assert chunks_for(12, 64, 65) == 2
    assert chunks_for(8, 1024, 50304) * (2**24 // (8 * 50304)) >= 1024
    assert 64 % chunks_for(12, 64, 65, chunk_length=10) == 0
    assert chunks_for(12, 64, 65, chunk_length=16) == 4
    assert chunks_for(1, 1, 65) == 1
    assert chunks_for(32, 1024, 50304) == 128
    assert chunks_for(32, 1024, 50304, device_kind="NVIDIA H200") == 8
    assert chunks_for(12, 257, 65) == 3


def test_the_loss_of_a_model_counts_the_rows_and_asks_for_the_devices_of_the_mesh(monkeypatch):
    """Over two devices: half of the rows on each, and the kind of device that the mesh has."""
    asked = []
    monkeypatch.setattr(loss, "chunks_for", lambda *sizes: asked.append(sizes) or 2)
    spec = ModelSpec(ModelConfig(n_layer=1, n_head=1, d_model=8, logit_soft_cap=5.0), VOCAB)
    random = np.random.default_rng(2)
    hidden = jnp.float32(random.normal(size=(4, T, 8)))
    targets, weights = jnp.int32(random.integers(0, VOCAB, (4, T))), jnp.float32(np.ones((4, T)))
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    params = initialise(spec, jax.random.key(0))

    @jax.jit
    def terms(params, hidden):
        model = bind(spec, params)
        return next_token_loss(
            model, hidden, targets, weights, label_smoothing=0.1, z_loss=1e-2, chunk_length=4
        ), model.head_weight()

    with jax.set_mesh(mesh):
        found, head = terms(params, hidden)
    assert asked == [(2, T, spec.padded_vocab_size, 4, jax.devices()[0].device_kind)]
    expected = reference_loss(hidden, np.asarray(head), targets, weights, ALL_OPTIONS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_bias_of_the_head_learns_how_often_each_token_comes():
    """Its gradient is the mean over targets of p_v - [target = v]."""
    config = ModelConfig(
        n_layer=1, n_head=1, d_model=8, context_length=T, tie_embeddings=False, head_bias=True
    )
    spec, random = ModelSpec(config, VOCAB), np.random.default_rng(3)
    tokens, targets = (jnp.int32(random.integers(0, VOCAB, (B, T))) for _ in range(2))
    params = initialise(spec, jax.random.key(0))
    params["head.bias"] = params["head.bias"].at[:VOCAB].set(random.normal(size=VOCAB))

    @jax.jit
    def objective(params):
        model = bind(spec, params)
        weights = jnp.full((B, T), 1 / (B * T))
        return next_token_loss(model, model.hidden(tokens), targets, weights).objective

    logits = np.asarray(bind(spec, params)(tokens), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (p - np.eye(VOCAB)[np.asarray(targets)]).mean((0, 1))
    found = jax.grad(objective)(params)["head.bias"]
    np.testing.assert_allclose(found[:VOCAB], expected, atol=1e-6)
    assert not found[VOCAB:].any()
