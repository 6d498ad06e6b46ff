"""`python -m llm serve`: OpenAI's own client against it, numbers against Scorer and Decoder, and
what bad requests, clients that leave and signals do."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
import runs
from runs import until

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from llm.commands import run_command, serve, shared  # noqa: E402
from llm.commands.flags import parse as parse_flags  # noqa: E402
from llm.errors import UsageError  # noqa: E402
from llm.inference.decode import Decoder, Request  # noqa: E402
from llm.inference.numerics import numerics_of  # noqa: E402
from llm.inference.records import RunRecord, Sampling, read_records  # noqa: E402
from llm.inference.score import Scorer  # noqa: E402
from llm.model.gpt import ModelSpec, initialise  # noqa: E402
from llm.model_config import ModelConfig  # noqa: E402
from llm.serving.completions import Served  # noqa: E402
from llm.serving.connections import Server, listen, run, url_of  # noqa: E402
from llm.serving.engine import Engine  # noqa: E402
from llm.serving.limits import Limits  # noqa: E402
from llm.serving.requests import parse  # noqa: E402
from llm.serving.server import Site, make_app  # noqa: E402
from llm.text.tokenizer import ByteTokenizer  # noqa: E402

CONTEXT = 96
MODEL = ModelConfig(n_layer=1, n_head=2, d_model=32, context_length=CONTEXT)
LIMITS = Limits(
    max_batch=4,
    max_queue=12,
    max_body=20_000,
    max_prompts=8,
    max_n=8,
    max_tokens=500,
    max_top=12,
    max_prompt=400,
)
CHECKPOINT = {"run": "mine", "step": 7, "params_sha256": "ab" * 32}
SITE = Site(("localhost", "127.0.0.1", "::1"), guests=())


class Running:
    """A server in a thread, with the model it serves."""

    def __init__(self, tokenizer):
        spec = ModelSpec(MODEL, tokenizer.vocab_size)
        params = jax.jit(initialise, static_argnums=0)(spec, jax.random.key(0))
        self.params = {name: 6.0 * w if w.ndim > 1 else w for name, w in params.items()}
        self.spec = spec
        self.decoder = Decoder.create(spec, self.params, tokenizer)
        self.engine = Engine(self.decoder, LIMITS)
        self.served = Served(
            name="mine",
            run=RunRecord.of(
                CHECKPOINT, tokenizer, None, numerics_of(spec, params, "cached"), top=12
            ),
            created=0,
            page="<!doctype html><p>the live page",
        )
        self.app = make_app(self.served, self.engine, SITE)
        listener, ready = listen("127.0.0.1", 0), threading.Event()
        self.url = url_of(listener)
        self.server = Server(self.app, self.engine, grace=5.0, ready=ready.set)
        self.engine.start()
        self.thread = threading.Thread(target=run, args=(self.server, listener))
        self.thread.start()
        assert ready.wait(60.0)
        self.http = httpx.Client(base_url=self.url, timeout=120.0)
        self.openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120.0
        )

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60.0)
        assert not self.thread.is_alive()

    def create(self, **fields):
        return self.openai.completions.create(**{"model": "mine", **fields})

    def post(self, **fields):
        return self.http.post("/v1/completions", json=fields)

    def health(self):
        return self.http.get("/health").json()

    def tokens(self, prompt, sampling, max_new_tokens, **options):
        """Decoder.generate's tokens."""
        request = Request(prompt, sampling, max_new_tokens=max_new_tokens, top=3, **options)
        return [t for progress in self.decoder.generate([request]) for t in progress.tokens]


