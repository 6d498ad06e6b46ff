"""Tokens go to disk and come back, and nothing that changed there is trusted."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from llm.errors import DataError
from llm.text.stream import StreamManifest, StreamWriter, TokenStream, smallest_dtype

VOCAB = 300
DOCUMENTS = {"one": [1, 2, 3], "zwei 學": list(range(200, 211)), "three#7": [299], "four": [5, 0]}
ALL = [id_ for ids in DOCUMENTS.values() for id_ in ids]


def write(folder, documents=None, dtype="uint16") -> StreamManifest:
    writer = StreamWriter(folder, "train", dtype)
    for name, ids in (DOCUMENTS if documents is None else documents).items():
        writer.begin_document(name)
        # In two parts, as documents of many pieces come.
        writer.add(np.array(ids[:1], np.int32))
        writer.add(np.array(ids[1:], np.int32))
    return writer.finish()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_tokens_come_back(tmp_path, dtype):
    stream = TokenStream(tmp_path, write(tmp_path, dtype=dtype), VOCAB, hashed=True)
    assert len(stream) == len(ALL)
    assert stream.tokens().tolist() == ALL
    lengths = [len(ids) for ids in DOCUMENTS.values()]
    assert np.diff(stream.places()[:, 0]).tolist() == lengths


def test_shards_are_plain_little_endian_numbers(tmp_path):
    write(tmp_path)
    stored = np.frombuffer((tmp_path / "train.bin").read_bytes(), "<u2")
    assert stored.tolist() == ALL


def test_the_manifest_counts(tmp_path):
    manifest = write(tmp_path)
    assert (manifest.tokens, manifest.documents) == (len(ALL), 4)
    assert manifest.largest_id == 299
    assert manifest.shard.bytes == 2 * len(ALL)


def test_the_manifest_survives_json(tmp_path):
    import json

    manifest = write(tmp_path)
    stored = json.loads(json.dumps(asdict(manifest)))
    assert TypeAdapter(StreamManifest).validate_python(stored) == manifest


def test_ids_beyond_16_bits_are_whole(tmp_path):
    ids = [0, 65535, 65536, 199_999]
    manifest = write(tmp_path, {"a": ids}, dtype=smallest_dtype(200_000))
    assert TokenStream(tmp_path, manifest, 200_000, hashed=True).tokens().tolist() == ids


def test_the_smallest_type_holds_the_largest_id():
    assert [smallest_dtype(v) for v in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=9), min_size=1, max_size=6))
def test_each_token_knows_its_document(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("stream")
    named = {f"document {n}": ids for n, ids in enumerate(documents)}
    stream = TokenStream(folder, write(folder, named), VOCAB, hashed=True)
    places = [(name, n) for name, ids in named.items() for n in range(len(ids))]
    assert [stream.document_at(n) for n in range(len(stream))] == places


def test_an_empty_stream_opens(tmp_path):
    stream = TokenStream(tmp_path, write(tmp_path, {}), VOCAB, hashed=True)
    assert len(stream) == 0


FILES = ["train.bin", "train.documents", "train.names"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("hashed", [True, False])
def test_a_missing_file_is_named(tmp_path, name, hashed):
    manifest = write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing") as caught:
        TokenStream(tmp_path, manifest, VOCAB, hashed=hashed)
    assert f"delete {tmp_path}" in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("hashed", [True, False])
def test_a_truncated_file_is_named_with_both_sizes(tmp_path, name, hashed):
    manifest = write(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{name}: expected {len(content)} bytes, found"):
        TokenStream(tmp_path, manifest, VOCAB, hashed=hashed)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(tmp_path, name):
    manifest = write(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[0] ^= 1
    (tmp_path / name).write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"{name} has changed: expected sha256"):
        TokenStream(tmp_path, manifest, VOCAB, hashed=True)
    with pytest.raises(DataError, match=f"{name} has changed: expected sha256"):
        TokenStream(tmp_path, manifest, VOCAB, hashed=False).verify()


def test_a_vocabulary_too_small_for_the_ids_is_refused(tmp_path):
    manifest = write(tmp_path)
    with pytest.raises(DataError, match="token id 299; expected ids below the vocabulary's 299"):
        TokenStream(tmp_path, manifest, 299, hashed=False)
