"""What a source names: which files, in which order, with which content."""

import contextlib
import errno
import hashlib
import http.server
import io
import os
import sysconfig
import threading
import time
import tokenize
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llm.errors import DataError, UsageError
from llm.text import sources
from llm.text.sources import check_unchanged, find_origins


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def corpus(tmp_path):
    """A folder with two texts, one of them below, a hidden file and a binary one."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / "b.txt").write_text("bee")
    (root / "sub" / "a.md").write_text("學")
    (root / ".hidden").write_text("no")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0")
    return root


def names(found):
    return [origin.name for origin in found.origins]


def test_a_file_is_one_origin_with_its_hash(corpus, cache):
    (origin,) = find_origins(str(corpus / "b.txt"), cache).origins
    assert (origin.name, origin.kind, origin.bytes) == ("b.txt", "text", 3)
    assert origin.sha256 == sha256(b"bee")


def test_a_folder_is_its_files_in_a_fixed_order(corpus, cache):
    found = find_origins(str(corpus), cache)
    assert names(found) == ["b.txt", "sub/a.md"]
    assert found.notes == (
        f"{corpus}: left out .hidden (hidden); picture.png (a picture, sound or film)",
    )


def test_the_order_is_that_of_the_names_not_of_the_disk(tmp_path, cache):
    wanted = [*(f"{n:02d}.txt" for n in range(30)), *(f"s{n:02d}/x" for n in range(30))]
    for name in sorted(wanted, key=lambda name: sha256(name.encode())):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text(name)
    assert names(find_origins(str(tmp_path / "f"), cache)) == wanted


def test_names_do_not_tell_where_the_corpus_lies(corpus, cache, tmp_path):
    before = find_origins(str(corpus), cache).origins
    after = find_origins(str(corpus.rename(tmp_path / "elsewhere")), cache).origins
    assert [replace(o, location="") for o in before] == [replace(o, location="") for o in after]


def test_a_glob_is_its_matches(corpus, cache):
    assert names(find_origins(str(corpus / "**" / "*.md"), cache)) == ["sub/a.md"]
    assert names(find_origins(str(corpus / "*.txt"), cache)) == ["b.txt"]


def test_a_name_with_magic_characters_is_a_file_first(tmp_path, cache):
    (tmp_path / "what[1].txt").write_text("x")
    assert names(find_origins(str(tmp_path / "what[1].txt"), cache)) == ["what[1].txt"]


def test_a_list_is_each_of_its_sources(corpus, cache):
    found = find_origins((str(corpus / "sub"), str(corpus / "b.txt")), cache)
    assert names(found) == ["a.md", "b.txt"]


def test_equal_names_are_told_apart(corpus, cache, tmp_path):
    (tmp_path / "b.txt").write_text("another")
    found = find_origins([str(corpus / "b.txt"), str(tmp_path / "b.txt")], cache)
    assert names(found) == ["b.txt", "b.txt (2)"]
    assert found.origins[0].sha256 != found.origins[1].sha256


def test_the_standard_library_is_python_source_without_tests(cache):
    found = find_origins("stdlib", cache)
    assert len(found.origins) > 300
    assert {origin.kind for origin in found.origins} == {"python"}
    assert "os.py" in names(found) and "json/decoder.py" in names(found)
    assert not [n for n in names(found) if "test" in Path(n).parts or "site-packages" in n]
    (origin,) = [origin for origin in found.origins if origin.name == "os.py"]
    content = Path(sysconfig.get_path("stdlib"), "os.py").read_bytes()
    assert origin.sha256 == sha256(content)
    # It is read as UTF-8, whatever a file might declare.
    for origin in found.origins:
        content = Path(origin.location).read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        assert content.decode("utf-8") == content.decode(encoding)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".jsonl", "json"),
        (".json", "json"),
        (".parquet", "parquet"),
        (".ndjson", "json"),
        (".JSONL", "json"),
        (".Parquet", "parquet"),
        (".txt", "text"),
    ],
)
def test_tables_are_told_by_their_suffix(suffix, kind, tmp_path, cache):
    (tmp_path / f"data{suffix}").write_text("{}")
    (origin,) = find_origins(str(tmp_path / f"data{suffix}"), cache).origins
    assert origin.kind == kind


def test_json_files_of_a_folder_are_documents(tmp_path, cache):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "settings.json").write_text("{}")
    (tmp_path / "f" / "rows.jsonl").write_text("{}")
    kinds = {o.name: o.kind for o in find_origins(str(tmp_path / "f"), cache).origins}
    assert kinds == {"rows.jsonl": "json", "settings.json": "text"}


def test_a_missing_file_is_answered_with_near_names(corpus, cache):
    with pytest.raises(DataError, match=r"no file or folder .*bb.txt; there is .*/b.txt") as caught:
        find_origins(str(corpus / "bb.txt"), cache)
    assert caught.value.exit_code == 3


def test_a_missing_folder_is_answered_with_near_names(corpus, cache):
    with pytest.raises(DataError, match=r"there is .*/corpus/sub"):
        find_origins(str(corpus / "sib" / "a.md"), cache)


def test_a_glob_without_matches_is_an_error(corpus, cache):
    with pytest.raises(DataError, match=r"\*.rst' matches no file"):
        find_origins(str(corpus / "*.rst"), cache)


def test_an_empty_folder_names_no_documents(tmp_path, cache):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="names no documents"):
        find_origins(str(tmp_path / "empty"), cache)


def test_an_empty_name_says_what_is_expected(cache):
    with pytest.raises(UsageError, match="expected a path, URL, 'stdlib' or hf:NAME"):
        find_origins("", cache)


def test_text_in_place_of_a_path_is_an_error_of_the_data(cache):
    with pytest.raises(DataError, match="File name too long"):
        find_origins("to be or not to be " * 400, cache)


def test_names_that_are_no_text_are_shown(tmp_path, cache):
    folder = tmp_path / "f"
    folder.mkdir()
    path = os.fsencode(folder) + b"/a\xff.txt"
    try:
        Path(os.fsdecode(path)).write_text("x")
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    assert names(find_origins(str(folder), cache)) == ["a\\xff.txt"]


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(sources, "REMEMBER_HASH_ABOVE_BYTES", 10)
    path = tmp_path / "large.txt"
    path.write_text("x" * 100)
    monkeypatch.setattr(sources.time, "time", lambda: path.stat().st_ctime + 10)
    hashed = []
    original = sources.sha256_of_file
    monkeypatch.setattr(
        sources, "sha256_of_file", lambda path: hashed.append(path) or original(path)
    )
    for _ in range(2):
        (origin,) = find_origins(str(path), cache).origins
        assert origin.sha256 == sha256(b"x" * 100)
    assert len(hashed) == 1
    before = path.stat()
    time.sleep(0.02)
    path.write_text("y" * 100)
    # Dated back: only ctime tells.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (origin,) = find_origins(str(path), cache).origins
    assert origin.sha256 == sha256(b"y" * 100)


def test_a_file_that_was_written_just_now_is_not_remembered(tmp_path, cache, monkeypatch):
    """It could change once more within the clock's grain."""
    monkeypatch.setattr(sources, "REMEMBER_HASH_ABOVE_BYTES", 10)
    path = tmp_path / "large.txt"
    path.write_text("x" * 100)
    find_origins(str(path), cache)
    assert not (cache / "hashes").exists()


