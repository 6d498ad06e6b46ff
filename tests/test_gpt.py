"""The model against its definition in float64 numpy, for every switch, and what follows from it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.errors import UsageError
from llm.model.gpt import (
    KVCache,
    ModelSpec,
    abstract_params,
    bind,
    initialise,
    logical_axes,
)
from llm.model.layers import Linear, apply_side_by_side, residual_std
from llm.model.norm import Norm, normalise
from llm.model_config import ModelConfig
from llm.pages import attention as maps

VOCAB, LENGTH = 11, 10
SMALL = {
    "n_layer": 2, "n_head": 4, "d_model": 16, "d_ff": 20, "context_length": 12, "vocab_multiple": 8,
}  # fmt: skip

# A covering set: every value of every switch, and every pair of the ones that meet in attention.
MODELS = {
    "gpt2": {},
    "gpt2 untied, exact gelu": {"tie_embeddings": False, "activation": "gelu"},
    "llama": {
        "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
        "n_kv_head": 2, "tie_embeddings": False,
    },
    "modern": {
        "positions": "rotary", "norm": "rmsnorm", "activation": "relu_squared", "bias": False,
        "qk_norm": True, "logit_soft_cap": 1.5, "tie_embeddings": False, "rope_theta": 50.0,
    },
    "no positions, multi-query": {"positions": "none", "n_kv_head": 1, "activation": "swiglu"},
    "learned, grouped, qk-norm, capped": {
        "n_kv_head": 2, "qk_norm": True, "logit_soft_cap": 3.0, "bias": False,
    },
    "rotary, multi-query, layernorm": {
        "positions": "rotary", "n_kv_head": 1, "qk_norm": True, "activation": "relu_squared",
    },
    "pythia": {"positions": "rotary", "rotary_fraction": 0.5, "block": "parallel",
               "tie_embeddings": False, "activation": "relu"},
    "phi": {"positions": "rotary", "rotary_fraction": 0.5, "block": "parallel_one_norm",
            "tie_embeddings": False, "head_bias": True},
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def spec_of(name, **changes):
    return ModelSpec(ModelConfig(**{**SMALL, **MODELS[name], **changes}), VOCAB)


@functools.cache
def params_of(spec):
    """Weights far from their start, so that each part shows: N(0, 0.3^2), scales around 1."""
    random = np.random.default_rng(0)
    return {
        name: jnp.asarray(
            0.3 * random.normal(size=leaf.shape) + name.endswith("scale"), jnp.float32
        )
        for name, leaf in abstract_params(spec).items()
    }


@functools.cache
def some_tokens(rows=2, length=LENGTH):
    return np.random.default_rng(1).integers(0, VOCAB, (rows, length), dtype=np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(spec, params, tokens):
    return bind(spec, params)(tokens)


@functools.cache
def logits_of(name):
    spec = spec_of(name)
    return np.asarray(forward(spec, params_of(spec), some_tokens()))


# The definition, in float64. Nothing below shares code with llm/model.


def reference(spec, params, tokens, weights=None):
    """(logits [B, T, V], attention weights [L, B, N, T, T]); weights, when given, are used."""
    config = spec.config
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = p["embed.weight"][tokens]
    if config.positions == "learned":
        x = x + p["embed.position"][: tokens.shape[1]]
    used = []
    for layer in range(config.n_layer):
        block = {n.removeprefix(f"blocks.{layer}."): v for n, v in p.items()}
        given = None if weights is None else weights[layer]
        read = reference_norm(config, block, "attention_norm", x)
        mixed, attended = reference_attention(config, block, read, given)
        used.append(attended)
        match config.block:
            case "sequential":
                x = x + mixed
                x = x + reference_mlp(config, block, reference_norm(config, block, "mlp_norm", x))
            case "parallel":
                other = reference_norm(config, block, "mlp_norm", x)
                x = x + mixed + reference_mlp(config, block, other)
            case "parallel_one_norm":
                x = x + mixed + reference_mlp(config, block, read)
    head = p["embed.weight"].T if config.tie_embeddings else p["head.weight"]
    logits = reference_norm(config, p, "final_norm", x) @ head + p.get("head.bias", 0.0)
    logits = logits[..., : spec.vocab_size]
    cap = config.logit_soft_cap
    return (cap * np.tanh(logits / cap) if cap else logits), np.stack(used)


def reference_norm(config, p, name, x):
    if config.norm == "layernorm":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + config.norm_epsilon
        )
    else:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return x * p[f"{name}.scale"] + p.get(f"{name}.bias", 0.0)


def linear(p, name, x):
    return x @ p[f"{name}.weight"] + p.get(f"{name}.bias", 0.0)


def reference_attention(config, p, x, weights=None):
    B, T, _ = x.shape
    N, K, H = config.n_head, config.n_kv_head, config.head_size
    query = linear(p, "attention.query", x).reshape(B, T, N, H)
    key = linear(p, "attention.key", x).reshape(B, T, K, H)
    value = linear(p, "attention.value", x).reshape(B, T, K, H)
    if config.qk_norm:
        query, key = (
            y / np.sqrt((y**2).mean(-1, keepdims=True) + config.norm_epsilon)
            * p[f"attention.{part}_norm.scale"]
            for part, y in (("query", query), ("key", key))
        )  # fmt: skip
    if config.positions == "rotary":
        turned = int(H * config.rotary_fraction)
        query, key = (
            np.concatenate(
                [reference_rotation(y[..., :turned], config.rope_theta), y[..., turned:]], -1
            )
            for y in (query, key)
        )
    out, used = np.zeros((B, T, N, H)), np.zeros((B, N, T, T))
    for n in range(N):
        k = n * K // N
        scores = query[:, :, n] @ key[:, :, k].swapaxes(1, 2) / math.sqrt(H)
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        used[:, n] = exponentials / exponentials.sum(-1, keepdims=True)
        mixing = used[:, n] if weights is None else weights[:, n]
        out[:, :, n] = mixing @ value[:, :, k]
    return linear(p, "attention.out", out.reshape(B, T, N * H)), used


def reference_rotation(x, theta):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[None, :, None, :]
    return np.concatenate([z.real, z.imag], -1)


def reference_mlp(config, p, x):
    up = linear(p, "mlp.up", x)
    match config.activation:
        case "gelu":
            hidden = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        case "gelu_tanh":
            hidden = up * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        case "relu":
            hidden = np.maximum(up, 0)
        case "relu_squared":
            hidden = np.maximum(up, 0) ** 2
        case "swiglu":
            gate = linear(p, "mlp.gate", x)
            hidden = gate / (1 + np.exp(-gate)) * up
    return linear(p, "mlp.down", hidden)


@every_model
def test_logits_equal_the_definition_in_float64(name):
    spec = spec_of(name)
    expected, _ = reference(spec, params_of(spec), some_tokens())
    assert np.std(expected) > 0.2
    np.testing.assert_allclose(logits_of(name), expected, atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def extend(spec, params, tokens, cache):
    model = bind(spec, params)
    hidden, cache = model.extend(tokens, cache)
    return model.logits(hidden), cache


def assert_decoding_equals_the_full_forward(spec, lengths, steps, *, prefill, capacity=LENGTH):
    """Prompts of these lengths, padded on the right with noise, then pieces of these sizes."""
    lengths = np.array(lengths, np.int32)
    text = some_tokens(rows=len(lengths))
    full = np.asarray(forward(spec, params_of(spec), text))
    prompts = np.where(np.arange(prefill) < lengths[:, None], text[:, :prefill], 7)
    cache = KVCache.create(spec, len(lengths), capacity)
    scores, cache = extend(spec, params_of(spec), prompts, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(scores[row, :length], full[row, :length], atol=2e-5)
    cache = dataclasses.replace(cache, length_B=jnp.asarray(lengths))
    for size in steps:
        starts = np.asarray(cache.length_B)
        piece = np.stack([text[row, at : at + size] for row, at in enumerate(starts)])
        scores, cache = extend(spec, params_of(spec), piece, cache)
        for row, at in enumerate(starts):
            np.testing.assert_allclose(scores[row], full[row, at : at + size], atol=2e-5)
    np.testing.assert_array_equal(cache.length_B, lengths + sum(steps))


def packed(name, *rows):
    """float32 log-softmax [B, T, V] of windows of documents that stand side by side."""
    spec = spec_of(name)
    tokens = np.stack([np.concatenate(documents) for documents in rows])
    segments = np.stack(
        [np.repeat(np.arange(len(row)), [len(part) for part in row]) for row in rows]
    ).astype(np.int32)

    @jax.jit
    def logprobs(params, tokens, segments):
        model = bind(spec, params)
        return jax.nn.log_softmax(model.logits(model.hidden(tokens, segments)))

    return np.asarray(logprobs(params_of(spec), tokens, segments))


def documents(*lengths, seed=4):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, length, dtype=np.int32) for length in lengths]


@pytest.mark.thorough(keep=1)
@every_model
def test_documents_packed_in_a_window_have_the_log_probabilities_that_they_have_alone(name):
    rows = documents(4, 1, 6), documents(2, 9, seed=5)
    found = packed(name, *rows)
    for row, parts in zip(found, rows, strict=True):
        ends = np.cumsum([len(part) for part in parts])
        for part, logprobs in zip(parts, np.split(row, ends[:-1]), strict=True):
            logits = forward(spec_of(name), params_of(spec_of(name)), part[None])
            np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits)[0], atol=1e-5)
    assert np.abs(found[0, 4:5] - packed(name, documents(5, 6))[0, 4:5]).max() > 0.01


@every_model
def test_a_document_changes_no_bit_of_the_others_in_its_window(name):
    first, second, third = documents(4, 3, 4)
    before = packed(name, [first, second, third])
    after = packed(name, [first, (second + 1) % VOCAB, third])
    np.testing.assert_array_equal(after[0, :4], before[0, :4])
    np.testing.assert_array_equal(after[0, 7:], before[0, 7:])
    assert not np.allclose(after[0, 4:7], before[0, 4:7])


@pytest.mark.thorough(keep=2)
@every_model
def test_cached_decoding_equals_the_full_forward(name):
    assert_decoding_equals_the_full_forward(spec_of(name), [5, 2, 1], [1, 1, 1], prefill=5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_pieces_of_any_size_may_follow_the_prompts(name):
    assert_decoding_equals_the_full_forward(spec_of(name), [5, 2, 1], [3, 1, 1], prefill=5)


def test_padding_that_reaches_over_the_capacity_is_dropped():
    assert_decoding_equals_the_full_forward(
        spec_of("llama"), [3, 2, 4], [1, 1, 1], prefill=10, capacity=7
    )


@pytest.mark.parametrize("name", ["gpt2 untied, exact gelu", "llama", "no positions, multi-query"])
def test_attention_is_causal_shown_by_gradients(name):
    """d logits_t / d embedding_s is exactly zero for every s > t, and not zero for any s <= t.

    Distinct tokens and an untied head make the gradient with respect to the embedding table that of
    the positions' own embeddings.
    """
    spec = spec_of(name, tie_embeddings=False)
    params = params_of(spec)
    tokens = np.arange(LENGTH, dtype=np.int32)[None]
    probe = jnp.asarray(np.random.default_rng(2).normal(size=VOCAB), jnp.float32)

    def probed(table):
        return bind(spec, {**params, "embed.weight": table})(tokens)[0] @ probe

    jacobian_TVD = jax.jit(jax.jacrev(probed))(params["embed.weight"])
    size_TS = np.abs(np.asarray(jacobian_TVD)).max(-1)[:, :LENGTH]
    for t in range(LENGTH):
        assert np.all(size_TS[t, t + 1 :] == 0.0)
        assert np.all(size_TS[t, : t + 1] > 1e-6)


def test_padded_vocabulary_is_never_scored_and_changes_nothing():
    for name in ("gpt2", "llama"):
        spec = spec_of(name)
        assert spec.padded_vocab_size == 16
        louder = dict(params_of(spec))
        louder["embed.weight"] = louder["embed.weight"].at[VOCAB:].add(100.0)
        if "head.weight" in louder:
            louder["head.weight"] = louder["head.weight"].at[:, VOCAB:].add(100.0)
        logits = np.asarray(forward(spec, louder, some_tokens()))
        assert logits.shape == (2, LENGTH, VOCAB)
        np.testing.assert_array_equal(logits, logits_of(name))


def test_multi_query_equals_multi_head_with_its_key_and_value_repeated():
    spec = spec_of("no positions, multi-query")
    many = spec_of("no positions, multi-query", n_kv_head=4)
    params = {
        name: jnp.concatenate([value] * 4, axis=-1)
        if ".attention.key." in name or ".attention.value." in name
        else value
        for name, value in params_of(spec).items()
    }
    logits = forward(many, params, some_tokens())
    np.testing.assert_allclose(logits, logits_of("no positions, multi-query"), atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def attention_weights(spec, params, tokens):
    return maps.attention_weights(bind(spec, params), tokens)


@pytest.mark.parametrize("name", ["gpt2", "llama", "modern"])
def test_attention_weights_are_those_that_the_forward_pass_used(name):
    """Equal to the definition; and the definition, mixing with them, gives the model's logits."""
    spec = spec_of(name)
    weights = np.asarray(attention_weights(spec, params_of(spec), some_tokens()))
    layers = spec.config.n_layer
    assert weights.dtype == np.float32 and weights.shape == (layers, 2, 4, LENGTH, LENGTH)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    assert np.all(np.triu(weights, 1) == 0.0)
    _, expected = reference(spec, params_of(spec), some_tokens())
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    logits, _ = reference(spec, params_of(spec), some_tokens(), weights.astype(np.float64))
    np.testing.assert_allclose(logits, logits_of(name), atol=2e-5)


