"""training.init_from: a model that a new run begins with, of another run or a Hugging Face folder.

The parameters, the model's settings and the tokenizer come from there, and nothing else: optimizer,
schedule and order of data are the new run's. `inherit` puts the settings into those of a command
when it is read. `Source.open` reads the parameters onto the devices when training begins: each
process what its own devices hold.

Once the run has a checkpoint, all of this is in its own directory, and the source is not needed.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llm.commands.flags import spelled
from llm.config import Config, TokenizerConfig, read_toml
from llm.errors import UsageError
from llm.model_config import ModelConfig
from llm.run.directory import RunDirectory, holds_steps, saved_steps

if TYPE_CHECKING:
    from llm.interop.hf import HFModel
    from llm.model.sharding import Mesh
    from llm.run.hosts import Hosts
    from llm.text.tokenizer import Tokenizer
    from llm.training.initial import Opened

# Settings of a model that do not change what its parameters mean.
FREE = ("dropout", "init_std", "zero_init_projections", "vocab_multiple")

_Tables = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A model to begin with.

    Attributes:
      name: as training.init_from spells it.
      path: the run or the folder.
      step: of a run; None: the newest.
      vocab_size: how many ids its model has.
      tokenizer: None if it has none.
      kind: how settings name the tokenizer.
      folder: the weights of a Hugging Face folder; None: it is a run.
    """

    name: str
    path: Path
    step: int | None
    model: ModelConfig
    vocab_size: int
    tokenizer: "Tokenizer | None"
    kind: TokenizerConfig
    folder: "HFModel | None" = None

    def open(self, mesh: "Mesh", hosts: "Hosts") -> "Opened":
        """The parameters on a mesh. Collective."""
        from llm.run.open import open_model, reading_shardings
        from llm.training.initial import Opened

        if self.folder is None:
            model = open_model(self.path, self.step, mesh=mesh, hosts=hosts)
            return Opened(self.path, model.step, model.spec, model.params)
        spec = self.folder.spec
        return Opened(self.path, 0, spec, self.folder.read(reading_shardings(mesh, spec)))

    def tokenizer_for(self, wanted: TokenizerConfig, resize: bool) -> "Tokenizer":
        """Its tokenizer, or the wanted one if that is the same or, with `resize`, adds to it.

        Raises:
          UsageError: the wanted tokenizer is another one; names the setting.
        """
        from llm.text.tokenizer import MADE_FROM_CORPUS, named_tokenizer

        chosen = self.tokenizer if wanted == self.kind else None
        if chosen is None and wanted.kind not in MADE_FROM_CORPUS:
            whole = named_tokenizer(wanted.kind, lossy=wanted.lossy).vocab_size if resize else 0
            size = max(whole, self.vocab_size)
            chosen = named_tokenizer(wanted.kind, size, lossy=wanted.lossy)
        if chosen is None or not self._fits(chosen, resize):
            raise UsageError(
                f"tokenizer.kind = {wanted.kind!r}: the model of {self.name} has {self.vocab_size} "
                f"tokens{f' of {self.kind.kind!r}' * (self.tokenizer is not None)}; name the "
                "tokenizer that it was trained with, or leave [tokenizer] out if it has its own, "
                "or name one that adds tokens to it, with training.resize_vocabulary = true"
            )
        return chosen

    def _fits(self, chosen: "Tokenizer", resize: bool) -> bool:
        """Whether each token that the model knows has its id, and others are wanted."""
        own, added = self.tokenizer, chosen.vocab_size - self.vocab_size
        if added < 0 or (added and not resize):
            return False
        if own is None or own.sha256 == chosen.sha256:
            return True
        known = set(range(self.vocab_size)).difference(*(range(*gap) for gap in own.unassigned))
        return resize and all(
            (chosen.token_bytes(id_), chosen.token_name(id_))
            == (own.token_bytes(id_), own.token_name(id_))
            for id_ in known
        )


def inherit(path: str | Path, tables: _Tables, flags: Mapping[str, Any]) -> _Tables:
    """The tables of a configuration file, with the settings that training.init_from brings.

    A run that has a checkpoint goes on with its own, also if init_from is not given again.

    Raises:
      UsageError: there is no such source, or a setting contradicts it; names each one.
    """
    parts = ("run", "training", "model", "tokenizer")
    if not all(isinstance(tables.get(part, {}), dict) for part in parts):
        return tables  # `validate` says what is wrong
    given = {part: dict(tables.get(part, {})) for part in parts}
    for flag, value in flags.items():
        part, _, key = flag.partition(".")
        given.setdefault(part, {})[key] = value
    name, folder = given["training"].get("init_from", ""), given["run"].get("dir", "")
    if not isinstance(name, str) or not isinstance(folder, str):
        return tables
    folder = os.path.expanduser(folder or default_dir(path))
    kept = _kept(folder)
    if kept["training"]["init_from"] and name in ("", kept["training"]["init_from"]):
        model, tokenizer = kept["model"], kept["tokenizer"]
        name = kept["training"]["init_from"]
    elif name:
        source = find_source(name, given["tokenizer"].get("lossy") is True)
        if os.path.exists(folder) and source.path.samefile(folder):
            raise UsageError(
                f"training.init_from = {name} is the run directory itself: leave it out to go on "
                "with that run, or set run.dir to a new folder to begin another with its weights"
            )
        model, tokenizer = source.model.model_dump(), source.kind.model_dump()
        _check_model(source, given["model"], flags)
        with contextlib.suppress(ValidationError):  # `validate` says what is wrong
            wanted = TokenizerConfig.model_validate({**tokenizer, **given["tokenizer"]})
            source.tokenizer_for(wanted, given["training"].get("resize_vocabulary") is True)
    else:
        return tables
    return tables | {
        "model": {**model, **tables.get("model", {})},
        "tokenizer": {**tokenizer, **tables.get("tokenizer", {})},
        "training": {**tables.get("training", {}), "init_from": name},
    }


