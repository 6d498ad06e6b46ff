"""Files of weights from nanoGPT and llama2.c, written anew as a folder of Hugging Face's.

What it is not: it executes nothing. ckpt.pt is opened by torch.load with weights_only=True, a .bin
holds numbers alone, and a meta.pkl is read if it is dictionaries of numbers and characters.
nanochat's checkpoints are not read: that model mixes neighbouring embeddings and adds value
embeddings, which [model] cannot express.

Sources: https://github.com/karpathy/nanoGPT (model.py, train.py) and
https://github.com/karpathy/llama2.c (export.py, model.py).
"""

import json
import math
import pickle
import pickletools
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import CheckpointError, UsageError, needing
from llm.files import check_regular, why
from llm.interop.tensors import save
from llm.text.tokenizer import CharacterTokenizer

Arrays = dict[str, np.ndarray]

# llama2.c: the first bytes of a file with a version, as a number.
_MAGIC = 0x616B3432
# The names of a layer's arrays there -> transformers' names.
_LLAMA2C = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}

# The instructions of a pickle of dictionaries, numbers and strings: none of them calls anything.
_PLAIN = {
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "MEMOIZE",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "BINUNICODE",
    "SHORT_BINUNICODE",
}  # fmt: skip


def nanogpt_characters(path: Path) -> CharacterTokenizer:
    """The vocabulary in a meta.pkl, as nanoGPT's data/shakespeare_char/prepare.py writes it.

    Raises:
      UsageError: the file cannot be read, or is a pickle of anything else.
    """
    try:
        check_regular(path)
        content = path.read_bytes()
        for instruction, place, _ in pickletools.genops(content):
            # The unpickler makes room for as many objects as a place says.
            is_far = instruction.name == "LONG_BINPUT" and int(place or 0) > len(content)
            if is_far or instruction.name not in _PLAIN:
                raise ValueError(f"it has the instruction {instruction.name}, which is not run")
        id_to_character = pickle.loads(content)["itos"]
        characters = "".join(id_to_character[n] for n in range(len(id_to_character)))
        tokenizer = CharacterTokenizer(characters)
        if [*tokenizer.characters] != [*id_to_character.values()]:
            raise ValueError("its characters are not in the order of code points")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {why(error)}") from None
    except Exception as error:  # pickles can be broken in any way
        raise UsageError(
            f"{path} is no vocabulary of nanoGPT: expected its meta.pkl, with itos from each id to "
            f"a character, found {type(error).__name__}: {str(error)[:200]}"
        ) from None
    return tokenizer


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """A folder that holds the model at `path`: a folder itself, or one that is removed afterwards.

    Raises:
      UsageError: a file of another kind, or a model that cannot be represented.
      CheckpointError: the file is damaged.
    """
    if not path.is_file():
        yield path
        return
    try:
        check_regular(path)
        described, arrays = (_nanogpt if path.suffix == ".pt" else _llama2c)(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {why(error)}") from None
    with tempfile.TemporaryDirectory(prefix="import-hf-") as made:
        shapes = {name: array.shape for name, array in arrays.items()}
        save(shapes, arrays.values(), Path(made))
        (Path(made) / "config.json").write_text(json.dumps(described))
        del arrays
        yield Path(made)


def _nanogpt(path: Path) -> tuple[dict[str, Any], Arrays]:
    """A ckpt.pt of nanoGPT's train.py. A bias that it does not have is zero."""
    with needing("a checkpoint of nanoGPT", "torch"):
        import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if any(name.endswith("transformer.h.0.attn.c_q.weight") for name in held):
            raise UsageError(
                f"{path} is a checkpoint of nanochat, which import-hf does not read: the model "
                "mixes neighbouring embeddings and adds value embeddings, and [model] has neither"
            )
        settings, weights = held["model_args"], held["model"]
        arrays = {
            name.removeprefix("_orig_mod."): tensor.float().numpy()
            for name, tensor in weights.items()
        }
        described = {x: settings[x] for x in ("n_layer", "n_head", "n_embd", "vocab_size")}
        described |= {"n_positions": settings["block_size"], "activation_function": "gelu"}
    except UsageError:
        raise
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{path} is no checkpoint of nanoGPT that can be read without executing it: expected "
            f"model_args and model, found {type(error).__name__}: {reason}"
        ) from None
    for name in [x for x in arrays if x.endswith(".weight")]:
        if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc"):
            arrays[name] = np.ascontiguousarray(arrays[name].T)  # GPT-2 stores [in, out]
        if ".h." in name or "ln_f" in name:
            bias = name.removesuffix("weight") + "bias"
            arrays.setdefault(bias, np.zeros(arrays[name].shape[-1], np.float32))
    return {"model_type": "gpt2", **described}, arrays


