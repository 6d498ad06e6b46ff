"""A sentencepiece model as a tokenizer.json, which encodes as sentencepiece itself does.

The merges of a BPE model are not in its file: they are all ways to put a piece together from two
others, the piece of the highest score first.

Source: sentencepiece_model.proto of https://github.com/google/sentencepiece
"""

import base64
import json
import re
from typing import Any

from llm.errors import needing
from llm.text.described import PREPEND, REPLACE

_UNIGRAM, _BPE = 1, 2  # kinds of models
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of pieces


def as_tokenizer_json(content: bytes) -> bytes:
    """The tokenizer.json of a model, given as the content of its file.

    Raises:
      UsageError: the package that reads the file is not installed.
      ValueError: the file is no such model, or the model is of another kind.
    """
    with needing("a sentencepiece .model", "sentencepiece protobuf"):
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"it is not a sentencepiece model ({error})") from None
    kind, rules = proto.trainer_spec.model_type, proto.normalizer_spec
    if not proto.pieces or kind not in (_UNIGRAM, _BPE) or not rules.escape_whitespaces:
        raise ValueError("it is not a sentencepiece model of kind BPE or Unigram")
    normalizers: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        normalizers += [_replace(r"\A +| +\z", ""), _replace(" {2,}", " ")]
    normalizers += [PREPEND] * rules.add_dummy_prefix + [REPLACE]
    whole = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    model = _bpe(proto) if kind == _BPE else _unigram(proto)
    pattern = "|".join(map(re.escape, sorted(whole, key=len, reverse=True)))
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    added = [
        {"id": id_, "content": piece.piece, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for id_, piece in enumerate(proto.pieces)
        if piece.type in (_UNKNOWN, _CONTROL)
    ]
    file = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": split if whole else None,
        "post_processor": None,
        "decoder": None,
        "model": model | {"byte_fallback": proto.trainer_spec.byte_fallback},
    }
    return json.dumps(file).encode()


def _replace(regex: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}


def _unigram(proto: Any) -> dict[str, Any]:
    vocabulary = [[piece.piece, piece.score] for piece in proto.pieces]
    return {"type": "Unigram", "unk_id": proto.trainer_spec.unk_id, "vocab": vocabulary}


def _bpe(proto: Any) -> dict[str, Any]:
    """Only normal pieces are merged; those that a user defined stay whole."""
    normal = {
        piece.piece: (-piece.score, id_)
        for id_, piece in enumerate(proto.pieces)
        if piece.type == _NORMAL
    }
    merges = [
        (*rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return {
        "type": "BPE",
        "vocab": {piece.piece: id_ for id_, piece in enumerate(proto.pieces)},
        "merges": [pair for *_, left, right in sorted(merges) for pair in [[left, right]]],
        "unk_token": proto.trainer_spec.unk_piece,
        "fuse_unk": True,
        "ignore_merges": any(piece.type == _USER_DEFINED for piece in proto.pieces),
    }