def test_attention_weights_are_zero_outside_a_window_but_in_layers_without():
    spec = spec_of("modern", window=3, global_every=2, attention_soft_cap=5.0, norm_place="after")
    weights = np.asarray(attention_weights(spec, params_of(spec), some_tokens()))
    outside = np.tril(np.ones((LENGTH, LENGTH), bool), -3)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    for layer, shown in enumerate(weights[..., outside]):
        assert np.all(shown == 0.0) if layer % 2 == 0 else np.all(shown > 0.0)


def test_layers_that_differ_are_not_stacked():
    for setting in ("global_every", "unrotated_every"):
        with pytest.raises(UsageError, match=rf"training\.scan_layers .* model\.{setting} = 2"):
            initialise(spec_of("modern", **{setting: 2}), jax.random.key(0), stacked=True)


def test_bfloat16_computes_in_bfloat16_and_scores_in_float32():
    spec = dataclasses.replace(spec_of("modern"), compute_dtype="bfloat16")
    params = params_of(spec_of("modern"))
    model = bind(spec, params)
    hidden = jax.eval_shape(model.hidden, some_tokens())
    assert hidden.dtype == jnp.bfloat16
    cache = KVCache.create(spec, 2, LENGTH)
    assert {array.dtype for array in (*cache.keys, *cache.values)} == {jnp.dtype(jnp.bfloat16)}
    logits = forward(spec, params, some_tokens())
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits; a dozen roundings in a row add up to a few per cent of the spread.
    error = np.abs(np.asarray(logits) - logits_of("modern")).max()
    assert 1e-4 < error < 0.1 * np.std(logits_of("modern"))
    assert {leaf.dtype for leaf in abstract_params(spec).values()} == {jnp.dtype(jnp.float32)}


