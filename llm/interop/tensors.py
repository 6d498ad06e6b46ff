"""The arrays of a Hugging Face folder: *.safetensors, not read until an array is asked for.

Nothing in such a file is executed. Files in other formats, pickles among them, are not opened.

Source: https://github.com/huggingface/safetensors (file format).
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import CheckpointError, UsageError
from llm.files import check_regular, read_json, why

# What can be widened to float32. Wider numbers are rounded to it.
DTYPES = ("F32", "BF16", "F16", "F64")


class Tensors:
    """name -> array of a folder. An array is read from its file by `take`, which forgets it.

    Raises:
      UsageError: the folder holds no weights, or can be read in two ways.
      CheckpointError: a file of weights is damaged.
    """

    def __init__(self, folder: Path, prefix: str, head: str):
        """
        Args:
          prefix: what the names begin with, all or some; it is left out here.
          head: the name of the output head, which has no prefix.
        """
        self.folder = folder
        self._files: dict[str, tuple[str, Any]] = {}
        for path in _weight_files(folder):
            opened = _open(path)
            for full_name in opened.keys():  # noqa: SIM118  (not a mapping)
                name = full_name.removeprefix(prefix)
                if name.startswith(f"{head}."):
                    name = full_name
                if name in self._files:
                    raise UsageError(
                        f"{folder} holds two arrays for the weight {name}: "
                        f"{self._files[name][0]} and {full_name} in {path.name}; expected one"
                    )
                self._files[name] = full_name, opened

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, name: str) -> np.ndarray:
        """The array in float32.

        Raises:
          CheckpointError: there is none, or it does not hold numbers that can be read.
        """
        from safetensors import SafetensorError

        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no weight {name}, which config.json needs")
        full_name, opened = self._files[name]
        dtype = opened.get_slice(full_name).get_dtype()
        if dtype not in DTYPES:
            raise UsageError(
                f"{self.folder}: weight {name} has the dtype {dtype}, expected one of "
                f"{', '.join(DTYPES)}; a quantised model can be saved anew in bfloat16"
            )
        try:
            return opened.get_tensor(full_name).astype(np.float32, copy=False)
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(f"{self.folder}: weight {name} cannot be read: {error}") from None

    def take(self, name: str) -> np.ndarray:
        """As `read`; the name is then no longer here."""
        array = self.read(name)
        del self._files[name]
        return array

    def rename(self, name: str, new: str) -> None:
        self._files[new] = self._files.pop(name)


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


def _open(path: Path) -> Any:
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        return safe_open(path, framework="np")
    except FileNotFoundError:
        others = sorted(
            x.name for x in path.parent.glob("*") if x.suffix in (".bin", ".pt", ".pth", ".gguf")
        )
        found = f" (it holds {', '.join(others[:3])})" if others else ""
        raise UsageError(
            f"{path.parent} holds no {path.name}{found}; weights in another format can be saved "
            "anew with transformers' save_pretrained"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {why(error)}") from None


def save(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write a file of weights that transformers opens."""
    from safetensors.numpy import save_file

    # transformers refuses a file that does not say which framework's layout it has.
    save_file(dict(arrays), path, metadata={"format": "pt"})
