"""Cached decoding against full passes in numpy, and the promises of a batch: rows share nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.config import MeshConfig
from llm.errors import NonFiniteError, UsageError
from llm.inference import decode
from llm.inference.decode import Decoder, Request, encode_prompt, round_up
from llm.inference.filters import CANDIDATES
from llm.inference.programs import decode_chunk, empty, for_decoding, prefill_piece
from llm.inference.records import Sampling
from llm.model.gpt import GPT, ModelSpec, bind, initialise, logical_axes
from llm.model.layers import filled_up_product, rows_product
from llm.model.sharding import make_mesh, tree_shardings
from llm.model_config import ModelConfig
from llm.text.tokenizer import ByteTokenizer, CharacterTokenizer

CONTEXT, VOCAB = 48, 257
GPT2 = ModelConfig(n_layer=2, n_head=2, d_model=32, context_length=CONTEXT)
LLAMA = ModelConfig(
    n_layer=1, n_head=4, n_kv_head=2, d_model=32, context_length=CONTEXT, positions="rotary",
    norm="rmsnorm", bias=False, activation="swiglu", qk_norm=True, tie_embeddings=False,
    logit_soft_cap=15.0,
)  # fmt: skip
MIXTURE = ModelConfig(
    n_layer=1, n_head=2, d_model=32, context_length=CONTEXT, positions="rotary",
    activation="swiglu", n_expert=4, n_expert_active=2,
)  # fmt: skip


def make(config, scale=6.0):
    """A random model whose distributions are far from flat."""
    spec = ModelSpec(config, VOCAB)
    params = jax.jit(initialise, static_argnums=0)(spec, jax.random.key(0))
    params = {name: scale * w if w.ndim > 1 else w for name, w in params.items()}
    return spec, params, Decoder.create(spec, params, ByteTokenizer())


@pytest.fixture(scope="module")
def gpt2():
    return make(GPT2)


@pytest.fixture(scope="module")
def decoder(gpt2):
    return gpt2[2]


def full_logprobs(spec, params, ids):
    """float64 log-softmax of one full pass: [len(ids), V]; row t scores the token at t + 1."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(_full_pass(spec, params, padded)[0, : len(ids)], np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


_full_pass = jax.jit(lambda spec, params, ids: bind(spec, params)(ids), static_argnums=0)


def collect(decoder, requests):
    """Row -> (tokens, finish) of a call."""
    tokens, finishes = [[] for _ in requests], [None] * len(requests)
    for progress in decoder.generate(requests):
        assert finishes[progress.row] is None, "a row went on after its end"
        tokens[progress.row] += progress.tokens
        finishes[progress.row] = progress.finish
    assert None not in finishes
    return list(zip(tokens, finishes, strict=True))


def ids_of(tokens):
    return [token.id for token in tokens]


def text_of(tokens):
    return "".join(token.text for token in tokens)


# Few shapes for the whole file: what takes the time is compilation.
PROMPT = np.array([72, 101, 108, 108, 111], np.int32)
WATCH = (0, 256, 70)
SAMPLING = Sampling(temperature=0.9, top_k=60, top_p=0.95, min_p=0.001, seed=5)


@pytest.mark.thorough
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_every_number_equals_a_full_pass_in_float64(config, gpt2):
    spec, params, decoder = gpt2 if config is GPT2 else make(config)
    request = Request(PROMPT, SAMPLING, max_new_tokens=30, top=7, watch=WATCH)
    [(tokens, finish)] = collect(decoder, [request])
    assert (finish, len(tokens)) == ("length", 35)
    assert ids_of(tokens)[:5] == PROMPT.tolist()
    assert tokens[0].logprob is None
    logprobs = full_logprobs(spec, params, ids_of(tokens))
    for row, token in zip(logprobs, tokens[1:], strict=False):
        check_prediction(row, token)


def check_prediction(row, token):
    said = token
    order = np.lexsort((np.arange(VOCAB), -row))
    rank_of = np.empty(VOCAB, int)
    rank_of[order] = 1 + np.arange(VOCAB)
    assert abs(said.logprob - row[token.id]) < 1e-4
    assert said.rank == rank_of[token.id]
    assert abs(said.entropy + (np.exp(row) * row).sum()) < 1e-4

    weights = np.exp((row[order] - row[order[0]]) / SAMPLING.temperature)[: SAMPLING.top_k]
    sums = np.cumsum(weights) / weights.sum()
    kept = min(1 + (sums < SAMPLING.top_p).sum(), (weights >= SAMPLING.min_p).sum())
    assert said.kept_tokens == kept
    assert abs(said.kept_mass - np.exp(row[order[:kept]]).sum()) < 1e-4
    if token.phase == "prompt":
        assert said.sampling_logprob is None
    else:
        place = rank_of[token.id] - 1
        assert place < kept, "a token that was cut was drawn"
        stated = np.log(weights[place] / weights[:kept].sum())
        assert abs(said.sampling_logprob - stated) < 2e-4

    expected = [*order[:7], *sorted((v for v in WATCH if rank_of[v] > 7), key=lambda v: rank_of[v])]
    assert [rival.id for rival in said.top] == [int(v) for v in expected]
    assert [rival.rank for rival in said.top] == [int(rank_of[v]) for v in expected]
    for rival in said.top:
        assert abs(rival.logprob - row[rival.id]) < 1e-4


