"""Text of one's own, given by an iterator, and what preparation says of a corpus."""

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from llm.config import DataConfig, TokenizerConfig
from llm.errors import UsageError
from llm.files import whole_folder
from llm.text.archives import KEY
from llm.text.corpus import Source, TokenizedCorpus
from llm.text.shards import prepare
from llm.text.tokenizer import Tokenizer, cached_encoding, utf8_length

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
    settings = DataConfig.model_validate({**data, "source": str(folder), "text_field": "text"})
    with whole_folder(folder) as partial, contextlib.ExitStack() as files:
        file: TextIO | None = None
        for number, document in enumerate(documents):
            if file is None or file.tell() >= _FILE_BYTES:
                path = partial / f"{number:012}.jsonl"
                file = files.enter_context(open(path, "w", encoding="utf-8"))
            file.write(_row(number, document))
    return summary(prepare(settings, TokenizerConfig(kind=tokenizer)))


def _row(number: int, document: Any) -> str:
    match document:
        case (str(name), str(text)):
            row = json.dumps({KEY: name, "text": text}, ensure_ascii=False) + "\n"
            with contextlib.suppress(UnicodeEncodeError):
                row.encode()
                return row
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
