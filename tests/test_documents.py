"""Bytes to documents: nothing is lost on the way to the pieces, and what is wrong has a place."""

import csv
import errno
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.ipc
import pyarrow.parquet
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import DataError
from llm.text import content, documents
from llm.text.bpe import PATTERN
from llm.text.documents import Origin, Reader, kind_of_file, pieces

SHARED = Path(__file__).parents[2] / "shared"


def origin_of(path: Path, kind: str = "text") -> Origin:
    content = path.read_bytes()
    return Origin(path.name, kind, str(path), len(content), hashlib.sha256(content).hexdigest())


def read(origins, errors="strict", text_field="text", bad_rows="error"):
    """[(name, text)] and the reader, which counts."""
    reader = Reader(errors, text_field, bad_rows)
    found = reader.documents(origins)
    return [(document.name, "".join(document.pieces)) for document in found], reader


@pytest.fixture
def write(tmp_path):
    def write(name, content, kind="text"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return origin_of(path, kind)

    return write


# Pieces

# One of each sort of character that the patterns tell apart.
SORTS = "ab Zé學而，。！'stde0129 \t\n\r ._-\u0301\u200d\u3000\x1c\u2028"


@settings(deadline=None)
@given(st.lists(st.text(SORTS, max_size=8), max_size=8))
def test_pieces_are_the_text(blocks):
    assert "".join(pieces(blocks)) == "".join(blocks)


def patterns():
    """The patterns of the encodings that tiktoken has, and ours."""
    from tiktoken_ext import openai_public

    with pytest.MonkeyPatch.context() as patch:
        # Their vocabularies would be fetched; the patterns need none.
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        patch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
        gpt2 = openai_public.r50k_base()["pat_str"]
        newer = [getattr(openai_public, n)()["pat_str"] for n in ("cl100k_base", "o200k_base")]
    return {"gpt2": gpt2, "cl100k_base": newer[0], "o200k_base": newer[1], "ours": PATTERN}


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "ours"])
@settings(max_examples=500, deadline=None)
@given(text=st.text(SORTS, max_size=12), rest=st.text(SORTS, max_size=6))
def test_no_token_reaches_across_a_cut(name, text, rest):
    """Splitting both sides gives what splitting the whole gives, whatever comes next."""
    pattern = regex.compile(ALL_PATTERNS[name])
    cut = documents._last_safe_cut(text)
    whole = text + rest
    assert pattern.findall(whole[:cut]) + pattern.findall(whole[cut:]) == pattern.findall(whole)


def test_cuts_are_found_in_prose_of_either_kind():
    assert documents._last_safe_cut("one two three") == len("one two")
    assert documents._last_safe_cut("學而時習之，不亦說") == len("學而時習之")
    assert documents._last_safe_cut("word " + "-" * 10_000) == len("word")
    assert documents._last_safe_cut("-" * 10_000) == 0


ALL_PATTERNS = patterns()


@pytest.mark.parametrize("name", ["chinese_classics.txt", "tinyshakespeare.txt"])
def test_gpt2_of_the_pieces_is_gpt2_of_the_whole(name, monkeypatch):
    import tiktoken

    if not (SHARED / "tiktoken-cache").is_dir() or not (SHARED / "data" / name).is_file():
        pytest.skip("no shared data")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))
    # Small pieces: many cuts.
    monkeypatch.setattr(documents, "PIECE_BYTES", 5000)
    encoding = tiktoken.get_encoding("gpt2")
    path = SHARED / "data" / name
    (document,) = Reader("strict", "").documents([origin_of(path)])
    parts = [encoding.encode_ordinary(piece) for piece in document.pieces]
    assert len(parts) > path.stat().st_size // 10_000
    assert np.concatenate(parts).tolist() == encoding.encode_ordinary(path.read_text("utf-8"))


# Text files


def test_newlines_stay_as_they_are(write):
    found, _ = read([write("a.txt", b"one\r\ntwo\rthree\n")])
    assert found == [("a.txt", "one\r\ntwo\rthree\n")]


def test_empty_files_are_no_documents(write):
    assert read([write("a.txt", ""), write("b.txt", "x")])[0] == [("b.txt", "x")]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 9))
def test_characters_across_blocks_are_whole(tmp_path_factory, text, block):
    path = tmp_path_factory.mktemp("blocks") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", block)
        assert read([origin_of(path)])[0] == [("a.txt", text)]


