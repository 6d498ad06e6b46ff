"""Text to shards, and shards to batches: how fast, beside what tiktoken does alone.

    python benchmarks/data.py [--mib 24] [--tokenizer gpt2] [--turns 3]
    python benchmarks/data.py --memory FOLDER [--gb 5] [--tokenizer bytes]

The text is the source code of the standard library, repeated to so many MiB, in files of a MiB.
Preparing is everything from these files to verified shards on disk. tiktoken's own time is
encode_ordinary_batch of the same texts, in memory, with as many threads; the two take turns. If
gigatoken is installed (the extra `fast`), a third is preparing without it.

With --memory: 3,000 files and one line of 2 GB, written below FOLDER and prepared once by a process
of its own, whose largest memory is printed. FOLDER needs room for three times the text.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=24, help="size of the text")
    parser.add_argument("--tokenizer", default="gpt2", help="a tiktoken encoding")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--memory", metavar="FOLDER", help="measure memory instead")
    parser.add_argument("--gb", type=float, default=5, help="with --memory: size of the text")
    options = parser.parse_args()
    if options.memory:
        memory(options, Path(options.memory))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(f"bytes, to shards: {result['bytes_mb_per_s']:.0f} MB/s on {result['cores']} cores")
    print(f"{options.tokenizer}, to shards: {result['bpe_mb_per_s']:.1f} MB/s")
    print(f"{options.tokenizer}, raw tiktoken / ours: {result['of_raw']:.2f} of its speed")
    print(
        f"{options.tokenizer}, without gigatoken: {result['of_raw_without_fast']:.2f} of its speed"
    )
    print(f"loader: {result['batches_per_s']:,.0f} batches of 12 x 64 a second")
    print(json.dumps(result))


LINE_BYTES, FILES = 2 * 10**9, 3000


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Prepare thousands of files and one long line in a process, and print its largest memory."""
    source = "".join(
        path.read_text("utf-8", "replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))
    )
    line = source.replace("\n", " ").encode()
    size = int((options.gb * 10**9 - LINE_BYTES) / FILES)
    (folder / "text").mkdir(parents=True)
    for number in range(FILES):
        start = number * 37_123 % (len(line) - size)
        (folder / "text" / f"{number}.txt").write_bytes(line[start : start + size])
    with open(folder / "text" / "line.txt", "wb") as file:
        for _ in range(LINE_BYTES // len(line)):
            file.write(line)
    written = sum(path.stat().st_size for path in (folder / "text").iterdir())
    config = folder / "config.toml"
    config.write_text(
        f'[data]\nsource = "{folder}/text"\ncache_dir = "{folder}/cache"\nerrors = "replace"\n'
        f'[tokenizer]\nkind = "{options.tokenizer}"\n'
    )
    command = [sys.executable, "-m", "llm", "prepare", str(config), "--json"]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{written:,} bytes in {FILES + 1} files: {written / seconds / 1e6:.0f} MB/s")
    print(f"largest memory of the process: {peak / 2**20:,.0f} MiB")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    import tiktoken

    from llm.config import TokenizerConfig
    from llm.measure.data import loader_speed, prepare_text, write_text
    from llm.text import tokenizer as tokenizers
    from llm.text.batches import RingWindows, TrainingBatches

    cores = len(os.sched_getaffinity(0))
    texts = write_text(folder / "text", options.mib)
    raw = tiktoken.get_encoding(options.tokenizer)
    raw.encode_ordinary("to build its tables")
    size = sum(len(text.encode()) for text in texts) / 1e6
    kinds: dict[str, list[float]] = {"bytes": [], options.tokenizer: [], "raw": [], "slow": []}
    fast_after = tokenizers._FAST_AFTER
    for turn in range(options.turns):
        for kind, times in kinds.items():
            start = time.perf_counter()
            if kind == "raw":
                raw.encode_ordinary_batch(texts, num_threads=cores)
            else:
                cache = folder / f"{kind}-{turn}"
                tokenizer = TokenizerConfig(kind=options.tokenizer if kind == "slow" else kind)
                tokenizers._FAST_AFTER = 2**62 if kind == "slow" else fast_after
                corpus = prepare_text(folder / "text", cache, tokenizer)
            times.append(time.perf_counter() - start)
    batches = TrainingBatches(RingWindows(corpus.train, 64), batch_size=12, seed=0)

    def of_raw(kind: str) -> float:
        return statistics.median(a / b for a, b in zip(kinds["raw"], kinds[kind], strict=True))

    return {
        "cores": cores,
        "bytes_mb_per_s": size / statistics.median(kinds["bytes"]),
        "bpe_mb_per_s": size / statistics.median(kinds[options.tokenizer]),
        "of_raw": of_raw(options.tokenizer),
        "of_raw_without_fast": of_raw("slow"),
        "batches_per_s": loader_speed(batches, seconds=2.0),
    }


if __name__ == "__main__":
    main()
