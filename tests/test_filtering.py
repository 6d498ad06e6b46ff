"""data.filters: what is left out, what is replaced, and what that costs."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llm.commands import prepare as prepare_command
from llm.config import DataConfig, TokenizerConfig, validate
from llm.errors import DataError, UsageError
from llm.quality import duplicates
from llm.run.start import changes_on_resume
from llm.text import filtering, parts
from llm.text.cache import silent
from llm.text.shards import prepare

_LINE = "word {} of a line that every document has in another order {} "


def _texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(_LINE.format(draw.randrange(999), draw.randrange(999)) for _ in range(12))
        for _ in range(count)
    ]


def _near(text: str) -> str:
    return text.replace(" ", " again ", 1)


def _rows(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _dropped(cache: Path) -> list[dict]:
    (path,) = cache.glob("dropped/*/dropped.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def make(cache):
    """prepare() with settings by keyword; nothing is held out."""

    def make(source="", kind="bytes", on_progress=silent, **data):
        data = {"source": str(source), "cache_dir": str(cache), "validation": "none", **data}
        return prepare(DataConfig(**data), TokenizerConfig(kind=kind), on_progress=on_progress)

    return make


def ids(split) -> list[int]:
    return split.read(0, len(split)).tolist()


def joined(contents: list[bytes]) -> list[int]:
    """What the byte tokenizer makes of documents: their bytes, each with an end of text."""
    return [id_ for content in contents for id_ in (*content, 256)]


@pytest.fixture
def corpus(tmp_path):
    """Two files with a copy and a near copy within, and of each other."""
    a, b = _texts(1, 6), _texts(2, 6)
    _rows(tmp_path / "corpus/a.jsonl", [*a, a[0]])
    _rows(tmp_path / "corpus/b.jsonl", [*b, _near(b[1]), a[2], _near(a[3])])
    return tmp_path / "corpus"


@pytest.fixture
def small(monkeypatch):
    """Every file in a folder of its own."""
    monkeypatch.setattr(parts, "PART_BYTES", 1)


def test_nothing_is_filtered_by_default_and_costs_nothing(make, corpus, cache, monkeypatch):
    monkeypatch.setattr(filtering.Filter, "_filtered", None)
    plain = make(corpus / "*.jsonl")
    assert plain.sources[0].documents == 16
    assert sorted(path.name for path in cache.iterdir()) == ["CACHEDIR.TAG", "shards"]
    # A filter that leaves out nothing has the same tokens, so the same shards.
    assert make(corpus / "a.jsonl").fingerprint


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_of_equal_documents_stays(make, corpus, cache, small, workers):
    a, b = _texts(1, 6), _texts(2, 6)
    exact = make(corpus / "*.jsonl", workers=workers, filters={"deduplicate": "exact"})
    kept = [*a, *b, _near(b[1]), _near(a[3])]
    assert ids(exact.train) == joined([text.encode() for text in kept])
    assert exact.sources[0].dropped == {"exact duplicate": 2}
    near = make(corpus / "*.jsonl", workers=workers, filters={"deduplicate": "near"})
    assert ids(near.train) == joined([text.encode() for text in [*a, *b]])
    assert near.sources[0].dropped == {"exact duplicate": 2, "near duplicate": 2}
    assert len({exact.fingerprint, near.fingerprint}) == 2
    assert any("left out 4 of 16 documents" in note for note in near.notes)


def test_a_file_says_what_was_left_out_and_why(make, corpus, cache, small):
    prepared = make(corpus / "*.jsonl", filters={"deduplicate": "near"})
    lines = {line["document"]: line for line in _dropped(cache)}
    assert {name: (of["reason"], of["detail"].split(",")[0]) for name, of in lines.items()} == {
        "a.jsonl#6": ("exact duplicate", "a.jsonl#0"),
        "b.jsonl#6": ("near duplicate", "b.jsonl#1"),
        "b.jsonl#7": ("exact duplicate", "a.jsonl#2"),
        "b.jsonl#8": ("near duplicate", "a.jsonl#3"),
    }
    assert float(lines["b.jsonl#8"]["detail"].split()[-1]) >= duplicates.SIMILAR
    assert _near(_texts(1, 6)[3]).startswith(lines["b.jsonl#8"]["begins"])
    assert str(next(cache.glob("dropped/*/dropped.jsonl"))) in prepared.notes[-1]


def test_a_new_file_costs_its_own_folder_unless_it_makes_copies(
    make,
    corpus,
    cache,
    small,
    monkeypatch,
):
    settings = {"filters": {"deduplicate": "near"}}
    make(corpus / "*.jsonl", **settings)
    sketched, made, tokenise = [], [], parts._tokenise
    add = duplicates.Sketch.add
    monkeypatch.setattr(duplicates.Sketch, "add", lambda *a: (sketched.append(a[3]), add(*a))[1])
    monkeypatch.setattr(
        parts,
        "_tokenise",
        lambda *a: (made.extend(o.name for o in a[2].origins), tokenise(*a))[1],
    )
    # It stands first, and is like nothing: the copies of the others are as they were.
    _rows(corpus / "0.jsonl", _texts(7, 3))
    make(corpus / "*.jsonl", **settings)
    assert made == ["0.jsonl"] and {name.split("#")[0] for name in sketched} == {"0.jsonl"}
    # It stands first, and has a document of b: that one is now the copy.
    del made[:], sketched[:]
    _rows(corpus / "00.jsonl", [*_texts(8, 2), _texts(2, 6)[4]])
    prepared = make(corpus / "*.jsonl", **settings)
    assert made == ["00.jsonl", "b.jsonl"]
    assert {name.split("#")[0] for name in sketched} == {"00.jsonl"}
    assert prepared.sources[0].dropped == {"exact duplicate": 3, "near duplicate": 2}
    # The same settings find everything again.
    del made[:], sketched[:]
    again = make(corpus / "*.jsonl", **settings)
    assert again.reused and not made and not sketched
    assert again.fingerprint == prepared.fingerprint


def test_copies_are_left_out_across_the_sources_of_a_mixture(make, corpus):
    mixture = [
        {"name": "x", "source": str(corpus / "b.jsonl"), "weight": 1.0},
        {"name": "y", "source": str(corpus / "a.jsonl"), "weight": 1.0},
    ]
    mixed = make(mixture=mixture, filters={"deduplicate": "near"})
    assert [one.dropped for one in mixed.sources] == [
        {"near duplicate": 1},
        {"exact duplicate": 2, "near duplicate": 1},
    ]


def test_documents_with_few_characters_are_left_out(make, tmp_path, cache):
    path = _rows(tmp_path / "a.jsonl", ["four", "fives", "學而時習之", "學而時習"])
    prepared = make(path, filters={"min_characters": 5})
    assert ids(prepared.train) == joined([b"fives", "學而時習之".encode()])
    assert prepared.sources[0].dropped == {"fewer than 5 characters": 2}
    assert _dropped(cache)[1]["begins"] == "學而時習"


def test_long_documents_are_measured_piece_by_piece(make, tmp_path, monkeypatch):
    monkeypatch.setattr(filtering, "LONGEST", 1000)
    path = tmp_path / "long.txt"
    path.write_text("a long text " * 100_000)
    settings = {}
    plain = make(path, **settings)
    for filters in ({"min_characters": 600_000}, {"deduplicate": "exact"}):
        assert ids(make(path, **settings, filters=filters).train) == ids(plain.train)
    for filters in ({"deduplicate": "near"}, {"redact": ["email"]}, {"quality": "c4"}):
        with pytest.raises(DataError, match=r"long.txt has more than 1,000 characters"):
            make(path, **settings, filters=filters)


def test_a_filter_that_leaves_nothing_is_an_error(make, tmp_path):
    path = _rows(tmp_path / "a.jsonl", ["some", "words"])
    for kind in ("bytes", "characters"):
        with pytest.raises(UsageError, match=r"every document \(2 fewer than 900 characters\)"):
            make(path, kind, filters={"min_characters": 900})


def test_what_is_left_out_is_in_no_vocabulary(make, tmp_path):
    path = _rows(tmp_path / "a.jsonl", ["some words", "xyz"])
    prepared = make(path, "characters", filters={"min_characters": 5})
    assert prepared.tokenizer.vocab_size == len(set("some words"))


def test_personal_data_is_replaced_before_anything_else_looks(make, tmp_path):
    texts = [f"Write to {name}@example.org, please, and not to me" for name in ("ann", "bob")]
    path = _rows(tmp_path / "a.jsonl", texts)
    settings = {"deduplicate": "exact", "redact": ["email"]}
    prepared = make(path, filters=settings)
    assert bytes(ids(prepared.train)[:-1]) == b"Write to <EMAIL>, please, and not to me"
    assert prepared.sources[0].dropped == {"exact duplicate": 1}
    assert any("personal data: 1 email" in note for note in prepared.notes)


def test_rules_of_quality_are_named(make, tmp_path, cache):
    path = _rows(tmp_path / "a.jsonl", ["Lorem ipsum dolor. " * 9, "One sentence ends. " * 9])
    prepared = make(path, filters={"quality": "c4"})
    assert prepared.sources[0].dropped == {"rules of c4": 1}
    assert "lorem ipsum" in _dropped(cache)[0]["detail"]


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from llm.config import DataConfig, TokenizerConfig
from llm.quality.duplicates import Sketch
from llm.text import filtering, parts, shards

source, root = sys.argv[1], Path(sys.argv[2])
parts.PART_BYTES = 1
PLACES = {
    "sketch": (Sketch, "_write"), "copies": (filtering, "_by_part"), "flush": (os, "fsync"),
    "header": (parts, "_write_header"), "rename": (Path, "rename"), "list": (shutil, "copyfileobj"),
}

def prepared(cache):
    data = DataConfig(
        source=source, cache_dir=str(cache), validation="documents:0.3",
        filters={"deduplicate": "near", "min_characters": 60},
    )
    corpus = shards.prepare(data, TokenizerConfig())
    (dropped,) = cache.glob("dropped/*/dropped.jsonl")
    ids = [split.read(0, len(split)).tolist() for split in corpus.sources[0].splits]
    return json.dumps([corpus.fingerprint, ids, corpus.sources[0].dropped, dropped.read_text()])

def forked(cache, place="", number=0):
    if pid := os.fork():
        return pid
    if place:
        owner, name = PLACES[place]
        function, left = getattr(owner, name), [number]
        def dies(*arguments):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)
        setattr(owner, name, dies)
    found = prepared(cache)
    with open(root / f"found-{os.getpid()}", "w") as file:
        file.write(found)
    os._exit(0)

def found(pid):
    assert os.waitpid(pid, 0)[1] == 0
    return (root / f"found-{pid}").read_text()

whole = found(forked(root / "whole"))
for place, number in json.loads(sys.argv[3]):
    cache = root / f"{place}-{number}"
    assert os.waitpid(forked(cache, place, number), 0)[1] == signal.SIGKILL, (place, number)
    assert found(forked(cache)) == whole, (place, number)
    assert not list(cache.glob("*/*.partial")), (place, number)
both = [forked(root / "both") for _ in range(2)]
assert {found(pid) for pid in both} == {whole}
print(whole)
"""


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    "points",
    [
        [("sketch", 3), ("rename", 2), ("list", 2)],
        [("sketch", 1), ("copies", 1), ("flush", 5), ("flush", 20), ("header", 1), ("rename", 5)],
    ],
)
def test_kills_and_a_second_process_change_nothing(corpus, tmp_path, points):
    """Killed at any place, then made again; and two processes at once: equal tokens and reasons."""
    (corpus / "c.txt").write_text("short")
    command = [sys.executable, "-c", KILLED, f"{corpus}/*", tmp_path, json.dumps(points)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    whole = subprocess.check_output(command, env=environment, timeout=120, text=True)
    assert json.loads(whole)[2] == {
        "exact duplicate": 2,
        "near duplicate": 2,
        "fewer than 60 characters": 1,
    }


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"dedup": "near"}, "unknown setting data.filters.dedup; did you mean .*deduplicate"),
        ({"min_charcters": 5}, "did you mean data.filters.min_characters"),
        ({"deduplicate": "fuzzy"}, "data.filters.deduplicate = 'fuzzy': .*'near'"),
        ({"redact": ["mail"]}, "data.filters.redact = 'mail': .*'email'"),
        ({"min_characters": -1}, "data.filters.min_characters = -1"),
        (True, r"data.filters = True: expected a table, \[data.filters\]"),
    ],
)
def test_wrong_settings_are_named(filters, message):
    with pytest.raises(UsageError, match=message):
        validate({"data": {"filters": filters}}, where="test")


