"""What is timed: the model, the data and the mesh of a configuration, as a run would have them."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from llm.config import Config
from llm.model.gpt import ModelSpec
from llm.model.kernels import choose_attention
from llm.model.sharding import check_sizes, make_mesh
from llm.run.open import compute_dtype
from llm.text.batches import TrainingBatches, check_windows, training_batches
from llm.text.shards import TokenizedCorpus, prepare


@dataclasses.dataclass(frozen=True)
class Workload:
    """A configuration made ready. corpus: its text as tokens, from the same cache that runs use."""

    config: Config
    spec: ModelSpec
    mesh: Mesh
    corpus: TokenizedCorpus

    def batches(self) -> TrainingBatches:
        """Of full size from the start, whatever warms up."""
        training = {"batch_warmup_steps": 0, "window_warmup_steps": 0}
        config = self.config.model_copy(
            update={"training": self.config.training.model_copy(update=training)}
        )
        return training_batches(config, self.corpus)

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
    mesh = make_mesh(config.mesh)
    corpus = prepare(config.data, config.tokenizer, on_progress=on_progress)
    check_windows(config, corpus)
    dtype = compute_dtype(config.training.compute_dtype)
    training = config.training
    attention = choose_attention(training.attention, config.model, dtype, mesh)
    spec = ModelSpec(config.model, corpus.tokenizer.vocab_size, dtype, attention)
    check_sizes(mesh, config, spec.padded_vocab_size)
    return Workload(config, spec, mesh, corpus)
