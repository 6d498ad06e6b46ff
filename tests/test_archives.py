"""Archives as WebDataset lays them out: whose text it is, and what is refused."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest

from llm.errors import DataError
from llm.text import documents
from llm.text.content import Origin
from llm.text.documents import Reader, kind_of_file

LINK = tarfile.SYMTYPE


def archive(*members, mode="w"):
    """A tar archive of (name, content) or of (name, type)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content in (LINK, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE):
                info.type, info.linkname = content, "/etc/passwd"
                tar.addfile(info)
                continue
            data = content if isinstance(content, bytes) else content.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture
def read(tmp_path):
    """[(name, text)] of the documents of an archive, and the reader."""

    def read(data, text_field="text", bad_rows="error", name="a.tar", errors="strict"):
        path = tmp_path / name
        path.write_bytes(data)
        kind = kind_of_file(path)
        origin = Origin(name, kind, str(path), len(data), hashlib.sha256(data).hexdigest())
        reader = Reader(errors, text_field, bad_rows)
        found = [(one.name, "".join(one.pieces)) for one in reader.documents([origin])]
        assert [one.name for one in tmp_path.iterdir()] == [name]  # nothing is unpacked
        path.unlink()
        return found, reader

    return read


ABOUT = json.dumps({"text": "of the json", "meta": {"title": "a title"}})
SAMPLES = [
    ("a", tarfile.DIRTYPE),
    ("a/001.jpg", b"\xff\xd8\xff\0"),
    ("a/001.txt", "first 學"),
    ("a/001.json", ABOUT),
    ("a/002.json", "\ufeff" + ABOUT),
    ("a/._002.json", b"\0of another system"),
    ("b/001.seg.txt", "nested"),
    ("b/001.txt", "the text"),
]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("x.txz", "w:xz")]
)
def test_samples_are_documents_by_their_keys(read, name, mode):
    found, _ = read(archive(*SAMPLES, mode=mode), name=name)
    texts = {"a/001": "first 學", "a/002": "of the json", "b/001": "the text"}
    assert found == [(f"{name}#{key}", text) for key, text in texts.items()]


def test_samples_are_those_of_datasets(read, tmp_path):
    """The same keys and fields as the WebDataset builder of `datasets` gives."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    first = [("a/001.cls", "3"), ("a/001.txt", "first")]
    data = archive(*first, ("b.c/002.seg.txt", "second"), ("b.c/002.txt", "z"))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        pairs = [(m.name, tar.extractfile(m)) for m in tar.getmembers()]
        theirs = list(WebDataset._get_pipeline_from_tar("a.tar", iter(pairs)))
    for field in ("txt", "seg.txt"):
        found, _ = read(data, text_field=field, bad_rows="skip")
        expected = [(f"a.tar#{one['__key__']}", one[field]) for one in theirs if field in one]
        assert found == [
            (name, getattr(text, "decode", lambda text=text: text)()) for name, text in expected
        ]


@pytest.mark.parametrize(
    ("field", "texts"),
    [("json.text", ["of the json"] * 2), ("meta.title", ["a title"] * 2), ("seg.txt", ["nested"])],
)
def test_the_text_may_be_in_another_field(read, field, texts):
    found, reader = read(archive(*SAMPLES), text_field=field, bad_rows="skip")
    assert [text for _, text in found] == texts
    assert reader.dropped == {"row without text": 3 - len(texts)}


def test_a_sample_without_text_is_named_or_left_out(read):
    data = archive(("1.jpg", b"\xff\xd8"), ("2.txt", "two"), ("3.jpg", b"\xff\xd8"))
    with pytest.raises(DataError, match=r"row 1 has no field 'text'; its fields are __key__, jpg"):
        read(data)
    found, reader = read(data, bad_rows="skip")
    assert found == [("a.tar#2", "two")] and reader.dropped == {"row without text": 2}


def test_an_archive_of_many_members_does_not_keep_them(read, monkeypatch):
    kept = []
    following = tarfile.TarFile.next
    monkeypatch.setattr(
        tarfile.TarFile, "next", lambda tar: kept.append(len(tar.members)) or following(tar)
    )
    assert len(read(archive(*((f"{n}.txt", "x") for n in range(50))))[0]) == 50
    assert max(kept) <= 1


WHOLE = archive(*((f"{n}.txt", f"text {n} " * 99) for n in range(5)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(("../../x.txt", "x")), r"a member outside of itself, '../../x.txt'; unpack it"),
        (archive(("/etc/x.txt", "x")), r"a member outside of itself, '/etc/x.txt'"),
        (archive(("1.txt", "x"), ("2.txt", LINK)), r"a link or a device, '2.txt' to '/etc/passwd'"),
        (archive(("1.txt", "x"), ("2.txt", tarfile.LNKTYPE)), r"a link or a device, '2.txt' to"),
        (archive(("1.txt", tarfile.FIFOTYPE)), r"a link or a device, '1.txt'"),
        (
            archive(("1.jpg", b"\xff\xd8"), ("1.cls", "0")),
            r"no member .txt or .json: found members cls, jpg",
        ),
        (archive(("a", tarfile.DIRTYPE)), r"no member .txt or .json: found nothing"),
        (archive(), r"no member .txt or .json: found nothing"),
        (archive(("1.json", "{]")), r"a.tar, 1.json, is not JSON: .*; mend or remove it"),
        (
            archive(("1.txt", b"many good words " * 9 + b"\xff")),
            r"a.tar, 1.txt, is not UTF-8: byte 0xff at offset 144",
        ),
        (archive(("1.txt", "x" * 5000)), r"a member of 5000 bytes, '1.txt'; expected at most 4096"),
        (WHOLE[:700], r"a.tar is damaged or cut off behind 1 members: unexpected end of data"),
        (WHOLE[:1600], r"behind 1 members: it has no end, but truncated header"),
        (WHOLE[:1536], r"behind 1 members: it has no end, but empty header"),
        (WHOLE[:1600] + b"!" + WHOLE[1601:], r"behind 1 members: it has no end, but bad checksum"),
        (b"a" * 100 + b"\0" * 400, "is damaged or cut off behind 0 members"),
    ],
)
def test_a_bad_archive_is_refused_with_one_message(read, monkeypatch, data, message):
    monkeypatch.setattr(documents, "_LONGEST_ROW", 4096)
    with pytest.raises(DataError, match=message) as caught:
        read(data)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_a_compressed_archive_that_is_cut_off_says_how_far_it_was_read(read):
    data = gzip.compress(WHOLE)[:-20]
    with pytest.raises(DataError, match=rf"after {len(data)} of its {len(data)} bytes"):
        read(data, name="a.tar.gz")


def test_replacements_in_archives_are_counted(read):
    found, reader = read(archive(("1.txt", b"a\xffb\xef\xbf\xbd")), errors="replace")
    assert found == [("a.tar#1", "a\ufffdb\ufffd")] and reader.replaced == 1