@pytest.mark.parametrize("place", [0, 1, 7, 8, 9, 25])
def test_bytes_that_are_not_utf8_have_a_place(write, monkeypatch, place):
    monkeypatch.setattr(documents, "PIECE_BYTES", 8)
    content = bytearray(b"0123456789" * 3)
    content[place] = 0xFF
    with pytest.raises(DataError, match=f"a.txt is not UTF-8: byte 0xff at offset {place};") as e:
        read([write("a.txt", bytes(content))])
    assert "data.errors = 'replace'" in str(e.value) and e.value.exit_code == 3


def test_a_character_cut_off_by_the_end_has_a_place(write, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 4)
    with pytest.raises(DataError, match="byte 0xe5 at offset 3"):
        read([write("a.txt", b"abc" + "學".encode()[:1])])


def test_only_stray_bytes_are_advised_to_be_replaced(write):
    """Replacing what is no UTF-8 at all would train on noise, so then the advice is to convert."""
    stray = write("stray.txt", "Straße".encode("latin-1") + b" of many words" * 9)
    with pytest.raises(DataError, match=r"convert the file .*, or set data.errors = 'replace'"):
        read([stray])
    for name, text, encoding in [
        ("a.txt", "學而時習之，不亦說乎？", "gb18030"),
        ("b.txt", "Привет, мир", "cp1251"),
        ("c.txt", "吾輩は猫である", "shift-jis"),
    ]:
        with pytest.raises(DataError, match=r"convert the file \(iconv") as caught:
            read([write(name, text.encode(encoding))])
        assert "replace" not in str(caught.value)


@settings(deadline=None)
@given(data=st.binary(max_size=30), block=st.integers(1, 7))
def test_replacements_are_counted(tmp_path_factory, data, block):
    """As Python's own decoder makes them; U+FFFD of the file itself does not count."""
    data = data + "\ufffd".encode() + data[:2]
    expected = data.decode("utf-8", "replace")
    genuine = data.count("\ufffd".encode())
    path = tmp_path_factory.mktemp("replace") / "a.txt"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", block)
        found, reader = read([origin_of(path)], errors="replace")
    assert found == [("a.txt", expected)]
    assert reader.replaced == expected.count("\ufffd") - genuine


def test_a_file_that_changes_while_it_is_read_is_noticed(write, tmp_path):
    origin = write("a.txt", "before")
    (tmp_path / "a.txt").write_text("beyond")
    with pytest.raises(DataError, match="changed while it was read") as caught:
        read([origin])
    assert origin.sha256 in str(caught.value)


# Rows

ROWS = [{"text": "first"}, {"text": ""}, {"text": "學而\nfünf \U0001f600"}]
EXPECTED = [("rows#0", "first"), ("rows#2", "學而\nfünf \U0001f600")]


def expected(name):
    return [(shown.replace("rows", name), text) for shown, text in EXPECTED]


def test_rows_of_jsonl(write):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert read([write("rows.jsonl", lines, "json")])[0] == expected("rows.jsonl")


def test_rows_of_json(write):
    assert read([write("rows.json", json.dumps(ROWS), "json")])[0] == expected("rows.json")


