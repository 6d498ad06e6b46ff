"""From settings to tokens on disk: the right ones, once and whole, whoever dies or changes them."""

import collections
import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llm.config import DataConfig, TokenizerConfig
from llm.errors import DataError, UsageError
from llm.text import bpe, documents, encoding, parts, shards, sources, splits, tokenizer
from llm.text.batches import RingWindows, TrainingBatches
from llm.text.cache import silent
from llm.text.parts import HEADER
from llm.text.shards import prepare
from llm.text.tokenizer import FILE_NAME, ByteTokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
END = 256


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def corpus(tmp_path):
    """Forty small documents, partly Chinese, and an empty one."""
    root = tmp_path / "corpus"
    root.mkdir()
    for n in range(40):
        (root / f"{n:02d}.txt").write_text(f"document {n}! 學而時習之 " * (n // 4 + 1), "utf-8")
    (root / "empty.txt").write_text("")
    return root


@pytest.fixture
def make(cache):
    """prepare() with settings by keyword."""

    def make(source, kind="bytes", vocab_size=300, on_progress=silent, **data):
        source = source if isinstance(source, tuple) else str(source)
        data = {"source": source, "cache_dir": str(cache), **data}
        settings = TokenizerConfig(kind=kind, vocab_size=vocab_size)
        return prepare(DataConfig(**data), settings, on_progress=on_progress)

    return make


def folder_of(prepared) -> Path:
    """The folder of a corpus whose shards are all in one."""
    [folder] = {span.stream.folder for split in prepared.sources[0].splits for span in split.spans}
    return folder


def ids(split) -> list[int]:
    return split.read(0, len(split)).tolist()


def texts(corpus: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(corpus.iterdir()) if path.stat().st_size]


def joined(contents: list[bytes]) -> list[int]:
    """What the byte tokenizer makes of documents: their bytes, each with an end of text."""
    return [id_ for content in contents for id_ in (*content, END)]


# The right tokens


def test_tiny_shakespeare_is_split_as_nanogpt_splits_it(make):
    path = SHARED / "data" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("no shared data")
    corpus = make(path, "characters", validation="tail:0.1")
    # nanoGPT's data/shakespeare_char/prepare.py, in its own words
    data = path.read_text("utf-8")
    stoi = {ch: i for i, ch in enumerate(sorted(set(data)))}
    train_data, val_data = data[: int(len(data) * 0.9)], data[int(len(data) * 0.9) :]
    assert (corpus.tokenizer.vocab_size, len(stoi)) == (65, 65)
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    assert ids(corpus.train) == [stoi[c] for c in train_data]
    assert ids(corpus.validation) == [stoi[c] for c in val_data]


def test_documents_are_their_bytes_and_an_end_of_text(make, corpus):
    prepared = make(corpus, validation="none")
    assert ids(prepared.train) == joined(texts(corpus))
    assert len(prepared.validation) == 0
    [source] = prepared.sources
    assert source.documents == 40 and source.dropped == {"empty": 1}
    assert source.text_bytes == sum(map(len, texts(corpus)))
    assert len(prepared.train) == source.text_bytes + 40
    assert [origin.name for origin in prepared.origins][:2] == ["00.txt", "01.txt"]


def test_held_out_documents_are_chosen_by_their_hash(make, corpus):
    prepared = make(corpus, validation="documents:0.3")
    held_out = [int(hashlib.sha256(t).hexdigest()[:16], 16) < 0.3 * 2**64 for t in texts(corpus)]
    assert 0 < sum(held_out) < 40
    pairs = list(zip(texts(corpus), held_out, strict=True))
    assert ids(prepared.train) == joined([t for t, out in pairs if not out])
    assert ids(prepared.validation) == joined([t for t, out in pairs if out])
    name, place = prepared.train.document_at(0)
    assert (name, place) == (f"{held_out.index(False):02d}.txt", 0)


def test_new_documents_move_none_of_the_old(make, corpus):
    before = set(names(make(corpus, validation="documents:0.3").validation))
    (corpus / "zz.txt").write_text("another")
    after = set(names(make(corpus, validation="documents:0.3").validation))
    assert after - {"zz.txt"} == before


def names(split) -> dict[str, None]:
    """The documents in order; each is longer than the stride."""
    return dict.fromkeys(split.document_at(n)[0] for n in range(0, len(split), 5))


def test_the_tail_is_the_end_of_one_stream(make, corpus):
    prepared = make(corpus, validation="tail:0.25")
    whole = joined(texts(corpus))
    assert ids(prepared.train) == whole[: len(whole) * 3 // 4]
    assert ids(prepared.validation) == whole[len(whole) * 3 // 4 :]


@pytest.mark.parametrize("name", ["chinese_classics.txt", "tinyshakespeare.txt"])
@pytest.mark.parametrize("workers", [1, 3])
def test_gpt2_in_parallel_is_gpt2_of_the_whole_text(make, monkeypatch, name, workers):
    import tiktoken

    if not (SHARED / "tiktoken-cache").is_dir() or not (SHARED / "data" / name).is_file():
        pytest.skip("no shared data")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))
    monkeypatch.setattr(documents, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(encoding, "_TASK_CHARACTERS", 10_000)
    prepared = make(SHARED / "data" / name, "gpt2", validation="none", workers=workers)
    gpt2 = tiktoken.get_encoding("gpt2")
    text = (SHARED / "data" / name).read_text("utf-8")
    assert ids(prepared.train) == [*gpt2.encode_ordinary(text), gpt2.eot_token]


def test_a_trained_vocabulary_encodes_its_corpus(make, corpus):
    prepared = make(corpus, "bpe", vocab_size=270, validation="none")
    assert prepared.tokenizer.vocab_size == 270
    found = prepared.tokenizer.decode_bytes(ids(prepared.train))
    assert found == b"".join(texts(corpus))
    assert ids(prepared.train).count(prepared.tokenizer.end_of_text) == 40


def test_a_corpus_too_small_for_its_vocabulary_is_noted(make, tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    for _ in range(2):
        prepared = make(tmp_path / "a.txt", "bpe", vocab_size=999, validation="none")
        assert "too small for 999 bpe tokens; it gave 258" in prepared.notes[-1]


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("task_characters", [1, 700, 10**6])
def test_how_the_work_is_shared_out_changes_no_token(
    make, corpus, monkeypatch, workers, task_characters
):
    monkeypatch.setattr(encoding, "_TASK_CHARACTERS", task_characters)
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    prepared = make(corpus, validation="none", workers=workers)
    assert ids(prepared.train) == joined(texts(corpus))
    expected = dict.fromkeys(path.name for path in sorted(corpus.iterdir())[:40])
    assert names(prepared.train) == expected


def test_rows_and_texts_make_one_corpus(make, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "a.txt").write_text("third")
    sources = (str(tmp_path / "rows.jsonl"), str(tmp_path / "a.txt"))
    prepared = make(sources, validation="none")
    assert ids(prepared.train) == joined([b"first", b"second", b"third"])
    assert list(names(prepared.train)) == ["rows.jsonl#0", "rows.jsonl#1", "a.txt"]


def test_replacements_are_counted_and_noted(make, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xff\xfeb")
    with pytest.raises(DataError, match="byte 0xff at offset 1"):
        make(tmp_path / "a.txt", validation="none")
    prepared = make(tmp_path / "a.txt", validation="none", errors="replace")
    assert prepared.sources[0].replaced == 2 and "2 characters U+FFFD" in prepared.notes[0]
    assert ids(prepared.train) == joined(["a\ufffd\ufffdb".encode()])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (70_000, "uint32")])
def test_tokens_are_stored_in_as_few_bytes_as_the_vocabulary_needs(
    make, corpus, monkeypatch, vocab_size, dtype
):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

    if vocab_size == 70_000:
        monkeypatch.setattr(tokenizer, "ByteTokenizer", Wide)
    prepared = make(corpus, validation="none")
    assert prepared.train.spans[0].stream.manifest.dtype == dtype
    assert ids(prepared.train) == joined(texts(corpus))


def test_the_header_says_what_is_there(make, corpus):
    prepared = make(corpus, validation="documents:0.3")
    header = json.loads((folder_of(prepared) / HEADER).read_text())
    assert header["fingerprint"][:32] == folder_of(prepared).name
    assert header["tokenizer"]["sha256"] == prepared.tokenizer.sha256
    for name, split in (("train", prepared.train), ("validation", prepared.validation)):
        stream = header["streams"][name]
        assert stream["tokens"] == len(split)
        assert stream["largest_id"] == max(ids(split))
        for file in (stream["shard"], stream["index"], stream["names"]):
            content = (folder_of(prepared) / file["name"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (
                len(content),
                hashlib.sha256(content).hexdigest(),
            )
    by_name = {origin["name"]: origin["sha256"] for origin in header["origins"]}
    assert by_name["07.txt"] == hashlib.sha256((corpus / "07.txt").read_bytes()).hexdigest()


# Once, folder by folder


@pytest.fixture
def folders(monkeypatch):
    """Groups of a few small files: the folders that are made, each with its files."""
    monkeypatch.setattr(parts, "PART_BYTES", 4 * 2**12)
    made, tokenise = [], parts._tokenise

    def record(folder, data, group, *rest):
        made.append([origin.name for origin in group.origins])
        return tokenise(folder, data, group, *rest)

    monkeypatch.setattr(parts, "_tokenise", record)
    return made


@pytest.mark.parametrize("validation", ["none", "tail:0.3", "documents:0.3"])
def test_folders_of_shards_are_one_corpus(make, corpus, tmp_path, folders, validation):
    many = make(corpus, validation=validation)
    assert 5 < len(folders) < 25 and [*itertools.chain(*folders)] == sorted(os.listdir(corpus))
    parts.PART_BYTES = 2**24
    one = make(corpus, validation=validation, cache_dir=str(tmp_path / "other"))
    assert one.fingerprint == many.fingerprint
    for a, b in zip(one.sources[0].splits, many.sources[0].splits, strict=True):
        assert ids(a) == ids(b) and names(a) == names(b)
        assert a.document_starts().tolist() == b.document_starts().tolist()


def test_the_beginnings_of_documents_are_where_they_end(make, corpus, folders):
    split = make(corpus, validation="none").train
    ends = np.cumsum([len(text) + 1 for text in texts(corpus)])
    assert split.document_starts().tolist() == [0, *ends[:-1]]


def test_one_more_file_costs_the_folder_that_it_is_in(make, corpus, folders):
    make(corpus, validation="none")
    before = [*folders]
    (corpus / "20b.txt").write_text("a new one")
    prepared = make(corpus, validation="none")
    (again,) = folders[len(before) :]
    assert [name for name in again if name != "20b.txt"] in before
    assert not prepared.reused and ids(prepared.train) == joined(texts(corpus))


def test_a_large_file_stands_alone(make, corpus, folders):
    (corpus / "20b.txt").write_text("large" * 4 * 2**12)
    make(corpus, validation="none")
    assert ["20b.txt"] in folders
    before = len(folders)
    (corpus / "20b.txt").write_text("large!" * 4 * 2**12)
    make(corpus, validation="none")
    assert folders[before:] == [["20b.txt"]]


def test_a_preparation_that_was_stopped_goes_on_with_the_folders_that_are_missing(
    make, corpus, folders, monkeypatch
):
    def stop(what, done, _total):
        if what == "tokenising" and done > 4_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(corpus, validation="none", on_progress=stop)
    done = folders[:-1]
    assert len(done) > 2
    del folders[:]
    prepared = make(corpus, validation="none")
    assert [*itertools.chain(*done, *folders)] == sorted(os.listdir(corpus))
    assert ids(prepared.train) == joined(texts(corpus))


def test_two_processes_prepare_one_corpus(make, corpus, cache):
    """Both at once, in folders of one file; neither sees half of what the other writes."""
    code = (
        "import sys\nfrom llm.config import DataConfig, TokenizerConfig\n"
        "from llm.text import parts, shards\nparts.PART_BYTES = 1\n"
        "data = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], validation='none')\n"
        "corpus = shards.prepare(data, TokenizerConfig())\n"
        "print(corpus.train.read(0, len(corpus.train)).tolist())\n"
    )
    command = [sys.executable, "-c", code, corpus, cache]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert {one.communicate(timeout=60)[0] for one in both} == {f"{joined(texts(corpus))}\n"}
    assert len([path for path in (cache / "shards").iterdir() if path.is_dir()]) == 41


def test_the_same_settings_reuse_the_shards(make, corpus, monkeypatch):
    first = make(corpus)
    monkeypatch.setattr(parts, "_tokenise", None)
    second = make(corpus)
    assert (first.reused, second.reused) == (False, True)
    assert first.fingerprint == second.fingerprint
    assert ids(first.train) == ids(second.train)
    assert first.notes == second.notes and first.origins == second.origins


def test_shards_are_found_again_wherever_the_corpus_lies(make, corpus, tmp_path):
    first = make(corpus)
    moved = corpus.rename(tmp_path / "moved")
    second = make(moved, workers=1)
    assert second.reused and second.fingerprint == first.fingerprint
    assert second.origins[0].location == str(moved / "00.txt")


@pytest.mark.parametrize(
    "change",
    [
        lambda corpus: (corpus / "05.txt").write_text("other"),
        lambda corpus: (corpus / "05.txt").rename(corpus / "05b.txt"),
        lambda corpus: (corpus / "new.txt").write_text("new"),
        lambda corpus: (corpus / "05.txt").unlink(),
    ],
)
def test_another_corpus_has_another_fingerprint(make, corpus, change):
    first = make(corpus)
    change(corpus)
    second = make(corpus)
    assert not second.reused and second.fingerprint != first.fingerprint


def test_other_settings_have_other_fingerprints(make, corpus):
    settings = [
        {},
        {"kind": "characters"},
        {"validation": "tail:0.05"},
        {"errors": "replace"},
        {"kind": "bpe", "vocab_size": 270},
        {"kind": "bpe", "vocab_size": 271},
    ]
    prepared = [make(corpus, **{"validation": "documents:0.3", **s}) for s in settings]
    assert len({p.fingerprint for p in prepared}) == len(settings)
    assert not any(p.reused for p in prepared)


def test_another_pattern_trains_another_vocabulary(make, corpus, monkeypatch):
    first = make(corpus, "bpe", validation="none")
    monkeypatch.setattr(shards, "PATTERN", r"\S+|\s+")
    monkeypatch.setattr(bpe, "PATTERN", r"\S+|\s+")
    second = make(corpus, "bpe", validation="none")
    assert not second.reused and second.tokenizer.sha256 != first.tokenizer.sha256


def test_a_vocabulary_is_made_once(make, corpus, monkeypatch):
    first = make(corpus, "characters", validation="none")
    monkeypatch.setattr(shards, "_all_text", None)
    second = make(corpus, "characters", validation="tail:0.5")
    assert second.tokenizer.sha256 == first.tokenizer.sha256


def test_what_was_left_out_is_said_of_the_folder_at_hand(make, corpus, tmp_path):
    """Equal texts in two folders share their shards, and not what lies beside them."""
    (corpus / "a.png").write_bytes(b"\x89PNG")
    first = make(corpus, validation="none")
    shutil.copytree(corpus, tmp_path / "copy")
    (tmp_path / "copy" / "a.png").rename(tmp_path / "copy" / "b.png")
    second = make(tmp_path / "copy", validation="none")
    assert second.reused and second.fingerprint == first.fingerprint
    assert first.notes == (f"{corpus}: left out a.png (a picture, sound or film)",)
    assert second.notes == (f"{tmp_path / 'copy'}: left out b.png (a picture, sound or film)",)


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_cache_that_cannot_be_written_serves_what_it_holds(make, corpus, kind, monkeypatch):
    """The superuser may write everywhere, so a file system that is read-only is acted."""
    monkeypatch.setattr(sources, "REMEMBER_HASH_ABOVE_BYTES", 10)
    first = make(corpus, kind, validation="none")
    past = time.time() + 100
    monkeypatch.setattr(sources.time, "time", lambda: past)
    refused = []

    def refuse(path, *_, **__):
        refused.append(path)
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def open_to_read(path, mode="r", *rest, **options):
        return opened(path, mode, *rest, **options) if "r" in mode else refuse(path)

    opened = open
    monkeypatch.setattr("builtins.open", open_to_read)
    monkeypatch.setattr(os, "mkdir", refuse)
    second = make(corpus, kind, validation="none")
    # The hashes of large files cannot be remembered, and nothing else is missing.
    assert second.reused and ids(second.train) == ids(first.train) and refused
    with pytest.raises(UsageError, match=r"Read-only file system; .* set data.cache_dir to a") as e:
        make(corpus, kind, validation="documents:0.5")
    assert e.value.exit_code == 2


def test_a_run_and_the_cache_below_a_source_change_nothing(make, corpus):
    """The first start finds an empty run directory, the second one what training left there."""
    run, cache = corpus / "runs" / "a", corpus / "cache"
    run.mkdir(parents=True)
    (run / "run.lock").touch()
    first = make(corpus, validation="none", cache_dir=str(cache))
    (run / "config.toml").write_text("steps = 1")
    (run / "metrics.jsonl").write_text("{}")
    (corpus / "runs" / "imported").mkdir()
    for name in ("config.toml", "run.json"):
        (corpus / "runs" / "imported" / name).write_text("")
    second = make(corpus, validation="none", cache_dir=str(cache))
    assert second.reused and second.fingerprint == first.fingerprint
    assert len(first.origins) == len(list(corpus.glob("*.txt")))


def test_rows_that_are_left_out_decide_the_fingerprint_and_are_said(make, tmp_path):
    rows, text = tmp_path / "rows.jsonl", tmp_path / "a.txt"
    rows.write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n{"id": 3}\n')
    text.write_text("text")
    with pytest.raises(DataError, match="row 1 has no text"):
        make(rows, validation="none")
    for _ in range(2):  # the second time from the cache
        prepared = make(rows, validation="none", bad_rows="skip")
        assert ids(prepared.train) == joined([b"a", b"b"])
        (note,) = prepared.notes
        assert "left out 2 rows without text; the first: rows.jsonl, row 1 has no text" in note
    rows.write_text('{"text": "a"}\n')
    prints = {make(rows, validation="none", bad_rows=b).fingerprint for b in ("error", "skip")}
    assert len(prints) == 2
    # The setting says nothing about a corpus without rows.
    prints = {make(text, validation="none", bad_rows=b).fingerprint for b in ("error", "skip")}
    assert len(prints) == 1


# What cannot be used


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
@pytest.mark.parametrize("validation", ["none", "tail:0.1", "documents:0.1"])
def test_a_corpus_without_text_is_a_data_error(make, tmp_path, kind, validation):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="the corpus has no text") as caught:
        make(tmp_path / "empty.txt", kind, validation=validation)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("fraction", "side"), [("0.001", "validation"), ("0.999", "train")])
def test_one_document_cannot_be_split_by_document(make, cache, tmp_path, fraction, side):
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(UsageError, match=f"of the 1 there are: the {side} split is empty") as e:
        make(tmp_path / "one.txt", validation=f"documents:{fraction}")
    assert f"data.validation = 'tail:{fraction}'" in str(e.value) and e.value.exit_code == 2
    assert list((cache / "shards").glob("*.partial")) == []


def test_a_text_shorter_than_a_window_has_both_numbers(make, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    prepared = make(tmp_path / "short.txt", validation="none")
    with pytest.raises(DataError, match="has 6 tokens, fewer than one window of 65"):
        splits.check_window(prepared.train, 64)


def test_an_unknown_tokenizer_is_refused_before_anything_is_read(make):
    with pytest.raises(UsageError, match="did you mean 'gpt2'"):
        make("/nowhere", "gpt")


# What changed on disk


def test_shards_of_another_tokenizer_are_refused(make, corpus):
    prepared = make(corpus, validation="none")
    others = make(corpus, "characters", validation="none")
    expected, folder = folder_of(prepared), folder_of(others)
    shutil.rmtree(expected)
    folder.rename(expected)
    with pytest.raises(DataError, match=rf"found {folder_of(others).name}\w*; delete") as caught:
        make(corpus, validation="none")
    assert f"expected the fingerprint {expected.name}" in str(caught.value)


def test_any_changed_byte_of_any_file_is_found(make, corpus):
    prepared = make(corpus, validation="documents:0.3")
    for path in sorted(folder_of(prepared).iterdir()):
        content = path.read_bytes()
        for place in {0, len(content) // 3, len(content) - 1}:
            changed = bytearray(content)
            changed[place] ^= 4
            path.write_bytes(bytes(changed))
            with pytest.raises(DataError, match=path.name) as caught:
                make(corpus, validation="documents:0.3")
            assert f"delete {folder_of(prepared)}" in str(caught.value)
        path.write_bytes(content)
    assert make(corpus, validation="documents:0.3").reused


def test_any_truncated_or_missing_file_is_found(make, corpus):
    prepared = make(corpus, validation="documents:0.3")
    for path in sorted(folder_of(prepared).iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(DataError, match=path.name):
            make(corpus, validation="documents:0.3")
        path.unlink()
        with pytest.raises(DataError, match=path.name):
            make(corpus, validation="documents:0.3")
        path.write_bytes(content)


@pytest.mark.parametrize("value", ["[]", "{}", "null", "", '{"sha256": "", "streams": {}}'])
def test_a_header_that_is_none_is_refused(make, corpus, value):
    prepared = make(corpus, validation="none")
    (folder_of(prepared) / HEADER).write_text(value)
    with pytest.raises(DataError, match=HEADER):
        make(corpus, validation="none")


def test_deleting_the_folder_is_the_remedy(make, corpus):
    prepared = make(corpus, validation="none")
    (folder_of(prepared) / "text.bin").write_bytes(b"")
    shutil.rmtree(folder_of(prepared))
    assert ids(make(corpus, validation="none").train) == joined(texts(corpus))


def test_large_shards_are_verified_on_request_and_their_ids_as_they_are_read(
    make, corpus, monkeypatch
):
    prepared = make(corpus, validation="none")
    monkeypatch.setattr(shards, "VERIFY_ON_OPEN_BYTES", 0)
    path = folder_of(prepared) / "text.bin"
    path.write_bytes(np.full(len(prepared.train), 999, "<u2").tobytes())
    opened = make(corpus, validation="none")
    with pytest.raises(DataError, match="has changed"):
        opened.train.spans[0].stream.verify()
    with pytest.raises(DataError, match="token id 999; expected ids below the vocabulary's 257"):
        TrainingBatches(RingWindows(opened.train, 8), batch_size=2, seed=0)[0]
    with pytest.raises(DataError, match="token id 999"):
        opened.train.read(0, 1)


def test_a_damaged_trained_tokenizer_is_refused(make, corpus, cache):
    make(corpus, "characters", validation="none")
    (path,) = (cache / "tokenizers").glob(f"*/{FILE_NAME}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"{FILE_NAME} is not a saved tokenizer.*delete"):
        make(corpus, "characters", validation="none")


# Whoever dies

KILLED = """
import os, signal, sys
from pathlib import Path
from llm.config import DataConfig, TokenizerConfig
from llm.text import cache, documents, encoding, parts, shards

place, number, source, cache_dir, kind = sys.argv[1:]
documents.PIECE_BYTES = encoding._TASK_CHARACTERS = 200
calls = 0

def die(*_):
    global calls
    calls += 1
    if calls == int(number):
        os.kill(os.getpid(), signal.SIGKILL)

def before(function):
    return lambda *arguments: (die(), function(*arguments))[1]

if place == "flush":
    os.fsync = before(os.fsync)
if place == "rename":
    Path.rename = before(Path.rename)
if place == "header":
    parts._write_header = before(parts._write_header)
shards.prepare(
    DataConfig(source=source, cache_dir=cache_dir, validation="none", workers=2),
    TokenizerConfig(kind=kind, vocab_size=300),
    on_progress=die if place == "progress" else cache.silent,
)
"""


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    ("place", "number", "kind"),
    [
        ("progress", 43, "bytes"),
        ("progress", 75, "bytes"),
        ("progress", 60, "characters"),
        ("header", 1, "bytes"),
        ("flush", 2, "bytes"),
        ("flush", 4, "characters"),
        ("rename", 1, "bytes"),
        ("rename", 2, "characters"),
    ],
)
def test_a_kill_at_any_instant_leaves_nothing_that_is_trusted(
    make, corpus, cache, tmp_path, place, number, kind
):
    command = [sys.executable, "-c", KILLED, place, str(number), corpus, cache, kind]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(command, env=environment, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not [p for p in (cache / "shards").glob("*") if p.is_dir() and p.suffix == ""]
    prepared = make(corpus, kind, validation="none")
    assert not prepared.reused
    unbroken = make(corpus, kind, validation="none", cache_dir=str(tmp_path / "unbroken"))
    assert ids(prepared.train) == ids(unbroken.train)
    assert prepared.fingerprint == unbroken.fingerprint
    assert list((cache / "shards").glob("*.partial")) == []


@pytest.mark.parametrize("stage", ["hashing", "reading the vocabulary", "tokenising"])
def test_what_progress_raises_stops_the_work_and_leaves_nothing(make, corpus, cache, stage):
    def stop(what, _done, _total):
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(corpus, "characters", on_progress=stop, validation="none")
    kept = (".lock", ".TAG")
    left = [p for p in cache.rglob("*") if p.is_file() and p.suffix not in kept]
    assert stage == "tokenising" or left == []
    assert not list((cache / "shards").glob("*.partial"))


def test_the_work_on_a_corpus_grows_as_its_files_do(make, tmp_path, monkeypatch):
    """Calls are counted, not seconds: twice as many files, twice as many calls."""
    counts = []
    for number in (200, 400):
        root = tmp_path / str(number)
        root.mkdir()
        for n in range(number):
            (root / f"{n}.txt").write_text(f"text {n}")
        calls = collections.Counter()

        def count(_frame, event, argument, calls=calls):
            calls[event] += event in ("call", "c_call")

        make(root, validation="none")  # what is imported or compiled once is no part of it
        shutil.rmtree(tmp_path / "cache")
        monkeypatch.setattr(encoding, "_in_order", lambda function, items, _: map(function, items))
        sys.setprofile(count)
        try:
            make(root, validation="none")
        finally:
            sys.setprofile(None)
        counts.append(calls["call"] + calls["c_call"])
    assert counts[1] < 2.1 * counts[0]


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_preparing_sums_the_sizes_of_all_files_a_fixed_number_of_times(
    make, corpus, kind, monkeypatch
):
    asked = []
    size = sources.Found.text_bytes.fget
    monkeypatch.setattr(
        sources.Found, "text_bytes", property(lambda found: asked.append(1) or size(found))
    )
    prepared = make(corpus, kind, validation="none")
    assert prepared.sources[0].documents == 40
    # Once for the vocabulary, once for the tokens; not once for each piece of text.
    assert len(asked) == (1 if kind == "bytes" else 2)


def test_progress_counts_bytes_up_to_all(make, corpus):
    seen = []
    make(corpus, on_progress=lambda *call: seen.append(call), validation="none")
    total = sum(map(len, texts(corpus)))
    tokenising = [(done, of) for what, done, of in seen if what == "tokenising"]
    assert tokenising == sorted(tokenising) and {of for _, of in tokenising} == {total}
    assert tokenising[0] == (0, total) and tokenising[-1][0] <= total


def test_a_full_disk_names_the_space_needed_and_found(make, corpus, cache, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 777, 777))

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llm.text.stream._HashedFile.write", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        make(corpus, validation="none")
    needed = sum(map(len, texts(corpus)))
    assert f"{needed} bytes of text need up to {2 * needed}" in str(caught.value)
    assert "777 bytes are free" in str(caught.value) and "data.cache_dir" in str(caught.value)
    assert caught.value.exit_code == 3
    assert not list((cache / "shards").glob("*.partial"))


def test_a_disk_that_fills_up_leaves_nothing_half_made(corpus, cache):
    """A real limit on the size of files, in a process of its own; then the same command again."""
    code = (
        "import resource, signal, sys\nfrom llm.config import DataConfig, TokenizerConfig\n"
        "from llm.errors import DataError\nfrom llm.text.shards import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))\n"
        "data = DataConfig(source=sys.argv[1], cache_dir=sys.argv[2], validation='none')\n"
        "try:\n    prepare(data, TokenizerConfig())\n"
        "except DataError as error:\n    print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "print(len(prepare(data, TokenizerConfig()).train))\n"
    )
    command = [sys.executable, "-c", code, corpus, cache]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    error, tokens = ended.stdout.splitlines()
    assert "File too large" in error and "bytes are free" in error
    assert int(tokens) == len(joined(texts(corpus)))


# Corpora larger than memory


def test_memory_does_not_grow_with_the_corpus(make, corpus, tmp_path, monkeypatch):
    """24 MB of text, 48 MB of tokens, at most 8 MB at a time."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 2**16)
    monkeypatch.setattr(encoding, "_TASK_CHARACTERS", 2**16)
    (tmp_path / "large.txt").write_text("all work and no play " * (24_000_000 // 21))
    make(corpus, validation="none")  # imports are no part of it
    tracemalloc.start()
    try:
        prepared = make(tmp_path / "large.txt", validation="tail:0.5", workers=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(prepared.train) + len(prepared.validation) > 23_000_000
    assert peak < 8_000_000, peak


def test_no_more_work_is_begun_than_threads_can_hold():
    begun = []

    def items():
        for n in range(100):
            begun.append(n)
            yield n

    for n, result in enumerate(encoding._in_order(lambda n: n * n, items(), 3)):
        assert result == n * n
        assert len(begun) <= n + 1 + 2 * 3
    assert n == 99


def test_an_error_in_a_thread_comes_out_where_its_item_stood():
    def fail_at_5(n):
        if n == 5:
            raise ValueError("five")
        return n

    done = []
    with pytest.raises(ValueError, match="five"):
        for item in encoding._in_order(fail_at_5, range(100), 2):
            done.append(item)
    assert done == [0, 1, 2, 3, 4]