MIXED = [
    Request(PROMPT, Sampling(0.8, top_p=0.9, seed=1), 0, max_new_tokens=20, top=3, watch=WATCH),
    Request(PROMPT[:1], Sampling(0.0), 1, max_new_tokens=12, top=10, watch=WATCH[:1]),
    Request(range(30, 46), Sampling(1.2, 5, seed=2), 7, max_new_tokens=25, top=0, watch=WATCH),
]
GREEDY = Request(PROMPT, Sampling(0.0), max_new_tokens=20, top=3, watch=WATCH)


@pytest.mark.thorough
def test_a_batch_of_mixed_requests_equals_each_alone(decoder):
    together = collect(decoder, MIXED)
    for request, (tokens, finish) in zip(MIXED, together, strict=True):
        [(alone, finish_alone)] = collect(decoder, [request])
        assert (ids_of(alone), finish_alone) == (ids_of(tokens), finish)
        for a, b in zip(alone[1:], tokens[1:], strict=True):
            assert abs(a.logprob - b.logprob) < 1e-4
            assert len(a.top) == len(b.top)
            assert a.rank == b.rank


def test_sample_i_is_the_same_among_any_number_of_samples(decoder):
    def samples(count):
        return [
            dataclasses.replace(MIXED[0], index=i, sampling=Sampling(seed=9)) for i in range(count)
        ]

    four = [ids_of(tokens) for tokens, _ in collect(decoder, samples(4))]
    three = [ids_of(tokens) for tokens, _ in collect(decoder, samples(3))]
    [(last, _)] = collect(decoder, samples(4)[3:])
    assert three == four[:3]
    assert ids_of(last) == four[3]
    assert len({tuple(ids) for ids in four}) == 4


def test_a_longer_prompt_of_its_own_words_goes_on_in_the_same_way(decoder):
    """Noise belongs to the position in the text, so a sample can be continued from any place."""
    [(whole, _)] = collect(decoder, [MIXED[0]])
    begun = dataclasses.replace(MIXED[0], prompt=ids_of(whole)[:8], max_new_tokens=6)
    [(continued, _)] = collect(decoder, [begun])
    assert len(whole) >= 14
    assert ids_of(continued) == ids_of(whole)[:14]


def test_asking_for_numbers_does_not_change_what_is_drawn(decoder):
    for request in MIXED:
        [(with_, _)] = collect(decoder, [request])
        [(without, _)] = collect(decoder, [dataclasses.replace(request, top=None)])
        assert ids_of(with_) == ids_of(without)
        assert all(token.logprob is None for token in without)


def test_no_sampling_flag_changes_a_log_probability_by_a_bit(decoder):
    """Of each prompt token, and of the likeliest and the watched ones at every place."""
    settings = [
        Sampling(1.0), Sampling(0.3), Sampling(0.0), Sampling(3.0, top_k=2),
        Sampling(1.0, top_p=0.1), Sampling(0.7, min_p=0.5),
        Sampling(1.0, top_k=100, top_p=0.99, seed=8),
    ]  # fmt: skip

    def said(sampling):
        request = Request(PROMPT, sampling, max_new_tokens=1, top=16, watch=WATCH)
        [(tokens, _)] = collect(decoder, [request])
        numbers = [(t.entropy, [(a.id, a.logprob, a.rank) for a in t.top]) for t in tokens[1:]]
        return numbers, [t.logprob for t in tokens[1:-1]]

    first = said(settings[0])
    assert len(first[0]) == len(PROMPT)
    for sampling in settings[1:]:
        assert said(sampling) == first


