"""The fields of requests that vLLM has, against the decoder, numpy in float64 and transformers;
the tokenizer's paths; texts longer than the context."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import test_serve
from test_serve import CONTEXT, stream

from llm.inference.records import Sampling
from llm.inference.score import Scorer
from llm.model.gpt import bind
from llm.serving.limits import Limits
from llm.serving.requests import APIError, CompletionRequest, parse, prompt_ids
from llm.serving.tokenization import Tokenize, tokenizer_info
from llm.text.bpe import train_bpe
from llm.text.tokenizer import ByteTokenizer, CharacterTokenizer

VOCAB, END = 257, 256
running = test_serve.running


def choice_of(running, **fields):
    answer = running.post(**fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def full_logprobs(running, ids):
    """float64 log-softmax of one full pass: [len(ids), V]; row t scores the token at t + 1."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(_full_pass(running.spec, running.params, padded)[0], np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))[: len(ids)]


_full_pass = jax.jit(lambda spec, params, ids: bind(spec, params)(ids), static_argnums=0)


def test_the_models_list_says_how_long_a_text_may_be(running):
    assert running.http.get("/v1/models").json()["data"][0]["max_model_len"] == CONTEXT


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1}, {"repetition_penalty": 1}, {"logit_bias": {}}, {"logit_bias": {"5": 0}},
        {"stream_options": {"include_usage": None}}, {"stream_options": {}}, {"min_tokens": 0},
        {"stream_options": {"include_usage": False}}, {"stop": []}, {"stop_token_ids": []},
        {"n": 1, "best_of": 1}, {"use_beam_search": False, "length_penalty": 1.0},
        {"skip_special_tokens": True, "bad_words": [], "prompt_logprobs": None},
        {"logprob_token_ids": [], "ignore_eos": False, "echo": None, "early_stopping": False},
        {"response_format": {"type": "text"}, "priority": 0, "allowed_token_ids": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_nothing_is_taken(running, fields):
    plain = {"prompt": "Hello", "max_tokens": 4, "seed": 3}
    assert choice_of(running, **plain, **fields) == choice_of(running, **plain)


def test_token_ids_come_with_the_text(running):
    fields = {"prompt": ["Hi", "\u00e9"], "max_tokens": 6, "seed": 2, "return_token_ids": True}
    whole = running.post(**fields).json()["choices"]
    for choice, prompt in zip(whole, fields["prompt"], strict=True):
        assert choice["prompt_token_ids"] == list(prompt.encode())
        text = bytes(id_ for id_ in choice["token_ids"] if id_ < 256).decode("utf-8", "replace")
        assert choice["text"] == text and len(choice["token_ids"]) == 6
    events = stream(running, **fields)
    for choice in whole:
        parts = [p for e in events for p in e["choices"] if p["index"] == choice["index"]]
        assert [id_ for part in parts for id_ in part["token_ids"]] == choice["token_ids"]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any("prompt_token_ids" in part for part in parts[1:])
    assert "token_ids" not in choice_of(running, prompt="a")


def test_prompt_logprobs_are_vllms_with_ranks(running):
    ids = list(b"To be, or not")
    expected = full_logprobs(running, ids)
    fields = {"prompt": "To be, or not", "max_tokens": 1, "prompt_logprobs": 3, "temperature": 0}
    choice = choice_of(running, **fields)
    assert "To be" not in choice["text"] and choice["logprobs"] is None
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == len(ids) - 1
    for row, id_, listed in zip(expected, ids[1:], rest, strict=False):
        order = np.argsort(-row, kind="stable")
        assert list(listed) == list(dict.fromkeys(map(str, [id_, *order[:3].tolist()])))
        for key, entry in listed.items():
            assert entry["logprob"] == pytest.approx(row[int(key)], abs=1e-4)
            assert entry["rank"] == 1 + int(np.flatnonzero(order == int(key))[0])
            assert entry["decoded_token"]
    events = stream(running, **fields)
    assert events[0]["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]


def test_watched_ids_are_listed_at_any_rank_also_of_an_echoed_prompt(running):
    watch = [7, 65, 256, 3, 250, 100]  # more than four: a width of its own would be compiled
    ids = list(b"abc")
    choice = choice_of(
        running, prompt="abc", echo=True, max_tokens=3, logprobs=1, prompt_logprobs=0,
        logprob_token_ids=watch, seed=1, return_token_ids=True,
    )  # fmt: skip
    ids += choice["token_ids"]
    names = [ByteTokenizer().token_name(id_) for id_ in watch]
    names = [name if len(name) == 1 or "<" in name else "bytes:\\xfa" for name in names]
    rows = full_logprobs(running, ids)
    assert len(choice["logprobs"]["top_logprobs"]) == 6
    for row, top in zip(rows, choice["logprobs"]["top_logprobs"][1:], strict=False):
        for name, id_ in zip(names, watch, strict=True):
            assert top[name] == pytest.approx(row[id_], abs=1e-4)
    for row, listed in zip(rows, choice["prompt_logprobs"][1:], strict=False):
        for id_ in watch:
            rank = 1 + int((row > row[id_]).sum())
            assert listed[str(id_)]["logprob"] == pytest.approx(row[id_], abs=1e-4)
            assert listed[str(id_)]["rank"] == rank
    records = running.post(
        prompt="abc", echo=True, max_tokens=0, records=2, logprob_token_ids=watch
    ).json()["records"]
    assert {*watch} <= {entry["id"] for entry in records[2]["top"]}


def test_a_token_that_stops_is_said_and_cut_or_kept(running):
    plain = {"prompt": "z", "max_tokens": 30, "seed": 5, "return_token_ids": True}
    ids = choice_of(running, **plain)["token_ids"]
    stop = next(id_ for place, id_ in enumerate(ids) if place > 6 and id_ not in ids[:place])
    place = ids.index(stop)
    for kept in (False, True):
        choice = choice_of(running, **plain, stop_token_ids=[stop], include_stop_str_in_output=kept)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert choice["token_ids"] == ids[: place + 1]
        text = bytes(ids[: place + kept]).decode("utf-8", "replace")
        assert choice["text"] == text
    events = stream(running, **plain, stop_token_ids=[stop])
    assert events[-1]["choices"][0]["stop_reason"] == stop
    assert choice_of(running, **plain)["stop_reason"] is None


def test_a_stop_string_is_said_and_cut_or_kept(running):
    plain = {"prompt": "z", "max_tokens": 40, "temperature": 0}
    whole = choice_of(running, **plain)["text"]
    stop = whole[9:11]
    for kept in (False, True):
        choice = choice_of(running, **plain, stop=["never", stop], include_stop_str_in_output=kept)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert choice["text"] == whole[: whole.index(stop) + len(stop) * kept]
    # The first min_tokens are not searched.
    texts = [token.text for token in running.tokens(list(b"z"), Sampling(0.0), 40)[1:]]
    rest = "".join(texts[15:])
    stop = rest[3:5]
    choice = choice_of(running, **plain, stop=stop, min_tokens=15)
    assert choice["text"] == "".join(texts[:15]) + rest[: rest.index(stop)]


def test_an_end_of_text_is_forced_passed_over_and_forbidden(running):
    """A bias of 100 draws it at once; the model's own number stays in the record."""
    fields = {"prompt": "abc", "max_tokens": 5, "logit_bias": {str(END): 100}, "seed": 1}
    ask = {"return_token_ids": True, "records": 3}
    answer = running.post(**fields, **ask).json()
    [choice] = answer["choices"]
    assert (choice["token_ids"], choice["finish_reason"]) == ([END], "stop")
    assert choice["stop_reason"] is None
    head, token, end = answer["records"]
    row = full_logprobs(running, list(b"abc"))[-1]
    assert token["logprob"] == pytest.approx(row[END], abs=1e-4) and end["finish"] == "end_of_text"
    assert token["rank"] == 1 + int((row > row[END]).sum())
    assert head["sampling"]["logit_bias"] == {str(END): 100.0}
    assert choice_of(running, **fields, **ask, ignore_eos=True)["token_ids"] == [END] * 5
    least = choice_of(running, **fields, **ask, min_tokens=3)["token_ids"]
    assert len(least) == 4 and least[3] == END and END not in least[:3]
    free = {"prompt": "abc", "max_tokens": 4, "min_tokens": 3, "records": 0}
    records = running.post(**free).json()["records"]
    assert [r["kept_tokens"] for r in records if r["type"] == "token"] == [VOCAB - 1] * 3 + [VOCAB]
    # Where ends are ignored, only stop_token_ids end a sample, and wait for min_tokens.
    fields["logit_bias"] = {"65": 100}
    stopped = choice_of(running, **fields, **ask, stop_token_ids=[65], min_tokens=2)
    assert stopped["token_ids"][-1] == 65 and 65 not in stopped["token_ids"][:2]
    assert stopped["stop_reason"] == 65


def test_biased_draws_are_those_of_transformers(running):
    """The stated probability of each drawn token against transformers' processors in float64."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    bias = {65: 3.5, 66: -100.0, 200: 5.0, END: 2.0, 10: 4.0}
    fields = {
        "prompt": "Hello", "max_tokens": 12, "min_tokens": 6, "temperature": 0.7, "top_k": 40,
        "top_p": 0.9, "seed": 11, "logit_bias": {str(k): v for k, v in bias.items()}, "records": 12,
        "ignore_eos": False,
    }  # fmt: skip
    records = running.post(**fields, n=4).json()["records"]
    steer = processors.SequenceBiasLogitsProcessor([[[k], v] for k, v in bias.items()])
    seen = 0
    for sample in range(4):
        tokens = [r for r in records if r["type"] == "token" and r["sample"] == sample]
        ids = [*b"Hello", *(token["id"] for token in tokens)]
        rows = full_logprobs(running, ids)[4:]
        for place, (row, token) in enumerate(zip(rows, tokens, strict=False)):
            given = torch.tensor([ids[: 5 + place]])
            scores = steer(given, torch.tensor(row[None]))
            least = processors.MinNewTokensLengthLogitsProcessor(5, 6, END, device="cpu")
            scores = least(given, scores)
            for warp in (
                processors.TemperatureLogitsWarper(0.7),
                processors.TopKLogitsWarper(40),
                processors.TopPLogitsWarper(0.9),
            ):
                scores = warp(given, scores)
            expected = torch.log_softmax(scores, dim=-1)[0].numpy()
            assert token["sampling_logprob"] == pytest.approx(expected[token["id"]], abs=2e-4)
            assert token["logprob"] == pytest.approx(row[token["id"]], abs=1e-4)
            assert token["kept_tokens"] == np.isfinite(expected).sum()
            kept = np.exp(row[np.isfinite(expected)]).sum()
            assert token["kept_mass"] == pytest.approx(kept, abs=1e-4)
            for entry in token["top"]:
                assert entry["kept"] == bool(np.isfinite(expected[entry["id"]]))
                seen += entry["kept"] != (entry["rank"] <= token["kept_tokens"])
    assert seen, "the bias changed no ranking"


def test_a_bias_of_one_request_changes_no_other(running):
    fields = {"prompt": "Hello", "max_tokens": 20, "seed": 8, "temperature": 0.9}
    alone = choice_of(running, **fields)
    with ThreadPoolExecutor(2) as pool:
        biased = pool.submit(choice_of, running, **fields, logit_bias={"65": 100})
        assert choice_of(running, **fields) == alone
        assert set(biased.result()["text"]) == {"A"}


@pytest.mark.parametrize("length", [CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT, 337])
def test_a_text_longer_than_the_context_is_scored_as_the_command_scores_it(running, length):
    words = "It was a bright cold day in April, and the clocks were striking thirteen. "
    text = (words * 6)[:length]
    scorer = Scorer(running.spec, running.params, ByteTokenizer(), top=2)
    [tokens] = scorer.score([list(text.encode())])
    expected = [token.logprob for token in tokens]
    choice = choice_of(running, prompt=text, max_tokens=0, echo=True, logprobs=2, prompt_logprobs=1)
    assert choice["text"] == text and choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"][0] is None
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:], expected[1:], atol=1e-4)
    for token, listed in zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True):
        assert listed[str(token.id)]["rank"] == token.rank
    assert choice_of(running, prompt=text, max_tokens=0, echo=True)["text"] == text
    refused = running.post(prompt=text, max_tokens=1, prompt_logprobs=1)
    assert refused.status_code == 400 and "max_tokens = 0" in refused.json()["error"]["message"]


def test_a_long_text_holds_no_other_request_up(running, monkeypatch):
    """Its windows are read one at a time, and who came later goes in between."""
    order = []
    begin = type(running.engine)._admit

    def admit(engine):
        if len(order) == 1:
            test_serve.until(lambda: engine.queued == 2)
        begin(engine)
        order.extend(len(ticket.request.prompt) for ticket in engine._group)

    monkeypatch.setattr(type(running.engine), "_admit", admit)
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(choice_of, running, prompt="x" * 400, max_tokens=0, prompt_logprobs=0)
        test_serve.until(lambda: order)
        short = choice_of(running, prompt="ab", max_tokens=2, temperature=0)
        assert len(long.result()["prompt_logprobs"]) == 400 and short["text"]
    assert order.count(400) == 8 and order.index(2) < 3


@pytest.mark.parametrize(
    "text", ["", "Hello", "\u4f60\u597d \U0001f600", "a<|endoftext|>b", " \n\t"], ids=ascii
)
def test_texts_become_ids_and_texts_again(running, text):
    answer = running.http.post("/tokenize", json={"prompt": text, "return_token_strs": True})
    ids = list(text.encode())
    assert answer.json() == {
        "tokens": ids, "count": len(ids), "max_model_len": CONTEXT,
        "token_strs": [ByteTokenizer().token_name(id_) for id_ in ids],
    }  # fmt: skip
    back = running.http.post("/detokenize", json={"model": "mine", "tokens": ids}).json()
    assert back == {"prompt": text}


def test_the_spelling_of_a_special_token_alone_is_that_token(running):
    for special in (True, False):
        fields = {"prompt": "<|endoftext|>", "add_special_tokens": special}
        assert running.http.post("/tokenize", json=fields).json()["tokens"] == [END]
    info = running.http.get("/tokenizer_info").json()
    assert info["eos_token"] == info["bos_token"] == "<|endoftext|>"
    assert (info["vocab_size"], info["model_max_length"]) == (VOCAB, CONTEXT)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", ["missing"]),
        ("/tokenize", {"prompt": 5}, "prompt", ["5", "string"]),
        ("/tokenize", {"messages": []}, "messages", ["chat"]),
        ("/tokenize", {"prompt": "\ud800"}, "prompt", ["U+D800"]),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, "model", ["mine"]),
        ("/detokenize", {"tokens": [257]}, "tokens", ["257", "256"]),
        ("/detokenize", {"tokens": [1.5]}, "tokens.0", ["1.5", "integer"]),
        ("/detokenize", {"tokens": "a"}, "tokens", ["list of token ids"]),
        ("/detokenize", {"token": [1]}, "token", ["did you mean tokens?"]),
    ],
)  # fmt: skip
def test_wrong_texts_and_ids_are_told_what_is_wrong(running, path, body, param, words):
    answer = running.http.post(path, content=json.dumps(body).encode())
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and error["param"] == param
    assert all(word in error["message"] for word in words), error["message"]


def test_a_beginning_of_text_stands_before_a_text_unless_it_is_refused():
    tokenizer = ByteTokenizer()
    tokenizer.begin_of_text = END
    for special, begin in ((True, [END]), (False, [])):
        asked = Tokenize(prompt="ab", add_special_tokens=special)
        assert asked.answer(tokenizer, 8)["tokens"] == [*begin, 97, 98]


@pytest.mark.parametrize(
    "name", ["max_token", "topk", "min_token", "stop_token", "prompt_logprob", "logit_biases",
             "until", "max_new_tokens", "watch", "top_logprobs", "num_samples", "ignore_eos_token"],
)  # fmt: skip
def test_hints_name_what_is_there(name):
    with pytest.raises(APIError, match="did you mean") as raised:
        parse(json.dumps({"prompt": "a", name: 1}).encode(), Limits())
    meant = re.search(r"did you mean (\w+)\?", raised.value.message)[1]
    assert meant in CompletionRequest.model_fields
    values = {"logit_bias": {"5": 1}, "stop": "a", "stop_token_ids": [1], "ignore_eos": True}
    values |= {"logprob_token_ids": [1]}
    extra = {"logprobs": 1} if meant == "logprob_token_ids" else {}
    assert parse(
        json.dumps({"prompt": "a", meant: values.get(meant, 1), **extra}).encode(), Limits()
    )


def test_openais_client_asks_for_it_all(running):
    answer = running.create(
        prompt="abc", max_tokens=4, logit_bias={"65": 100}, logprobs=0,
        extra_body={"return_token_ids": True, "prompt_logprobs": 1, "logprob_token_ids": [7]},
    )  # fmt: skip
    [choice] = answer.choices
    assert choice.text == "AAAA" and choice.token_ids == [65] * 4
    assert choice.prompt_token_ids == [97, 98, 99] and len(choice.prompt_logprobs) == 3
    assert all("\x07" in top for top in choice.logprobs.top_logprobs)


def test_a_tokenizer_without_an_end_of_text_begins_with_a_newline():
    newline, none = CharacterTokenizer("ab\n"), CharacterTokenizer("ab")
    infos = [tokenizer_info(tokenizer, 8) for tokenizer in (newline, none)]
    assert [info["bos_token"] for info in infos] == ["\n", None]
    assert [info["eos_token"] for info in infos] == [None, None]
    request = parse(b'{"prompt": [null, 1, 2]}', Limits())
    assert [*prompt_ids(request, newline, 8, Limits())[0]] == [0, 1, 2]


CORPUS = "\n".join(["the cat sat on the mat", "and the dog ran to the red hat", "said the fox"] * 9)
PAIRS = [
    ("the cat sat on the", " mat"),
    ("the cat sat on the ", "mat and the dog"),
    ("the cat\n\n  ", "sat"),
    ("", "the fox"),
    (CORPUS[:40], CORPUS[40:60]),
]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_the_harness_needs_no_tokenizer_and_gets_the_numbers_of_eval(kind, monkeypatch):
    """lm-evaluation-harness's `local-completions` as it comes, against our own adapter."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("tenacity")
    from lm_eval.api.instance import Instance

    from llm.interop.lm_eval import HarnessModel

    tokenizer = {
        "characters": lambda: CharacterTokenizer(CORPUS),
        "bpe": lambda: train_bpe([CORPUS], 280),
    }[kind]()
    monkeypatch.setenv("HTTP_PROXY", "")
    monkeypatch.setenv("http_proxy", "")

    def instances(kind, arguments):
        return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]

    with test_serve.serving(tokenizer) as running:
        client = completions.LocalCompletionsAPI(
            base_url=f"{running.url}/v1/completions", model="mine", max_length=CONTEXT,
            batch_size=4, max_retries=1,
        )  # fmt: skip
        assert client.tokenizer_backend == "remote"
        ours = HarnessModel(running.spec, running.params, tokenizer)
        pairs = instances("loglikelihood", PAIRS)
        got, expected = client.loglikelihood(pairs), ours.loglikelihood(pairs)
        np.testing.assert_allclose([a for a, _ in got], [a for a, _ in expected], atol=1e-5)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        texts = instances("loglikelihood_rolling", [(CORPUS[:25],), (CORPUS[:60],)])
        np.testing.assert_allclose(
            client.loglikelihood_rolling(texts), ours.loglikelihood_rolling(texts), atol=1e-5
        )
        asked = {"max_gen_toks": 9, "until": ["5"], "do_sample": False}
        prompts = instances("generate_until", [(text, asked) for text in ("the cat", CORPUS[:30])])
        assert client.generate_until(prompts) == ours.generate_until(prompts)
