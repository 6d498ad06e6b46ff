"""A mixture gives each source its exact share at every prefix, and each source its own order."""

import importlib.util
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import write_config

from llm.config import DataConfig, validate
from llm.errors import UsageError
from llm.text.batches import RingWindows, TrainingBatches
from llm.text.mixture import Mixture, Phase, mixture_of, schedule

PROPORTIONS = st.lists(st.integers(1, 60), min_size=1, max_size=9).map(tuple)


class Counting:
    """A split whose tokens are `first`, `first` + 1, ..."""

    def __init__(self, tokens: int, first: int = 0):
        self.tokens, self.first = tokens, first

    def __len__(self):
        return self.tokens

    def windows(self, starts, length):
        return (self.first + (starts[:, None] + np.arange(length)) % self.tokens).astype(np.int32)


def mixture(*proportions: int) -> Mixture:
    return mixture_of([Phase(0, 1, proportions)])


# Shares


@settings(deadline=None)
@given(PROPORTIONS)
def test_each_source_is_less_than_one_window_from_its_share_at_every_prefix(proportions):
    """In whole numbers: | D count - p n | < D for each n, over two periods and a bit."""
    period = sum(proportions)
    numbers = np.arange(2 * period + 3)
    source, within = mixture(*proportions).place(numbers)
    counts = np.cumsum(source[:, None] == np.arange(len(proportions)), axis=0)
    errors = period * counts - np.array(proportions) * (numbers[:, None] + 1)
    assert np.abs(errors).max() < period
    # Each source's windows come in order: 0, 1, 2, ...
    assert np.array_equal(within, counts[numbers, source] - 1)
    assert np.array_equal(counts[period - 1], proportions)


@pytest.mark.parametrize(
    "proportions",
    [(900, 20, 20, 20, 20, 20), (1,) * 40, (999_983, 1), (1, 50, 949), (7, 7, 7, 7, 1)],
)
def test_shares_that_rounding_and_divisor_methods_miss(proportions):
    """With 90 % and five of 2 %, Webster's method is 1.8 windows off at some prefix."""
    period = sum(proportions)
    counts = np.zeros(len(proportions))
    for n, source in enumerate(schedule(proportions)[0].tolist(), 1):
        counts[source] += 1
        if n % 97 == 0 or n < 3000:
            errors = np.abs(counts - n * np.array(proportions) / period)
            assert errors.max() < 1, (n, errors)
        if n > 20_000:
            break


@settings(deadline=None)
@given(PROPORTIONS, st.integers(0, 2**40))
def test_window_n_is_found_without_those_before_it(proportions, number):
    """Far away as near: whole periods come first, and the rest as at the beginning."""
    period = sum(proportions)
    whole = mixture(*proportions)
    source, within = whole.place(np.array([number]))
    near, rank = whole.place(np.array([number % period]))
    assert source == near
    assert within == number // period * proportions[source[0]] + rank
    assert whole.read(number)[source[0]] == within[0]  # as many came before it


@settings(deadline=None)
@given(st.lists(st.decimals("0.001", 50, places=3), min_size=1, max_size=6))
def test_weights_are_read_as_they_are_written(weights):
    tables = [
        {"name": f"s{n}", "source": "x", "weight": float(weight)}
        for n, weight in enumerate(weights)
    ]
    found = DataConfig(mixture=tables).proportions
    assert [Fraction(n, sum(found)) for n in found] == [
        Fraction(weight) / Fraction(sum(weights)) for weight in weights
    ]
    assert np.gcd.reduce(found) == 1


# Order


def batches(*sizes: int, proportions=None, phases=None, batch_size=6, rows=None, seed=3):
    """Source i has the tokens from 1000 i on; windows of 10 tokens and their targets."""
    phases = phases or [Phase(0, batch_size, proportions)]
    return TrainingBatches(
        [RingWindows(Counting(size, 1000 * i), 10) for i, size in enumerate(sizes)],
        batch_size=phases[-1].batch_size,
        seed=seed,
        rows=rows,
        mixture=mixture_of(phases),
    )


