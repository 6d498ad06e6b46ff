"""The arrays of a Hugging Face folder: *.safetensors, not read until an array is asked for.

Nothing in such a file is executed. Files in other formats, pickles among them, are not opened.

Source: https://github.com/huggingface/safetensors (file format).
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import CheckpointError, UsageError
from llm.files import check_regular, read_json, why, write_atomic

# What can be widened to float32, and numpy's name of it. Wider numbers are rounded to float32.
DTYPES = {"F32": "<f4", "BF16": "bfloat16", "F16": "<f2", "F64": "<f8"}
# What can be written: numpy's name -> the file's.
WRITTEN = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# More bytes of weights than this become several files.
LARGEST_FILE = 5 * 10**9


@dataclass(frozen=True)
class Tensor:
    """An array in a file. Nothing of it is in memory until it is read.

    Attributes:
      name: in the file.
      dtype: as the file spells it.
      offset: of its first byte, from the beginning of the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def check(self) -> None:
        """Raise a UsageError if these are no numbers that can be read."""
        if self.dtype not in DTYPES:
            raise UsageError(
                f"{self.path.parent}: weight {self.name} has the dtype {self.dtype}, expected one "
                f"of {', '.join(DTYPES)}; a quantised model can be saved anew in bfloat16"
            )

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A part of the array in float32; no other part is read.

        Raises:
          UsageError: as `check`.
          CheckpointError: the file cannot be read any more.
        """
        self.check()
        try:
            # Mapped for this part alone: pages that stayed mapped would count as this process's.
            held = np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)
            return np.array(held[index], np.float32)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: weight {self.name} cannot be read: {why(error)}"
            ) from None


def open_tensors(folder: Path, prefix: str, head: str) -> dict[str, Tensor]:
    """name -> array of a folder.

    Args:
      prefix: what the names begin with, all or some; it is left out here.
      head: the name of the output head, which has no prefix.
    Raises:
      UsageError: the folder holds no weights, or can be read in two ways.
      CheckpointError: a file of weights is damaged.
    """
    found: dict[str, Tensor] = {}
    for tensor in [tensor for path in _weight_files(folder) for tensor in _tensors_of(path)]:
        name = tensor.name.removeprefix(prefix)
        if name.startswith(f"{head}."):
            name = tensor.name
        other = found.setdefault(name, tensor)
        if other is not tensor:
            raise UsageError(
                f"{folder} holds two arrays for the weight {name}: {other.name} and "
                f"{tensor.name} in {tensor.path.name}; expected one"
            )
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers opens: model.safetensors, else those that an index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single) or not os.path.lexists(index):
        return [single]
    try:
        content = read_json(index)
    except (OSError, ValueError) as error:
        raise UsageError(f"{index} cannot be read: {why(error)}") from None
    named = content.get("weight_map") if isinstance(content, dict) else None
    names = [*named.values()] if isinstance(named, dict) else []
    if not names or not all(isinstance(x, str) and x == Path(x).name for x in names):
        raise UsageError(
            f"{index}: expected a weight_map from the name of each weight to a file of this folder"
        )
    return [folder / name for name in sorted(set(names))]


def _tensors_of(path: Path) -> list[Tensor]:
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        safe_open(path, framework="np")  # checks that the header is true of the file
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except FileNotFoundError:
        others = sorted(
            x.name for x in path.parent.glob("*") if x.suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        found = f" (it holds {', '.join(others[:3])})" if others else ""
        raise UsageError(
            f"{path.parent} holds no {path.name}{found}; weights in another format can be saved "
            "anew with transformers' save_pretrained"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {why(error)}") from None
    header.pop("__metadata__", None)
    return [
        Tensor(path, name, of["dtype"], tuple(of["shape"]), 8 + size + of["data_offsets"][0])
        for name, of in header.items()
    ]


def save(
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[np.ndarray],
    folder: Path,
    dtype: str = "float32",
) -> None:
    """Write files of weights that transformers opens, and an index if there are several.

    One array is in memory at a time.

    Args:
      shapes: name -> shape.
      arrays: in the order of the names.
      dtype: of the files, one of WRITTEN.
    Raises:
      UsageError: a number that the dtype cannot hold.
    """
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)

    width = np.dtype(dtype).itemsize
    files: list[dict[str, Any]] = [{}]
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + width * math.prod(shape)
        if end > LARGEST_FILE and begin:
            files.append({})
            begin, end = 0, end - begin
        span = {"dtype": WRITTEN[dtype], "shape": shape, "data_offsets": (begin, end)}
        files[-1][name] = span
    weight_map: dict[str, str] = {}
    remaining = iter(arrays)
    for n, header in enumerate(files, 1):
        part = f"-{n:05}-of-{len(files):05}" if len(files) > 1 else ""
        path = folder / f"model{part}.safetensors"
        weight_map |= dict.fromkeys(header, path.name)
        # transformers refuses a file that does not say which framework's layout it has.
        content = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        content += b" " * (-len(content) % 8)
        with path.open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            for name in header:
                file.write(narrowed(name, next(remaining), dtype).data)
    if len(files) > 1:
        size = width * sum(map(math.prod, shapes.values()))
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=2).encode())


def narrowed(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of an array in a narrower dtype.

    Raises:
      UsageError: a finite number that is infinite there.
    """
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(array).astype(dtype, copy=False)
    lost = np.isfinite(array) & ~np.isfinite(narrow.astype(np.float32, copy=False))
    if lost.any():
        raise UsageError(
            f"weight {name} has the number {array[lost][0]:.6g}, which {dtype} cannot hold; take "
            "another --dtype"
        )
    return narrow.view(np.uint8)
