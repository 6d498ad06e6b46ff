"""Probes: a few fixed texts whose probabilities are followed as the model learns them.

They are the held-out windows of the receipt (llm/run/receipt.py) and the [[probe]] tables of the
configuration. Their numbers come from the code of `score`, on the same parameters, so that a row of
probes.jsonl is what `score` says of the checkpoint of that step.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llm.config import ProbeText
from llm.errors import NonFiniteError, UsageError
from llm.inference.score import Scorer
from llm.model.gpt import ModelSpec, Params
from llm.run.hosts import Hosts
from llm.run.probes import ProbeRow, ProbesFile
from llm.text.tokenizer import Tokenizer

# Tokens of a probe: what fits in a few lines of a page.
LONGEST = 256
# What a text is called that has no name: so many of its characters.
NAME = 24


class Probes:
    """Scores the texts at a step, once. Every process makes the same calls; one writes.

    Args:
      spec: as a model that predicts has it.
      held_out: int32 [B, T + 1] windows; B is 0 if nothing is held out.
    Raises:
      UsageError: a [[probe]] is too short or too long.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        texts: Sequence[ProbeText],
        held_out: np.ndarray,
        file: ProbesFile,
    ):
        self.file, self._last = file, -1
        self._compiling: threading.Thread | None = None
        self._scorer = Scorer(spec, {}, tokenizer, top=1)
        self._texts = [
            (f"Held-out text {number}", row.tolist()) for number, row in enumerate(held_out, 1)
        ]
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
        size = max((len(ids) for _, ids in self._texts), default=0)
        self._padded = [ids + [0] * (size - len(ids)) for _, ids in self._texts]

    def compile(self, params: Params) -> None:
        """Begin to compile the program of `score` in a thread, so that training need not wait."""
        if self._texts:
            shapes: Any = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
            )
            scorer = dataclasses.replace(self._scorer, params=shapes)

            def work() -> None:
                # `score` compiles again, and says what is wrong.
                with contextlib.suppress(Exception):
                    scorer.compile(self._padded)

            self._compiling = threading.Thread(target=work)
            self._compiling.start()

    def close(self) -> None:
        """Wait for the compiler, and close the file."""
        if self._compiling is not None:
            self._compiling.join()
        self.file.close()

    def resume(self, step: int, hosts: Hosts) -> None:
        """Go on from a step: later rows are dropped."""
        if hosts.decide("the probes", lambda: self.file.rewind(step)):
            self._last = step

    def score(self, params: Params, step: int) -> None:
        """Write a row for each text, unless this step has them. A model that has diverged gives no
        probabilities, and then no rows."""
        if not self._texts or step == self._last:
            return
        self._last = step
        if self._compiling is not None:
            self._compiling.join()
        scorer = dataclasses.replace(self._scorer, params=params)
        try:
            scored = list(scorer.score(self._padded))
        except NonFiniteError:
            return
        texts = zip(self._texts, scored, strict=True)
        self.file.write(*[ProbeRow.of(step, name, of[: len(ids)]) for (name, ids), of in texts])