@pytest.fixture
def columns(tmp_path):
    """Write a table, given as rows or as a pyarrow.Table, as parquet or in a format of Arrow."""

    def write(name, table, kind="parquet"):
        path = tmp_path / name
        table = pyarrow.Table.from_pylist(table) if isinstance(table, list) else table
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=2)
        else:
            new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
            with new(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return origin_of(path, "parquet" if kind == "parquet" else "arrow")

    return write


FORMATS = ["parquet", "file", "stream"]


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_columns(columns, kind, monkeypatch):
    monkeypatch.setattr(documents, "_BATCH_ROWS", 1)
    assert read([columns("rows", ROWS, kind)])[0] == expected("rows")
    assert kind_of_file(Path(columns("rows.x", ROWS, kind).location)) == kind.replace(
        "file", "arrow"
    ).replace("stream", "arrow")


def test_a_path_that_looks_like_a_pattern_is_a_path(columns, tmp_path):
    names = ["part?.parquet", "part*.parquet", "part[1].parquet", "zip:::part.parquet", "a b#c"]
    for number, name in enumerate([*names, "part1.parquet"]):
        columns(name, [{"text": f"text {number}"}])
    for number, name in enumerate(names):
        origin = origin_of(tmp_path / name, "parquet")
        assert read([origin])[0] == [(f"{name}#0", f"text {number}")]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_table_without_rows_has_no_documents(columns, kind):
    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    full = columns("full", ROWS, kind)
    assert read([columns("empty", empty, kind), full])[0] == expected("full")


@pytest.mark.parametrize("kind", FORMATS)
def test_only_the_column_of_the_text_is_read(columns, kind):
    """A map, and a picture and a date that cannot be decoded, as data sets of the hub have them."""
    picture = {"bytes": b"no picture", "path": None}
    table = pyarrow.table(
        {
            "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
            "image": pyarrow.array([picture]),
            "date": pyarrow.array([10**7], pyarrow.date32()),  # Python's dates end before it
            "text": ["x"],
        },
        metadata={"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'},
    )
    assert read([columns("rows", table, kind)])[0] == [("rows#0", "x")]


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_that_are_damaged_are_an_error_of_the_data(columns, kind, tmp_path):
    origin = columns("rows", ROWS * 200, kind)
    content = (tmp_path / "rows").read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"PAR1 no table PAR1", content[:-7] + b"x"):
        (tmp_path / "rows").write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows cannot be read: |changed while it was read"):
            read([origin])


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_that_change_while_they_are_read_are_noticed(columns, kind):
    origin = columns("rows", ROWS, kind)
    columns("rows", [{"text": "other"}], kind)
    with pytest.raises(DataError, match="changed while it was read"):
        read([origin])


def test_a_stream_of_the_hub_reads_only_the_column_of_the_text(columns, tmp_path):
    """A folder stands for the hub: `datasets` reads both in the same way."""
    table = pyarrow.table(
        {"text": ["x", "y"], "n": [1, 2], "image": [{"bytes": b"no picture", "path": None}] * 2},
        metadata={
            "huggingface": '{"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, '
            '"n": {"dtype": "int64", "_type": "Value"}, "image": {"_type": "Image"}}}}'
        },
    )
    (tmp_path / "hub").mkdir()
    columns("hub/train-00000-of-00002.parquet", table.slice(0, 0))
    columns("hub/train-00001-of-00002.parquet", table)
    origin = Origin("hf:name", "hub", str(tmp_path / "hub"), 0, "main")
    assert read([origin])[0] == [("hf:name#0", "x"), ("hf:name#1", "y")]
    with pytest.raises(DataError, match="row 0 has no field 'body'; its fields are text"):
        read([origin], text_field="body")


# Files that go away


@pytest.mark.parametrize("kind", ["text", "json", "parquet", "arrow"])
def test_a_file_that_goes_away_before_it_is_read_is_an_error_of_the_data(write, tmp_path, kind):
    origin = write("a", "x", kind)
    (tmp_path / "a").unlink()
    with pytest.raises(DataError, match=r"/a cannot be read: No such file .*put it back whole"):
        read([origin])


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_file_that_cannot_be_read_to_its_end_is_an_error_of_the_data(write, monkeypatch, kind):
    origin = write("a", '{"text": "x"}\n' * 9, kind)

    class Torn(io.BytesIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(content, "open", lambda *_: Torn(), raising=False)
    with pytest.raises(DataError, match="/a cannot be read: Input/output error"):
        read([origin])


# Tables of text


@settings(deadline=None)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"id": st.text("ab,", max_size=3), "text": st.text(SORTS + '",')}),
        max_size=5,
    ),
    dialect=st.sampled_from(["csv", "tsv"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_rows_of_tables_are_those_that_were_written(tmp_path_factory, rows, dialect, end):
    """Written by Python's csv, read in blocks of any size; every separator inside of quotes."""
    path = tmp_path_factory.mktemp("tables") / "rows"
    with open(path, "w", newline="", encoding="utf-8") as file:
        separator = "\t" if dialect == "tsv" else ","
        writer = csv.DictWriter(
            file,
            ["id", "text"],
            delimiter=separator,
            lineterminator=end,
            quoting=csv.QUOTE_ALL,
        )
        writer.writeheader()
        writer.writerows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 7)
        found = read([origin_of(path, dialect)])[0]
    assert found == [(f"rows#{n}", row["text"]) for n, row in enumerate(rows) if row["text"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,x\n", "row 0 has no field 'text'; its fields are id, body: set data.text_"),
        ("id;text\n1;x\n", "row 0 has no field 'text'; its fields are id;text"),
        ("id,text\n1,one, two\n", "row 0 has 3 fields; expected 2, as many as its header"),
        ("id,text\n1,a\n2\n", "row 1 has no text: the field 'text' is null"),
        ('id,text\n1,"a" b\n', r"line 2, is not as tables of text are: ',' expected after"),
        ('id,text\n1,"a\n\nb\n', r"is not as tables of text are: unexpected end of data"),
        ("id,text\n1,a\rb\n", r"is not as tables of text are: new-line character seen"),
        (f"id,text\n1,{'a' * 70}\n", r"line 2, is not .*field larger than field limit"),
        (f'id,text\n1,"{"a" * 40}\n{"b" * 40}"\n', r"field larger than field limit \(64\)"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(write, monkeypatch, content, message):
    monkeypatch.setattr(documents, "_LONGEST_ROW", 64)
    with pytest.raises(DataError, match=message) as caught:
        read([write("rows.csv", content, "csv")])
    assert str(caught.value).startswith("rows.csv") and caught.value.exit_code == 3


def test_a_column_may_have_dots_and_a_table_a_byte_order_mark(write):
    origin = write("rows.csv", "\ufefftext,meta.text\nx,y\n", "csv")
    assert read([origin])[0] == [("rows.csv#0", "x")]
    assert read([origin], text_field="meta.text")[0] == [("rows.csv#0", "y")]


def test_two_columns_of_the_name_that_is_read_are_refused(write):
    origin = write("rows.csv", "text,text,other,other\nx,y,a,b\n", "csv")
    with pytest.raises(DataError, match=r"rows\.csv has 2 columns 'text'; expected one"):
        read([origin])
    assert read([write("two.csv", "text,a,a\nx,y,z\n", "csv")])[0] == [("two.csv#0", "x")]


def test_a_line_of_rows_that_memory_may_not_hold_is_named(write, monkeypatch):
    monkeypatch.setattr(documents, "_LONGEST_ROW", 64)
    monkeypatch.setattr(documents, "PIECE_BYTES", 8)
    lines = "".join(json.dumps({"text": "x" * size}) + "\n" for size in (1, 40, 80))
    with pytest.raises(DataError, match=r"rows.jsonl, line 3, is longer than 64 characters"):
        read([write("rows.jsonl", lines, "json")])
    # A list is read whole, as ever.
    rows = json.dumps([{"text": "x" * 80}])
    assert read([write("rows.json", rows, "json")])[0] == [("rows.json#0", "x" * 80)]


# Rows without text


BAD = [
    ({"text": None}, "row 1 has no text: the field 'text' is null; expected text"),
    ({"id": 1}, "row 1 has no field 'text'; its fields are id: set data.text_field"),
    ({"text": 3}, "row 1 has no text: the field 'text' is int"),
    ({"text": ["a", "b"]}, "row 1 has no text: the field 'text' is list"),
    ({"text": {"en": "a"}}, "row 1 has no text: the field 'text' is dict"),
    ({"text": True}, "the field 'text' is bool"),
    ({"text": "x\ud83d"}, "row 1 has half of a surrogate pair"),
    ({"body": {"text": "a"}}, "its fields are body, body.text"),
    ({}, "row 1 has no field 'text'"),
    (7, "row 1 is int; expected one JSON object a line"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_row_without_text_is_named_or_left_out_and_counted(write, row, message):
    rows = [{"text": "first"}, row, {"text": ""}, row, {"text": "last"}]
    origin = write("rows.jsonl", "\n".join(map(json.dumps, rows)), "json")
    with pytest.raises(DataError) as caught:
        read([origin])
    assert message in str(caught.value) and "data.bad_rows = 'skip'" in str(caught.value)
    found, reader = read([origin], bad_rows="skip")
    assert found == [("rows.jsonl#0", "first"), ("rows.jsonl#4", "last")]
    # An empty text is a text.
    assert reader.dropped["row without text"] == 2 and message in reader.first_bad


@pytest.mark.parametrize("kind", FORMATS)
def test_null_in_columns_is_left_out_too(columns, kind):
    origin = columns("rows", [{"text": None}, {"text": "x"}, {"text": None}], kind)
    with pytest.raises(DataError, match="rows, row 0 has no text: the field 'text' is null"):
        read([origin])
    found, reader = read([origin], bad_rows="skip")
    assert (found, reader.dropped["row without text"]) == ([("rows#1", "x")], 2)


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_without_the_field_name_those_that_there_are(columns, kind):
    origin = columns("rows", [{"body": "a", "id": 1}], kind)
    with pytest.raises(DataError, match="row 0 has no field 'text'; its fields are body, id"):
        read([origin])


@pytest.mark.parametrize("kind", ["json", *FORMATS])
def test_a_field_may_be_nested(write, columns, kind):
    rows = [{"meta": {"text": "x", "n": {"deep": "y"}}, "b.c": "z", "b": {"c": "other"}}]
    if kind == "json":
        origin = write("rows", json.dumps(rows), "json")
    else:
        origin = columns("rows", rows, kind)
    for field, text in [("meta.text", "x"), ("meta.n.deep", "y"), ("b.c", "z")]:
        assert read([origin], text_field=field)[0] == [("rows#0", text)]
    for field in ("meta.none", "meta.text.more", "none.text", "meta.", ".meta", "b.c.d"):
        with pytest.raises(DataError, match="has no field"):
            read([origin], text_field=field)


def test_rows_of_another_field(write):
    origin = write("rows.jsonl", '{"body": "x", "id": 1}\n', "json")
    assert read([origin], text_field="body")[0] == [("rows.jsonl#0", "x")]
    with pytest.raises(DataError, match="row 0 has no field 'text'; its fields are body, id"):
        read([origin])


@pytest.mark.parametrize("text", ["2020-01-01", "2020-01-01T00:00:00Z", "12:30:00", "1", "null"])
def test_a_text_that_looks_like_another_type_stays_as_it_is_written(write, text):
    lines = json.dumps({"text": text, "date": text}) + "\n"
    assert read([write("rows.jsonl", lines, "json")])[0] == [("rows.jsonl#0", text)]
    assert read([write("rows.json", f"[{lines}]", "json")])[0] == [("rows.json#0", text)]


def test_a_text_of_rows_holds_any_separator_but_a_newline(write, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 5)
    texts = ["one\u2028two\x85", "tab\tand\x1c", "學" * 9]
    lines = "\r\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    found = read([write("rows.jsonl", "\ufeff" + lines.replace("\\t", "\t"), "json")])[0]
    assert [text for _, text in found] == texts


def test_a_list_of_bare_texts_is_a_column(write):
    content = json.dumps(["first", "", "third"], indent=1)
    assert read([write("rows.json", content, "json")])[0] == [
        ("rows.json#0", "first"), ("rows.json#2", "third"),
    ]  # fmt: skip


def test_a_row_that_cannot_be_text_is_an_error_of_the_data(write):
    with pytest.raises(DataError, match="row 1 is int; expected one JSON object a line"):
        read([write("rows.jsonl", '{"text": "x"}\n3\n', "json")])
    with pytest.raises(DataError, match=r"row 0 has half of a surrogate pair, '\\ud83d'"):
        read([write("rows.jsonl", '{"text": "x\\ud83d"}\n', "json")])


def test_an_empty_table_has_no_documents(write):
    assert read([write("rows.jsonl", "", "json")])[0] == []


def test_rows_that_are_no_json_are_an_error_of_the_data(write):
    with pytest.raises(DataError, match=r"rows.jsonl, line 2, is not JSON: Unterminated string"):
        read([write("rows.jsonl", '{"text": "x"}\n{"te', "json")])


def test_rows_that_are_not_utf8_have_a_place_or_are_replaced(write):
    origin = write("rows.jsonl", b'{"text": "a\xffb"}\n', "json")
    with pytest.raises(DataError, match="byte 0xff at offset 11"):
        read([origin])
    found, reader = read([origin], errors="replace")
    assert found == [("rows.jsonl#0", "a\ufffdb")]
    assert reader.replaced == 1


def test_equal_texts_have_equal_hashes(write):
    origins = [
        write("a.txt", "same"),
        write("rows.jsonl", '{"text": "same"}\n{"text": "other"}\n', "json"),
    ]
    found = Reader("strict", "text").documents(origins)
    hashes = [document.sha256 for document in found if list(document.pieces)]
    assert hashes[0] == hashes[1] != hashes[2]