def test_greedy_and_its_equivalents_say_the_same_to_the_bit(decoder):
    def said(sampling):
        [(tokens, _)] = collect(decoder, [dataclasses.replace(GREEDY, sampling=sampling)])
        return [(t.id, t.logprob, t.rank, t.top) for t in tokens[1:]]

    greedy = said(Sampling(0.0))
    assert all(rank == 1 for _, _, rank, _ in greedy[4:])
    for sampling in (Sampling(2.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(0.5, min_p=1.0)):
        assert said(sampling) == greedy


def test_prompts_longer_than_a_piece_are_read_whole(gpt2, monkeypatch):
    monkeypatch.setattr(decode, "PIECE", 16)
    spec, params, decoder = gpt2
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, 40)).astype(np.int32)
    prompts = [ids[0], ids[1][:17], ids[2][:3]]
    requests = [
        Request(prompt, SAMPLING, i, max_new_tokens=6, top=0, watch=WATCH)
        for i, prompt in enumerate(prompts)
    ]
    for prompt, (tokens, _) in zip(prompts, collect(decoder, requests), strict=True):
        logprobs = full_logprobs(spec, params, ids_of(tokens))
        assert len(tokens) == len(prompt) + 6
        for row, token in zip(logprobs, tokens[1:], strict=False):
            assert abs(token.logprob - row[token.id]) < 1e-4


def test_stop_strings_cut_cleanly_across_tokens(decoder):
    [(tokens, _)] = collect(decoder, [GREEDY])
    generated = text_of(tokens[5:])
    stop = generated[6:9]
    end = generated.find(stop)
    [(cut, finish)] = collect(decoder, [dataclasses.replace(GREEDY, stop=["never", stop])])
    assert finish == "stop"
    assert text_of(cut) == "Hello" + generated[:end]
    # The tokens that spell the stop string have their places, the one that completes it is last.
    assert ids_of(cut) == ids_of(tokens)[: len(cut)]
    completing = next(n for n in range(len(tokens)) if stop in text_of(tokens[5 : n + 1]))
    assert len(cut) == completing + 1


def test_a_stop_string_counts_in_what_is_written_not_in_the_prompt(decoder):
    request = dataclasses.replace(GREEDY, max_new_tokens=4, stop=["ell"])
    [(_, finish)] = collect(decoder, [request])
    assert finish == "length"


def test_end_of_text_ends_a_sample_and_is_its_last_token(decoder):
    [(tokens, _)] = collect(decoder, [GREEDY])
    tokenizer = ByteTokenizer()
    drawn = ids_of(tokens)[5:]
    tokenizer.end_of_text = drawn[4]
    ended = dataclasses.replace(decoder, tokenizer=tokenizer)
    [(short, finish)] = collect(ended, [GREEDY])
    assert finish == "end_of_text"
    assert ids_of(short)[5:] == drawn[: drawn.index(drawn[4]) + 1]
    assert short[-1].logprob is not None


def test_finish_reasons_at_the_edges(decoder):
    def finish(length, count):
        request = Request([65] * length, max_new_tokens=count)
        [(tokens, finish)] = collect(decoder, [request])
        return finish, len(tokens)

    assert finish(CONTEXT - 3, 3) == ("length", CONTEXT)
    assert finish(CONTEXT - 3, 4) == ("context", CONTEXT)
    assert finish(CONTEXT - 3, 10**12) == ("context", CONTEXT)
    assert finish(CONTEXT, 5) == ("context", CONTEXT)
    assert finish(4, 0) == ("length", 4)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([65] * (CONTEXT + 5)), [str(CONTEXT + 5), str(CONTEXT), "by 5"]),
        (Request([]), ["at least one"]),
        (Request([1, VOCAB]), [str(VOCAB), "256"]),
        (Request([1], watch=[-1]), ["watch", "-1"]),
        (Request([1], stop=["a", ""]), ["stop"]),
    ],
    ids=["long prompt", "no prompt", "unknown id", "unknown watch", "empty stop"],
)
def test_requests_that_cannot_be_served_say_why(decoder, request_, words):
    with pytest.raises(UsageError) as error:
        next(decoder.generate([request_]))
    assert all(word in str(error.value) for word in words)


def test_a_model_of_nan_says_so(gpt2):
    spec, params, _ = gpt2
    broken = params | {"final_norm.scale": params["final_norm.scale"] * jnp.nan}
    decoder = Decoder.create(spec, broken, ByteTokenizer())
    for request in (GREEDY, dataclasses.replace(GREEDY, top=None)):
        with pytest.raises(NonFiniteError):
            collect(decoder, [request])


@pytest.mark.thorough
@pytest.mark.parametrize("devices", [1, 2])
def test_a_generation_of_many_chunks_compiles_its_programs_once(gpt2, devices, monkeypatch):
    """A second compilation of the same program would double the wait for the first token."""
    monkeypatch.setattr(decode, "CHUNK_SECONDS", 0.0)  # one token in each chunk
    spec, params, decoder = gpt2
    if devices > 1:
        mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
        spread = jax.device_put(params, tree_shardings(mesh, logical_axes(spec)))
        decoder = Decoder.create(spec, spread, ByteTokenizer())
    before = decode_chunk._cache_size(), prefill_piece._cache_size()
    request = Request(PROMPT, SAMPLING, max_new_tokens=4, top=0, watch=range(40))
    [(tokens, _)] = collect(decoder, [request])
    assert len(tokens) == len(PROMPT) + 4
    assert (decode_chunk._cache_size(), prefill_piece._cache_size()) == tuple(n + 1 for n in before)


