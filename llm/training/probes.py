"""Probes: a few fixed texts whose probabilities are followed as the model learns them.

They are the held-out windows of the receipt (llm/run/receipt.py) and the [[probe]] tables of the
configuration. Their numbers come from the code of `score`, on the same parameters, so that a row of
probes.jsonl is what `score` says of the checkpoint of that step; but always in float32, at the
highest precision of the matrix units, as a receipt is. One program computes both, so that probes
cost a run no other compilation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llm.config import ProbeText
from llm.errors import NonFiniteError, UsageError
from llm.inference.score import Scorer
from llm.model.gpt import ModelSpec, Params
from llm.run.hosts import Hosts
from llm.run.probes import ProbeRow, ProbesFile
from llm.run.receipt import make_receipt
from llm.text.tokenizer import Tokenizer

# Tokens of a probe: what fits in a few lines of a page.
LONGEST = 256
# What a text is called that has no name: so many of its characters.
NAME = 24


class Probes:
    """Scores the texts at a step, once. Every process makes the same calls; one writes.

    Args:
      spec: of a model that computes in float32.
      receipt: int32 [B, T + 1], the windows of the receipt.
      held_out: whether they are held out, and are followed.
    Raises:
      UsageError: a [[probe]] is too short or too long.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        texts: Sequence[ProbeText],
        receipt: np.ndarray,
        held_out: bool,
        file: ProbesFile,
    ):
        self.file, self._last = file, -1
        self._scorer = Scorer(spec, {}, tokenizer, top=1)
        self._receipt = receipt
        self._texts = [
            (f"Held-out text {number}", row.tolist()) for number, row in enumerate(receipt, 1)
        ]
        self._skipped = 0 if held_out else len(receipt)
        longest = min(LONGEST, spec.config.context_length + 1)
        for probe in texts:
            called = f"the [[probe]] {probe.text[:NAME]!r}"
            try:
                ids = list(tokenizer.begun(tokenizer.encode(probe.text)))
            except UsageError as error:
                raise UsageError(f"{called}: {error}") from None
            if not 2 <= len(ids) <= longest:
                raise UsageError(
                    f"{called} has {len(ids):,} tokens; expected 2 to "
                    f"{longest}, so that it fits in the context and on a page"
                )
            self._texts.append((probe.name or probe.text[:NAME], ids))
        # All as long as the longest, behind which nothing is seen: one program is compiled.
        size = max(len(ids) for _, ids in self._texts)
        self._padded = [ids + [0] * (size - len(ids)) for _, ids in self._texts]

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def resume(self, step: int, hosts: Hosts) -> None:
        """Go on from a step: later rows are dropped."""
        if hosts.decide("the probes", lambda: self.file.rewind(step)):
            self._last = step

    def score(self, params: Params, step: int) -> None:
        """Write a row for each text, unless this step has them. A model that has diverged gives no
        probabilities, and then no rows."""
        texts = self._texts[self._skipped :]
        if not texts or step == self._last:
            return
        self._last = step
        scorer = dataclasses.replace(self._scorer, params=params)
        try:
            with jax.default_matmul_precision("highest"):
                scored = list(scorer.score(self._padded))[self._skipped :]
        except NonFiniteError:
            return
        rows = zip(texts, scored, strict=True)
        self.file.write(*[ProbeRow.of(step, name, of[: len(ids)]) for (name, ids), of in rows])

    def receipt(self, params: Params) -> Callable[[], dict[str, Any]]:
        """What makes the receipt of these parameters: dispatched here, waited for by the function.

        The function raises:
          NonFiniteError: the model has diverged.
        """
        with jax.default_matmul_precision("highest"):
            logprobs = dataclasses.replace(self._scorer, params=params).logprobs(self._padded)
        B, T = self._receipt[:, 1:].shape
        sha256 = self._scorer.tokenizer.sha256
        return lambda: make_receipt(self._receipt, np.asarray(logprobs)[:B, :T], sha256)