BIG = ModelSpec(
    ModelConfig(n_layer=8, n_head=4, d_model=64, context_length=64, tie_embeddings=False), 256
)


@functools.cache
@pytest.mark.parametrize("kind", ["a bias", "joined biases"])
def test_gradients_over_rows_in_bfloat16_are_summed_in_float32(kind):
    """Each of 16,384 rows adds 1 to the sum over them; in bfloat16 many would be lost."""
    rows = jnp.ones((64, 256, 2), jnp.bfloat16)
    linear = Linear(("embed", "mlp"), (2, 3), std=0.02, bias=True, dtype="bfloat16")
    modules = {"a bias": [linear], "joined biases": [linear, linear]}[kind]
    graph, state = nnx.split(nnx.List(modules))

    def total(state, rows, one):
        modules = list(nnx.merge(graph, state))
        joined = kind == "joined biases"
        outputs = apply_side_by_side(modules, rows) if joined else [modules[0](rows)]
        return sum(jnp.sum((one * output).astype(jnp.float32)) for output in outputs)

    # The factor is an argument: the sum of a constant would be multiplied out.
    one = jnp.ones((64, 256, 1), jnp.bfloat16)
    flat = nnx.to_flat_state(jax.jit(jax.grad(total))(state, rows, one))
    found = [leaf[...] for path, leaf in flat if path[-1] == "bias"]
    expected = {"a bias": 16384.0, "joined biases": 32768.0}[kind]
    for gradient in found:
        np.testing.assert_array_equal(gradient, np.full(gradient.shape, expected))
    assert found


