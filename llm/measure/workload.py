"""What is timed: the model, the data and the mesh of a configuration, as a run would have them."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from llm.config import Config
from llm.model.gpt import ModelSpec
from llm.run.setup import make_setup
from llm.text.batches import TrainingBatches, training_batches
from llm.text.shards import TokenizedCorpus, prepare
from llm.text.splits import check_window


@dataclasses.dataclass(frozen=True)
class Workload:
    """A configuration made ready. corpus: its text as tokens, from the same cache that runs use."""

    config: Config
    spec: ModelSpec
    mesh: Mesh
    corpus: TokenizedCorpus

    def batches(self) -> TrainingBatches:
        """Those of a run."""
        return training_batches(self.config, self.corpus)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.spec.config.context_length

    def tokens(self) -> np.ndarray:
        """The first batch, int32 [B, T + 1]."""
        return self.batches()[0]


def make_workload(config: Config, on_progress: Callable[[str, int, int | None], None]) -> Workload:
    """Raises:
    UsageError, DataError: as the train command would.
    """
    corpus = prepare(config.data, config.tokenizer, on_progress=on_progress)
    check_window(corpus.train, config.model.context_length)
    setup = make_setup(config, corpus.tokenizer.vocab_size)
    return Workload(config, setup.spec, setup.mesh, corpus)
