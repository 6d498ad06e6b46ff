"""python -m llm import-hf FOLDER RUN: make a run of a Hugging Face model, GPT-2, Llama or Mixtral.

FOLDER holds config.json and *.safetensors, as transformers' save_pretrained writes them. The new
run has one checkpoint, step 0, that sample, score, eval, serve, verify and export-hf open. It was
not trained here: train does not go on from it.

The tokenizer is the folder's when that is GPT-2's, or was written by export-hf; else say which one
the model was trained with (--tokenizer).
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llm.commands.flags import CommandLine, argument, parse
from llm.config import setting
from llm.errors import LLMError, UsageError
from llm.files import (
    disk_full_reason,
    free_bytes,
    is_disk_full,
    partial_folder,
    readable_bytes,
    whole_folder,
)
from llm.runtime import prepare_process

if TYPE_CHECKING:
    import numpy as np

    from llm.model.gpt import ModelSpec
    from llm.text.tokenizer import Tokenizer


class Options(CommandLine):
    """The command line."""

    folder: str = argument("FOLDER", "Hugging Face model")
    run: str = argument("RUN", "run directory to make")
    tokenizer: str | None = setting(None, '"bytes", or a tiktoken encoding such as gpt2', "NAME")
    as_json: bool = setting(False, "print what was made as one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    prepare_process()  # before JAX is imported, as it is below

    from llm.interop.hf import from_hf
    from llm.model.gpt import ModelSpec

    folder = Path(options.folder)
    config, vocab_size, params = from_hf(folder)
    tokenizer = tokenizer_of(folder, options.tokenizer, vocab_size)
    spec = ModelSpec(config, vocab_size)
    with new_folder(Path(options.run)) as partial:
        sha256 = write_run(partial, Path(options.run), folder, spec, params, tokenizer)
    report = {"run": options.run, "step": 0, "params_sha256": sha256, "tokenizer": tokenizer.name}
    if options.as_json:
        print(json.dumps(report))
    print(
        f"{options.run} holds {folder} as step 0, with the tokenizer {tokenizer.name}; sample from "
        f"it: python sample.py {options.run}",
        file=sys.stderr,
    )
    return 0


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when all is written, or goes away.

    Raises:
      UsageError: `path` is there already, its parent cannot be written, or there is no room.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} exists already; give the name of a new folder")
    try:
        partial_folder(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with whole_folder(path) as partial:
            yield partial
    except LLMError:
        raise
    except Exception as error:
        # safetensors raises a class of its own when the disk is full.
        if not is_disk_full(error):
            raise
        raise UsageError(
            f"no room for {path} ({disk_full_reason(error)}); "
            f"{readable_bytes(free_bytes(path.parent))} are free, and nothing was left there: free "
            "some space, or name a folder on another disk"
        ) from None


def tokenizer_of(folder: Path, named: str | None, vocab_size: int) -> "Tokenizer":
    """The tokenizer that a model was trained with.

    Args:
      named: what the caller says it is; None: look into the folder.
    Raises:
      UsageError: it cannot be told, or has another number of tokens than the model.
      DataError: a tiktoken encoding that is not on this machine.
    """
    from llm.text.tokenizer import FILE_NAME, ByteTokenizer, load_tokenizer, tiktoken_tokenizer

    if named == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif named in ("characters", "bpe"):
        raise UsageError(f"--tokenizer {named}: its tokens are those of a corpus, not of its name")
    elif named:
        tokenizer = tiktoken_tokenizer(named)
    elif (folder / "tokenizer" / FILE_NAME).is_file():
        tokenizer = load_tokenizer(folder / "tokenizer")
    else:
        tokenizer = _gpt2_tokenizer(folder)
    if tokenizer.vocab_size != vocab_size:
        raise UsageError(
            f"{folder} predicts {vocab_size} tokens and the tokenizer {tokenizer.name!r} has "
            f"{tokenizer.vocab_size}; give the one that it was trained with by --tokenizer"
        )
    return tokenizer


def _gpt2_tokenizer(folder: Path) -> "Tokenizer":
    """GPT-2's, when the folder's vocabulary is that."""
    from llm.text.bpe import byte_of_symbol
    from llm.text.tokenizer import tiktoken_tokenizer

    vocabulary = _read_vocabulary(folder)
    if vocabulary is None:
        raise UsageError(
            f"{folder} holds no vocabulary (vocab.json or tokenizer.json); say which tokenizer the "
            "model was trained with: --tokenizer NAME"
        )
    tokenizer = tiktoken_tokenizer("gpt2")
    symbol_of = {byte: symbol for symbol, byte in byte_of_symbol().items()}
    expected = {
        "".join(symbol_of[byte] for byte in data): id_
        for id_, data in enumerate(tokenizer.token_table)
    }
    expected.pop("")  # the end of text
    # tokenizer.json lists special tokens apart, vocab.json does not.
    if vocabulary not in (expected, expected | tokenizer.special_tokens):
        raise UsageError(
            f"the vocabulary of {folder}, of {len(vocabulary)} "
            f"{'token' if len(vocabulary) == 1 else 'tokens'}, is not GPT-2's, the one that can be "
            "imported; if it is another encoding of tiktoken, say which: --tokenizer NAME"
        )
    return tokenizer


def _read_vocabulary(folder: Path) -> dict[str, int] | None:
    """token -> id, its bytes spelled in GPT-2's printable symbols; None where there is none."""
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / name).is_file():
            try:
                read = json.loads((folder / name).read_text(encoding="utf-8"))
                return dict(read if name == "vocab.json" else read["model"]["vocab"])
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{folder / name} is not a vocabulary: {error!r}") from None
    return None


