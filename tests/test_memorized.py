"""Memorisation: counts by brute force, shares in closed form, and a model made to memorise."""

import json

import numpy as np
import pytest
from runs import train, write_config
from test_packing import Numbered

from llm.__main__ import main
from llm.api.language_model import LanguageModel
from llm.commands.memorized import for_people
from llm.errors import UsageError
from llm.inference.score import Scorer
from llm.measure.memorization import (
    PREFIX,
    SUFFIX,
    Predictions,
    by_occurrences,
    draw_windows,
    extraction,
    membership,
    occurrences,
    predictions,
    rivals,
    separation,
)
from llm.text.splits import Span, TokenSplit

LENGTH = PREFIX + SUFFIX


def split_of(ids):
    stream = Numbered([len(ids)])
    stream.ids = np.asarray(ids, np.int32)
    return TokenSplit([Span(stream, 0, len(ids))])


def test_occurrences_are_those_that_a_search_finds(monkeypatch):
    """Few ids, so that most places begin like a window; the text is read in several parts."""
    monkeypatch.setattr("llm.measure.memorization._CHUNK", 64)
    ids = np.random.default_rng(0).integers(0, 2, 1000)
    windows = np.stack([ids[at : at + 7] for at in (0, 60, 400, 993)])
    expected = [sum((ids[at : at + 7] == window).all() for at in range(994)) for window in windows]
    assert occurrences(split_of(ids), windows).tolist() == expected
    assert min(expected) > 1


def test_windows_lie_within_documents_and_depend_on_the_seed_alone():
    class Ends:
        ends_of_text, begin_of_text = (0,), None

    ids = np.arange(1, 3001)
    ids[::250] = 0
    split = split_of(ids)
    windows = draw_windows(split, 40, 3, Ends)
    assert windows.shape == (40, LENGTH) and not (windows == 0).any()
    assert len({tuple(window) for window in windows.tolist()}) == 40
    np.testing.assert_array_equal(windows, draw_windows(split, 40, 3, Ends))
    assert not np.array_equal(windows, draw_windows(split, 40, 4, Ends))
    assert draw_windows(split_of(ids[:90]), 40, 3, Ends).shape == (0, LENGTH)


def predictions_of(probabilities, ranks):
    """Windows whose suffix has these probabilities as a whole, its tokens all of one rank."""
    shape = len(ranks), LENGTH - 1
    logprobs = np.zeros(shape)
    logprobs[:, -1] = np.log(probabilities)
    return Predictions(np.tile(np.array(ranks)[:, None], (1, shape[1])), logprobs)


def test_shares_follow_from_the_probability_of_the_suffix():
    """1 - (1 - P)^n >= p; by hand for P = 1, 1/2, 1e-3 and 1e-30."""
    numbers = predictions_of([1.0, 0.5, 1e-3, 1e-30], [1, 1, 2, 9])
    numbers.ranks[1, 0] = 5  # in the prefix, which is given
    found = extraction(numbers)
    assert found["verbatim_share"] == 0.5
    shares = {(e["draws"], e["probability"]): e["share"] for e in found["extractable"]}
    # 1 - 0.999^1000 = 0.632
    assert shares == {
        (1, 0.5): 0.5, (10, 0.5): 0.5, (100, 0.5): 0.5, (1000, 0.5): 0.75, (1000, 0.9): 0.5
    }  # fmt: skip
    levels = by_occurrences(np.array([1, 3, 2, 64]), numbers)
    assert [(g["at_least"], g["at_most"], g["windows"]) for g in levels] == [
        (1, 1, 1), (2, 3, 2), (64, 127, 1)
    ]  # fmt: skip


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    random = np.random.default_rng(1)
    members, others = random.integers(0, 9, 300) + 1.0, random.integers(0, 9, 200) * 1.0
    pairs = np.sign(members[:, None] - others).mean() / 2 + 0.5
    assert separation(members, others)["auc"] == pytest.approx(pairs)
    threshold = np.sort(others)[-3]  # two of 200 may be above
    expected = (members > threshold).mean()
    assert separation(members, others)["tpr_at_1_percent_fpr"] == expected


def test_a_model_that_knows_nothing_is_at_chance():
    random = np.random.default_rng(2)
    one, other = (Predictions(None, random.normal(size=(2000, LENGTH - 1))) for _ in range(2))
    for found in (membership(one, other), membership(one, other)["min_k"]):
        assert found["auc"] == pytest.approx(0.5, abs=0.03)
        assert found["tpr_at_1_percent_fpr"] == pytest.approx(0.01, abs=0.01)


def test_rivals_have_the_form_of_the_canary():
    for text in rivals("PIN 47-11, ok", 0, 20):
        assert text[:4] == "PIN " and text[6] == "-" and text[9:] == ", ok"
        assert (text[4:6] + text[7:9]).isdigit()
    assert all(text[0].isupper() and text[1:3].islower() for text in rivals("Abc!", 0, 20))
    assert len(set(rivals("47114711", 0, 20))) == 20
    with pytest.raises(UsageError, match="neither digits nor Latin letters"):
        rivals("密码", 0)


CANARY = "the code is 38204711"