def alone(size: int, first: int, count: int, seed=3) -> np.ndarray:
    """The first windows of a run on one source."""
    one = TrainingBatches(RingWindows(Counting(size, first), 10), batch_size=count, seed=seed)
    return one[0].tokens


def test_the_windows_of_a_source_are_those_of_a_run_on_it_alone():
    mixed = batches(75, 333, 40, proportions=(2, 5, 1))
    rows = np.concatenate([mixed[step].tokens for step in range(40)])
    sources = np.concatenate([mixed.window_sources(step) for step in range(40)])
    assert np.array_equal(rows[:, 0] // 1000, sources)
    for i, size in enumerate((75, 333, 40)):
        own = rows[sources == i]
        assert abs(len(own) - 240 * (2, 5, 1)[i] / 8) < 1
        assert np.array_equal(own, alone(size, 1000 * i, len(own)))


def test_window_starts_are_of_each_source():
    mixed = batches(75, 333, proportions=(1, 2))
    for step in range(5):
        starts = mixed.window_starts(step) + 1000 * mixed.window_sources(step)
        assert np.array_equal(mixed[step].tokens[:, 0], starts)


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_and_reading_ahead_change_no_window(hosts):
    whole = batches(75, 333, proportions=(3, 4))
    parts = [
        batches(75, 333, proportions=(3, 4), rows=slice(h * 6 // hosts, (h + 1) * 6 // hosts))
        for h in range(hosts)
    ]
    together = zip(*(part.iterate(7) for part in parts), strict=True)
    for step, local in zip(range(7, 90), together, strict=False):
        expected = whole[step].tokens
        assert np.array_equal(np.concatenate([batch.tokens for batch in local]), expected)


def test_epochs_are_what_was_read():
    mixed = batches(75, 333, proportions=(1, 2))
    read = np.concatenate([mixed.window_sources(step) for step in range(50)])
    assert mixed.epochs(50) == [(read == 0).sum() / 7, (read == 1).sum() / 33]


# Other weights from a step on


def test_other_weights_go_on_where_each_source_was():
    phases = [Phase(0, 6, (1, 1)), Phase(10, 6, (5, 1)), Phase(14, 4, (1, 7))]
    steps = [*range(10), *range(10, 14), *range(14, 40)]
    found = []
    for step in steps:
        until = [phase for phase in phases if phase.from_step <= step]
        found.append(batches(75, 333, phases=until)[step].tokens)
    for i, size in enumerate((75, 333)):
        own = np.concatenate([rows[rows[:, 0] // 1000 == i] for rows in found])
        assert np.array_equal(own, alone(size, 1000 * i, len(own)))
        # 60 windows by halves, 24 by 5 : 1, 104 by 1 : 7
        assert abs(len(own) - (30 + 24 * (5, 1)[i] / 6 + 104 * (1, 7)[i] / 8)) < 3
    # The object of the newest phase reads ahead as the steps one by one.
    newest = batches(75, 333, phases=phases)
    for batch, expected in zip(newest.iterate(20), found[20:], strict=False):
        assert np.array_equal(batch.tokens, expected)


# Settings


def settings_of(*tables, **data):
    return validate({"data": {"mixture": list(tables), **data}}, "the test")


A, B = ({"name": name, "source": f"{name}.txt", "weight": 1.0} for name in "ab")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([A, B | {"weight": -1.0}], r"data.mixture.1.weight = -1.0: expected a number greater"),
        ([A, B | {"weight": 0}], r"data.mixture.1.weight = 0: expected a number greater than 0"),
        ([A, B | {"weight": float("nan")}], r"data.mixture.1.weight = nan: expected"),
        ([A, B | {"weight": float("inf")}], r"data.mixture.1.weight = inf: expected"),
        ([A, B | {"weight": "1"}], r"data.mixture.1.weight = '1': expected"),
        ([A, A], r"'a' is the name of 2 sources; expected another name"),
        ([A, B | {"name": "a/b"}], r"data.mixture.1.name = 'a/b': expected a name of letters"),
        ([A, B | {"weigth": 1}], r"unknown setting data.mixture.1.weigth; did you mean .*weight"),
        ([{"name": "a", "weight": 1}], r"data.mixture.0.source is missing: expected a source"),
        ([A, B | {"weight": 0.123456789}], r"round them, to four digits"),
        ([A, B | {"max_epochs": 0}], r"data.mixture.1.max_epochs = 0: expected"),
        (["a"], r"data.mixture"),
    ],
)
def test_what_is_no_mixture_is_refused(tables, message):
    with pytest.raises(UsageError, match=message):
        settings_of(*tables)


def test_a_mixture_stands_in_the_place_of_a_source():
    with pytest.raises(UsageError, match=r"data.source = 'x' beside \[\[data.mixture\]\]"):
        settings_of(A, B, source="x")
    config = settings_of(A, B | {"text_field": "body"}, text_field="content")
    assert settings_of(
        *config.model_dump(mode="json")["data"]["mixture"], source=""
    ) == settings_of(*config.data.model_dump()["mixture"])
    of = config.data.by_source
    assert [one.source for one in of.values()] == ["a.txt", "b.txt"]
    assert [one.text_field for one in of.values()] == ["content", "body"]


# Whole runs


@pytest.fixture
def mixed(tmp_path):
    """A configuration that mixes two texts, 3 : 1; the second is of other letters."""
    config = write_config(tmp_path)
    (tmp_path / "other.txt").write_text("HE SAW A BOAT UNDER THE MOON AND SANG. " * 60)
    return mixture_file(tmp_path, config, 3, 1)


def mixture_file(folder, config, *weights, name="config.toml", extra=""):
    lines = [line for line in config.read_text().splitlines() if not line.startswith("source")]
    while "[[data.mixture]]" in lines:
        del lines[lines.index("[[data.mixture]]") :]
    tables = [
        f'[[data.mixture]]\nname = "{of}"\nsource = "{folder}/{of}.txt"\nweight = {weight}\n{extra}'
        for of, weight in zip(("corpus", "other"), weights, strict=True)
    ]
    path = folder / name
    path.write_text("\n".join([*lines, *tables]))
    return path


def rows_of(folder, run="run"):
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def trained(config, *flags):
    from runs import train

    return train(config, *flags)


def test_a_run_on_a_mixture_reports_each_source_and_replays_it(mixed, tmp_path, capsys):
    from llm.commands.replay import main as replay

    has_tensorboard = importlib.util.find_spec("tensorboardX") is not None
    trained(mixed, *["--logging.tensorboard"] * has_tensorboard)
    said = capsys.readouterr().err
    assert "corpus: " in said and "75 % of the windows" in said
    rows = rows_of(tmp_path)
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert [(row["step"], row.get("source")) for row in evaluated] == [
        (step, source) for step in (6, 12) for source in ("corpus", "other", None)
    ]
    for *parts, whole in (evaluated[:3], evaluated[3:]):
        assert whole["tokens"] == sum(part["tokens"] for part in parts)
        nats = sum(part["loss"] * part["tokens"] for part in parts)
        assert whole["loss"] == pytest.approx(nats / whole["tokens"], rel=1e-12)
        # One character, one byte: bits per byte are bits per token.
        for row in (*parts, whole):
            assert row["bits_per_byte"] == pytest.approx(row["loss"] / np.log(2), rel=1e-12)
        assert f"validation loss on other {parts[1]['loss']:.4f}" in said
    if has_tensorboard:
        (events,) = (tmp_path / "run" / "tensorboard").iterdir()
        assert b"eval/other/bits_per_byte" in events.read_bytes()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [o["name"] for o in run["data"]["origins"]] == ["corpus/corpus.txt", "other/other.txt"]

    capsys.readouterr()
    found = []
    for step in range(1, 13):
        replay([str(tmp_path / "run"), "--step", str(step), "--json"])
        found += json.loads(capsys.readouterr().out)["sequences"]
    for n in range(1, len(found) + 1):
        assert abs(sum(s["source"] == "corpus" for s in found[:n]) - 0.75 * n) < 1
    for sequence in found:
        assert sequence["text"].isupper() == (sequence["source"] == "other")
        assert {d["document"] for d in sequence["documents"]} == {f"{sequence['source']}.txt"}
    replay([str(tmp_path / "run"), "--step", "1"])
    assert "step 1, sequence 0, from corpus" in capsys.readouterr().out


def test_weights_change_on_resume_and_what_was_read_stays_read(mixed, tmp_path, capsys):
    """Steps 1 to 8 by 3 : 1, the rest by 1 : 3: replay reads as both starts did."""
    from llm.commands.replay import main as replay

    def read(step):
        capsys.readouterr()
        replay([str(tmp_path / "run"), "--step", str(step), "--json"])
        return json.loads(capsys.readouterr().out)["sequences"]

    trained(mixed, "--training.steps", "8", "--optimizer.decay-steps", "12")
    before = [read(step) for step in range(1, 9)]
    other = mixture_file(tmp_path, mixed, 1, 3, name="other.toml")
    with pytest.raises(UsageError, match=r"corpus.weight: the run has 3.0, this") as caught:
        trained(other, "--optimizer.decay-steps", "12")
    assert "or add --run.allow-change" in str(caught.value)
    trained(other, "--optimizer.decay-steps", "12", "--run.allow-change")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    changed = run["starts"][-1]["changed"]
    assert changed["data.mixture.corpus.weight"] == [3, 1]
    assert changed["data.mixture.other.weight"] == [1, 3]
    assert [read(step) for step in range(1, 9)] == before
    after = [sequence for step in range(9, 13) for sequence in read(step)]
    assert sum(sequence["source"] == "corpus" for sequence in after) == 8
    # Each source goes on: no window comes twice before all have come.
    places = [
        (part["source"], part["documents"][0]["offset"])
        for part in [*itertools.chain(*before), *after]
    ]
    for source, windows in (("corpus", 48 + 8), ("other", 16 + 24)):
        own = [place for place in places if place[0] == source]
        assert len(own) == len(set(own)) == windows


def test_names_and_their_order_stay_on_resume_and_places_may_change(mixed, tmp_path):
    trained(mixed)
    (tmp_path / "moved").mkdir()
    for name in ("corpus", "other"):
        (tmp_path / "moved" / f"{name}.txt").write_bytes((tmp_path / f"{name}.txt").read_bytes())
    moved = mixture_file(tmp_path / "moved", mixed, 3, 1, extra="max_epochs = 9")
    trained(moved)  # finished, and nothing is asked
    text = mixed.read_text().replace('name = "other"', 'name = "another"')
    (tmp_path / "renamed.toml").write_text(text)
    with pytest.raises(UsageError, match=r"data.mixture: the run has") as caught:
        trained(tmp_path / "renamed.toml", "--run.allow-change")
    assert "add --run.allow-change" not in str(caught.value)


@pytest.mark.thorough
def test_how_the_devices_share_the_batch_changes_no_window_and_no_loss(mixed, tmp_path):
    """Eight devices with a sequence each, and four pairs that share two sequences and the heads."""
    trained(mixed)
    trained(mixed, "--run.dir", str(tmp_path / "two"), "--mesh.data", "4", "--mesh.tensor", "2")
    one, two = rows_of(tmp_path), rows_of(tmp_path, "two")
    assert [(row["kind"], row["step"], row.get("source")) for row in one] == [
        (row["kind"], row["step"], row.get("source")) for row in two
    ]
    # Sums are in another order.
    np.testing.assert_allclose(
        [row["loss"] for row in two], [row["loss"] for row in one], rtol=2e-5
    )


@pytest.mark.thorough
def test_a_killed_run_on_a_mixture_ends_as_one_that_was_not(mixed, tmp_path):
    from runs import run_process

    assert run_process(mixed)[0] == 0
    again = tmp_path / "again"
    flags = ("--run.dir", str(again))
    code, output = run_process(mixed, *flags, fault="step:step=7:kill")
    assert code == -9, output
    code, output = run_process(mixed, *flags)
    assert code == 0, output
    deterministic = ("kind", "source", "step", "loss", "tokens", "bits_per_byte")
    one, other = (
        [{name: row.get(name) for name in deterministic} for row in rows_of(tmp_path, run)]
        for run in ("run", "again")
    )
    assert one == other


def test_rows_of_sources_without_the_whole_are_written_again(mixed, tmp_path, monkeypatch):
    from llm.run.metrics import MetricsFile

    trained(mixed)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-1]))  # the two sources' rows of the last step stay
    trained(mixed)  # which looks at the rows before it is taken for finished
    assert path.read_text().splitlines(keepends=True) == whole
    path.write_text("".join(whole[:-1]))
    metrics = MetricsFile(path)
    metrics.rewind(12)
    assert not metrics.has_evaluation(12) and metrics.has_evaluation(6)


def test_a_source_that_would_be_read_too_often_is_refused_before_training(mixed, tmp_path):
    """270 of its 300 characters train: 16 windows, and 87 of the run's 96 are its."""
    (tmp_path / "other.txt").write_text("HE SAW A BOAT. " * 20)
    config = mixture_file(tmp_path, mixed, 1, 9)
    with pytest.raises(
        UsageError,
        match=r"'other' would be read 5.44 times in 12 steps, expected "
        r"at most max_epochs = 4: lower its weight \(9\)",
    ):
        trained(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    trained(mixture_file(tmp_path, mixed, 1, 9, extra="max_epochs = 5.5"))


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ("", "the source 'other' of data.mixture: the corpus has no text", 3),
        ("short", "the source 'other' of data.mixture: the training text has 4 tokens, fewer", 3),
        (None, "the source 'other' of data.mixture: there is no file or folder .*other.txt", 3),
    ],
)
def test_a_source_without_a_window_is_named(mixed, tmp_path, text, message, code):
    from llm.errors import LLMError

    (tmp_path / "other.txt").unlink()
    if text is not None:
        (tmp_path / "other.txt").write_text(text)
    with pytest.raises(LLMError, match=message) as caught:
        trained(mixed)
    assert caught.value.exit_code == code


def test_prepare_says_what_each_source_holds(mixed, tmp_path, capsys):
    """Counted by hand: the documents that are read, those left out, characters as tokens."""
    from llm.commands.prepare import main as prepare

    (tmp_path / "rows.jsonl").write_text('{"text": "the cat"}\n{"text": null}\n{"text": ""}\n')
    text = mixed.read_text().replace("other.txt", "rows.jsonl")
    config = tmp_path / "rows.toml"
    config.write_text(text.replace("[data]", '[data]\nbad_rows = "skip"'))
    assert prepare([str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sources"]
    size = (tmp_path / "corpus.txt").stat().st_size
    keys = ("name", "documents", "tokens", "bytes", "bytes_per_token", "dropped")
    beside = [one.pop("beside_gpt2") for one in found]
    assert all(one is None or one["sample_bytes"] <= size for one in beside)
    left_out = {"row without text": 1, "empty": 1}
    expected = [("corpus", 1, size, size, 1.0, {}), ("other", 1, 7, 7, 1.0, left_out)]
    assert found == [dict(zip(keys, values, strict=True)) for values in expected]
    assert prepare([str(config)]) == 0
    assert "other: 1 document, 7 tokens" in capsys.readouterr().out
