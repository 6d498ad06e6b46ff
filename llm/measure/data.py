"""Data: text to token shards, and shards to batches."""

import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from llm.config import DataConfig, TokenizerConfig
from llm.measure.machine import time_turns
from llm.text.batches import TrainingBatches
from llm.text.corpus import TokenizedCorpus
from llm.text.shards import prepare
from llm.training.loop import Job

_MIB = 2**20


def measure_data(job: Job, folder: Path, turns: int, mib: int = 8) -> dict[str, Any]:
    """The speed of the configuration's tokenizer, and of its loader.

    Args:
      folder: an empty folder, for text and shards.
      mib: size of the text, which is source code of the standard library.
    Returns:
      batches_per_second: the speed of the loader, which reads ahead.
      bytes_per_second: the speed from files of text to verified shards on disk; null for a
        tokenizer that is trained on its corpus, because the training takes longer than the rest.
    """
    tokenizer, bytes_per_second = job.config.tokenizer, None
    if tokenizer.kind != "bpe":
        texts = write_text(folder / "text", mib)
        size = sum(len(text.encode()) for text in texts)

        def turn() -> None:
            prepare_text(folder / "text", Path(tempfile.mkdtemp(dir=folder)), tokenizer)

        seconds = time_turns(turn, turns, warm_up=0)
        bytes_per_second = size / statistics.median(seconds)
    batches_per_second = loader_speed(job.batches())
    return {"batches_per_second": batches_per_second, "bytes_per_second": bytes_per_second}


def prepare_text(text: Path, cache: Path, tokenizer: TokenizerConfig) -> TokenizedCorpus:
    """A folder of text as verified shards in an empty folder, with a tenth of the text held out."""
    data = DataConfig(source=str(text), validation="tail:0.1", cache_dir=str(cache))
    return prepare(data, tokenizer)


def loader_speed(batches: TrainingBatches, seconds: float = 1.0) -> float:
    """Batches a second, from the third batch on, because reading ahead begins with the second."""
    with contextlib.closing(batches.iterate()) as reading:
        next(reading)
        next(reading)
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            next(reading)
            count += 1
    return count / passed


def write_text(folder: Path, mib: int) -> list[str]:
    """Write `mib` different files, each a MiB of Python source, and return their texts."""
    folder.mkdir()
    source = "".join(
        path.read_text("utf-8", "replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))
    )
    starts = (number * 37_123 % (len(source) - _MIB) for number in range(mib))
    texts = [source[start : start + _MIB] for start in starts]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, "utf-8")
    return texts
