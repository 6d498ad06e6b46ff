"""How long packing takes, how much memory, and how much padding is left.

    python benchmarks/packing.py [DOCUMENTS] [MEAN] [CONTEXT]

Plans windows for documents of lognormal lengths; 8,000,000 documents of 500 tokens on average, 4
billion tokens in all, and windows of 1,024 by default.
"""

import resource
import sys
import time

import numpy as np

from llm.text.packing import PackedWindows, cut_documents, pack


def main(documents: int = 8_000_000, mean: int = 500, context: int = 1024) -> None:
    """Print the figures as one line."""
    random = np.random.default_rng(0)
    lengths = np.maximum(1, random.lognormal(np.log(mean) - 0.5, 1, documents)).astype(np.int64)
    ends = np.cumsum(lengths)
    begun = time.monotonic()
    starts, size = ends - lengths, int(ends[-1])
    pieces, bounds = pack(cut_documents(starts, size, context, True), context, True)
    seconds = time.monotonic() - begun
    windows = PackedWindows(None, pieces, bounds, context, 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{size:,} tokens in {windows.per_epoch:,} windows of {context}: {seconds:.1f} s, "
        f"{peak:.2f} GB at most, {100 * windows.padding:.3f} % padding"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
