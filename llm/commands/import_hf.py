"""python -m llm import-hf FOLDER RUN: make a run of a Hugging Face model: GPT-2, Llama, Qwen, ...

FOLDER holds config.json and *.safetensors, as transformers' save_pretrained writes them. It can
also be a file: a ckpt.pt of nanoGPT or a .bin of llama2.c, with --tokenizer, which may also be
nanoGPT's meta.pkl. The new run has one
checkpoint, step 0, that sample, score, eval, serve, verify and export-hf open. It was not trained
here: another run trains on from it, with --training.init-from RUN.

The tokenizer is the folder's (docs/text.md), or the one that --tokenizer names.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llm.commands.flags import CommandLine, argument, parse
from llm.console import say
from llm.errors import CheckpointError, LLMError, UsageError
from llm.files import (
    disk_full_reason,
    free_bytes,
    partial_folder,
    read_json,
    readable_bytes,
    whole_folder,
    why,
)
from llm.runtime import prepare_process
from llm.section import setting

if TYPE_CHECKING:
    from llm.config import TokenizerConfig
    from llm.model.gpt import ModelSpec, Params
    from llm.text.tokenizer import Tokenizer


class Options(CommandLine):
    """The command line."""

    folder: str = argument("FOLDER", "Hugging Face model, nanoGPT's ckpt.pt or llama2.c's .bin")
    run: str = argument("RUN", "run directory to make")
    tokenizer: str | None = setting(
        None, "the tokenizer, if the folder has none: as tokenizer.kind, a name or a path", "KIND"
    )
    lossy: bool = setting(False, "take a tokenizer that loses text", flag="tokenizer.lossy")
    context_length: int | None = setting(
        None,
        "tokens that the model sees at once; as many as it can, by default",
        flag="model.context_length",
    )
    as_json: bool = setting(False, "print what was made as one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    prepare_process()  # before JAX is imported, as it is below

    from llm.config import Config
    from llm.interop.foreign import as_folder
    from llm.interop.hf import open_hf
    from llm.run.open import reading_shardings
    from llm.run.setup import setup_to_predict

    folder = Path(options.folder)
    with as_folder(folder) as readable:
        model = open_hf(readable, options.context_length)
        spec, vocab_size = model.spec, model.spec.vocab_size
        tokenizer = tokenizer_of(folder, options.tokenizer, vocab_size, options.lossy)
        mesh = setup_to_predict(Config(model=spec.config), vocab_size).mesh
        with new_folder(Path(options.run), folder) as partial:
            params = model.read(reading_shardings(mesh, spec))
            sha256, nats = write_run(partial, Path(options.run), folder, spec, params, tokenizer)
    report = {"run": options.run, "step": 0, "params_sha256": sha256, "tokenizer": tokenizer.name}
    report["random_tokens_logprob"] = nats
    if options.as_json:
        print(json.dumps(report))
    say(
        f"{options.run} holds {folder} as step 0, with the tokenizer {tokenizer.name}; checked: "
        f"random tokens have {nats:.2f} nats each, {-math.log(vocab_size):.2f} if all were as "
        f"likely; sample from it: python sample.py {options.run}"
    )
    return 0


@contextmanager
def new_folder(path: Path, source: Path) -> Iterator[Path]:
    """A folder to write into. It becomes `path` when all is written, or is removed.

    Args:
      source: the folder that is read meanwhile.
    Raises:
      UsageError: `path` exists already, it cannot be written, or there is no room; or the folder to
        write into, which is cleared first, holds `source`.
    """
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} exists already; give the name of a new folder")
    unfinished = partial_folder(path)
    if os.path.exists(unfinished) and any(
        map(unfinished.samefile, (source, *source.resolve().parents))
    ):
        raise UsageError(
            f"{path} is written in {unfinished}, where {source} lies; give another name"
        )
    try:
        with whole_folder(path) as partial:
            yield partial
    except LLMError:
        raise
    except Exception as error:
        # safetensors raises a class of its own when the disk is full.
        if reason := disk_full_reason(error):
            raise UsageError(
                f"no room for {path} ({reason}); {readable_bytes(free_bytes(path.parent))} are "
                "free, and nothing was left there: free some space, or name a folder on another "
                "disk"
            ) from None
        if isinstance(error, OSError):
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None
        raise


def tokenizer_of(
    folder: Path, named: str | None, vocab_size: int, lossy: bool = False
) -> "Tokenizer":
    """The tokenizer that a model was trained with. Ids that it does not have are no tokens.

    Args:
      named: its kind, if the caller knows it; None: look into the folder.
      lossy: take one that loses text.
    Raises:
      UsageError: the folder does not tell, or the tokenizer has another number of tokens than the
        model.
      DataError: a tiktoken encoding that is not on this machine.
    """
    from llm.text.tokenizer import MADE_FROM_CORPUS, named_tokenizer
    from llm.text.tokenizer_folder import FILES

    meta = Path(named or folder.with_name("meta.pkl"))
    if named in MADE_FROM_CORPUS:
        raise UsageError(f"--tokenizer {named}: its tokens are those of a corpus, not of its name")
    tokenizer: Tokenizer | None
    if meta.suffix == ".pkl" and (named or (folder.is_file() and meta.is_file())):
        from llm.interop.foreign import nanogpt_characters

        tokenizer = nanogpt_characters(meta)
    elif named:
        tokenizer = named_tokenizer(named, vocab_size, lossy=lossy)
    else:
        tokenizer = own_tokenizer(folder, vocab_size, lossy)
    if tokenizer is None:
        characters = ", or --tokenizer data/DATASET/meta.pkl if its tokens are characters"
        raise UsageError(
            f"{folder} holds no tokenizer ({', '.join(FILES)}); say which one the model was "
            f"trained with: --tokenizer KIND{characters * (folder.suffix == '.pt')}"
        )
    if tokenizer.vocab_size != vocab_size:
        raise UsageError(
            f"{folder} predicts {vocab_size} tokens and the tokenizer {tokenizer.name!r} has "
            f"{tokenizer.vocab_size}; give the one that it was trained with by --tokenizer"
        )
    return tokenizer


def own_tokenizer(folder: Path, vocab_size: int, lossy: bool) -> "Tokenizer | None":
    """The tokenizer of a folder, which may have more tokens than its model; None if it has none."""
    from llm.text.tokenizer import FILE_NAME, load_tokenizer
    from llm.text.tokenizer_folder import FILES, open_tokenizer

    if (folder / "tokenizer" / FILE_NAME).is_file():
        return load_tokenizer(folder / "tokenizer")
    if any((folder / name).exists() for name in FILES):
        return open_tokenizer(folder, vocab_size, lossy=lossy)
    return _gpt2_tokenizer(folder, vocab_size) if (folder / "vocab.json").exists() else None


def settings_of(tokenizer: "Tokenizer", folder: Path) -> "TokenizerConfig":
    """How settings name the tokenizer of a folder."""
    from llm.config import TokenizerConfig

    is_file = tokenizer.definition()["kind"] == "imported"
    kind = str(folder.resolve()) if is_file else tokenizer.name
    return TokenizerConfig(kind=kind, lossy=tokenizer.lossy)


def _gpt2_tokenizer(folder: Path, vocab_size: int) -> "Tokenizer":
    """GPT-2's tokenizer, if the folder's vocab.json is GPT-2's."""
    from llm.text.tokenizer import byte_of_symbol, tiktoken_tokenizer

    path = folder / "vocab.json"
    try:
        vocabulary = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a vocabulary: {why(error)}") from None
    tokenizer = tiktoken_tokenizer("gpt2", vocab_size)
    symbol_of = {byte: symbol for symbol, byte in byte_of_symbol().items()}
    expected = {
        "".join(symbol_of[byte] for byte in token): id_
        for id_, token in enumerate(tokenizer.token_table)
        if token  # the end of text has no bytes
    }
    if vocabulary not in (expected, expected | tokenizer.special_tokens):
        raise UsageError(
            f"the vocabulary of {folder}, of {len(vocabulary)} "
            f"{'token' if len(vocabulary) == 1 else 'tokens'}, is not GPT-2's, the one that needs "
            "no tokenizer.json; say which tokenizer it is: --tokenizer KIND"
        )
    return tokenizer


