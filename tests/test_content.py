"""Compressed files: what comes out is what went in, in bounded memory; or a message says why."""

import bz2
import gzip
import hashlib
import json
import lzma
import tracemalloc

import pyarrow
import pytest

from llm.config import DataConfig, TokenizerConfig
from llm.errors import DataError
from llm.text import content, documents
from llm.text.content import Origin
from llm.text.documents import Reader, kind_of_file
from llm.text.shards import prepare
from llm.text.sources import find_origins


def pyarrow_bytes(data, codec):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pyarrow_bytes(data, "zstd"),
    "lz4": lambda data: pyarrow_bytes(data, "lz4"),
}
TEXT = "".join(f"line {n}, 學而時習之，不亦說乎\n" for n in range(2000))
ROWS = "".join(json.dumps({"meta": {"text": f"row {n}"}}) + "\n" for n in range(9))


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return Origin(name, kind_of_file(path), str(path), len(data), digest)

    return write


def read(origin, **settings):
    reader = Reader(settings.pop("errors", "strict"), settings.pop("text_field", "text"))
    found = reader.documents([origin])
    return [(document.name, "".join(document.pieces)) for document in found], reader


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("parts", [1, 3])
def test_what_comes_out_is_what_went_in(write, monkeypatch, suffix, parts):
    """One stream, or several behind each other, as parallel compressors write them."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 5000)
    data = TEXT.encode()
    size = -(-len(data) // parts)
    compressed = b"".join(
        COMPRESS[suffix](data[start : start + size]) for start in range(0, len(data), size)
    )
    origin = write(f"a.txt.{suffix}", compressed)
    assert origin.compression and read(origin)[0] == [(f"a.txt.{suffix}", TEXT)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_rows_of_compressed_files(write, suffix):
    found, _ = read(
        write(f"a.jsonl.{suffix}", COMPRESS[suffix](ROWS.encode())), text_field="meta.text"
    )
    assert [text for _, text in found] == [f"row {n}" for n in range(9)]
    table = "text,n\n" + "".join(f"row {n},{n}\n" for n in range(9))
    found, _ = read(write(f"a.csv.{suffix}", COMPRESS[suffix](table.encode())))
    assert [text for _, text in found] == [f"row {n}" for n in range(9)]


def test_the_bytes_tell_the_compression_and_the_name_what_is_in_it(write):
    assert write("rows.jsonl", gzip.compress(ROWS.encode())).kind == "gzip+json"
    assert write("data", lzma.compress(b"text")).kind == "xz+text"
    assert write("old.gz", gzip.compress(b"text")).kind == "gzip+text"


def test_a_compressed_text_without_text_is_no_document(write):
    found, reader = read(write("a.txt.gz", gzip.compress(b"")))
    assert (found, reader.dropped) == ([], {"empty": 1})


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_is_cut_off_says_how_far_it_was_read(write, suffix):
    data = COMPRESS[suffix](TEXT.encode())
    cut = data[: len(data) - 9]
    with pytest.raises(
        DataError, match=rf"a.{suffix} cannot be read: .*, after {len(cut)} of its"
    ) as e:
        read(write(f"a.{suffix}", cut))
    assert f"{len(cut)} of its {len(cut)} bytes; put it back whole" in str(e.value)
    assert e.value.exit_code == 3


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_damaged_file_is_noticed(write, suffix):
    data = bytearray(COMPRESS[suffix](TEXT.encode()))
    data[len(data) // 2] ^= 0x55
    with pytest.raises(DataError, match=rf"a.{suffix} cannot be read: .* bytes; put it back"):
        read(write(f"a.{suffix}", bytes(data)))


@pytest.mark.parametrize("name", ["a.gz", "a.zst", "a.xz", "a.jsonl.bz2"])
def test_a_name_that_lies_is_answered(write, name):
    with pytest.raises(DataError, match=rf"{name} cannot be read: .*put it back whole"):
        write(name, b"plain text, and no more")


def test_a_compressed_file_that_changes_while_it_is_read_is_noticed(write, tmp_path):
    origin = write("a.txt.gz", gzip.compress(b"before"))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"beyond"))
    with pytest.raises(DataError, match="changed while it was read"):
        read(origin)


def test_bytes_that_are_not_utf8_have_a_place_in_what_comes_out(write):
    origin = write("a.txt.gz", gzip.compress(b"many good words " * 9 + b"\xff!"))
    with pytest.raises(DataError, match=r"a.txt.gz is not UTF-8: byte 0xff at offset 144;"):
        read(origin)
    found, reader = read(origin, errors="replace")
    assert found[0][1].endswith("\ufffd!") and reader.replaced == 1


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_is_refused_with_the_limit(write, monkeypatch, suffix):
    monkeypatch.setattr(content, "FREE_BYTES", 2**20)
    origin = write(f"a.txt.{suffix}", COMPRESS[suffix](b"all work and no play " * 400_000))
    if suffix == "lz4":  # which makes nothing 200 times smaller twice over
        monkeypatch.setattr(content, "MOST_TIMES", 100)
    with pytest.raises(
        DataError, match=r"may be a bomb: \d+ bytes came out of the first \d+;"
    ) as e:
        read(origin)
    assert "or 1048576. If it is text all the same, decompress it" in str(e.value)
    # Below the limits, it is text like any other.
    monkeypatch.setattr(content, "FREE_BYTES", 2**28)
    assert len(read(origin)[0][0][1]) == 8_400_000


def test_memory_does_not_grow_with_what_comes_out(tmp_path):
    """80 MB out of 0.3 MB: never 16 MB at a time."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"all work and no play\n" * 4_000_000))
    reader = Reader("strict", "text")
    origins = find_origins(str(tmp_path / "a.txt.gz"), tmp_path / "cache").origins
    tracemalloc.start()
    try:
        size = sum(len(piece) for one in reader.documents(origins) for piece in one.pieces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 84_000_000 and peak < 16_000_000


def test_shards_of_compressed_text_are_those_of_the_text(tmp_path):
    tokens = []
    for name, data in (("a.txt", TEXT.encode()), ("b.txt.zst", COMPRESS["zst"](TEXT.encode()))):
        (tmp_path / name).write_bytes(data)
        settings = {"cache_dir": str(tmp_path / "cache"), "validation": "none"}
        corpus = prepare(DataConfig(source=str(tmp_path / name), **settings), TokenizerConfig())
        assert corpus.sources[0].text_bytes == len(TEXT.encode())
        assert corpus.origins[0].sha256 == hashlib.sha256(data).hexdigest()
        tokens.append(corpus.train.read(0, len(corpus.train)).tolist())
    assert tokens[0] == tokens[1]


def test_a_text_is_held_out_or_a_copy_however_it_is_compressed(write, tmp_path):
    hashes = set()
    for suffix, compress in {"": bytes, **{f".{k}": v for k, v in COMPRESS.items()}}.items():
        (found,) = Reader("strict", "text").documents(
            [write(f"a.txt{suffix}", compress(TEXT.encode()))]
        )
        hashes.add(found.sha256)
    assert hashes == {hashlib.sha256(TEXT.encode()).hexdigest()}
    source = [str(tmp_path / "a.txt"), str(tmp_path / "a.txt.gz")]
    settings = {"cache_dir": str(tmp_path / "cache"), "validation": "none"}
    filters = {"deduplicate": "exact"}
    corpus = prepare(DataConfig(source=source, filters=filters, **settings), TokenizerConfig())
    assert corpus.sources[0].dropped == {"exact duplicate": 1}


@pytest.mark.parametrize(("suffix", "zeros"), [("gz", 5_000_000), ("xz", 4)])
def test_padding_behind_and_between_streams_is_passed_over(write, suffix, zeros):
    """As `gzip` has it; for xz by fours (the format's specification, section 2)."""
    data = b"".join(COMPRESS[suffix](part) + b"\0" * zeros for part in (b"one ", b"two"))
    name = f"a.txt.{suffix}"
    assert read(write(name, data))[0] == [(name, "one two")]
    with pytest.raises(DataError, match="cannot be read"):
        read(write(name, data + b"rubbish of many bytes"))


def test_a_key_that_is_not_utf8_is_a_name_in_ascii(write):
    origin = write("a.jsonl", b'{"__key__": "x\\ud83d", "text": "y"}\n')
    assert read(origin)[0] == [("a.jsonl#x\\ud83d", "y")]
