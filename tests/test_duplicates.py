"""Exact and near duplicates, overlap, repeated lines."""

import hashlib
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from llm.measure.overlap import Overlap, RepeatedLines
from llm.quality.duplicates import (
    BANDS,
    ROWS,
    SIMILAR,
    Sketch,
    bands_of,
    find_duplicates,
    shingles_of,
)
from llm.quality.ngrams import runs_of, units_of

_ENGLISH = [f"{a}{b}" for a in ("bar", "cor", "del", "fen", "gul") for b in ("a", "ed", "in", "os")]
_CHINESE = [chr(0x4E00 + 37 * n) for n in range(300)]


def _text(draw: random.Random, language: str, count: int = 300) -> list[str]:
    return draw.choices(_ENGLISH if language == "english" else _CHINESE, k=count)


def _joined(words: list[str], language: str) -> str:
    return (" " if language == "english" else "").join(words)


def _found(folder: Path, texts: list[str], *, near: bool = True):
    folder.mkdir(exist_ok=True)
    with Sketch(folder, near=near) as sketch:
        for text in texts:
            sketch.add(text, hashlib.sha256(text.encode()).hexdigest())
    return find_duplicates([folder], near=near)


def _sets(texts: list[str]) -> list[set[tuple[str, ...]]]:
    """The runs of five words of each text, by Python."""
    words = [re.findall(r"[a-z]+|[\u4e00-\u9fff]", text.lower()) for text in texts]
    return [{tuple(of[n : n + 5]) for n in range(max(1, len(of) - 4))} for of in words]


def test_a_unit_is_a_word_or_a_character_of_a_script_without_spaces():
    text = "Don't STOP, ＡＢ caf\u00e9: 学而时习之 x2 ひらカタ ไทย हिन्दी"
    units = units_of([text, "", "stop cafe\u0301"])
    shown = [
        unicodedata.normalize("NFC", re.split(r"[\s,:']", units.joined[begin:])[0])
        for begin in units.begins
    ]
    assert shown[:5] == ["Don", "t", "STOP", "AB", "caf\u00e9"]
    assert [one[0] for one in shown[5:10]] == list("学而时习之")
    assert len(shown) == 5 + 5 + 1 + 4 + 3 + 1 + 2
    assert units.text.tolist() == [0] * 19 + [2] * 2
    # Neither case nor the way of writing an accent counts.
    assert units.hashes[[2, 4]].tolist() == units.hashes[-2:].tolist()


def test_runs_stay_inside_a_text_and_a_short_text_is_one_run():
    units = units_of(["a b c d", "a b", "...", "c d"])
    runs, first, sizes = runs_of(units.hashes, units.text, 3)
    assert first.tolist() == [0, 1, 4, 6]
    assert sizes.tolist() == [3, 3, 2, 2]
    assert len(set(runs.tolist())) == 4


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_sets_of_hashes_have_the_similarity_of_sets_of_words(language):
    draw = random.Random(3)
    first = _text(draw, language)
    texts = [_joined(first, language)]
    for changes in (1, 4, 20):
        words = [*first]
        for place in draw.sample(range(len(words)), changes):
            words[place] = "zu" if language == "english" else "龘"
        texts.append(_joined(words, language))
    hashes, sizes = shingles_of(texts)
    ours = [set(part.tolist()) for part in np.split(hashes, np.cumsum(sizes)[:-1])]
    theirs = _sets(texts)
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        expected = len(theirs[0] & other) / len(theirs[0] | other)
        assert len(ours[0] & one) / len(ours[0] | one) == expected


