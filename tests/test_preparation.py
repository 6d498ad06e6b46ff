"""llm.prepare: documents of an iterator become a source like any other."""

import json
import threading
import time

import pytest

import llm
from llm.api import preparation
from llm.commands import prepare as command
from llm.config import DataConfig, TokenizerConfig, load_config
from llm.errors import DataError, UsageError
from llm.text import tokenizer
from llm.text.batches import training_batches
from llm.text.shards import prepare
from llm.text.tokenizer import cached_gpt2

TEXTS = {f"page {n}": f"學而 {n}\n" * (n + 1) for n in range(9)}


def test_documents_of_an_iterator_are_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_FILE_BYTES", 100)
    settings = {"validation": "none", "cache_dir": str(tmp_path / "cache")}
    found = llm.prepare(iter(TEXTS.items()), tmp_path / "pages", **settings)
    (source,) = found["sources"]
    size = sum(len(text.encode()) for text in TEXTS.values())
    assert (source["documents"], source["bytes"]) == (9, size)
    assert source["tokens"] == size + 9 and found["tokenizer"] == "bytes"
    files = sorted((tmp_path / "pages").iterdir())
    assert len(files) > 2
    corpus = prepare(DataConfig(source=str(tmp_path / "pages"), **settings), TokenizerConfig())
    assert corpus.reused
    expected = b"".join(text.encode() + b"\0" for text in TEXTS.values())
    ids = corpus.train.read(0, len(corpus.train))
    assert bytes(0 if id_ == 256 else id_ for id_ in ids.tolist()) == expected
    assert corpus.train.document_at(0)[0] == f"{files[0].name}#page 0"


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["text"], "document 0 is str; expected a pair of texts"),
        ([("a", "x"), ("b", b"x")], "document 1 is tuple; expected a pair"),
        ([("a", "x\ud83d")], "document 0, 'a', has half of a surrogate pair"),
        ([], "no document has text"),
        ([("a", ""), ("b", "")], "no document has text"),
    ],
)
def test_what_is_no_document_is_named_and_leaves_nothing(tmp_path, documents, message):
    with pytest.raises(UsageError, match=message):
        llm.prepare(documents, tmp_path / "pages")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_written_over(tmp_path):
    with pytest.raises(UsageError, match="exists; name a folder that is new"):
        llm.prepare([("a", "x")], tmp_path)


def test_of_two_processes_that_write_one_folder_the_second_is_refused(tmp_path):
    """The second begins while the first still writes."""
    begun, refused = threading.Event(), []

    def documents():
        yield "a", "x"
        begun.set()
        time.sleep(0.3)
        yield "b", "y"

    def second():
        begun.wait()
        try:
            llm.prepare([("c", "z")], tmp_path / "pages", validation="none")
        except UsageError as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    found = llm.prepare(documents(), tmp_path / "pages", validation="none")
    thread.join()
    assert found["sources"][0]["documents"] == 2
    assert len(refused) == 1 and "exists; name a folder that is new" in refused[0]


def test_an_iterator_that_fails_leaves_nothing(tmp_path):
    def documents():
        yield "a", "x"
        raise RuntimeError("the network is gone")

    with pytest.raises(RuntimeError, match="the network is gone"):
        llm.prepare(documents(), tmp_path / "pages")
    assert list(tmp_path.iterdir()) == []


