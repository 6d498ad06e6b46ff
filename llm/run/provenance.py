"""What a run was made of, and its starts: the content of run.json.

schema, name, created
model     parameters, FLOPs per token, vocabulary, compute dtype
data      fingerprint, hashes of the tokenizer and the sources, counts
ancestor  of a run that begins with other parameters, or is the mean of some (then with the steps of
          its members): where they came from, their step and sha256, the sha256 of what the run
          begins with, and the ancestor of that run in turn
starts    an entry for each start: its first step, versions, devices, settings that changed, and
          the steps that a crash made it repeat, with the seconds that they had taken before
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm.config import Config, flatten
from llm.data_config import whole_weights
from llm.errors import DataError, UsageError
from llm.files import now
from llm.model.flops import flops_per_token, parameter_count
from llm.model.gpt import ModelSpec
from llm.run.directory import RunDirectory
from llm.run.setup import compute_dtype
from llm.runtime import has_bfloat16_units
from llm.text.corpus import TokenizedCorpus
from llm.text.mixture import Phase
from llm.text.sources import check_unchanged
from llm.text.tokenizer import Tokenizer, known_kinds, load_tokenizer

SCHEMA = 1


def describe_run(run: RunDirectory, spec: ModelSpec, corpus: TokenizedCorpus) -> dict[str, Any]:
    """run.json of a run that has not been started yet."""
    data = {
        "fingerprint": corpus.fingerprint,
        **_identity(corpus.tokenizer),
        "train_tokens": len(corpus.train),
        "validation_tokens": len(corpus.validation),
        **{
            name: sum(getattr(source, name) for source in corpus.sources)
            for name in ("documents", "text_bytes", "replaced")
        },
        "origins": [dataclasses.asdict(origin) for origin in corpus.origins],
    }
    return _description(run, spec, data)


def describe_import(
    run: RunDirectory, spec: ModelSpec, tokenizer: Tokenizer, source: Path
) -> dict[str, Any]:
    """run.json of a run that was not trained here; `source` is the folder its model came from."""
    counts = ("train_tokens", "validation_tokens", "documents", "text_bytes", "replaced")
    # No corpus has this fingerprint, so that training on any corpus is refused.
    data = dict.fromkeys(counts, 0) | {
        "fingerprint": "none: imported from a Hugging Face model",
        **_identity(tokenizer),
        "origins": [],
    }
    imported = {"from": str(source.resolve()), "versions": versions()}
    return _description(run, spec, data) | {"imported": imported}


def _identity(tokenizer: Tokenizer) -> dict[str, Any]:
    lossy = {"tokenizer_lossy": True} if tokenizer.lossy else {}
    return {"tokenizer_sha256": tokenizer.sha256, **lossy}


def _description(run: RunDirectory, spec: ModelSpec, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": run.name,
        "created": now(),
        "model": {
            "parameters": parameter_count(spec),
            "flops_per_token": flops_per_token(spec),
            "vocab_size": spec.vocab_size,
            "compute_dtype": spec.products_dtype,
        },
        "data": data,
        "starts": [],
    }


def describe_ancestor(
    path: Path, step: int, params_sha256: str, step_0_sha256: str
) -> dict[str, Any]:
    """The ancestor of a run that begins with the parameters of a run or a Hugging Face folder.

    Args:
      step_0_sha256: of the parameters as they begin here: others if the vocabulary or the
        positions have another size.
    """
    source = RunDirectory(path)
    record = source.read_provenance() if source.exists() else {}
    return {
        "from": str(path.resolve()),
        "name": record.get("name", source.name),
        "created": record.get("created", ""),
        "step": step,
        "params_sha256": params_sha256,
        "step_0_sha256": step_0_sha256,
        "ancestor": record.get("ancestor"),
    }


def came_from(ancestor: Mapping[str, Any]) -> str:
    """How a run came from its ancestor, for people: what follows "the run"."""
    if "members" in ancestor:
        return (
            f"is the mean of steps {', '.join(map(str, ancestor['members']))} of {ancestor['from']}"
        )
    return "was trained on from {from}, step {step} (sha256 {params_sha256})".format(**ancestor)


def check_trained(run: RunDirectory) -> None:
    """Raise a UsageError if the run was imported or averaged: it then has no steps to look at."""
    imported = run.read_provenance().get("imported")
    if imported is not None:
        came = "holds the mean of checkpoints of" if "members" in imported else "was imported from"
        raise UsageError(
            f"{run.path} {came} {imported['from']}: it was not trained here, so it has "
            "no steps; name a run that was. To train on from it, set another run.dir and "
            f"--training.init-from {run.path}"
        )


def kept_tokenizer(run: RunDirectory, config: Config) -> Tokenizer | None:
    """The tokenizer of a run, if its settings cannot make it again: a file may have changed, and
    training.init_from brings one that no corpus here gives. None for other runs."""
    made_again = config.tokenizer.kind in known_kinds() and not config.training.init_from
    return load_tokenizer(run.tokenizer) if run.exists() and not made_again else None


def check_corpus(run: RunDirectory, corpus: TokenizedCorpus) -> None:
    """Raise if the text is not what the run began with.

    Raises:
      DataError: the message names what changed.
    """
    recorded = run.read_provenance()["data"]
    if recorded["fingerprint"] == corpus.fingerprint:
        return
    check_unchanged(recorded["origins"], corpus.origins)
    raise DataError(
        f"the corpus of {run.path} was prepared in another way: expected fingerprint "
        f"{recorded['fingerprint']}, found {corpus.fingerprint}; set another run.dir"
    )


def dtype_to_train(run: RunDirectory, choice: str, device: Any) -> str:
    """training.compute_dtype with "auto" decided, which a run keeps from its beginning to its end.

    A run that began in float32 goes on so on any CPU.

    Raises:
      UsageError: the run began with another type; the message names both.
    """
    dtype, on_cpu = compute_dtype(choice, device), device.platform == "cpu"
    recorded = run.read_provenance()["model"]["compute_dtype"] if run.exists() else dtype
    if choice == "auto" and on_cpu and recorded == "float32":
        return recorded
    if recorded != dtype:
        slow = on_cpu and recorded == "bfloat16" and not has_bfloat16_units()
        slower = " (slower: this CPU has no units for it)" * slow
        raise UsageError(
            f"{run.path} holds a run with another training.compute_dtype: the run has "
            f"{recorded!r}, this command has {dtype!r} on these devices; set "
            f"--training.compute-dtype {recorded} to go on with it{slower}, or run.dir to another "
            "folder for another experiment"
        )
    return dtype


def phases_of(starts: Sequence[Mapping[str, Any]], config: Config) -> list[Phase]:
    """The batch sizes and weights of a run, in the order of its steps.

    A start that went on from an earlier step than another undoes what that one had changed.

    Args:
      starts: `from_step` and `changed` of each, as run.json has them.
      config: the settings of the last of them.
    """

    def phase(from_step: int) -> Phase:
        size, *weights = settings.values()
        return Phase(from_step, size, whole_weights(weights))

    flat, size = flatten(config), "training.batch_size"
    weights = [f"data.mixture.{one.name}.weight" for one in config.data.mixture]
    settings = {name: flat[name] for name in (size, *weights)}
    history = []
    for start in reversed(starts):
        history.append(phase(start["from_step"]))
        settings |= {name: old for name, (old, _) in start["changed"].items() if name in settings}
    phases = [phase(0)]
    for one in reversed(history):
        while phases[1:] and phases[-1].from_step >= one.from_step:
            phases.pop()
        if one[1:] != phases[-1][1:]:
            phases.append(one)
    return phases


def versions() -> dict[str, str]:
    """The versions of everything that decides a number."""
    packages = ("jax", "jaxlib", "flax", "optax", "tensorstore", "numpy", "tiktoken")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def describe_start(mesh: Mesh) -> dict[str, Any]:
    """When, where and by what a start is made: a part of its entry in run.json."""
    devices = list(mesh.devices.flat)
    return {
        "time": now(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": socket.gethostname(),
        "process": os.getpid(),
        "processes": len({device.process_index for device in devices}),
        "code_sha256": code_sha256(),
        "versions": versions(),
        "devices": {
            "count": len(devices),
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
        },
        "mesh": dict(mesh.shape),
    }


def code_sha256() -> str:
    """The sha256 of this package's source, so that two runs can tell if the code was the same."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