def fresh(spec, seed=0):
    params = jax.jit(initialise, static_argnums=0)(spec, jax.random.key(seed))
    return {name: np.asarray(value) for name, value in params.items()}


def test_initial_weights_are_gpt2s():
    """N(0, 0.02^2), residual projections N(0, 0.02^2 / (2 L)), biases 0, scales 1."""
    for name, value in fresh(BIG).items():
        if name.endswith("scale"):
            assert np.all(value == 1.0)
        elif name.endswith("bias"):
            assert np.all(value == 0.0)
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            z, n = value.ravel() / std, value.size
            # Five standard errors of the mean, the variance and the fourth moment of a normal.
            assert abs(z.mean()) < 5 / math.sqrt(n), name
            assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / n), name
            assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n), name


def test_no_two_initial_weights_are_alike():
    draws = [value.ravel()[:100] for value in fresh(BIG).values() if value.ndim == 2]
    normalised = np.stack([draw / draw.std() for draw in draws])
    correlation = np.corrcoef(normalised) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.5


def test_an_initial_weight_depends_on_its_name_its_shape_and_the_seed_alone():
    other_mlp = dataclasses.replace(
        BIG, config=BIG.config.model_copy(update={"activation": "swiglu", "d_ff": 32, "n_layer": 4})
    )
    one, other = fresh(BIG), fresh(other_mlp)
    name = "blocks.1.attention.query.weight"
    np.testing.assert_array_equal(one[name], other[name])
    assert np.any(one[name] != fresh(BIG, seed=1)[name])