def test_an_encoding_that_is_not_here_is_not_fetched(tmp_path, monkeypatch):
    import tiktoken.load
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    asked = []

    def fetched(url):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(tiktoken.load, "read_file", fetched)
    for name in ("DATA_GYM_CACHE_DIR", "TIKTOKEN_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert cached_gpt2() is None
    assert asked == []
    # The files that it looks for are those that tiktoken would fetch.
    with pytest.raises(DataError):
        tokenizer.tiktoken_tokenizer("gpt2")
    assert asked == [f"{tokenizer._GPT2_URL}/vocab.bpe"]


def test_gpt2_stands_beside_the_tokenizer_on_the_same_text(tmp_path, monkeypatch):
    """Another tokenizer in gpt2's place, so that nothing is needed: 1 token a character."""
    characters = tokenizer.CharacterTokenizer("".join(TEXTS.values()))
    monkeypatch.setattr(preparation, "cached_gpt2", lambda: characters)
    settings = {"validation": "none", "cache_dir": str(tmp_path / "cache")}
    found = llm.prepare([("a", "學而" * 500)], tmp_path / "pages", **settings)
    beside = found["sources"][0]["beside_gpt2"]
    assert beside == {
        "sample_bytes": 3000,
        "bytes_per_token": 3000 / 3001,
        "gpt2_bytes_per_token": 3.0,
    }
    assert json.dumps(found)


def test_a_folder_may_have_the_name_of_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = llm.prepare([("a", "text")], "stdlib", validation="none", cache_dir="cache")
    assert [source["documents"] for source in found["sources"]] == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 3}, "data.validation"),
        ({"validate": "none"}, "data.validate"),
        ({"tokenizer": "gpt3"}, "tokenizer.kind"),
    ],
)
def test_a_wrong_setting_is_named_before_a_document_is_read(tmp_path, settings, message):
    def documents():
        raise AssertionError("read")
        yield

    with pytest.raises(UsageError, match=message):
        llm.prepare(documents(), tmp_path / "pages", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def config(tmp_path):
    """Documents packed into windows of bytes, and what would break a page or a terminal."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("<script>\x1b[31m學</script>\n")
    (tmp_path / "texts/b.txt").write_text("b & c" * 60)
    path = tmp_path / "config.toml"
    path.write_text(
        f'[data]\nsource = "{tmp_path}/texts"\ncache_dir = "{tmp_path}/cache"\n'
        'validation = "none"\nwindows = "packed"\n[model]\ncontext_length = 64\n'
        '[logging]\nprogress = "none"\n'
    )
    return path


def test_prepare_shows_the_windows_that_training_reads_first(config, capsys):
    assert command.main([str(config), "--show", "6", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["windows"]
    settings = load_config(config)
    corpus = prepare(settings.data, settings.tokenizer)
    batches = training_batches(settings, corpus)
    assert len(shown) == 6
    for row, window in enumerate(shown):
        size = len(window["ids"])
        assert window["ids"] == batches[0].tokens[row][:size].tolist()
        assert not batches[0].weights[row][size - 1 :].any()
        held = sum(one["tokens"] for one in window["documents"])
        assert size - held == (window["documents"][0]["offset"] == 0)
    command.main([str(config), "--show", "6"])
    text = capsys.readouterr().out
    assert "a.txt from token 0: 27 tokens" in text and "<|endoftext|>|<|s|c|r|" in text
    assert "|\\x1b|[|3|1|m|學|<" in text and "\x1b" not in text


def test_the_page_of_windows_marks_tokens_and_runs_nothing(config, tmp_path):
    page = tmp_path / "page.html"
    assert command.main([str(config), "--show", "6", "--html", str(page)]) == 0
    html = page.read_text()
    assert '<span class="t" title="id 60">&lt;</span>' in html
    assert '<span class="t" title="id 229, 173, 184">學</span>' in html
    assert '<span class="t name" title="id 256">&lt;|endoftext|&gt;</span>' in html
    assert '<span class="t" title="id 27">\\x1b</span>' in html
    assert "<script></script>" in html and "<script>\x1b" not in html


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--html", "page.html"], "say how many by --show N"),
        (["--show", "1", "--html", "none/page.html"], "there is no folder none"),
        (["--show", "1", "--model.context-length", "4096", "--data.windows", "stream"], "4096"),
    ],
)
def test_windows_that_cannot_be_shown_are_answered(config, flags, message):
    with pytest.raises(UsageError, match=message):
        command.main([str(config), *flags])
