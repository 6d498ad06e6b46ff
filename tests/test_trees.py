"""Which files of a folder or a pattern are read, as what, and what is said of the others."""

import errno
import gzip
import json
import lzma
import os
import subprocess
from pathlib import Path

import pytest

from llm.errors import DataError
from llm.text import trees
from llm.text.documents import KINDS
from llm.text.sources import find_origins

SPLITS = ("train", "validation", "test")


@pytest.fixture
def find(tmp_path):
    """Find what sources name, with a cache that is not among them."""
    cache = tmp_path / "cache"
    cache.mkdir()
    return lambda *sources: find_origins([str(source) for source in sources], cache)


@pytest.fixture
def make(tmp_path):
    """Write files, given as NAME=content or as names that hold themselves; return their folder."""

    def make(*names, root="corpus", **contents):
        for name in [*names, *contents]:
            content = contents.get(name, name)
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / root

    return make


def names(found):
    return [origin.name for origin in found.origins]


# Nothing is left out in silence


def no_entry(monkeypatch, folder):
    """The superuser may enter every folder, so a refusal is acted."""
    scandir = os.scandir

    def refuse(path):
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(trees.os, "scandir", refuse)


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "*/closed/*.txt"])
def test_a_folder_that_cannot_be_entered_is_an_error(make, find, monkeypatch, pattern):
    root = make("a/1.txt", "a/closed/2.txt", "b/3.txt")
    no_entry(monkeypatch, root / "a" / "closed")
    with pytest.raises(DataError, match=r"a/closed' cannot be read: Permission denied"):
        find(root / pattern)


@pytest.mark.parametrize("pattern", ["", "**", "*", "b*"])
def test_a_link_that_leads_nowhere_is_an_error(make, find, pattern):
    root = make("a.txt")
    (root / "b.txt").symlink_to("/nowhere/b.txt")
    with pytest.raises(DataError, match=r"b.txt is a link to /nowhere/b.txt, which is not there"):
        find(root / pattern)


def test_what_a_pattern_does_not_match_may_be_broken(make, find):
    root = make("a.txt")
    (root / "b.so").symlink_to("/nowhere/b.so")
    assert names(find(root / "**" / "*.txt")) == ["a.txt"]


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt"])
def test_links_to_folders_are_named_and_loops_end(make, find, pattern):
    root = make("a/x.txt", "elsewhere/y.txt")
    (root / "a" / "up").symlink_to(root)
    (root / "linked").symlink_to(root / "elsewhere")
    found = find(root / pattern)
    assert sorted(names(found)) == ["a/x.txt", "elsewhere/y.txt"]
    (note,) = found.notes
    assert {"a/up", "linked"} <= set(note.replace(",", "").split()) and "link to a folder" in note


def test_a_link_that_is_named_is_followed(make, find):
    root = make("a/x.txt")
    (root / "linked").symlink_to(root / "a")
    assert names(find(root / "linked")) == ["x.txt"]
    assert names(find(root / "linked" / "*.txt")) == ["x.txt"]


def test_pipes_and_hidden_files_are_named(make, find):
    root = make("a.txt", ".hidden", ".git/config", "lost+found/x")
    os.mkfifo(root / "pipe")
    found = find(root)
    assert names(found) == ["a.txt"]
    (note,) = found.notes
    assert ".git, .hidden, lost+found (hidden); pipe (neither a file nor a folder)" in note


def test_many_are_counted(make, find):
    root = make("a.txt", **{f"{n:02d}.png": b"\x89PNG" for n in range(12)})
    (note,) = find(root).notes
    assert note.endswith("left out 00.png, 01.png, 02.png and 9 more (a picture, sound or film)")