def write_run(
    partial: Path,
    path: Path,
    folder: Path,
    spec: "ModelSpec",
    params: "Params",
    tokenizer: "Tokenizer",
) -> tuple[str, float]:
    """Write a run directory with one checkpoint, step 0, and run the model once.

    Returns the parameters' sha256, and the mean log-probability of random tokens in nats.

    Args:
      partial: the folder to write into, which becomes `path`.
      folder: where the model came from.
    Raises:
      CheckpointError: the model's log-probabilities are not finite.
    """
    import jax
    import numpy as np

    from llm.config import Config, RunConfig
    from llm.run.checkpoint import Checkpoints, read_receipt
    from llm.run.directory import RunDirectory
    from llm.run.provenance import describe_import
    from llm.run.receipt import LENGTH, ROWS, make_receipt, receipt_logprobs

    run = RunDirectory(partial)
    tokenizer.save(run.tokenizer)
    run.write_provenance(describe_import(RunDirectory(path), spec, tokenizer, folder))
    length = min(LENGTH, spec.config.context_length) + 1
    # The tokens of the receipt are random: no text can be encoded by every tokenizer.
    tokens_BT = np.random.default_rng(0).integers(0, spec.vocab_size, (ROWS, length), np.int32)
    # There was no training, so the optimizer has no state.
    groups = jax.device_put({"params": dict(params), "training": {"step": np.int32(0)}})
    logprobs_BT = receipt_logprobs(spec, groups["params"], tokens_BT)
    if not np.isfinite(logprobs_BT).all():
        raise CheckpointError(
            f"{folder} holds a model whose log-probabilities are not finite; are its weights whole?"
        )
    checkpoints = Checkpoints(run.checkpoints, keep=1)
    checkpoints.clean()
    checkpoints.save(0, groups, lambda: make_receipt(tokens_BT, logprobs_BT, tokenizer.sha256))
    checkpoints.wait()
    config = Config(
        run=RunConfig(dir=str(path)),
        model=spec.config,
        tokenizer=settings_of(tokenizer, folder),
    )
    run.write_config(config.resolved())
    return read_receipt(run.checkpoints / "0")["params_sha256"], float(np.mean(logprobs_BT))