def source_of(config: Config) -> Callable[[], Source] | None:
    """What a run begins with, read when it is first called; None if its weights are random."""
    name = config.training.init_from
    return functools.cache(lambda: find_source(name, config.tokenizer.lossy)) if name else None


def source_tokenizer(
    config: Config, source: Callable[[], Source] | None = None
) -> "Tokenizer | None":
    """The tokenizer of a run that begins with a source; None for other runs."""
    source = source or source_of(config)
    resize = config.training.resize_vocabulary
    return source().tokenizer_for(config.tokenizer, resize) if source else None


def default_dir(path: str | Path) -> str:
    """Where the run of a configuration file lies if run.dir does not say it."""
    return f"runs/{Path(path).stem}"


def _kept(folder: str) -> dict[str, Any]:
    """config.toml of a run that has a checkpoint; it names no source if it is none of ours."""
    with contextlib.suppress(UsageError, LookupError, TypeError, ValueError):
        run = RunDirectory(Path(folder))
        if run.config.is_file() and holds_steps(run.checkpoints):
            kept = read_toml(run.config)
            return {part: {**kept[part]} for part in ("training", "model", "tokenizer")}
    return {"training": {"init_from": ""}}


def _check_model(source: Source, given: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Raise a UsageError that lists every setting that would make it another model."""
    has = source.model.model_dump()
    wrong = {key for key in given.keys() & has.keys() - {*FREE} if given[key] != has[key]}
    length, longest = given.get("context_length"), source.model.context_length
    if type(length) is int and 0 < length < longest:  # fewer positions than it knows
        wrong.discard("context_length")
    if not wrong:
        return
    lines = []
    for key in [key for key in has if key in wrong]:
        setting = f"model.{key}"
        said = f"{spelled(setting)} " if setting in flags else f"{setting} = "
        least = "at most " if key == "context_length" else ""
        lines.append(f"  {said}{given[key]!r}: it has {least}{has[key]!r}")
    said = f"training.init_from = {source.name} brings its model, which these settings contradict:"
    raise UsageError("\n".join([said, *lines, "  leave them out"]))


def find_source(name: str, lossy: bool = False) -> Source:
    """What training.init_from names.

    Args:
      lossy: tokenizer.lossy, for a folder.
    Raises:
      UsageError: nothing is there, or no such step.
      CheckpointError: what is there is damaged.
    """
    path, step = Path(os.path.expanduser(name)), None
    if not path.exists() and (match := re.fullmatch(r"(.+)@([0-9]{1,18})", name)):
        path, step = Path(os.path.expanduser(match[1])), int(match[2])
    if (path / "config.json").exists() and not (path / "config.toml").exists():
        return _of_folder(name, path, lossy)
    if not path.exists():
        raise UsageError(
            f"training.init_from = {name}: there is no such run or folder; expected RUN, RUN@STEP "
            "or the folder of a Hugging Face model"
        )
    return _of_run(name, RunDirectory(path), step)


def _of_run(name: str, run: RunDirectory, step: int | None) -> Source:
    from llm.text.tokenizer import load_tokenizer

    config, steps = run.read_config(), saved_steps(run.checkpoints)
    if not steps or step not in (None, *steps):
        there_are = ", ".join(map(str, steps)) or "none"
        raise UsageError(
            f"training.init_from = {name}: expected a checkpoint of {run.path}; there are: "
            f"{there_are}"
        )
    tokenizer = load_tokenizer(run.tokenizer)
    size = tokenizer.vocab_size
    return Source(name, run.path, step, config.model, size, tokenizer, config.tokenizer)


def _of_folder(name: str, folder: Path, lossy: bool) -> Source:
    from llm.runtime import prepare_process

    prepare_process()  # before JAX is imported
    from llm.commands.import_hf import own_tokenizer, settings_of
    from llm.interop.hf import open_hf

    model = open_hf(folder)
    size = model.spec.vocab_size
    tokenizer = own_tokenizer(folder, size, lossy)
    kind = settings_of(tokenizer, folder) if tokenizer is not None else TokenizerConfig()
    return Source(name, folder, None, model.spec.config, size, tokenizer, kind, model)
