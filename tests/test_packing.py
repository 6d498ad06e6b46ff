"""Documents packed into windows: each target once, each document by itself, little padding."""

import functools
import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import jax.flatten_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import copied, train, write_config

from llm.__main__ import main
from llm.api.language_model import LanguageModel
from llm.config import TrainingConfig
from llm.model.gpt import ModelSpec, initialise
from llm.model_config import ModelConfig
from llm.text.packing import PackedWindows, best_fit, cut_documents, pack
from llm.text.splits import Span, TokenSplit
from llm.text.windows import Batch
from llm.training.step import accumulate_gradients

END = 0
SPEC = ModelSpec(
    ModelConfig(n_layer=2, n_head=4, d_model=32, context_length=24, vocab_multiple=16), 400
)


class Numbered:
    """A stream whose token n is n, and 0 where a document ends."""

    vocab_size = 2**31

    def __init__(self, ends):
        self.ids = np.arange(1, (ends[-1] if len(ends) else 0) + 2, dtype=np.int32)[:-1]
        self.ids[np.asarray(ends) - 1] = END

    def tokens(self):
        return self.ids


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def packed(lengths, context, opens, cut=0, end=None):
    """The split [cut, end) of documents that each end in END."""
    stops = np.cumsum(lengths)
    stream = Numbered(stops)
    end = len(stream.ids) if end is None else end
    starts = np.concatenate([[0], stops[:-1]])
    inside = starts[(starts >= cut) & (starts < end)] - cut
    pieces = cut_documents(inside, end - cut, context, opens)
    split = TokenSplit([Span(stream, cut, end)])
    return PackedWindows(split, *pack(pieces, context, opens), context, END if opens else None)


def documents_of(windows, chosen=None):
    """Of all windows: each segment's inputs and targets."""
    batch = windows.rows(np.arange(windows.per_epoch) if chosen is None else chosen)
    for tokens, weights, segments in zip(*batch, strict=True):
        changes = np.diff(segments[segments > 0], prepend=1)
        assert set(changes) <= {0, 1} and not segments[(segments > 0).sum() :].any()
        for number in range(1, segments.max() + 1):
            counted = (segments == number) & (weights == 1)
            assert np.diff(np.flatnonzero(counted)).max(initial=1) == 1
            yield tokens[:-1][counted].tolist(), tokens[1:][counted].tolist()
        assert not weights[segments == 0].any()


@settings(deadline=None, max_examples=300)
@given(lengths=LENGTHS, context=st.integers(1, 50), opens=st.booleans(), data=st.data())
def test_each_target_is_predicted_once_from_its_own_document(lengths, context, opens, data):
    """By hand: each document, with the end of text before it, cut into runs of T inputs."""
    size = sum(lengths)
    cut = data.draw(st.integers(0, size - 1))
    end = data.draw(st.integers(cut + 1, size))
    windows = packed(lengths, context, opens, cut, end)
    expected, start, tokens = [], 0, windows._split.spans[0].stream.ids.tolist()
    for length in lengths:
        whole = tokens[max(start, cut) : min(start + length, end)]
        if opens and start >= cut and whole:
            whole = [END, *whole]
        for at in range(0, len(whole) - 1, context):
            run = whole[at : at + context + 1]
            expected.append((run[:-1], run[1:]))
        start += length
    assert sorted(documents_of(windows)) == sorted(expected)


def test_an_end_of_text_closes_one_document_and_opens_the_next():
    """In one place, so that documents of 11 tokens have 12 inputs at most."""
    windows = packed([3, 3, 3, 2], 12, True)
    [tokens], [weights], [segments] = windows.rows(np.array([0]))
    assert windows.per_epoch == 1
    assert tokens.tolist() == [END, 1, 2, END, 4, 5, END, 7, 8, END, 10, END, 0]
    assert segments.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert weights.tolist() == 11 * [1.0] + [0.0]


def first_best_fit(costs, capacity):
    """Best-fit decreasing, one piece at a time."""
    rooms, window_of = [], {}
    for piece in sorted(range(len(costs)), key=lambda n: -costs[n]):
        able = [n for n, room in enumerate(rooms) if room >= costs[piece]]
        if not able:
            rooms.append(capacity)
            able = [len(rooms) - 1]
        best = min(able, key=lambda n: rooms[n])
        rooms[best] -= costs[piece]
        window_of[piece] = best
    return sorted(rooms)


@settings(deadline=None, max_examples=300)
@given(costs=st.lists(st.integers(1, 30), min_size=1, max_size=60), capacity=st.integers(30, 60))
def test_windows_are_as_full_as_best_fit_makes_them_piece_by_piece(costs, capacity):
    window_of = best_fit(np.array(costs), capacity)
    taken = np.bincount(window_of, weights=costs)
    assert sorted((capacity - taken).astype(int).tolist()) == first_best_fit(costs, capacity)


@functools.partial(jax.jit, static_argnums=0)
def gradients(training, batch):
    """The gradient of all parameters as one vector, and the mean of nats per target."""
    params = initialise(SPEC, jax.random.key(0))
    gradient, terms = accumulate_gradients(SPEC, training, params, batch, None)
    return jax.flatten_util.ravel_pytree(gradient)[0], terms.nll