@contextlib.contextmanager
def serving(tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        # Few shapes: what takes the time is compilation.
        patch.setattr("llm.inference.decode.PIECE", 16)
        patch.setattr("llm.serving.engine._piece", lambda length: 16)
        patch.setattr("llm.serving.engine.LEAST_PREFILL", 128)
        running = Running(tokenizer)
        yield running
        running.stop()


@pytest.fixture(scope="module")
def running():
    with serving(ByteTokenizer()) as running:
        yield running


def events_of(response):
    """The parsed events of a stream, [DONE] taken off."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def stream(running, **fields):
    with running.http.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events_of(answer)


def test_models_health_and_the_page(running):
    [model] = running.openai.models.list().data
    assert model.id == "mine" and running.openai.models.retrieve("mine").id == "mine"
    with pytest.raises(openai.NotFoundError, match="mine"):
        running.openai.models.retrieve("gpt-4")
    assert running.health() == {
        "status": "ok", "model": "mine", "step": 7, "params_sha256": "ab" * 32, "active": 0,
        "queued": 0,
    }  # fmt: skip
    page = running.http.get("/")
    assert page.headers["content-type"].startswith("text/html") and "the live page" in page.text
    assert "access-control-allow-origin" not in page.headers


def test_a_completion_is_the_decoders(running):
    tokens = running.tokens(list(b"Hello"), Sampling(0.0), 20)
    answer = running.create(prompt="Hello", max_tokens=20, temperature=0, logprobs=3)
    [choice] = answer.choices
    generated = tokens[5:]
    assert choice.text == "".join(token.text for token in generated)
    assert (choice.index, choice.finish_reason, answer.model) == (0, "length", "mine")
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25
    }  # fmt: skip
    expected = [token.logprob for token in generated]
    assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert choice.logprobs.text_offset == [token.text_offset for token in generated]
    for name, top in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True):
        assert max(top, key=top.get) == name and len(top) == 3
    assert running.create(prompt="Hello", temperature=0).usage.completion_tokens == 16


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt_as_lm_eval_asks_for_it(running, max_tokens):
    texts = ["To be, or not", "\u4f60\u597d!"]
    prompts = [list(text.encode()) for text in texts]
    expected = list(Scorer(running.spec, running.params, ByteTokenizer()).score(prompts))
    for given in (texts, prompts):
        answer = running.create(
            prompt=given, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0, seed=1234
        )
        for choice, text, predictions in zip(answer.choices, texts, expected, strict=True):
            logprobs = choice.logprobs.token_logprobs
            assert len(logprobs) == len(predictions) + max_tokens
            assert logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
            scored = [prediction.logprob for prediction in predictions[1:]]
            assert logprobs[1 : len(predictions)] == pytest.approx(scored, abs=1e-4)
            assert choice.text.startswith(text) and (max_tokens or choice.text == text)
            assert choice.finish_reason == "length"


def test_n_and_prompts_and_seeds(running):
    fields = {"prompt": ["ab", "xyz w"], "n": 2, "max_tokens": 12, "seed": 5}
    fields |= {"temperature": 0.9, "top_p": 0.9}
    answer = running.create(**fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    sampling = Sampling(0.9, top_p=0.9, seed=5)
    expected = [
        "".join(
            token.text
            for token in running.tokens(list(prompt.encode()), sampling, 12, index=j)
            if token.phase == "generated"
        )
        for prompt in fields["prompt"]
        for j in range(2)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == 7 and answer.usage.completion_tokens == 48
    assert running.create(**fields).choices == answer.choices
    assert running.create(**{**fields, "seed": 6}).choices != answer.choices
    unseeded = {**fields, "seed": None}
    assert running.create(**unseeded).choices != running.create(**unseeded).choices


def test_stop_strings_cut_and_say_so(running):
    whole = running.create(prompt="z", max_tokens=40, temperature=0).choices[0].text
    stop = whole[9:11]
    for given in (stop, ["never seen", stop]):
        [choice] = running.create(prompt="z", max_tokens=40, temperature=0, stop=given).choices
        assert choice.finish_reason == "stop"
        assert choice.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_says_what_the_whole_says(running, echo):
    fields = {
        "prompt": ["\u4e2d", "abc"], "n": 2, "max_tokens": 30, "temperature": 1.2, "seed": 4,
        "logprobs": 2, "records": 3, "echo": echo, "stop": ["e"],
    }  # fmt: skip
    whole = running.post(**fields).json()
    events = stream(running, **fields, stream_options={"include_usage": True})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"]]
        parts = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [
            choice["finish_reason"]
        ]
        assert parts[-1]["finish_reason"]
        for name, values in choice["logprobs"].items():
            joined = [value for part in parts for value in part["logprobs"][name]]
            assert joined == values or name.endswith("logprobs")
    first, *rest = [record for event in events[:-1] for record in event["records"]]
    assert first == whole["records"][0]
    assert [record for record in events[0]["records"] if record["type"] == "run"] == [first]

    def in_order(records):
        return sorted(records, key=lambda r: (r["sample"], r["type"] == "end"))

    for record, other in zip(in_order(rest), in_order(whole["records"][1:]), strict=True):
        assert {k: v for k, v in record.items() if not isinstance(v, float | list)} == {
            k: v for k, v in other.items() if not isinstance(v, float | list)
        }


def test_records_are_those_of_a_file(running, tmp_path):
    answer = running.post(prompt="To be", max_tokens=7, seed=2, echo=True, records=4).json()
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in answer["records"]))
    head, *tokens, end = read_records(path)
    assert head["checkpoint"] == CHECKPOINT and head["top"] == 4
    assert head["sampling"] == {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 2
    }  # fmt: skip
    assert [token["phase"] for token in tokens] == ["prompt"] * 5 + ["generated"] * 7
    assert "".join(token["text"] for token in tokens) == end["text"]
    assert end["text"] == answer["choices"][0]["text"]
    assert (end["tokens"], end["finish"]) == (7, "length")
    expected = running.tokens(list(b"To be"), Sampling(1.0, seed=2), 7)
    for token, other in zip(tokens[1:], expected[1:], strict=True):
        assert token["id"] == other.id and len(token["top"]) == 4
        assert token["logprob"] == pytest.approx(other.logprob, abs=1e-4)
    # Nothing drawn: nothing cut, and the sums are the prompt's.
    scored = running.post(prompt="To be", max_tokens=0, echo=True, records=True, top_k=3).json()
    assert scored["records"][0]["sampling"] is None and scored["records"][0]["top"] == 10
    assert {token["kept_tokens"] for token in scored["records"][2:-1]} == {257}
    assert scored["records"][-1]["tokens"] == 4


def test_a_branch_from_token_ids_is_exact_also_inside_a_character(running):
    """The first byte of a character as a prompt: its text comes with the byte that ends it."""
    lead, *rest = "\u00e9".encode()
    records = running.post(prompt=[65, lead], max_tokens=40, echo=True, seed=1, records=0).json()
    assert [r["bytes"] for r in records["records"][1:3]] == [[65], [lead]]
    events = stream(running, prompt=[65, lead], max_tokens=40, echo=True, seed=1, records=0)
    streamed = [record for event in events for record in event["records"]]
    assert [r["id"] for r in streamed[1:-1]] == [r["id"] for r in records["records"][1:-1]]
    text = bytes(b for r in streamed[1:-1] for b in r["bytes"]).decode("utf-8", "replace")
    assert "".join(event["choices"][0]["text"] for event in events) == text == streamed[-1]["text"]
    whole = running.post(prompt=[65, lead, *rest], max_tokens=0, echo=True).json()
    assert whole["choices"][0]["text"] == "A\u00e9"


def test_an_empty_prompt_starts_from_an_end_of_text(running):
    answer = running.post(prompt="", max_tokens=3, echo=True, records=1).json()
    assert answer["usage"]["prompt_tokens"] == 1
    assert [record["id"] for record in answer["records"][1:2]] == [256]


@pytest.mark.thorough
def test_many_at_once_get_what_each_gets_alone(running):
    asked = [
        {
            "prompt": "x" * (1 + 7 * i % 60), "n": 1 + i % 3, "max_tokens": 5 + 11 * i % 50,
            "seed": i, "temperature": 0.3 * (i % 4), "logprobs": 1 if i % 2 else None,
            "echo": i % 5 == 0,
        }
        for i in range(16)
    ]  # fmt: skip
    alone = [running.create(**fields).choices for fields in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda fields: running.create(**fields).choices, asked))
    for got, expected in zip(together, alone, strict=True):
        for choice, other in zip(got, expected, strict=True):
            assert (choice.text, choice.finish_reason) == (other.text, other.finish_reason)
            if other.logprobs:
                lists = choice.logprobs.token_logprobs, other.logprobs.token_logprobs
                for value, of_other in zip(*lists, strict=True):
                    assert value is of_other is None or abs(value - of_other) < 1e-4


BAD = [
    ({}, "prompt", ["prompt", "missing"]),
    ({"prompt": []}, "prompt", ["none of them empty"]),
    ({"prompt": [[]]}, "prompt", ["prompt"]),
    ({"prompt": [1, "a"]}, "prompt", ["list of token ids"]),
    ({"prompt": {"text": "a"}}, "prompt", ["expected"]),
    ({"prompt": [True]}, "prompt", ["expected"]),
    ({"prompt": [1.5]}, "prompt", ["expected"]),
    ({"prompt": [300]}, "prompt", ["300", "256"]),
    ({"prompt": [-1]}, "prompt", ["-1", "0 to 256"]),
    ({"prompt": "x" * 97}, "prompt", ["97", "96", "context"]),
    ({"prompt": ["a", "x" * 5000]}, "prompt", ["prompt 1", "5000", "96"]),
    ({"prompt": ["a"] * 9}, "prompt", ["9", "8", "--max-prompts"]),
    ({"prompt": "\ud800"}, "prompt", ["U+D800"]),
    ({"prompt": "a", "max_token": 5}, "max_token", ["max_token", "did you mean max_tokens?"]),
    ({"prompt": "a", "messages": []}, "messages", ["no chat format"]),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", ["-1", "greater than or equal to 0"]),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", ['"5"', "integer"]),
    ({"prompt": "a", "max_tokens": 501}, "max_tokens", ["501", "500", "--max-tokens"]),
    ({"prompt": "a", "max_tokens": 10**400}, "max_tokens", ["--max-tokens"]),
    ({"prompt": "a", "temperature": -0.5}, "temperature", ["-0.5"]),
    ({"prompt": "a", "temperature": "hot"}, "temperature", ["hot", "number"]),
    ({"prompt": "a", "top_p": 0}, "top_p", ["0", "greater than 0"]),
    ({"prompt": "a", "top_p": 1.5}, "top_p", ["1.5"]),
    ({"prompt": "a", "top_k": -3}, "top_k", ["-3"]),
    ({"prompt": "a", "min_p": 2}, "min_p", ["2"]),
    ({"prompt": "a", "n": 0}, "n", ["n = 0"]),
    ({"prompt": "a", "n": 9}, "n", ["9", "8", "--max-n"]),
    ({"prompt": ["a"] * 8, "n": 8}, "n", ["64", "12", "--max-queue"]),
    ({"prompt": "a", "logprobs": 13}, "logprobs", ["13", "12", "--max-top"]),
    ({"prompt": "a", "logprobs": True}, "logprobs", ["true", "integer"]),
    ({"prompt": "a", "records": 13}, "records", ["13", "12"]),
    ({"prompt": "a", "records": "all"}, "records", ["all", "true"]),
    ({"prompt": "a", "stop": ""}, "stop", ["empty"]),
    ({"prompt": "a", "stop": [1]}, "stop", ["text"]),
    ({"prompt": "a", "seed": 2**63}, "seed", ["seed"]),
    ({"prompt": "a", "echo": "yes"}, "echo", ["yes", "boolean"]),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", ["streams"]),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x", ["unknown"]),
    ({"prompt": "a", "best_of": 3}, "best_of", ["3", "n"]),
    ({"prompt": "a", "suffix": "b"}, "suffix", ["leave it out", 'give ""']),
    ({"prompt": "a", "repetition_penalty": 1.2}, "repetition_penalty", ["1.2", "leave", "1.0"]),
    ({"prompt": "a", "top_k": -2}, "top_k", ["-2", "greater than or equal to 0"]),
    ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias.5", ["101", "100"]),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x", ["x", "integer"]),
    ({"prompt": "a", "logit_bias": {"257": 1}}, "logit_bias", ["257", "256"]),
    ({"prompt": "a", "logit_bias": [5]}, "logit_bias", ["[5]", "object"]),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", ["-1", "0 to 256"]),
    ({"prompt": "a", "stop_token_ids": ["5"]}, "stop_token_ids.0", ["5", "integer"]),
    ({"prompt": "a", "min_tokens": 17}, "min_tokens", ["17", "16", "max_tokens"]),
    ({"prompt": "a", "prompt_logprobs": 13}, "prompt_logprobs", ["13", "--max-top"]),
    ({"prompt": "a", "logprob_token_ids": [5]}, "logprob_token_ids", ["give logprobs"]),
    ({"prompt": "", "logprob_token_ids": [5] * 13, "logprobs": 1}, "logprob_token_ids", ["13"]),
    ({"prompt": [1, None]}, "prompt", ["list of token ids"]),
    ({"prompt": "x" * 500, "max_tokens": 0}, "prompt", ["500", "400", "--max-prompt"]),
    ({"prompt": "x" * 97}, "prompt", ["97", "max_tokens = 0"]),
    ({"prompt": "a", "until": "b"}, "until", ["did you mean stop?"]),
    ({"prompt": "a", "max_new_tokens": 2}, "max_new_tokens", ["did you mean max_tokens?"]),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", ["0.5", "0.0"]),
    ({"prompt": "a", "frequency_penalty": 1}, "frequency_penalty", ["leave it out"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "words"), BAD, ids=lambda value: str(value)[:40] if value else "empty"
)
def test_a_wrong_request_is_told_what_is_wrong(running, fields, param, words):
    answer = running.http.post("/v1/completions", content=json.dumps(fields).encode())
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert all(word in error["message"] for word in words), error["message"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 600


def test_what_is_neutral_or_null_is_taken(running):
    answer = running.create(
        prompt="a", max_tokens=1, user="me", suffix=None, best_of=1, presence_penalty=0,
        frequency_penalty=0.0, logit_bias={}, logprobs=None, stop=None, temperature=0,
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(("max_top", "listed"), [(5, 5), (12, 10)])
def test_records_without_a_number_are_never_too_many(max_top, listed):
    body = b'{"prompt": "a", "records": true}'
    assert parse(body, Limits(max_top=max_top)).records == listed


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", ["not JSON"]),
        (b"", ["not JSON"]),
        (b"\xff\xfe\x00", ["not JSON"]),
        (b"[1]", ["[1]", "object"]),
        (b'"text"', ["object"]),
        (b'{"prompt": "a", "temperature": NaN}', ["NaN"]),
        (b'{"prompt": "a", "temperature": 1e999}', ["temperature", "finite"]),
        (b'{"prompt": ' + b"[" * 9000, ["not JSON"]),
        (b'{"prompt": [' + b"9" * 5000 + b"]}", ["JSON"]),
    ],
)
def test_a_body_that_is_no_request_is_told_so(running, body, words):
    answer = running.http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert all(word in answer.json()["error"]["message"] for word in words), answer.text


def test_other_errors_are_openais_too(running):
    with pytest.raises(openai.NotFoundError, match="'mine'") as raised:
        running.create(model="gpt-4", prompt="a")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        running.create(prompt="a", max_tokens=-1)
    answer = running.http.post("/v1/completions", content=b" " * 3_000_000)
    assert answer.status_code == 413 and "20000" in answer.json()["error"]["message"]
    chunked = running.http.post("/v1/completions", content=(b" " * 9000 for _ in range(9)))
    assert chunked.status_code == 413
    assert running.http.get("/v1/completions").status_code == 405
    nowhere = running.http.post("/v1/chat/completions", json={})
    assert nowhere.status_code == 404
    assert "/v1/completions" in nowhere.json()["error"]["message"]
    assert running.create(prompt="a", max_tokens=1).usage.total_tokens == 2


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "localhost:1234"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"host": "localhost:80", "origin": "http://localhost:80"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(running, headers, status):
    answer = running.http.get("/health", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert "--allow-host" in answer.json()["error"]["message"]


def asked(running, site, method, path, headers=None, **fields):
    """The answer of an application for this site, without a connection."""

    async def ask():
        transport = httpx.ASGITransport(make_app(running.served, running.engine, site))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers, json=fields or None)

    return asyncio.run(ask())


GUESTS = Site(None, guests=("notebook.example", "::1"))
ANYONE = Site(None, guests=None)
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    "Access-Control-Request-Private-Network": "true",
}


@pytest.mark.parametrize(
    ("site", "origin", "status"),
    [
        (GUESTS, "http://notebook.example", 200),
        (GUESTS, "https://NOTEBOOK.example:8443", 200),
        (GUESTS, "http://[::1]:3000", 200),
        (ANYONE, "http://evil.example", 200),
        (ANYONE, "null", 200),
        (GUESTS, "http://evil.example", 403),
        (GUESTS, "http://notebook.example.evil.example", 403),
        (GUESTS, "http://evil.example#notebook.example", 403),
        (GUESTS, "http://evil.example/http://notebook.example", 403),
        (GUESTS, "null", 403),
        (SITE, "http://localhost:3000", 403),
        (SITE, "http://localhost", 400),  # no browser asks for its own site
    ],
)
def test_preflights_are_answered_for_allowed_origins_alone(running, site, origin, status):
    """https://fetch.spec.whatwg.org/#http-cors-protocol"""
    answer = asked(running, site, "OPTIONS", "/v1/completions", {**PREFLIGHT, "origin": origin})
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (None if status != 200 else "*" if site is ANYONE else origin)
    if status != 200:
        assert answer.json()["error"]["message"]
        return
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(
    ("method", "path", "fields", "status"),
    [
        ("GET", "/health", {}, 200),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, 200),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": True}, 200),
        ("POST", "/tokenize", {"prompt": "a"}, 200),
        ("POST", "/v1/completions", {"prompt": 5}, 400),
        ("GET", "/nowhere", {}, 404),
        ("DELETE", "/v1/completions", {}, 405),
    ],
)
def test_allowed_pages_may_read_answers_errors_and_streams(running, method, path, fields, status):
    origin = {"origin": "http://notebook.example:8888"}
    answer = asked(running, GUESTS, method, path, origin, **fields)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == origin["origin"]
    assert "Origin" in answer.headers["vary"]
    alone = asked(running, GUESTS, method, path, None, **fields)
    assert "access-control-allow-origin" not in alone.headers


