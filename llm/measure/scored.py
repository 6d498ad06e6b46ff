"""How probable documents are under a model: bits per byte of each, from the start of its text.

The documents are a sample by the hash of their text, so that the order of the corpus does not
matter, and equal corpora have the same sample.
"""

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np

from llm.inference.records import EndRecord
from llm.inference.score import Scorer
from llm.text.tokenizer import Ids

# Windows that a document is read through, at most: the first has the whole context, the second
# goes on by the scorer's stride.
WINDOWS = 2


class Sampled:
    """Keeps the starts of some documents, and scores them.

    Args:
      most: how many documents.
    """

    def __init__(self, scorer: Scorer, most: int):
        self._scorer, self._most = scorer, most
        context = scorer.spec.config.context_length
        self.longest = context + 1 + (WINDOWS - 1) * (scorer.stride or max(1, context // 2))
        self._held: list[tuple[int, int, str, Ids, bool]] = []
        self._count = 0

    def add(self, sha256: str, name: str, ids: Ids) -> None:
        """Keep a document if it is among those whose hashes are lowest.

        Args:
          ids: [T], at least `longest` of them if the document has so many.
        """
        begun = np.asarray(self._scorer.tokenizer.begun(ids), np.int32)
        self._count += 1  # decides between equal hashes, before ids are compared
        one = -int(sha256, 16), self._count, name, begun[: self.longest], len(begun) > self.longest
        keep = heapq.heappush if len(self._held) < self._most else heapq.heappushpop
        keep(self._held, one)

    def scored(self) -> Iterator[tuple[dict[str, Any], Ids]]:
        """Each document in order of the corpus: what the report says of it, and what was read.

        A document without a token that another stands before is left out.
        """
        held = sorted(self._held, key=lambda one: one[1])
        every = self._scorer.score(one[3] for one in held)
        for (*_, name, ids, cut), tokens in zip(held, every, strict=True):
            end = EndRecord.of(0, tokens, "length", counted="prompt")
            if end.bits_per_byte is not None:
                said = {"document": name, "bits_per_byte": end.bits_per_byte}
                yield said | {"tokens": end.tokens, "cut": cut}, ids