@pytest.mark.parametrize(
    ("opens", "training"),
    [(True, {}), (False, {}), (True, {"micro_batch_size": 2}), (False, {"remat": "block"})],
    ids=["whole", "whole, unopened", "accumulated", "remat"],
)
def test_a_packed_batch_has_the_loss_and_gradient_of_its_documents_alone(opens, training):
    """Weighted by their tokens, to 1e-6; in float32, each alone at the beginning of a window."""
    T = SPEC.config.context_length
    windows = packed([9, 30, 3, 14, 2, 22, 17, 8, 5, 60, 1, 11], T, opens)
    rows = np.arange(windows.per_epoch // 2 * 2)
    batch = windows.rows(rows)
    config = TrainingConfig(batch_size=len(rows), compute_dtype="float32", **training)
    found = gradients(config, batch)
    alone, tokens = [np.float64(0), np.float64(0)], 0
    for inputs, targets in documents_of(windows, rows):
        count = len(inputs)
        padded = np.zeros((1, T + 1), np.int32)
        padded[0, : count + 1] = [*inputs, targets[-1]]
        weights = (np.arange(T) < count)[None].astype(np.float32)
        each = gradients(TrainingConfig(batch_size=1), Batch(padded, weights))
        alone = [
            sum_ + count * np.asarray(part, np.float64)
            for sum_, part in zip(alone, each, strict=True)
        ]
        tokens += count
    assert tokens == batch.weights.sum()
    for value, expected in zip(found, alone, strict=True):
        expected /= tokens
        assert np.linalg.norm(value - expected) <= 1e-6 * np.linalg.norm(expected)


def write_documents(folder):
    """Forty documents of 5 to 90 characters, some longer than the context."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(40):
        words = random.choice(["the", "cat", "sat", "on", "mat"], random.integers(2, 25))
        (folder / f"{number:02}.txt").write_text(f"{number} {' '.join(words)}")
    return str(folder)


@pytest.fixture(scope="module", params=["bytes", "characters"])
def packed_run(request, tmp_path_factory):
    """The folder of a run on packed documents, with an end of text and without one."""
    folder = tmp_path_factory.mktemp("packed")
    data = {
        "source": write_documents(folder / "texts"),
        "windows": "packed",
        "validation": "documents:0.2",
    }
    assert train(write_config(folder, data=data, tokenizer={"kind": request.param})) == 0
    return folder


def test_the_validation_loss_is_that_of_each_document_alone(packed_run):
    """After an end of text where there is one; a document is cut at the context."""
    lm = LanguageModel.load(packed_run / "run")
    T, end = lm.spec.config.context_length, lm.tokenizer.end_of_text
    rows = map(json.loads, (packed_run / "run" / "metrics.jsonl").read_text().splitlines())
    found = [row for row in rows if row["kind"] == "eval"][-1]
    nats, targets = [], 0
    for path in (packed_run / "texts").iterdir():
        text = path.read_bytes()
        if int(hashlib.sha256(text).hexdigest()[:16], 16) >= 0.2 * 2**64:
            continue
        ids = lm.tokenizer.encode(text.decode()).tolist()
        ids = ids if end is None else [end, *ids, end]
        for start in range(0, len(ids) - 1, T):
            scored = lm.score(ids[start : start + T + 1]).tokens[1:]
            nats += [-token.logprob for token in scored]
            targets += len(scored)
    assert found["tokens"] == targets > 0
    assert found["loss"] == pytest.approx(np.sum(nats) / targets, rel=1e-6)


@pytest.mark.thorough(keep=1)
def test_a_resumed_run_reads_the_packed_windows_of_an_unbroken_one(packed_run, tmp_path, capsys):
    """And the start says how much of them is padding."""
    config = copied(packed_run, tmp_path)
    shutil.rmtree(tmp_path / "run")
    schedule = "--optimizer.decay-steps", "12"
    assert train(config, *schedule, "--training.steps", "6") == 0
    assert train(config, *schedule) == 0
    one, other = (
        LanguageModel.load(folder / "run").params_sha256 for folder in (packed_run, tmp_path)
    )
    assert one == other
    said = capsys.readouterr().err
    assert re.search(r"documents: packed in \d+ windows, \d+\.\d\d % of them padding", said)


def test_replay_names_the_documents_of_a_packed_window(packed_run, capsys):
    assert main(["replay", str(packed_run / "run"), "--step", "3", "--json"]) == 0
    sequences = json.loads(capsys.readouterr().out)["sequences"]
    assert len(sequences) == 8
    for sequence in sequences:
        for part in sequence["documents"]:
            text = (packed_run / "texts" / Path(part["document"]).name).read_text()
            held = text[part["offset"] : part["offset"] + part["tokens"]]
            assert held and held in sequence["text"]


def test_packing_leaves_little_room(tmp_path):
    """Lengths as texts have them, far more documents than windows: below 1 %."""
    lengths = np.random.default_rng(1).lognormal(5, 1, 20_000).astype(int) + 1
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for opens in (True, False):
        pieces = cut_documents(starts[:-1], int(starts[-1]), 1024, opens)
        windows = PackedWindows(None, *pack(pieces, 1024, opens), 1024, 0)
        assert 0 <= windows.padding < 0.01