def test_a_home_that_nobody_has_is_refused_and_a_file_with_its_name_is_read(
    tmp_path, cache, monkeypatch
):
    with pytest.raises(UsageError, match="'~nobodyknown/x': the system knows no such user's home"):
        find_origins("~nobodyknown/x", cache)
    (tmp_path / "~nobodyknown").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert names(find_origins("~nobodyknown", cache)) == ["~nobodyknown"]


def test_names_are_distinct_whatever_files_are_called(tmp_path, cache):
    for folder, name in [("1", "a"), ("2", "a"), ("3", "a (2)")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(folder)
    found = find_origins([str(tmp_path / folder) for folder in "132"], cache)
    assert names(found) == ["a", "a (2)", "a (3)"]


@pytest.mark.parametrize("memory", ["", "[]", "{}", "null", '{"identity": 3}'])
def test_a_damaged_memory_of_a_hash_is_passed_over(tmp_path, cache, monkeypatch, memory):
    monkeypatch.setattr(sources, "REMEMBER_HASH_ABOVE_BYTES", 10)
    path = tmp_path / "large.txt"
    path.write_text("x" * 100)
    monkeypatch.setattr(sources.time, "time", lambda: path.stat().st_ctime + 10)
    for _ in range(2):
        (origin,) = find_origins(str(path), cache).origins
        assert origin.sha256 == sha256(b"x" * 100)
        (file,) = (cache / "hashes").iterdir()
        file.write_text(memory)


def test_a_file_that_goes_away_while_it_is_listed_is_an_error_of_the_data(
    corpus, cache, monkeypatch
):
    def gone(path, cache):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(sources, "_sha256_of", gone)
    with pytest.raises(DataError, match=r"b.txt' cannot be read: No such file or directory"):
        find_origins(str(corpus), cache)


# The corpus and what a run recorded of it


@pytest.fixture
def recorded(corpus, cache):
    return [asdict(origin) for origin in find_origins(str(corpus), cache).origins]


def test_an_unchanged_corpus_passes(corpus, cache, recorded):
    check_unchanged(recorded, find_origins(str(corpus), cache).origins)


def test_a_changed_file_is_named_with_both_hashes(corpus, cache, recorded):
    (corpus / "b.txt").write_text("bees")
    with pytest.raises(DataError, match=r"b.txt") as caught:
        check_unchanged(recorded, find_origins(str(corpus), cache).origins)
    message = str(caught.value)
    assert f"expected 3 bytes with sha256 {sha256(b'bee')}" in message
    assert f"found 4 bytes with sha256 {sha256(b'bees')}" in message
    assert "restore it" in message and caught.value.exit_code == 3


def test_a_file_that_is_gone_or_new_is_named(corpus, cache, recorded):
    (corpus / "c.txt").write_text("sea")
    with pytest.raises(DataError, match=r"c.txt is new"):
        check_unchanged(recorded, find_origins(str(corpus), cache).origins)
    (corpus / "c.txt").unlink()
    (corpus / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b.txt is gone"):
        check_unchanged(recorded, find_origins(str(corpus), cache).origins)


def test_the_first_of_two_files_with_one_name_is_compared_too(corpus, cache, tmp_path):
    (tmp_path / "b.txt").write_text("another")
    both = [str(corpus / "b.txt"), str(tmp_path / "b.txt")]
    recorded = [asdict(origin) for origin in find_origins(both, cache).origins]
    (corpus / "b.txt").write_text("changed")
    with pytest.raises(DataError, match=r"corpus/b.txt"):
        check_unchanged(recorded, find_origins(both, cache).origins)


# URLs


class Server:
    """A web server on this machine that counts what it is asked for."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut_after: int | None = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                content = outer.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: outer.cut_after])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with contextlib.closing(Server()) as server:
        yield server


def test_a_url_is_fetched_once(server, cache):
    server.files["/a/text.txt?v=1"] = "學而".encode()
    for _ in range(2):
        (origin,) = find_origins(f"{server.url}/a/text.txt?v=1", cache).origins
        assert origin.name == f"{server.url}/a/text.txt?v=1"
        assert Path(origin.location).read_bytes() == "學而".encode()
        assert origin.sha256 == sha256("學而".encode())
    assert server.requests == ["/a/text.txt?v=1"]


def test_the_suffix_of_a_url_tells_a_table(server, cache):
    server.files["/rows.jsonl"] = b'{"text": "x"}'
    (origin,) = find_origins(f"{server.url}/rows.jsonl", cache).origins
    assert origin.kind == "json"


def test_a_download_that_changed_in_the_cache_is_noticed(server, cache):
    server.files["/text.txt"] = b"first"
    (origin,) = find_origins(f"{server.url}/text.txt", cache).origins
    Path(origin.location).write_bytes(b"fjrst")
    with pytest.raises(DataError, match="has changed") as caught:
        find_origins(f"{server.url}/text.txt", cache)
    assert sha256(b"first") in str(caught.value) and sha256(b"fjrst") in str(caught.value)
    assert "delete" in str(caught.value)


@pytest.mark.parametrize("name", ["sha256", "text.txt.sha256", "x" * 300 + ".txt", ""])
def test_a_url_may_have_any_name(server, cache, name):
    server.files[f"/{name}"] = b"content"
    (origin,) = find_origins(f"{server.url}/{name}", cache).origins
    assert Path(origin.location).read_bytes() == b"content"


def test_a_url_that_is_not_there_names_the_offline_way(server, cache):
    with pytest.raises(DataError, match="404") as caught:
        find_origins(f"{server.url}/none.txt", cache)
    assert "copy it here and set data.source" in str(caught.value)
    assert list((cache / "downloads").glob("*.partial")) == []


def test_half_a_download_is_not_kept(server, cache):
    server.files["/text.txt"] = b"0123456789" * 1000
    server.cut_after = 5000
    with pytest.raises(DataError, match="could not be fetched"):
        find_origins(f"{server.url}/text.txt", cache)
    server.cut_after = None
    (origin,) = find_origins(f"{server.url}/text.txt", cache).origins
    assert origin.bytes == 10000


def test_a_download_without_room_names_its_size_and_leaves_nothing(server, cache):
    server.files["/text.txt"] = b"0123456789" * 1000

    def full(what, _done, _total):
        if what == "fetching":
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"No space left on device.: it has 10000 bytes, and") as e:
        find_origins(f"{server.url}/text.txt", cache, full)
    assert "set data.cache_dir to a folder on another disk" in str(e.value)
    assert [p for p in (cache / "downloads").iterdir() if p.suffix != ".lock"] == []


def test_letters_of_a_url_that_are_not_ascii_are_escaped(server, cache):
    server.files["/%C3%BC%20%E5%AD%B8.jsonl?q=%C3%A9"] = b"content"
    (origin,) = find_origins(f"{server.url}/ü 學.jsonl?q=é", cache).origins
    assert (origin.name, origin.kind) == (f"{server.url}/ü 學.jsonl?q=é", "json")
    # What is escaped already stays as it is.
    find_origins(f"{server.url}/%C3%BC%20%E5%AD%B8.jsonl?q=%C3%A9", cache)
    assert len(set(server.requests)) == 1


@pytest.mark.parametrize(
    "url", ["http://höst.invalid/x", f"http://{'ü' * 80}.invalid/x", f"http://{'u' * 80}.invalid/",
            "http://127.0.0.1:port/", "http://", "HTTP://127.0.0.1:1/x", "http://a/\udcff\n"],
)  # fmt: skip
def test_a_url_that_cannot_be_asked_for_is_an_error_for_people(cache, url, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises((DataError, UsageError), match=r"could not be fetched|is not a URL"):
        find_origins(url, cache)


def test_what_a_url_holds_is_told_by_its_bytes(server, cache):
    server.files["/text.txt"] = b"PK\x03\x04"
    with pytest.raises(DataError, match=r"text.txt is a zip archive; unpack it"):
        find_origins(f"{server.url}/text.txt", cache)


def test_other_schemes_are_refused_by_name(cache):
    for url in ("s3://bucket/x", "file:///etc/passwd", "gs://x/*.txt"):
        with pytest.raises(UsageError, match=r"by http:// and https:// only"):
            find_origins(url, cache)


def test_a_url_that_is_none_is_refused(cache):
    with pytest.raises(UsageError, match="is not a URL"):
        find_origins("http://[bad", cache)


# The hub


def test_the_hub_out_of_reach_uses_the_last_revision_seen(cache, monkeypatch):
    monkeypatch.setattr(sources, "hub_revision", lambda name: "abc123")
    (origin,) = find_origins("hf:someone/data:en:train", cache).origins
    assert (origin.name, origin.kind) == ("hf:someone/data:en:train", "hub")
    assert origin.sha256 == "abc123"

    def no_network(name):
        raise OSError("no network")

    monkeypatch.setattr(sources, "hub_revision", no_network)
    (again,) = find_origins("hf:someone/data:en:train", cache).origins
    assert again == origin
    with pytest.raises(DataError, match=r"'other' could not be fetched: no network. Offline"):
        find_origins("hf:other", cache)


def test_a_folder_with_the_name_of_a_data_set_is_not_read_in_its_place(
    tmp_path, cache, monkeypatch
):
    """`datasets` would read it, under the revision of the hub's."""
    monkeypatch.setattr(sources, "hub_revision", lambda name: "abc123")
    (tmp_path / "someone" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="someone/data is here too"):
        find_origins("hf:someone/data", cache)
    with pytest.raises(UsageError, match="expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLI"):
        find_origins("hf:other:en:train:more", cache)
