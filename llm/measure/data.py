"""Data: text to token shards, and shards to batches."""

import contextlib
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

from llm.config import DataConfig, TokenizerConfig
from llm.measure.machine import time_turns
from llm.measure.workload import Workload
from llm.text.batches import TrainingBatches
from llm.text.shards import TokenizedCorpus, prepare

_MIB = 2**20


def measure_data(workload: Workload, folder: Path, turns: int, mib: int = 8) -> dict[str, Any]:
    """The speed of the configuration's tokenizer, and of its loader.

    Args:
      folder: an empty one, for text and shards.
      mib: size of the text, which is source code of the standard library.
    Returns:
      bytes_per_second: text, from files to verified shards on disk; null for a tokenizer that is
        trained on its corpus, because the training takes longer than anything else.
      batches_per_second: batches of the loader, which reads ahead.
    """
    batches = workload.batches()
    result: dict[str, Any] = {"batches_per_second": loader_speed(batches), "bytes_per_second": None}
    if workload.config.tokenizer.kind != "bpe":
        texts = write_text(folder / "text", mib)
        size = sum(len(text.encode()) for text in texts)
        caches = (folder / f"cache-{number}" for number in itertools.count())

        def turn() -> None:
            prepare_text(folder / "text", next(caches), workload.config.tokenizer)

        seconds = time_turns(turn, turns, warm_up=0)
        result["bytes_per_second"] = size / statistics.median(seconds)
    return result


def prepare_text(text: Path, cache: Path, tokenizer: TokenizerConfig) -> TokenizedCorpus:
    """A folder of text as verified shards in an empty folder, a tenth of it held out."""
    data = DataConfig(source=str(text), validation="tail:0.1", cache_dir=str(cache))
    return prepare(data, tokenizer)


def loader_speed(batches: TrainingBatches, seconds: float = 1.0) -> float:
    """Batches per second, from the third batch on: reading ahead begins with the second."""
    with contextlib.closing(batches.iterate()) as reading:
        next(reading)
        next(reading)
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds:
            next(reading)
            count += 1
    return count / passed


def write_text(folder: Path, mib: int) -> list[str]:
    """Write `mib` files of a MiB of Python source, all different, and return their texts."""
    folder.mkdir()
    source = "".join(
        path.read_text("utf-8", "replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))
    )
    texts = []
    for number in range(mib):
        start = number * 37_123 % (len(source) - _MIB)
        texts.append(source[start : start + _MIB])
        (folder / f"{number}.txt").write_text(texts[-1], "utf-8")
    return texts
