"""`python -m llm bench`: its arithmetic, on a small run. No test asks how long anything takes."""

import json
import os

import jax.numpy as jnp
import pytest
from runs import QUICK_COMPILING, write_config

from llm.commands.bench import main
from llm.errors import DataError, UsageError
from llm.inference.decode import Decoder
from llm.measure import machine
from llm.measure.decode import weight_bytes
from llm.measure.machine import time_turns
from llm.model.gpt import ModelSpec, abstract_params
from llm.model_config import ModelConfig
from llm.text.tokenizer import ByteTokenizer

PARTS = ("step", "loop", "decode", "data", "checkpoint")
D, L, F, T, B = 32, 2, 128, 16, 8


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A small configuration, and a machine whose peaks take no time to measure."""
    monkeypatch.setattr(machine, "_CPU_SIDES", (64,))
    monkeypatch.setattr(machine, "_CPU_FLOPS", 2**20)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"])
    return str(write_config(tmp_path))


def reported(capsys, *arguments):
    def refuse(constant):
        raise ValueError(f"{constant} is not strict JSON")

    assert main([*arguments, "--json", "--turns", "1"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=refuse)


@pytest.mark.thorough
def test_the_figures_of_each_part_agree_with_closed_forms(quick, capsys, tmp_path):
    V = len(set((tmp_path / "corpus.txt").read_text()))
    report = reported(capsys, quick, "--parts", *PARTS, "--decode-batches", "1", "2")
    matrices = L * (4 * D * D + 2 * D * F)
    flops = 6 * (matrices + D * V) + 12 * L * D * T / 2
    assert set(report) == {"machine", "model", *PARTS}
    assert report["model"]["flops_per_token"] == flops
    assert report["model"]["tokens_per_step"] == B * T

    step = report["step"]
    assert step["tokens_per_second"] * step["seconds"] == pytest.approx(B * T)
    share = step["tokens_per_second"] * flops / report["machine"]["matmul_flops"]
    assert step["mfu_of_matmul"] == pytest.approx(share / report["machine"]["devices"])
    assert step["mfu_of_peak"] is None, "the CPU has no data sheet here"

    one, two = report["decode"]
    padded, positions = 64, 64
    vectors = L * (9 * D + F) + 2 * D  # biases and norms; the embeddings' rows are not counted
    cache = 2 * L * positions * D
    assert one["bytes_per_token"] == 4 * (matrices + D * padded + vectors + cache)
    assert two["bytes_per_token"] - one["bytes_per_token"] == 4 * cache
    if one["seconds_per_token"] is not None:  # on a busy machine 16 tokens may take as long as one
        assert one["tokens_per_second"] * one["seconds_per_token"] == pytest.approx(1)

    assert report["loop"]["steps"] == 200
    assert report["data"]["batches_per_second"] > 0 and report["data"]["bytes_per_second"] > 0
    # Weights, two moments, in float32; and little else.
    assert 12 * matrices < report["checkpoint"]["bytes"] < 10 * 12 * matrices


def test_a_time_that_cannot_be_told_from_none_is_null(quick, capsys, monkeypatch):
    monkeypatch.setattr("llm.measure.decode.time_turns", lambda *_: [1.0])
    [decoded] = reported(capsys, quick, "--parts", "decode", "--decode-batches", "1")["decode"]
    for figure in ("seconds_per_token", "tokens_per_second", "bandwidth_share"):
        assert decoded[figure] is None


@pytest.mark.parametrize(("rows", "read"), [(1, 2), (3, 6), (4, 8), (64, 8)])
def test_of_a_mixture_the_chosen_experts_are_read(rows, read):
    """Two of eight for each row."""
    config = ModelConfig(n_layer=1, n_head=1, d_model=4, d_ff=6, context_length=8, n_expert=8)
    spec = ModelSpec(config.resolved(), 257)
    params = {name: jnp.zeros(w.shape, w.dtype) for name, w in abstract_params(spec).items()}
    experts = read * (2 * 4 * 6 + 6 + 4)
    attention, router, norms, head = 4 * (4 * 4 + 4), 4 * 8, 3 * 2 * 4, 4 * spec.padded_vocab_size
    decoder = Decoder.create(spec, params, ByteTokenizer())
    assert weight_bytes(decoder, rows) == 4 * (experts + attention + router + norms + head)


@pytest.mark.thorough
def test_decoding_is_measured_past_an_end_of_text(quick, capsys, monkeypatch):
    """Random weights may draw it: in the second turn it is what they drew in the first."""
    create, generate = Decoder.create, Decoder.generate
    drawn, finishes = [], set()

    def creates(spec, params, tokenizer):
        if drawn and tokenizer.end_of_text is not None:
            tokenizer.end_of_text = drawn[-1]
        return create(spec, params, tokenizer)

    def generates(self, requests):
        for progress in generate(self, requests):
            drawn.extend(token.id for token in progress.tokens)
            finishes.add(progress.finish)
            yield progress

    monkeypatch.setattr(Decoder, "create", creates)
    monkeypatch.setattr(Decoder, "generate", generates)
    for _ in range(2):
        bytes_alone = ("--tokenizer.kind", "bytes", "--parts", "decode", "--decode-batches", "1")
        reported(capsys, quick, *bytes_alone)
    assert finishes - {None} == {"length"}


@pytest.mark.thorough
def test_the_start_is_timed_cold_and_warm(quick, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILING)
    start = reported(capsys, quick, "--parts", "start")["start"]
    assert 0 < start["warm_seconds"] < 600 and 0 < start["cold_seconds"] < 600


@pytest.mark.thorough
def test_a_person_gets_a_table(quick, capsys):
    assert main([quick, "--parts", "step", "--turns", "1"]) == 0
    shown = capsys.readouterr().out
    assert "tokens_per_second" in shown and "mfu_of_peak" in shown and "unknown" in shown


@pytest.mark.thorough
def test_a_part_is_shown_before_the_next_is_measured(quick, capsys, monkeypatch):
    """So that a measurement that is stopped, or runs into a limit, leaves what it has."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm.measure.training.measure_loop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([quick, "--parts", "step", "loop", "--turns", "1"])
    assert "mfu_of_peak" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused_by_name(quick, capsys, tmp_path):
    with pytest.raises(UsageError, match=r"--parts stepp: .*'decode'"):
        main([quick, "--parts", "stepp"])
    with pytest.raises(UsageError, match="--turns 0: expected a number greater than 0"):
        main([quick, "--turns", "0"])
    with pytest.raises(UsageError, match=r"model\.n-layer"):
        main([quick, "--model.n-layers", "3"])
    with pytest.raises(DataError, match="nowhere"):
        main([quick, "--data.source", str(tmp_path / "nowhere.txt")])


def test_the_turns_that_warm_up_are_not_timed():
    calls = []
    seconds = time_turns(lambda: calls.append(1), 5, warm_up=2)
    assert len(calls) == 7 and len(seconds) == 5 and min(seconds) >= 0
