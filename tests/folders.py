"""Models in Hugging Face folders, read whole."""

from pathlib import Path

import numpy as np

from llm.interop.hf import open_hf
from llm.model_config import ModelConfig


def from_hf(
    folder: str | Path, context_length: int | None = None
) -> tuple[ModelConfig, int, dict[str, np.ndarray]]:
    """(configuration, vocabulary size, float32 parameters), by `llm.interop.hf.open_hf`."""
    model = open_hf(folder, context_length)
    params = {name: model.part(name) for name in model.shapes}
    return model.spec.config, model.spec.vocab_size, params