def _llama2c(path: Path) -> tuple[dict[str, Any], Arrays]:
    """A .bin of llama2.c in float32: without a version, as its models are, or version 1."""
    with open(path, "rb") as file:
        header = file.read(256).ljust(256, b"\0")
    magic, version = struct.unpack_from("<Ii", header)
    if magic == _MAGIC and version != 1:
        raise UsageError(
            f"{path} is a .bin of llama2.c of version {version}, which is quantised; expected one "
            "in float32: export it with --version 0 or 1"
        )
    has_version = magic == _MAGIC
    sizes = struct.unpack_from("<7i", header, 8 if has_version else 0)
    width, hidden, layers, heads, kv_heads, vocab, context = sizes
    is_tied = bool(header[36]) if has_version else vocab > 0
    sizes = width, hidden, layers, heads, kv_heads, abs(vocab), context
    # A header that lies could ask for billions of names.
    least = 8 * layers * width**2
    if min(sizes) < 1 or width % heads or width // heads % 2 or least > path.stat().st_size:
        raise UsageError(
            f"{path} is no model that import-hf reads: expected a Hugging Face folder, nanoGPT's "
            "ckpt.pt or a .bin of llama2.c"
        )
    order = _order(sizes, is_tied, has_version)
    count = sum(math.prod(shape) for _, shape in order)
    offset = 256 if has_version else 28
    if path.stat().st_size != offset + 4 * count:
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, and its header describes {offset + 4 * count}"
        )
    numbers: np.ndarray = np.memmap(path, "<f4", "r", offset)
    arrays: Arrays = {}
    for name, shape in order:
        array, numbers = np.split(numbers, [math.prod(shape)])
        if name:
            arrays[name] = _halves(array.reshape(shape), name, width // heads)
    described = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": abs(vocab),
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": is_tied,
    }
    return described, arrays


def _order(
    sizes: tuple[int, ...], is_tied: bool, has_version: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays in the order of the file: (transformers' name or "" for none, shape)."""
    width, hidden, layers, heads, kv_heads, vocab, context = sizes
    key_width = width // heads * kv_heads
    matrices = {
        "wq": (width, width),
        "wk": (key_width, width),
        "wv": (key_width, width),
        "wo": (width, width),
        "w1": (hidden, width),
        "w2": (width, hidden),
        "w3": (hidden, width),
    }
    shapes = {"attention_norm": (width,), "ffn_norm": (width,), **matrices}

    def each(*names: str) -> list[tuple[str, tuple[int, ...]]]:
        return [
            (f"model.layers.{layer}.{_LLAMA2C[name]}.weight", shapes[name])
            for name in names
            for layer in range(layers)
        ]

    embedding = [("model.embed_tokens.weight", (vocab, width))]
    norm = [("model.norm.weight", (width,))]
    head = [] if is_tied else [("lm_head.weight", (vocab, width))]
    if has_version:
        return [*each("attention_norm", "ffn_norm"), *norm, *embedding, *each(*matrices), *head]
    turns = [("", (context, width // heads))]  # cosines and sines
    return [*embedding, *each(*_LLAMA2C), *norm, *turns, *head]


def _halves(array: np.ndarray, name: str, head_size: int) -> np.ndarray:
    """Queries and keys for a rotation of a head's halves; llama2.c rotates neighbours."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return array
    pairs = array.reshape(-1, head_size // 2, 2, array.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))