def test_the_sketch_of_a_long_text_does_not_depend_on_its_neighbours(tmp_path):
    draw = random.Random(5)
    long = _joined(_text(draw, "english", 120_000), "english")
    alone = _found(tmp_path / "a", [long])
    assert len(alone.near) == 0
    both = shingles_of(["some other words stand here first", long])[0]
    assert set(shingles_of([long])[0].tolist()) < set(both.tolist())


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_bands_are_shared_as_often_as_the_closed_form_says(similarity):
    draws, size = 1500, 180
    random_numbers = np.random.default_rng(int(100 * similarity))
    # Two sets of one size with c of n elements in common have the similarity c / (2n - c).
    common = round(2 * size * similarity / (1 + similarity))
    s = common / (2 * size - common)
    every = random_numbers.integers(0, 2**32, (draws, 2 * size - common), dtype=np.uint32)
    pairs = np.concatenate([every[:, :size], every[:, size - common :]], axis=1)
    bands = bands_of(pairs.ravel(), np.full(2 * draws, size)).reshape(draws, 2, BANDS)
    rate = (bands[:, 0] == bands[:, 1]).any(1).mean()
    expected = 1 - (1 - s**ROWS) ** BANDS
    assert abs(rate - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_planted_duplicates_are_found_and_nothing_else(tmp_path, language):
    """Every pair above SIMILAR that shares a band is found; no other pair is."""
    draw = random.Random(11)
    texts, planted = [], []
    for _ in range(60):
        words = _text(draw, language)
        texts.append(_joined(words, language))
        for changes in (0, 2, 5, 12, 30):
            other = [*words]
            for place in draw.sample(range(len(other)), changes):
                other[place] = draw.choice(_ENGLISH + _CHINESE)
            planted.append((len(texts) - 1, _joined(other, language)))
    order = draw.sample(range(len(planted)), len(planted))
    originals = len(texts)
    texts += [planted[n][1] for n in order]
    found = _found(tmp_path, texts)
    sets = _sets(texts)

    def similarity(one: int, other: int) -> float:
        return len(sets[one] & sets[other]) / len(sets[one] | sets[other])

    assert sorted(map(tuple, found.exact.tolist())) == sorted(
        (originals + at, planted[n][0]) for at, n in enumerate(order) if n % 5 == 0
    )
    for (copy, kept), shown in zip(found.near.tolist(), found.similarity, strict=True):
        assert shown == pytest.approx(similarity(copy, kept)) and shown >= SIMILAR  # precision 1
    near = set(found.near[:, 0].tolist())
    wanted = {
        originals + at
        for at, n in enumerate(order)
        if n % 5 and similarity(planted[n][0], originals + at) >= SIMILAR
    }
    assert len(wanted) > 100
    assert len(wanted & near) / len(wanted) > 0.95


def test_a_document_is_a_duplicate_of_a_kept_one_only(tmp_path):
    """Similarity is not passed on: a is near b, b is near c, and a is not near c."""
    draw = random.Random(2)
    words = _text(draw, "english", 400)
    changed = [*words[:-30], *_text(draw, "english", 30)]
    again = [*_text(draw, "english", 30), *changed[30:]]
    texts = [_joined(of, "english") for of in (words, changed, again)]
    assert _found(tmp_path, texts).near.tolist() == [[1, 0]]
    assert _found(tmp_path, texts[1:]).near.tolist() == [[1, 0]]


def test_duplicates_are_found_across_sketches_in_any_division(tmp_path):
    draw = random.Random(8)
    texts = ["", "...", "the same few words", "The same few words!"]
    texts += [_joined(_text(draw, "english", 60), "english") for _ in range(20)]
    texts += [texts[5], texts[6] + " and more", texts[7]]
    whole = _found(tmp_path / "whole", texts)
    assert {*map(tuple, whole.near.tolist())} == {(3, 2), (25, 6)}
    assert whole.exact.tolist() == [[24, 5], [26, 7]]
    folders = []
    for number, (start, stop) in enumerate([(0, 3), (3, 3), (3, 20), (20, 27)]):
        folders.append(tmp_path / str(number))
        _found(folders[-1], texts[start:stop])
    parts = find_duplicates(folders, near=True)
    for one, other in zip(whole, parts, strict=True):
        assert one.tolist() == other.tolist()
    assert _found(tmp_path / "exact", texts, near=False).exact.tolist() == whole.exact.tolist()


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_planted_leaks_are_found_long_and_short(language):
    draw = random.Random(4)
    lines = [_joined(_text(draw, language, 40), language) for _ in range(6)]
    short = _joined(_text(draw, language, 7), language)
    clean = _joined(_text(draw, language, 30), language)
    words = _text(draw, language, 30)
    copied = _joined([*words[:14], *_text(draw, language, 20)], language)
    expected = [("long", _joined(words, language)), ("short", short), ("clean", clean)]
    overlap = Overlap(expected)
    overlap.read("train#0", "\n".join(lines))
    assert overlap.found() == []
    overlap.read("train#1", "\n".join([lines[0], copied, lines[1]]))
    overlap.read("train#2", "\n".join([lines[2], short, lines[3]]))
    one, other = overlap.found()
    assert (one.name, one.found, one.grams, one.where) == ("short", 1, 1, "train#2")
    assert one.example.strip() == short
    assert (other.name, other.where) == ("long", "train#1")
    assert 2 <= other.found <= 3 and other.grams == 18
    assert other.example.startswith(_joined(words[:13], language))


def test_more_grams_than_fit_are_sampled(monkeypatch):
    draw = random.Random(4)
    texts = [_joined(_text(draw, "english", 2000), "english") for _ in range(4)]
    monkeypatch.setattr("llm.measure.overlap._MOST_GRAMS", 1000)
    overlap = Overlap((str(number), text) for number, text in enumerate(texts))
    assert overlap.one_in == 8
    overlap.read("a", texts[2])
    (leak,) = overlap.found()
    assert leak.name == "2" and leak.found == leak.grams
    assert 4 * 1988 / 8 / 2 < 4 * leak.grams < 2 * 4 * 1988 / 8


def test_repeated_lines_are_counted_by_document(monkeypatch):
    lines = RepeatedLines()
    for number in range(5):
        lines.add(f"header\nheader\nline {number}\n\n" + "footer\n" * (number > 1))
    assert lines.most(5) == [("header", 5), ("footer", 3)]
    assert lines.repeated == 5 * 6 + 3 * 6
    assert lines.characters == lines.repeated + 5 * 6
    monkeypatch.setattr("llm.measure.overlap._MOST_LINES", 100)
    for number in range(300):
        lines.add(f"header\nrare {number}\n")
    assert lines.most(1)[0][0] == "header"
    assert lines.most(1)[0][1] == 305 and lines.forgotten
    # A line that comes late is kept, although it is in fewer documents than were forgotten.
    for number in range(2000):
        lines.add(f"rare {number + 300}\n" + "late\n" * (number % 50 == 0))
    count = dict(lines.most(99))["late"]
    assert 10 < lines.forgotten < 40 and 40 - lines.forgotten <= count <= 40


@pytest.mark.thorough
@pytest.mark.parametrize("language", ["english", "chinese"])
def test_datatrove_finds_the_same_pairs(tmp_path, monkeypatch, language):
    """datatrove does not verify, so pairs below SIMILAR that it proposes are no difference; texts
    above 0.9 share a band but once in 2,600 pairs."""
    minhash = pytest.importorskip("datatrove.pipeline.dedup.minhash")
    from datatrove.data import Document

    draw = random.Random(21)
    texts, planted = [], set()
    for _ in range(80):
        words = _text(draw, language)
        other = [*words]
        other[draw.randrange(100)] = draw.choice(_ENGLISH if language == "english" else _CHINESE)
        planted.add((len(texts) + 1, len(texts)))
        texts += [_joined(words, language), _joined(other, language) + " again" * 2]
        texts.append(_joined(_text(draw, language), language))

    class Words:
        @staticmethod
        def word_tokenize(text: str) -> list[str]:
            return re.findall(r"[a-z]+|[\u4e00-\u9fff]", text)

    monkeypatch.setattr(minhash, "load_word_tokenizer", lambda _language: Words())
    config = minhash.MinhashConfig(
        n_grams=5, hash_config=minhash.HashConfig(precision=64, hash_fc="sha1")
    )
    sig, buckets, removed = (str(tmp_path / name) for name in ("sig", "buckets", "removed"))
    documents = [Document(text=text, id=str(n)) for n, text in enumerate(texts)]
    minhash.MinhashDedupSignature(sig, config).run(iter(documents))
    for bucket in range(config.num_buckets):
        minhash.MinhashDedupBuckets(sig, buckets, config=config).run(
            None, bucket, config.num_buckets
        )
    minhash.MinhashDedupCluster(buckets, removed, config=config).run()
    stays = minhash.MinhashDedupFilter(removed).run(iter(documents))
    theirs = {*range(len(texts))} - {int(document.id) for document in stays}
    found = _found(tmp_path / "ours", texts)
    assert {*map(tuple, found.near.tolist())} == planted
    assert len(theirs) == len(planted) and {*found.near[:, 0]} == theirs
