"""Looking for duplicates: MB/s on one core, beside datatrove, and the memory that it takes.

    python benchmarks/duplicates.py [--mib 32] [--turns 3]     beside datatrove, if it is installed
    python benchmarks/duplicates.py --mib 5000 --turns 0       a large corpus on disk

The text is drawn from a vocabulary of 50,000 words with Zipf's frequencies, in documents of some
500 words; one in ten repeats an earlier document with some words changed, one in fifty exactly.
datatrove runs its signature stage (14 x 8, runs of five words) with words split at spaces, which
is faster than its own tokenizers. The large corpus is jsonl in files of 64 MiB; a process of its
own sketches it and finds the duplicates, and says its peak memory.
"""

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_FILE = 2**26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=32, help="size of the text")
    parser.add_argument("--turns", type=int, default=3, help="turns beside datatrove; 0: from disk")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        from_disk(Path(options.child[0]), options.child[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.turns:
            beside_datatrove(options, Path(folder))
        else:
            large(options, Path(folder))


def texts(size: int) -> Iterator[str]:
    """Documents of about `size` bytes in all."""
    draw = np.random.default_rng(1)
    letters = np.array([*"etaoinshrdlucmfwypvbgkqjxz"])
    lengths = draw.integers(2, 11, 50_000)
    words = np.array(["".join(letters[draw.integers(0, 26, length)]) for length in lengths])
    weights = 1 / np.arange(10, 50_010)
    bounds = np.cumsum(weights / weights.sum())
    kept: list[np.ndarray] = []
    done = 0
    while done < size:
        if kept and (kind := draw.random()) < 0.12:
            document = kept[draw.integers(len(kept))].copy()
            if kind > 0.02:
                places = draw.integers(0, len(document), draw.integers(1, 20))
                document[places] = draw.integers(0, 50_000, len(places))
        else:
            count = int(draw.integers(200, 800))
            document = np.minimum(np.searchsorted(bounds, draw.random(count)), 49_999)
            kept = [*kept[-999:], document]
        text = " ".join(words[document].tolist())
        done += len(text)
        yield text


def beside_datatrove(options: argparse.Namespace, folder: Path) -> None:
    from llm.quality.duplicates import Sketch, find_duplicates

    corpus = [*texts(options.mib * 2**20)]
    size = sum(map(len, corpus)) / 1e6
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in corpus]
    turns: dict[str, list[float]] = {"sketch": [], "find": [], "datatrove": []}
    for turn in range(options.turns):
        own = folder / str(turn)
        own.mkdir()

        def sketch(own: Path = own) -> None:
            with Sketch(own, near=True) as sketch:
                for text, sha256 in zip(corpus, hashes, strict=True):
                    sketch.add(text, sha256)

        turns["sketch"].append(timed(sketch))
        turns["find"].append(timed(lambda own=own: find_duplicates([own], near=True)))
        if peer := datatrove(folder / f"peer-{turn}", corpus):
            turns["datatrove"].append(timed(peer))
    result = {name: size / statistics.median(of) for name, of in turns.items() if of}
    for name, speed in result.items():
        print(f"{name}: {speed:.1f} MB/s")
    print(json.dumps({"mb": size, "documents": len(corpus), **result}))


def datatrove(folder: Path, corpus: list[str]) -> Callable[[], object] | None:
    """Its signature stage on the same documents."""
    try:
        from datatrove.data import Document
        from datatrove.pipeline.dedup import minhash
    except ImportError:
        return None

    class Words:
        word_tokenize = staticmethod(str.split)

    minhash.load_word_tokenizer = lambda _language: Words()
    config = minhash.MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    stage = minhash.MinhashDedupSignature(str(folder), config)
    hashed = stage._hash_func  # given text, xxhash 4 raises
    stage._hash_func = lambda text: hashed(text.encode())
    return lambda: stage.run(Document(text=text, id=str(n)) for n, text in enumerate(corpus))


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def large(options: argparse.Namespace, folder: Path) -> None:
    written, file = 0, None
    for text in texts(options.mib * 2**20):
        if file is None or file.tell() > _FILE:
            file = open(folder / f"{written:05d}.jsonl", "w")  # noqa: SIM115
            written += 1
        file.write(json.dumps({"text": text}) + "\n")
    assert file is not None
    file.close()
    start = time.perf_counter()
    for path in folder.glob("*.jsonl"):
        with open(path, "rb") as opened:
            hashlib.file_digest(opened, "sha256")
    size = sum(path.stat().st_size for path in folder.glob("*.jsonl")) / 1e6
    print(f"reading and sha256 alone: {size / (time.perf_counter() - start):.0f} MB/s", flush=True)
    for kind in ("exact", "near"):
        subprocess.run([sys.executable, __file__, "--child", str(folder), kind], check=True)


def from_disk(folder: Path, kind: str) -> None:
    """find_copies of every file, each a part, as `prepare` calls it."""
    from llm.data_config import FilterConfig
    from llm.text.documents import Origin, Reader
    from llm.text.filtering import find_copies

    paths = sorted(folder.glob("*.jsonl"))
    contents = []
    for path in paths:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        origin = Origin(path.name, "json", str(path), path.stat().st_size, sha256)
        contents.append((path.name, Reader("strict", "text").documents([origin])))
    size = sum(path.stat().st_size for path in paths) / 1e6
    start = time.perf_counter()
    copies = find_copies(folder / kind, FilterConfig(deduplicate=kind), contents, lambda *_: None)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = sum(map(len, copies))
    print(
        f"{kind}: {size:.0f} MB in {seconds:.0f} s, {size / seconds:.1f} MB/s; {found:,} copies; "
        f"peak {peak:.2f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
