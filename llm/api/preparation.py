"""Text of one's own, given by an iterator, and what preparation says of a corpus."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm.config import validate
from llm.errors import UsageError
from llm.files import whole_folder
from llm.text.archives import KEY
from llm.text.cache import cache_root, locked
from llm.text.corpus import Source, TokenizedCorpus
from llm.text.shards import prepare
from llm.text.tokenizer import Tokenizer, cached_gpt2, check_kind, utf8_length

# A file of so much text is prepared again as a whole after a kill.
_FILE_BYTES = 2**26

# gpt2 reads so many stretches of a source, each of so many tokens.
_STRETCHES, _STRETCH_TOKENS = 16, 2**14


def prepare_documents(
    documents: Iterable[tuple[str, str]],
    folder: str | Path,
    tokenizer: str = "bytes",
    **data: Any,
) -> dict[str, Any]:
    """Write documents into a folder that `data.source` can name, and prepare them.

    The folder holds JSON lines. It is there when all documents are written, not before: a process
    that is killed while it writes them begins again. What comes after that goes on where it was.

    Args:
      documents: (name, text) of each.
      tokenizer: as `tokenizer.kind`.
      data: more settings of [data], `validation` or `cache_dir` for example.
    Returns:
      what `python -m llm prepare --json` prints.
    Raises:
      UsageError: the folder exists, or another process made it in the meantime; a document is no
        pair of texts, or none has text; a setting that cannot be used.
      DataError: as `llm.text.shards.prepare`.
    """
    # Absolute: a folder may be named "stdlib".
    folder = Path(folder).absolute()
    source = {"source": str(folder), "text_field": "text"}
    values = {"data": {**data, **source}, "tokenizer": {"kind": tokenizer}}
    settings = validate(values, "the arguments of llm.prepare")
    check_kind(settings.tokenizer.kind)
    locks = cache_root(settings.data.cache_dir) / "written"
    locks.mkdir(exist_ok=True)
    with locked(locks / hashlib.sha256(os.fsencode(folder)).hexdigest()):
        if folder.exists():
            raise UsageError(f"{folder} exists; name a folder that is new, or remove it")
        with whole_folder(folder) as partial:
            _write(partial, documents)
    return summary(prepare(settings.data, settings.tokenizer))


def _write(folder: Path, documents: Iterable[tuple[str, str]]) -> None:
    """Documents as JSON lines, in files of about _FILE_BYTES, each named by its first document."""
    has_text, size = False, _FILE_BYTES
    with contextlib.ExitStack() as files:
        for number, document in enumerate(documents):
            row = _row(number, document)
            has_text |= bool(document[1])
            if size >= _FILE_BYTES:
                files.close()
                file = files.enter_context(open(folder / f"{number:09}.jsonl", "wb"))
                size = 0
            size += file.write(row)
    if not has_text:
        raise UsageError("no document has text; expected pairs (name, text) with some")


def _row(number: int, document: Any) -> bytes:
    match document:
        case (str(name), str(text)):
            row = json.dumps({KEY: name, "text": text}, ensure_ascii=False) + "\n"
            with contextlib.suppress(UnicodeEncodeError):
                return row.encode()
            raise UsageError(f"document {number}, {name!a}, has half of a surrogate pair")
    raise UsageError(
        f"document {number} is {type(document).__name__}; expected a pair of texts, (name, text)"
    )


def summary(corpus: TokenizedCorpus) -> dict[str, Any]:
    """What a corpus holds, source by source, as JSON."""
    gpt2 = cached_gpt2()
    sources = []
    for source in corpus.sources:
        tokens = len(source.train) + len(source.validation)
        sources.append(
            {
                "name": source.name,
                "documents": source.documents,
                "tokens": tokens,
                "bytes": source.text_bytes,
                "bytes_per_token": source.text_bytes / tokens,
                "beside_gpt2": gpt2 and _beside(gpt2, source, corpus.tokenizer),
                "dropped": source.dropped,
            }
        )
    return {"tokenizer": corpus.tokenizer.name, "sources": sources}


def _beside(other: Tokenizer, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Bytes per token of two tokenizers on stretches of the training text, evenly spread."""
    split = source.train
    most = _STRETCHES * _STRETCH_TOKENS
    step = max(_STRETCH_TOKENS, len(split) // _STRETCHES)
    starts = [0] if len(split) <= most else [n * step for n in range(_STRETCHES)]
    length = min(len(split), most if starts == [0] else _STRETCH_TOKENS)
    stretches = [split.read(start, length) for start in starts]
    texts = [
        tokenizer.decode(ids, continues=start > 0)
        for start, ids in zip(starts, stretches, strict=True)
    ]
    size = sum(map(utf8_length, texts))
    return {
        "sample_bytes": size,
        "bytes_per_token": size / sum(map(len, stretches)),
        "gpt2_bytes_per_token": size / sum(len(other.encode(text)) for text in texts),
    }
