"""Batches, windows and momentum that warm up, in whole runs and in the step."""

import json

import numpy as np
import pytest
from runs import losses, params_sha256, train, write_config
from test_step import OPTIMIZER, tokens
from test_step import losses as losses_of
from test_step import train as train_steps

from llm.commands import replay
from llm.config import OptimizerConfig, TrainingConfig
from llm.errors import UsageError
from llm.run.hosts import Hosts

WARMING = {
    "tokenizer": {"kind": "bytes"},
    "data": {"windows": "documents"},
    "model": {"n_layer": 1, "dropout": 0.0},
    "optimizer": {
        "kind": "muon", "schedule": "constant", "warmup_steps": 0, "muon_momentum_warmup_steps": 6
    },
    "training": {
        "batch_size": 64, "batch_warmup_steps": 3, "window_warmup_steps": 3, "eval_every": 0,
        "steps": 8,
    },
    "checkpoint": {"every": 2, "keep": 9},
    "sample": {"max_new_tokens": 0},
}  # fmt: skip
# (sequences, tokens) of steps 1, 2, 3 and of all that follow.
SIZES = [(8, 2), (16, 4), (32, 8), (64, 16)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(warming_config(folder)) == 0
    return folder


def warming_config(folder):
    """On documents of 40, 60, ... bytes, each with its end of text."""
    texts = [json.dumps({"text": "the cat sat " * (n // 12)}) for n in range(40, 400, 20)]
    (folder / "documents.jsonl").write_text("\n".join(texts))
    data = WARMING["data"] | {"source": str(folder / "documents.jsonl")}
    return write_config(folder, **{**WARMING, "data": data})


def test_a_run_stopped_while_it_warms_up_goes_on_bit_for_bit(unbroken, tmp_path):
    config = warming_config(tmp_path)
    assert train(config, "--training.steps", "2") == 0
    assert train(config) == 0
    steps = [row for row in losses(tmp_path / "run") if row[0] == "train"]
    assert steps == [row for row in losses(unbroken / "run") if row[0] == "train"]
    assert params_sha256(tmp_path / "run", 8) == params_sha256(unbroken / "run", 8)


def test_tokens_are_counted_as_they_are_trained_on(unbroken):
    lines = (unbroken / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    trained = [rows_ * window for rows_, window in SIZES] + [64 * 16] * 4
    assert [row["tokens"] for row in rows] == np.cumsum(trained).tolist()


def test_hosts_hear_of_no_place_until_a_new_size_was_compiled_by_all(tmp_path, monkeypatch):
    """Else one that compiles a little faster would find the others hanging."""
    places = []
    monkeypatch.setattr(Hosts, "mark", lambda self, place: places.append(place))
    assert train(warming_config(tmp_path), "--checkpoint.every=0") == 0
    assert [one for one in places if "," not in one] == ["step 5", "step 6", "step 7"]


def test_replay_shows_the_smaller_batches(unbroken, capsys):
    for step, (sequences, window) in enumerate(SIZES, start=1):
        assert replay.main([str(unbroken / "run"), "--step", str(step), "--json"]) == 0
        page = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [len(one["ids"]) for one in page["sequences"]] == [window + 1] * sequences
        for one in page["sequences"]:
            first, offset = one["ids"][0], one["documents"][0]["offset"]
            # The end of text before a document, or further on in one; in the first document, which
            # no end of text precedes, one token later.
            assert first == 256 or offset % 16 in (15, 0)


def test_replay_knows_that_warming_up_was_given_up(tmp_path, capsys):
    config = warming_config(tmp_path)
    assert train(config, "--training.steps", "2") == 0
    # The batch before is not divisible by the micro-batch of now.
    larger = ["--training.batch-size=128", "--training.micro-batch-size=128"]
    given_up = [*larger, "--training.batch-warmup-steps=0", "--run.allow-change"]
    assert train(config, "--training.steps", "3", *given_up) == 0
    for step, sequences in ((2, 16), (3, 128)):
        assert replay.main([str(tmp_path / "run"), "--step", str(step), "--json"]) == 0
        page = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(page["sequences"]) == sequences


def test_windows_at_documents_need_an_end_of_text(tmp_path):
    config = write_config(tmp_path, data={"windows": "documents"})
    with pytest.raises(UsageError, match=r"needs a tokenizer with an end of text.*'characters'"):
        train(config)


def test_a_batch_that_grows_is_divided_into_its_own_micro_batches():
    config = TrainingConfig(batch_size=8, micro_batch_size=4)
    assert [config.accumulation_of(size) for size in (8, 4, 2)] == [2, 1, 1]
    batches = [tokens(0, 4), tokens(1, 8)]
    _, divided = train_steps(batches=batches, micro_batch_size=1)
    _, whole = train_steps(batches=batches)
    np.testing.assert_allclose(losses_of(divided), losses_of(whole), rtol=1e-6)


def test_the_step_uses_the_momentum_of_its_number():
    """Warming up for ever from 0.85: the weights of a run whose momentum is 0.85."""
    shared = OPTIMIZER.model_dump() | {"kind": "muon"}
    rising = OptimizerConfig(**shared | {"muon_momentum_warmup_steps": 10**9})
    low = OptimizerConfig(**shared | {"muon_momentum": 0.85})
    states = [train_steps(optimizer=each)[0] for each in (rising, low)]
    name = "blocks.0.mlp.up.weight"
    one, other = (np.asarray(state.params[name]) for state in states)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    high = train_steps(optimizer=OptimizerConfig(**shared))[0].params[name]
    assert np.abs(np.asarray(high) - one).max() > 1e-4