def test_a_run_does_not_go_on_with_other_filters():
    plain, other = validate({}, ""), validate({"data": {"filters": {"min_characters": 5}}}, "")
    with pytest.raises(UsageError, match=r"data.filters.min_characters: the run has 0, .* has 5"):
        changes_on_resume(plain, other)


@pytest.mark.parametrize("name", ["documents.bin", "names.txt", "sets.bin", "sha256.json"])
def test_damaged_sketches_are_named(make, corpus, cache, small, name):
    """Before they are used for a corpus with a new file."""
    filters = {"deduplicate": "near"}
    make(corpus, filters=filters)
    path = next(cache.glob(f"sketches/*/{name}"))
    content = path.read_bytes()
    _rows(corpus / "new.jsonl", _texts(99, 1))
    for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"sketches/.* is damaged.*delete"):
            make(corpus, filters=filters)
    path.write_bytes(content)
    make(corpus, filters=filters)


def test_damaged_copies_are_named(make, corpus, cache):
    settings = {"filters": {"deduplicate": "exact"}}
    make(corpus / "*.jsonl", **settings)
    (path,) = cache.glob("copies/*/copies.json")
    path.write_text("[[")
    with pytest.raises(DataError, match=r"copies.json is damaged; delete"):
        make(corpus / "*.jsonl", **settings)


def test_prepare_counts_what_was_left_out_by_source(corpus, cache, tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text(
        f'[data]\nsource = "{corpus}/*.jsonl"\ncache_dir = "{cache}"\nvalidation = "none"\n'
        '[data.filters]\ndeduplicate = "exact"\n'
    )
    flags = ["--data.filters.deduplicate", "near", "--logging.progress", "none"]
    assert prepare_command.main([str(config), *flags, "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    assert source["dropped"] == {"exact duplicate": 2, "near duplicate": 2}
    assert source["documents"] == 12


def test_a_disk_that_is_full_when_the_list_is_gathered_is_said_in_one_message(
    make, corpus, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filtering.shutil, "copyfileobj", full)
    with pytest.raises(DataError, match="no room for the token shards"):
        make(corpus / "*.jsonl", filters={"deduplicate": "exact"})