KEY = "sk-3$w:x"


def basic(text):
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer {KEY}", 200),
        (basic(f"anyone:{KEY}"), 200),
        (basic(f":{KEY}"), 200),
        (None, 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (KEY, 401),
        (f"Basic {KEY}", 401),
        (f"Digest {KEY}", 401),
        (basic(KEY), 401),
        ("Basic \u00e9", 401),
        ("Bearer \u00e9", 401),
    ],
)
def test_a_key_is_wanted_by_all_but_health(running, given, status):
    site = Site(None, guests=("notebook.example",), key=KEY)
    headers = {"origin": "http://notebook.example"}
    headers |= {"authorization": given.encode("latin-1")} if given else {}
    for method, path in [("GET", "/"), ("GET", "/v1/models"), ("POST", "/tokenize")]:
        fields = {"prompt": "a"} if method == "POST" else {}
        answer = asked(running, site, method, path, headers, **fields)
        assert answer.status_code == status, path
        assert answer.headers["access-control-allow-origin"] == headers["origin"]
        if status == 401:
            assert answer.json()["error"]["code"] == "invalid_api_key" and KEY not in answer.text
            challenges = answer.headers.get_list("www-authenticate")
            assert [challenge.split()[0] for challenge in challenges] == ["Bearer", "Basic"]
    assert asked(running, site, "GET", "/nowhere", headers).status_code == (401, 404)[status == 200]
    assert asked(running, site, "GET", "/health").status_code == 200
    preflight = {**PREFLIGHT, "origin": headers["origin"]}
    assert asked(running, site, "OPTIONS", "/v1/models", preflight).status_code == 200