def test_residual_projections_may_start_at_zero():
    config = BIG.config.model_copy(update={"zero_init_projections": True, "n_layer": 1})
    assert residual_std(config) == 0.0
    for name, value in fresh(ModelSpec(config, 256)).items():
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            assert np.all(value == 0.0)
        elif value.ndim == 2:
            assert np.std(value) > 0.01


@functools.partial(jax.jit, static_argnums=0)
def hidden_with_dropout(spec, params, tokens, key):
    return bind(spec, params).hidden_and_routing(tokens, dropout_key=key)[0]


DROPOUT_RATE = 0.3


def dropped(*ones, key, identity=()):
    """bool [B, T, D], where the output of a two-layer model is zero.

    All its weights are zero but those named, so its stream is one everywhere but where something
    was dropped, and its final RMSNorm keeps zeros.
    """
    config = ModelConfig(**SMALL, positions="none", norm="rmsnorm", dropout=DROPOUT_RATE)
    spec = ModelSpec(config, VOCAB)
    params = {name: jnp.zeros(leaf.shape) for name, leaf in abstract_params(spec).items()}
    for name in (*ones, "final_norm.scale"):
        params[name] += 1.0
    for name in identity:
        params[name] += jnp.eye(16)
    tokens = some_tokens(rows=200)
    return np.asarray(hidden_with_dropout(spec, params, tokens, key)) == 0.0


