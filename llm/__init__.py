"""Pretrain GPT-style language models with JAX and Flax, and see the probability of every token.

    import llm

    lm = llm.load("runs/mine")
    lm.score("to be or not to be").logprobs
    lm.generate("def ", max_new_tokens=50, seed=1).text

`import llm` itself loads nothing heavy; `load` does. docs/python.md shows the rest.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm import errors

if TYPE_CHECKING:
    import jax

    from llm.api.language_model import LanguageModel

__all__ = ["errors", "load", "prepare"]


def load(
    run: "str | Path",
    step: int | None = None,
    *,
    devices: "int | Sequence[jax.Device] | None" = None,
) -> "LanguageModel":
    """Open the model of a run, to score texts and to continue them.

    Sets up this process as the commands do (llm/runtime.py): where JAX is not imported yet, it will
    keep compiled programs on disk.

    Args:
      run: its directory.
      step: the checkpoint; None: the newest that verifies.
      devices: what the model is spread over, as devices or as the first so many of this machine's.
        None: all of its accelerators, or one CPU.
    Raises:
      UsageError: not a run, or no such step.
      CheckpointError: no step verifies, or one is not what it says it is.
    """
    from llm.runtime import prepare_process

    prepare_process()  # before JAX is imported, as it is below
    from llm.api.language_model import LanguageModel

    return LanguageModel.load(run, step, devices)


def prepare(
    documents: Iterable[tuple[str, str]],
    folder: "str | Path",
    tokenizer: str = "bytes",
    **data: Any,
) -> dict[str, Any]:
    """Write documents of your own, (name, text), into a folder that `data.source` can name, and
    tokenise them: `llm.api.preparation.prepare_documents`.

    Returns:
      what `python -m llm prepare --json` prints: `sources`, with documents, tokens, bytes.
    """
    from llm.api.preparation import prepare_documents

    return prepare_documents(documents, folder, tokenizer, **data)