def planted(folder):
    """Random letters, in documents that stand 1, 4, 16 or 64 times in the corpus; and a canary."""
    random = np.random.default_rng(0)
    folder.mkdir()
    texts = []
    for times, different in ((1, 24), (4, 12), (16, 3), (64, 2)):
        for _ in range(different):
            text = "".join(random.choice(list("abcdefghijklmnop "), 200))
            texts += [text] * times
    texts += [f"{CANARY}\n" * 5] * 16
    for number, place in enumerate(random.permutation(len(texts))):
        (folder / f"{number:03}.txt").write_text(texts[place])


@pytest.mark.thorough
def test_what_stands_more_often_in_the_text_is_repeated_more_often(tmp_path, capsys):
    planted(tmp_path / "texts")

    def found_after(steps, *more):
        folder = tmp_path / str(steps)
        folder.mkdir()
        config = write_config(
            folder,
            data={"source": str(tmp_path / "texts")},
            model={"d_model": 64, "context_length": 112, "positions": "rotary", "dropout": 0.0},
            optimizer={"kind": "muon", "warmup_steps": 50},
            tokenizer={"kind": "bytes"},
            training={"steps": steps, "eval_every": 0, "batch_size": 16},
            checkpoint={"every": 0},
            sample={"prompt": "", "max_new_tokens": 0},
        )
        assert train(config) == 0
        capsys.readouterr()
        words = ["--windows", "200", "--canary", CANARY, "--json", *more]
        assert main(["memorized", str(folder / "run"), *words]) == 0
        return json.loads(capsys.readouterr().out)

    # Untrained: after one step of the warm-up. Nothing is repeated, and all is at chance.
    chance = found_after(1)
    for group in (chance, chance["held_out"], *chance["by_occurrences"]):
        assert group["verbatim_share"] == 0
        assert all(one["share"] == 0 for one in group["extractable"])
    assert chance["membership"]["auc"] == pytest.approx(0.5, abs=0.1)
    assert chance["membership"]["tpr_at_1_percent_fpr"] < 0.1
    assert chance["canaries"][0]["exposure"] < 5

    run, page = tmp_path / "150" / "run", tmp_path / "page.html"
    found = found_after(150, "--html", str(page))
    (canary,) = found["canaries"]
    assert (canary["rank"], canary["of"]) == (1, 1001)
    assert canary["exposure"] == pytest.approx(np.log2(1001))
    shares = [group["verbatim_share"] for group in found["by_occurrences"]]
    logprobs = [group["mean_suffix_logprob"] for group in found["by_occurrences"]]
    assert len(shares) >= 4 and shares == sorted(shares) and logprobs == sorted(logprobs)
    assert shares[0] == 0 and shares[-1] > 0.9
    assert "likeliest to repeat" in page.read_text()
    assert main(["memorized", str(run), "--windows", "20"]) == 0
    assert "written by greedy decoding" in capsys.readouterr().out
    # Verbatim is what greedy decoding, token by token, writes.
    opened = LanguageModel.load(run)
    texts = [path.read_bytes() for path in sorted((tmp_path / "texts").iterdir())[:12]]
    windows = np.array([list(text[50 : 50 + LENGTH]) for text in texts])
    prompts = [window[:PREFIX] for window in windows.tolist()]
    written = opened.generate(prompts, max_new_tokens=SUFFIX, temperature=0.0)
    greedy = [[token.id for token in one.tokens[PREFIX:]] for one in written]
    by_hand = [one == window[PREFIX:] for one, window in zip(greedy, windows.tolist(), strict=True)]
    scorer = Scorer(opened.spec, opened.params, opened.tokenizer)
    numbers = predictions(scorer, windows)
    assert (numbers.ranks[:, -SUFFIX:] == 1).all(1).tolist() == by_hand
    assert 0 < sum(by_hand) < len(by_hand)
    # It tells what it has seen from letters that it has not. Held-out text here has copies.
    letters = [*map(ord, "abcdefghijklmnop ")]
    unseen = np.random.default_rng(9).choice(letters, windows.shape).astype(np.int32)
    told = membership(numbers, predictions(scorer, unseen))
    assert told["auc"] > 0.7 and told["min_k"]["auc"] > 0.7


def test_a_run_that_was_not_trained_here_has_no_training_text(copy):
    path = copy / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"imported": {"from": "model"}}))
    with pytest.raises(UsageError, match="was imported from model: it was not trained here"):
        main(["memorized", str(copy / "run")])


def test_a_window_that_stands_once_is_said_to_stand_once():
    numbers = predictions_of([0.5, 0.5], [1, 1])
    report = {
        "prefix_tokens": PREFIX, "suffix_tokens": SUFFIX, **extraction(numbers),
        "by_occurrences": by_occurrences(np.array([1, 4]), numbers),
        "held_out": extraction(numbers), "membership": membership(numbers, numbers), "canaries": [],
    }  # fmt: skip
    said = for_people(report)
    assert "  once (1 window)" in said and "  4 to 7 times (1 window)" in said


@pytest.mark.thorough
def test_a_model_that_reads_too_little_at_once_is_refused(unbroken):
    with pytest.raises(UsageError, match="windows are of 100 tokens, and the model reads 16"):
        main(["memorized", str(unbroken / "run")])