def test_folders_may_be_nested_as_deep_as_the_system_lets_them(make, find):
    root = make("a.txt")
    deep = root.joinpath(*["d"] * 1200)
    try:
        os.makedirs(root.joinpath(*["d"] * 600))
        os.makedirs(deep)
        (deep / "b.txt").write_text("b")
        assert len(names(find(root))) == len(names(find(root / "**"))) == 2
    finally:
        # pytest could not remove it: Python before 3.13 does so by recursion.
        subprocess.run(["rm", "-rf", root / "d"], check=True)


# What is not text


NOT_TEXT = [
    ("a.gz", gzip.compress(b"PAR1", mtime=0), "what is in it is a table of columns; decompress it"),
    ("a.jpg.gz", gzip.compress(b"\xff\xd8\xff", mtime=0), "what is in it is a picture"),
    (
        "a.gz.xz",
        lzma.compress(gzip.compress(b"x", mtime=0)),
        "by xz, and what is in it is compressed by",
    ),
    ("a.docx", b"PK\x03\x04", "a zip archive"),
    ("a.npy", b"\x93NUMPY", "arrays, weights or token ids; name the text that it was made from"),
    ("a.safetensors", b"\x08\0\0\0\0\0\0\0{}", "arrays, weights or token ids"),
    ("a.pkl", b"(dp0\n", "arrays, weights or token ids"),
    ("train.bin", b"\x0b\0\x0d\0", "not text: it has NUL bytes"),
    ("a.csv", "text\na".encode("utf-16"), "UTF-16 or UTF-32; convert it: iconv"),
    ("a.txt", "a".encode("utf-16-le"), "not text: it has NUL bytes"),
    ("a.pdf", b"%PDF-1.7", "a PDF"),
    ("a.jpg", b"\xff\xd8\xff", "a picture"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
]


@pytest.mark.parametrize(("name", "content", "message"), NOT_TEXT)
@pytest.mark.parametrize("magic", [False, True])
def test_a_named_file_that_is_not_text_is_refused_with_what_helps(
    make, find, name, content, message, magic
):
    root = make(**{name: content})
    with pytest.raises(DataError) as caught:
        find(root / ("*" if magic else name))
    assert message.split(";")[0] in str(caught.value)
    assert magic or message in str(caught.value)
    assert "data.errors" not in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["europarl.pt", "wiki.br", "notes.bin", "PKZIP.txt", "a.idx", "x"])
def test_text_is_text_whatever_its_name(make, find, name):
    (origin,) = find(make(name) / name).origins
    assert origin.kind == "text"


def test_a_table_is_told_by_what_it_holds_too(make, find):
    root = make(**{"rows.parq": b"PAR1...", "old.arrow": b"\xff\xff\xff\xff\x10\x01\0\0"})
    assert {o.name: o.kind for o in find(root).origins} == {
        "rows.parq": "parquet", "old.arrow": "arrow",
    }  # fmt: skip


def test_a_folder_whose_text_is_compressed_is_not_read_as_its_readme(make, find):
    root = make("README.txt", **{f"{n}.zip": b"PK\x03\x04" + bytes(99) for n in range(3)})
    with pytest.raises(DataError, match=r"most of .* cannot be read: 3 files, such as .*zip"):
        find(root)
    (root / "README.txt").write_text("text " * 99)
    (note,) = find(root).notes
    assert "0.zip, 1.zip, 2.zip (a zip archive)" in note


def test_tables_in_a_plain_folder_are_text_unless_they_are_compressed_or_named(make, find):
    """A person who names a table means its rows; among other files it may be any document."""
    zipped = {f"b{suffix}.gz": gzip.compress(b"text") for suffix in (".json", ".csv")}
    root = make("a.json", "a.csv", "a.tsv", "a.jsonl", "b.md", **zipped)
    assert {o.name: o.kind for o in find(root).origins} == {
        "a.json": "text", "a.csv": "text", "a.tsv": "text", "a.jsonl": "json", "b.md": "text",
        "b.json.gz": "gzip+json", "b.csv.gz": "gzip+csv",
    }  # fmt: skip
    kinds = [
        origin.kind for origin in find(*(root / f"a.{k}" for k in ("json", "csv", "tsv"))).origins
    ]
    assert kinds == ["json", "csv", "tsv"]