@pytest.mark.thorough
def test_a_step_neither_sorts_the_vocabulary_nor_joins_weights_nor_transposes_the_cache():
    """On a CPU each takes as long as much of what the model computes for a token."""
    spec = ModelSpec(GPT2, 1000)
    decoder = Decoder.create(spec, initialise(spec, jax.random.key(0)), ByteTokenizer())
    batch = decoder.batch([Request(PROMPT, SAMPLING)])
    state = empty(decoder.spec, decoder.params, 1, CONTEXT)
    alive_B = np.ones(1, bool)
    program = decode_chunk.lower(
        decoder.spec, decoder.params, state, batch.settings, batch.watch_BW, alive_B, 1, 0, top=None
    )
    text = program.compile().as_text()
    assert f"f32[1,{CANDIDATES}]" in text and " sort(" not in text
    D = GPT2.d_model
    assert f"f32[{D},{4 * D}]" in text and f"f32[{D},{3 * D}]" not in text
    N, H, S = GPT2.n_head, spec.config.head_size, state.cache.capacity
    assert f"f32[1,{N},{S},{H}]" in text
    assert f"[{N},{H},{S}]" not in text and f"[1,{N},{H},{S}]" not in text
    assert f"[{S},{N},{H}]" not in text and f"[1,{S},{N},{H}]" not in text


@pytest.mark.thorough
def test_parameters_spread_over_a_mesh_give_the_same_samples(gpt2):
    spec, params, decoder = gpt2
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    spread = jax.device_put(params, tree_shardings(mesh, logical_axes(spec)))
    spread_decoder = Decoder.create(spec, spread, ByteTokenizer())
    [(one, _)] = collect(decoder, MIXED[:1])
    [(many, _)] = collect(spread_decoder, MIXED[:1])
    assert ids_of(one) == ids_of(many)
    for a, b in zip(one[1:], many[1:], strict=True):
        assert abs(a.logprob - b.logprob) < 1e-4


def test_preparation_for_decoding_keeps_the_function(gpt2):
    spec, params, _ = gpt2
    prepared_spec, prepared = for_decoding(spec, params)
    ids = np.arange(CONTEXT)[None]
    before, after = _full_pass(spec, params, ids), _full_pass(prepared_spec, prepared, ids)
    np.testing.assert_allclose(before, after, atol=1e-5)
    assert isinstance(bind(prepared_spec, prepared), GPT)
    half = dataclasses.replace(spec, compute_dtype="bfloat16")
    dtypes = {name: weight.dtype for name, weight in for_decoding(half, params)[1].items()}
    assert dtypes["blocks.0.mlp.up.weight"] == dtypes["head.weight"] == jnp.bfloat16
    assert dtypes["embed.weight"] == dtypes["final_norm.scale"] == jnp.float32


def test_a_few_rows_multiply_as_many_do():
    """By the way of a GPU, whose program is looked at: it has none that multiplies a single row."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(7, 32)), rng.normal(size=(32, 48))
    for rows in (1, 2, 7):
        arrays = x[:rows].astype(np.float32), weight.astype(np.float32)
        found = filled_up_product(jnp.matmul, *arrays)
        np.testing.assert_allclose(found, x[:rows] @ weight, atol=1e-5)
    product = jax.jit(functools.partial(rows_product, preferred_element_type="float32"))
    traced = product.trace(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays))
    on = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu")}
    assert "tensor<8x48xf32>" in on["cuda"] and "tensor<8x48xf32>" not in on["cpu"]


def test_the_empty_prompt_starts_from_an_end_of_text_or_a_newline():
    assert encode_prompt(ByteTokenizer(), "").tolist() == [256]
    assert encode_prompt(ByteTokenizer(), "a").tolist() == [97]
    assert encode_prompt(CharacterTokenizer("b\na"), "").tolist() == [0]
    with pytest.raises(UsageError, match="give a prompt"):
        encode_prompt(CharacterTokenizer("ab"), "")


def test_sizes_are_rounded_to_powers_of_two():
    assert [round_up(n) for n in (0, 1, 2, 3, 5, 64, 65)] == [0, 1, 2, 4, 8, 64, 128]
    assert [round_up(n, at_least=16) for n in (0, 1, 17)] == [0, 16, 32]