def write_run(
    partial: Path,
    path: Path,
    folder: Path,
    spec: "ModelSpec",
    params: "Mapping[str, np.ndarray]",
    tokenizer: "Tokenizer",
) -> str:
    """Everything that a run directory holds; returns the parameters' sha256."""
    from llm.config import Config, RunConfig, TokenizerConfig
    from llm.run.checkpoint import read_receipt
    from llm.run.directory import RunDirectory
    from llm.run.provenance import describe_import

    run = RunDirectory(partial)
    tokenizer.save(run.tokenizer)
    run.write_provenance(describe_import(RunDirectory(path), spec, tokenizer, folder))
    _save_checkpoint(run.checkpoints, spec, params, tokenizer)
    config = Config(
        run=RunConfig(dir=str(path)),
        model=spec.config,
        tokenizer=TokenizerConfig(kind=tokenizer.name),
    )
    run.write_config(config.resolved())
    return read_receipt(run.checkpoints / "0")["params_sha256"]


def _save_checkpoint(
    root: Path, spec: "ModelSpec", params: "Mapping[str, np.ndarray]", tokenizer: "Tokenizer"
) -> None:
    """Step 0. Its optimizer has no state: there was no training."""
    import jax
    import numpy as np

    from llm.run.checkpoint import Checkpoints
    from llm.run.receipt import LENGTH, ROWS, make_receipt, receipt_logprobs

    length = min(LENGTH, spec.config.context_length) + 1
    # Any tokens would do; no text can be encoded by every tokenizer.
    tokens_BT = np.random.default_rng(0).integers(0, spec.vocab_size, (ROWS, length), np.int32)
    placed = jax.device_put(dict(params))
    logprobs_BT = receipt_logprobs(spec, placed, tokens_BT)
    groups = {"params": placed, "training": {"step": jax.numpy.int32(0)}}
    checkpoints = Checkpoints(root, keep=1)
    checkpoints.clean()
    try:
        checkpoints.save(0, groups, lambda: make_receipt(tokens_BT, logprobs_BT, tokenizer.sha256))
        checkpoints.wait()
    finally:
        checkpoints.close()