def test_a_pointer_in_place_of_a_file_is_refused_in_a_folder_too(make, find):
    root = make("a.txt", **{"b.txt": b"version https://git-lfs.github.com/spec/v1\noid sha256:"})
    with pytest.raises(DataError, match="git lfs pull"):
        find(root)


def test_kinds_have_a_reader_or_say_what_to_do():
    for kind in KINDS.values():
        assert (kind.read is None) == bool(kind.what) == bool(kind.remedy)


# Data sets


CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: ["en/first.jsonl", "en/more-*.jsonl"]}
  - {split: test, path: en/last.jsonl}
---
# A data set
"""

# The files of a folder, and those that train.
LAYOUTS = {
    "shards": (
        [f"data/{split}-0000{n}-of-00002.parquet" for split in SPLITS for n in range(2)]
        + ["README.md", "dataset_infos.json", "LICENSE"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
    ),
    "names": (["my_train.jsonl", "my-dev.jsonl", "test.jsonl", "README.md"], ["my_train.jsonl"]),
    "names of text": (
        ["train.txt", "valid.txt", "test.txt", "README.md", "config.json"], ["train.txt"],
    ),
    "folders": (
        ["train/pos/1.txt", "train/neg/2.txt", "test/pos/1.txt", "README", "x.vocab"],
        ["train/neg/2.txt", "train/pos/1.txt"],
    ),
    "cache of datasets": (
        ["imdb-train.arrow", "imdb-test.arrow", "dataset_info.json"], ["imdb-train.arrow"],
    ),
    "clone": (["README.md", ".gitattributes", "rows.jsonl", "LICENSE"], ["rows.jsonl"]),
    "infos": (["dataset_infos.json", "README.md", "part-1.jsonl"], ["part-1.jsonl"]),
    "card": (
        ["en/first.jsonl", "en/more-1.jsonl", "en/more-2.jsonl", "en/last.jsonl", "README.md"],
        ["en/first.jsonl", "en/more-1.jsonl", "en/more-2.jsonl"],
    ),
}  # fmt: skip


@pytest.fixture(params=LAYOUTS)
def layout(request, make):
    """(folder, names of the files that train)"""
    files, train = LAYOUTS[request.param]
    cards = {"card": CARD, "clone": "---\nlicense: mit\n---\n# A data set"}
    contents = {"dataset_infos.json": "{}", "README.md": cards.get(request.param, "#")}
    contents["dataset_info.json"] = "{}"
    # A shard is told by its name; what it holds is not looked at here.
    shards = {name: b"PAR1" for name in files if name.endswith((".parquet", ".arrow"))}
    return make(**{name: contents.get(name, name) for name in files} | shards), train


def test_a_data_set_is_its_train_split(layout, find):
    root, train = layout
    found = find(root)
    assert names(found) == train
    (note,) = found.notes
    for path in root.iterdir():
        assert path.name in note or path.name in train or path.name in ("data", "en", "train")
    # A folder above it reads it in the same way.
    (root.parent / "above").mkdir()
    moved = root.rename(root.parent / "above" / "set")
    assert names(find(moved.parent)) == [f"set/{name}" for name in train]


def test_the_train_split_is_that_of_datasets(layout, find, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    root, train = layout
    files = datasets.load_dataset_builder(str(root)).config.data_files["train"]
    assert sorted(os.path.relpath(file, root) for file in files) == train


def test_splits_of_the_layouts_of_other_corpora_are_told(make, find):
    root = make("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")
    assert names(find(root)) == ["wiki.train.tokens"]


def test_the_cache_of_the_hub_is_refused_by_name(make, find):
    root = make("blobs/0a1b", "refs/main", "snapshots/0123/train.txt", "snapshots/0123/test.txt")
    with pytest.raises(DataError, match=r"hub's cache .*; name one of the folders in .*/snapshots"):
        find(root)
    assert names(find(root / "snapshots" / "0123")) == ["train.txt"]


def test_files_of_programs_are_no_splits(make, find):
    root = make("train.py", "test.py", "train/a.py", "test/b.py", "train.txt", "notes.txt")
    assert len(names(find(root))) == 6


def test_a_data_set_without_a_train_split_is_refused(make, find):
    root = make("test-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl")
    with pytest.raises(DataError, match="without a train split: found test, validation; name the"):
        find(root)
    assert len(names(find(root / "*.jsonl"))) == 2


def test_several_configurations_are_told_apart(make, find):
    one = "- config_name: {0}\n  data_files: {0}/*.jsonl\n"
    card = "---\nconfigs:\n" + one.format("de") + one.format("en") + "{}---\n"
    root = make("de/a.jsonl", "en/b.jsonl", **{"README.md": card.format("")})
    with pytest.raises(DataError, match="in several configurations: de, en; name the files"):
        find(root)
    make(**{"README.md": card.format("  default: true\n")})
    assert names(find(root)) == ["en/b.jsonl"]


ELSEWHERE = ["/etc/passwd", "../other/x.txt", "https://example.org/x", "zip://x::a.zip"]


@pytest.mark.parametrize("path", [*ELSEWHERE, "3", "[[]]"])
def test_a_card_that_points_elsewhere_is_refused(make, find, path):
    files = f"[{{split: train, path: {path}}}]"
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---"
    root = make("a.jsonl", "other/x.txt", **{"README.md": card})
    message = "expected files in its" if path in ELSEWHERE else "cannot be followed"
    with pytest.raises(DataError, match=f"the card of .*{message}"):
        find(root)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz", "json.xz"])
def test_the_tables_of_a_data_set_are_read_as_rows(make, find, suffix):
    compress = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix[-2:], bytes)
    root = make(**{f"{split}.{suffix}": compress(b"text") for split in ("train", "test")})
    (origin,) = find(root).origins
    assert origin.name == f"train.{suffix}" and KINDS[origin.kind].has_rows


def test_what_trains_and_cannot_be_read_is_refused(make, find):
    root = make("test.jsonl.gz", **{"train.jsonl.gz": gzip.compress(b"%PDF-")})
    with pytest.raises(DataError, match="compressed by gzip, and what is in it is a PDF"):
        find(root)


# Folders that datasets.save_to_disk wrote


def saved(root, *parts):
    root.mkdir(parents=True)
    for part in parts:
        (root / part).write_bytes(b"\xff\xff\xff\xff\x10\x01\0\0")
    state = {"_data_files": [{"filename": part} for part in parts]}
    (root / "state.json").write_text(json.dumps(state))
    (root / "dataset_info.json").write_text("{}")


def test_a_saved_data_set_is_the_files_of_its_state(tmp_path, find):
    saved(tmp_path / "set", "data-0.arrow", "data-1.arrow")
    (tmp_path / "set" / "cache-123.arrow").write_bytes(b"")
    found = find(tmp_path / "set")
    assert [(o.name, o.kind) for o in found.origins] == [
        ("data-0.arrow", "arrow"), ("data-1.arrow", "arrow"),
    ]  # fmt: skip


def test_saved_splits_are_the_train_split(tmp_path, find):
    for split in SPLITS:
        saved(tmp_path / "set" / split, "data-0.arrow")
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": SPLITS}))
    found = find(tmp_path / "set")
    assert names(found) == ["train/data-0.arrow"]
    assert "validation (the split 'validation' of a data set" in found.notes[0]
    assert names(find(tmp_path / "set" / "test")) == ["data-0.arrow"]
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["a", "b"]}))
    with pytest.raises(DataError, match="without a train split: found a, b"):
        find(tmp_path / "set")


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", '{"_data_files": [3]}', "[" * 100_000, '{"_data_files": null}']
)
def test_a_damaged_state_is_an_error_of_the_data(tmp_path, find, state):
    saved(tmp_path / "set", "data-0.arrow")
    (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"state.json .*name its .arrow files"):
        find(tmp_path / "set")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.txt", "sub/x.txt", ".."])
def test_a_state_that_points_elsewhere_is_refused(tmp_path, find, name):
    saved(tmp_path / "set", "data-0.arrow")
    state = {"_data_files": [{"filename": name}]}
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="expected a file beside it"):
        find(tmp_path / "set")


# What grows while a run reads


@pytest.mark.parametrize("pattern", ["", "**", "*/*", "**/*.jsonl", "*/[am]*.jsonl"])
def test_runs_and_caches_below_a_source_are_left_out(make, tmp_path, pattern):
    root = make(
        "rows/a.jsonl",
        "begun/run.lock", "begun/log.jsonl",
        "imported/config.toml", "imported/run.json", "imported/metrics.jsonl",
        "cache/hashes.jsonl",
        "other/CACHEDIR.TAG", "other/x.jsonl",
    )  # fmt: skip
    found = find_origins(str(root / pattern), root / "cache")
    assert names(found) == ["rows/a.jsonl"]
    (note,) = found.notes
    assert "cache, other (a cache)" in note and "begun, imported (a run directory)" in note


def test_a_file_of_a_run_that_a_pattern_reaches_is_left_out(make, find):
    root = make("a/rows.jsonl", "run/run.lock", "run/rows.jsonl")
    found = find(root / "*" / "rows.jsonl")
    assert names(found) == ["a/rows.jsonl"] and "run (a run directory)" in found.notes[0]
    # Whoever names it means it.
    assert names(find(root / "run" / "rows.jsonl")) == ["rows.jsonl"]


def test_a_cache_in_a_home_that_is_closed_is_no_matter(make, find, monkeypatch):
    root = make("a.txt")
    stat = Path.stat

    def refuse(path, **options):
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setenv("LLM_CACHE_DIR", str(root.parent / "closed"))
    monkeypatch.setattr(Path, "stat", refuse)
    assert names(find(root)) == ["a.txt"]


@pytest.mark.parametrize("pattern", ["", "**", "*"])
def test_a_run_or_a_cache_is_no_source(make, find, pattern):
    with pytest.raises(DataError, match="is a run directory, which changes while a run reads it"):
        find(make("run.lock", "corpus.txt", root="run") / pattern)
    with pytest.raises(DataError, match="is a cache, which changes"):
        find(make("CACHEDIR.TAG", "corpus.txt", root="other") / pattern)


# Once


@pytest.mark.parametrize(
    "sources", [["a.txt", "a.txt"], ["a.txt", "."], [".", "*.txt"], ["a.txt", "link.txt"]]
)
def test_a_file_that_is_named_twice_is_read_once(make, find, sources):
    root = make("a.txt")
    (root / "link.txt").symlink_to("a.txt")
    found = find(*[root / source for source in sources])
    assert names(found) == ["a.txt"]
    assert "named more than once, and read once: " in found.notes[-1]


def test_equal_files_are_two(make, find):
    root = make(**{"a.txt": "same", "b.txt": "same"})
    os.link(root / "a.txt", root / "c.txt")
    assert names(find(root)) == ["a.txt", "b.txt", "c.txt"]
    assert find(root).notes == ()


def test_names_with_magic_characters_are_paths_first(make, find):
    root = make("[a]/x.txt", "a/y.txt")
    assert names(find(root / "[a]")) == ["x.txt"]
    assert names(find(root / "[a]" / "*.txt")) == ["x.txt"]
    assert names(find(root / "[ab]" / "*.txt")) == ["a/y.txt"]
