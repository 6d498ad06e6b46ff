"""Text to shards, and shards to batches: how fast, beside what tiktoken does alone.

    python benchmarks/data.py [--mib 24] [--tokenizer gpt2] [--turns 3]

The text is the source code of the standard library, repeated to so many MiB, in files of a MiB.
Preparing is everything from these files to verified shards on disk. tiktoken's own time is
encode_ordinary_batch of the same texts, in memory, with as many threads; the two take turns.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=24, help="size of the text")
    parser.add_argument("--tokenizer", default="gpt2", help="a tiktoken encoding")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(f"bytes, to shards: {result['bytes_mb_per_s']:.0f} MB/s on {result['cores']} cores")
    print(f"{options.tokenizer}, to shards: {result['bpe_mb_per_s']:.1f} MB/s")
    print(f"{options.tokenizer}, raw tiktoken / ours: {result['of_raw']:.2f} of its speed")
    print(f"loader: {result['batches_per_s']:,.0f} batches of 12 x 64 a second")
    print(json.dumps(result))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    import tiktoken

    cores = len(os.sched_getaffinity(0))
    texts = write_text(folder / "text", options.mib)
    raw = tiktoken.get_encoding(options.tokenizer)
    raw.encode_ordinary("to build its tables")
    size = options.mib * MIB / 1e6
    kinds: dict[str, list[float]] = {"bytes": [], options.tokenizer: [], "raw": []}
    for turn in range(options.turns):
        for kind, times in kinds.items():
            start = time.perf_counter()
            if kind == "raw":
                raw.encode_ordinary_batch(texts, num_threads=cores)
            else:
                corpus = prepared(kind, folder, f"{kind}-{turn}")
            times.append(time.perf_counter() - start)
    fractions = [a / b for a, b in zip(kinds["raw"], kinds[options.tokenizer], strict=True)]
    return {
        "cores": cores,
        "bytes_mb_per_s": size / statistics.median(kinds["bytes"]),
        "bpe_mb_per_s": size / statistics.median(kinds[options.tokenizer]),
        "of_raw": statistics.median(fractions),
        "batches_per_s": loader_speed(corpus.train),
    }


def write_text(folder: Path, mib: int) -> list[str]:
    """Files of a MiB of Python source, each unlike the others; their texts."""
    folder.mkdir()
    source = "".join(
        path.read_text("utf-8", "replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))
    )
    texts = []
    for number in range(mib):
        start = number * 37_123 % (len(source) - MIB)
        text = source[start : start + MIB].encode()[:MIB].decode("utf-8", "ignore")
        (folder / f"{number}.txt").write_text(text)
        texts.append(text)
    return texts


def prepared(kind: str, folder: Path, cache: str):
    from llm.config import DataConfig, TokenizerConfig
    from llm.text.shards import prepare

    data = DataConfig(
        source=[str(folder / "text")], validation="tail:0.1", cache_dir=str(folder / cache)
    )
    return prepare(data, TokenizerConfig(kind=kind))


def loader_speed(split) -> float:
    """Batches a second over two seconds, after the second, with which reading ahead begins."""
    from llm.text.batches import TrainingBatches

    batches = TrainingBatches(split, context_length=64, batch_size=12, seed=0).iterate()
    next(batches)
    next(batches)
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < 2.0:
        next(batches)
        count += 1
    batches.close()
    return count / seconds


if __name__ == "__main__":
    main()