@pytest.mark.parametrize(
    ("flags", "variable", "key"),
    [
        ([], None, None),
        ([], "", None),
        ([], "secret", "secret"),
        (["--api-key", "flag"], "secret", "flag"),
        (["--api-key", ""], "secret", UsageError),
        (["--api-key", "two words"], None, UsageError),
        ([], "\u00e9", UsageError),
    ],
)
def test_the_key_is_a_flag_or_a_variable(monkeypatch, flags, variable, key):
    monkeypatch.delenv("LLM_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("LLM_API_KEY", variable)
    if key is UsageError:
        with pytest.raises(UsageError, match=r"--api-key.*expected letters"):
            parse_flags(serve.Options, ["run", *flags])
    else:
        assert parse_flags(serve.Options, ["run", *flags]).api_key == key


def test_hosts_are_checked_where_only_this_machine_can_reach():
    assert serve.site_of("127.0.0.1", []).names == ("localhost", "127.0.0.1", "::1")
    assert serve.site_of("127.0.0.5", ["Me.example"]) == Site(
        ("localhost", "127.0.0.1", "::1", "127.0.0.5", "me.example"), ("me.example",)
    )
    assert serve.site_of("0.0.0.0", []) == Site(None, ())
    assert serve.site_of("127.0.0.1", ["*"]) == Site(None, None)


class Gate:
    """Lets chunks of one token through, as many as are released."""

    def __init__(self):
        self.passed, self._through = 0, threading.Semaphore(0)
        self._chunk = Decoder.chunk

    def open(self, count=1):
        for _ in range(count):
            self._through.release()

    def chunk(self, decoder, batch, state, alive_B, steps):
        assert self._through.acquire(timeout=60.0)
        self.passed += 1
        return self._chunk(decoder, batch, state, alive_B, 1)


@pytest.fixture
def gate(monkeypatch, running):
    gate = Gate()
    monkeypatch.setattr(Decoder, "chunk", lambda *arguments: gate.chunk(*arguments))
    yield gate
    gate.open(1000)
    until(lambda: running.engine.active + running.engine.queued == 0)


def send(running, **fields):
    """A connection on which the request was sent."""
    body = json.dumps(fields).encode()
    connection = socket.create_connection((running.http.base_url.host, running.http.base_url.port))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_rows(running, gate, streams):
    """Of 90 tokens of each row four at most are computed for nobody."""
    connection = send(running, prompt="ab", max_tokens=90, n=4, stream=streams, echo=True)
    until(lambda: running.engine.active == 4)
    if streams:
        assert b"200 OK" in connection.recv(1000)
    connection.close()
    tickets = [ticket for ticket in running.engine._rows if ticket]
    until(lambda: all(t.ended for t in [*tickets, *filter(None, running.engine._rows)]))
    gate.open(4)
    until(lambda: running.engine.active == 0)
    assert gate.passed <= 4
    assert running.health()["active"] == 0


def test_a_full_queue_is_429_and_the_queue_goes_on(running, gate):
    fields = {"prompt": "ab", "max_tokens": 3, "n": 4, "temperature": 0}
    held = [send(running, **fields)]
    until(lambda: running.engine.active == 4)  # else the fourth may find the first still waiting
    held += [send(running, **fields) for _ in range(3)]
    until(lambda: running.engine.active == 4 and running.engine.queued == 12)
    with pytest.raises(openai.RateLimitError, match="12 samples wait") as raised:
        running.create(prompt="a")
    assert raised.value.code == "queue_full"
    gate.open(1000)
    answers = []
    for connection in held:
        with connection, connection.makefile("rb") as file:
            length = 0
            while (line := file.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length"):
                    length = int(line.split(b":")[1])
            answers.append(json.loads(file.read(length)))
    assert len({choice["text"] for a in answers for choice in a["choices"]}) == 1


def test_what_goes_wrong_in_the_middle_of_a_stream_is_an_event(running, gate, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory on the device")

    with running.http.stream(
        "POST", "/v1/completions", json={"prompt": "ab", "stream": True, "echo": True}
    ) as answer:
        monkeypatch.setattr(Decoder, "chunk", fails)
        gate.open(1)
        *_, last = events_of(answer)
    assert last["error"]["type"] == "server_error" and "memory" not in last["error"]["message"]


def test_a_stopped_engine_is_503(running):
    engine = Engine(running.decoder, LIMITS)
    engine.start()
    assert engine.stop(timeout=10.0)
    app = make_app(running.served, engine, SITE)

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", json={"prompt": "a"})

    answer = asyncio.run(ask())
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"


@pytest.fixture
def stopping(running, monkeypatch):
    """A server of its own that is slow and waits a fifth of a second for what runs."""
    chunk = Decoder.chunk

    def slow_chunk(*arguments):
        time.sleep(0.1)
        return chunk(*arguments[:-1], 1)

    monkeypatch.setattr(Decoder, "chunk", slow_chunk)
    engine = Engine(running.decoder, Limits(max_batch=4))
    app = make_app(running.served, engine, SITE)
    listener, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(app, engine, grace=0.2, ready=ready.set)
    engine.start()
    thread = threading.Thread(target=run, args=(server, listener))
    thread.start()
    assert ready.wait(60.0)
    yield server, engine, url_of(listener)
    server.should_exit = True
    thread.join(60.0)
    assert not thread.is_alive()


def test_when_the_grace_time_is_over_clients_are_told(stopping, capfd):
    server, engine, url = stopping
    fields = {"prompt": "ab", "max_tokens": 90, "temperature": 0}

    def ask(**more):
        return httpx.post(f"{url}/v1/completions", json=fields | more, timeout=60.0)

    with ThreadPoolExecutor(2) as pool:
        whole, streamed = pool.submit(ask), pool.submit(ask, stream=True)
        until(lambda: engine.active == 2)
        server.should_exit = True
        answer, events = whole.result(), events_of(streamed.result())
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
    assert events[-1]["error"]["code"] == "shutting_down"
    assert capfd.readouterr().err == ""


def test_a_second_signal_ends_the_process_at_once(monkeypatch, capfd):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    server = Server(None, None, 1.0, print)
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit and left == []
    server.handle_exit(signal.SIGTERM, None)
    assert left == [128 + signal.SIGTERM] and "at once" in capfd.readouterr().err


def test_a_signal_is_heard_though_the_terminal_is_gone(monkeypatch):
    def gone(*_):
        raise OSError("input/output error")

    monkeypatch.setattr(os, "write", gone)
    server = Server(None, None, 1.0, print)
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "70000"], ["--port 70000", "65535"]),
        (["--port", "-1"], ["--port"]),
        (["--host", "no.such.host.invalid"], ["no.such.host.invalid", "127.0.0.1"]),
        (["--host", "192.0.2.1", "--port", "0"], ["192.0.2.1", "--host"]),
        (["--max-batch", "0"], ["--max-batch 0", "greater than 0"]),
        (["--grace", "nan"], ["--grace"]),
        (["--port", "0"], ["no/such/run"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_what_cannot_be_served_is_told_and_exits_2(flags, words, capsys, monkeypatch):
    for module in (serve, shared):
        monkeypatch.setattr(module, "prepare_process", lambda: None)
    assert run_command(serve.main, ["no/such/run", *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and "Traceback" not in error, error


@pytest.mark.thorough
def test_without_its_libraries_it_names_the_extra():
    code = """
import sys
sys.modules["starlette"] = sys.modules["uvicorn"] = None
from llm.commands import run_command, serve
sys.exit(run_command(serve.main, ["no/such/run"]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "glassbox-gpt[serve]" in ended.stderr


def test_help_does_not_import_jax():
    code = """
import sys
from llm.commands.serve import main
try:
    main(["--help"])
except SystemExit:
    assert "jax" not in sys.modules and "uvicorn" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", code], cwd=runs.ROOT, check=True, stdout=subprocess.DEVNULL
    )


def serve_process(run_dir, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "llm", "serve", str(run_dir), *flags],
        cwd=runs.ROOT,
        env={**os.environ, "XLA_FLAGS": runs.QUICK_COMPILING},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.thorough
def test_sigterm_finishes_a_running_stream_and_the_port_is_the_first_servers(tmp_path):
    """A whole process, on a run as training leaves it."""
    config = runs.write_config(
        tmp_path, training={"steps": 1}, model={"context_length": 512, "n_layer": 1}
    )
    assert runs.train(config) == 0
    process = serve_process(tmp_path / "run", "--port", "0")
    try:
        said = process.stderr.readline()
        while "serving" not in said:
            assert said, "it ended without serving"
            said = process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:(\d+)", said)
        second = serve_process(tmp_path / "run", "--port", url[1])
        assert second.wait(60.0) == 2
        assert re.search(f"port {url[1]}.*--port", second.stderr.read())
        assert "page" in httpx.get(url[0]).text
        fields = {"prompt": "the", "max_tokens": 400, "stream": True, "records": 1}
        with httpx.stream("POST", f"{url[0]}/v1/completions", json=fields, timeout=60.0) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [first, *lines]
        events = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert sum(r["type"] == "token" for e in events for r in e["records"]) == 400
        assert process.wait(60.0) == 0
        assert "SIGTERM: finishing what runs" in process.stderr.read()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url[0])
    finally:
        process.kill()
        process.communicate()
