"""Text of one's own, given by an iterator, and what preparation says of a corpus."""

import contextlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm.config import validate
from llm.errors import UsageError
from llm.files import whole_folder
from llm.text.archives import KEY
from llm.text.corpus import Source, TokenizedCorpus
from llm.text.shards import prepare
from llm.text.tokenizer import Tokenizer, cached_encoding, check_kind, utf8_length

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
      UsageError: the folder exists, a document is no pair of texts, a setting that cannot be used.
      DataError: as `llm.text.shards.prepare`.
    """
    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists; name a folder that is new, or remove it")
    # Absolute: a folder may be named "stdlib".
    source = {"source": str(folder.absolute()), "text_field": "text"}
    values = {"data": {**data, **source}, "tokenizer": {"kind": tokenizer}}
    settings = validate(values, "the arguments of llm.prepare")
    check_kind(settings.tokenizer.kind)
    with whole_folder(folder) as partial:
        rows = map(_row, itertools.count(), documents)
        for number, first in enumerate(rows):
            with open(partial / f"{number:09}.jsonl", "wb") as file:
                size = file.write(first)
                while size < _FILE_BYTES and (row := next(rows, b"")):
                    size += file.write(row)
    return summary(prepare(settings.data, settings.tokenizer))


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
    gpt2 = cached_encoding("gpt2")
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