def share_is(found, expected, draws):
    """Within five standard errors of a binomial share."""
    return abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)


def test_dropout_reaches_embeddings_and_every_branch_each_with_a_draw_of_its_own():
    parts = ["embed.weight"] + [
        f"blocks.{layer}.{part}.bias" for layer in (0, 1) for part in ("attention.out", "mlp.down")
    ]
    masks = [dropped(part, key=jax.random.key(0)) for part in parts]
    masks.append(dropped("embed.weight", key=jax.random.key(1)))
    for one in range(len(masks)):
        assert share_is(masks[one].mean(), DROPOUT_RATE, masks[one].size)
        for other in range(one):
            both = (masks[one] & masks[other]).mean()
            assert share_is(both, DROPOUT_RATE**2, masks[one].size)


def test_dropout_reaches_attention_weights():
    """The first position looks at itself alone: there its output is dropped head by head, and then
    feature by feature on the branch."""
    mask = dropped(
        "blocks.1.attention.value.bias", identity=["blocks.1.attention.out.weight"],
        key=jax.random.key(0),
    )[:, 0].reshape(200, 4, 4)  # fmt: skip
    whole_heads = mask.all(-1).mean()
    assert share_is(whole_heads, DROPOUT_RATE + 0.7 * DROPOUT_RATE**4, mask[..., 0].size)


def test_nothing_is_dropped_without_a_key():
    mask = dropped("embed.weight", key=None)
    assert not mask.any()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_equals_float64_numpy(kind):
    """Also far from zero, where a one-pass variance would cancel."""
    random = np.random.default_rng(0)
    x = 100.0 + random.normal(size=(2, 3, 16))
    norm = Norm(kind, 16, epsilon=1e-5, bias=True)
    scale, bias = random.normal(size=16), random.normal(size=16)
    norm.scale[...] = jnp.float32(scale)
    parameters = {"n.scale": scale}
    if kind == "layernorm":
        norm.bias[...] = jnp.float32(bias)
        parameters["n.bias"] = bias
    config = ModelConfig(norm=kind, norm_epsilon=1e-5)
    expected = reference_norm(config, parameters, "n", np.float64(np.float32(x)))
    np.testing.assert_allclose(norm(jnp.float32(x)), expected, atol=1e-4)
    narrow = norm(jnp.asarray(x, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


@pytest.mark.parametrize("centered", [True, False])
def test_the_gradient_of_a_norm_is_that_of_its_formula(centered):
    """Automatic differentiation of the formula, as it is written, is the oracle."""

    def plainly(x, scale):
        y = x - x.mean(-1, keepdims=True) if centered else x
        return scale[None, None] * y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-5)

    random = np.random.default_rng(0)
    x, up = jnp.float32(3.0 + random.normal(size=(2, 2, 3, 16)))
    scale = jnp.float32(random.normal(size=16))
    of_x, of_scale = jax.vjp(lambda *a: normalise(*a, centered, 1e-5), x, scale)[1](up)
    expected_x, expected_scale = jax.vjp(plainly, x, scale)[1](up)
    np.testing.assert_allclose(of_x, expected_x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_scale, expected_scale, rtol=1e-5, atol=1e-5)


@every_model
def test_every_weight_names_its_axes(name):
    spec = spec_of(name)
    axes = logical_axes(spec)
    for weight, leaf in abstract_params(spec).items():
        assert len(axes[weight]) == len(leaf.shape), weight
