"""Every setting of a run: its type, default and meaning, and how a file and flags become a Config.

A TOML file overrides the defaults here, and flags override the file (llm/commands/flags.py):

    python train.py configs/quickstart.toml --training.steps 500

A configuration is data: reading it executes no code of its author. Defaults exist here and nowhere
else. This file imports no JAX, so `--help` is quick.
"""

import reprlib
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import tomli_w
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat

from llm.data_config import DataConfig, MixtureSource
from llm.errors import UsageError
from llm.model_config import ModelConfig
from llm.names import nearest
from llm.section import (
    AxisSize,
    Count,
    DropoutRate,
    Folder,
    Positive,
    Probability,
    Seed,
    Settings,
    TopK,
    as_tuple,
    setting,
)


class RunConfig(Settings):
    """Where the run lives and what makes it repeatable."""

    dir: Folder = setting("", "run directory; empty: runs/<name of the configuration file>")
    seed: Seed = setting(1337, "seed of initialisation, data order and dropout; below 2^32")
    allow_change: bool = setting(False, "resume with another learning rate, schedule or batch size")
    deterministic: bool = setting(False, "ask the backend to repeat bit for bit; step 1 checks it")


class TokenizerConfig(Settings):
    """How text becomes token ids."""

    kind: str = setting(
        "bytes",
        "'bytes' (256 and an end of text), 'characters' (of the corpus), 'bpe' (trained on the "
        "corpus), the name of a tiktoken encoding: gpt2, cl100k_base, o200k_base, or the path of a "
        "tokenizer.json, a sentencepiece .model or a folder of Hugging Face",
    )
    vocab_size: Annotated[int, Field(gt=0, le=2**22)] = setting(
        4096, "tokens of a 'bpe' vocabulary, up to 2^22; others have their own"
    )
    lossy: bool = setting(False, "take a tokenizer that loses text; its reports are of what stays")


class OptimizerConfig(Settings):
    """The update rule and the learning rate over time."""

    kind: Literal["adamw", "muon"] = setting(
        "adamw", "muon is for hidden matrices, with adamw for everything else"
    )
    learning_rate: PositiveFloat = setting(6e-4, "peak learning rate of adamw")
    min_learning_rate: NonNegativeFloat = setting(6e-5, "learning rate at the end of decay")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine", "decay after warmup: to decay_steps, never, or in the last of them (wsd)"
    )
    warmup_steps: Count = setting(100, "steps from zero to the peak")
    decay_steps: Count = setting(
        0, "steps until the decay ends, after which the rate is held; 0: training.steps"
    )
    decay_fraction: Probability = setting(
        0.2, "wsd: last fraction of these steps, in which the rate decays"
    )
    weight_decay: NonNegativeFloat = setting(0.1, "decoupled; on matrices only")
    beta1: DropoutRate = setting(0.9, "adamw: decay of the first moment")
    beta2: DropoutRate = setting(0.95, "adamw: decay of the second moment")
    epsilon: PositiveFloat = setting(1e-8, "adamw: added to the root of the second moment")
    grad_clip: NonNegativeFloat = setting(1.0, "clip gradients to this global norm; 0: off")
    muon_learning_rate: PositiveFloat = setting(0.02, "muon: peak learning rate of hidden matrices")
    muon_momentum: DropoutRate = setting(0.95, "muon: Nesterov momentum")
    muon_momentum_warmup_steps: Count = setting(
        0, "muon: steps in which the momentum rises to muon_momentum, from 0.1 below it"
    )
    muon_iterations: Annotated[Positive, Field(le=100)] = setting(
        5, "muon: Newton-Schulz iterations; fewer cost less"
    )


class TrainingConfig(Settings):
    """The step and the loop around it."""

    steps: Positive = setting(5000, "optimizer steps in the whole run")
    batch_size: Positive = setting(64, "sequences per step, over all devices")
    micro_batch_size: Count = setting(
        0,
        "sequences per forward pass, over all devices; fewer accumulate gradients; 0: batch_size",
    )
    eval_every: Count = setting(250, "steps between evaluations; 0: only at the end")
    eval_batch_size: Count = setting(
        0, "sequences per evaluation batch; 0: micro_batch_size, or batch_size without one"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "of matrix products; auto: bfloat16 where the devices have units for it, else float32. On "
        "a CPU only the products of training use it",
    )
    attention: Literal["auto", "plain", "cudnn", "splash"] = setting(
        "auto",
        "what computes attention: plain, NVIDIA's cudnn, the TPU's splash; auto: the fastest that "
        "the devices, the sizes and compute_dtype allow",
    )
    label_smoothing: DropoutRate = setting(0.0, "probability spread evenly over the vocabulary")
    z_loss: NonNegativeFloat = setting(0.0, "weight of log(Z)^2, which keeps logits near zero")
    load_balancing_loss: NonNegativeFloat = setting(
        0.01, "experts: weight of the loss that is smallest if all are chosen equally often"
    )
    router_z_loss: NonNegativeFloat = setting(0.001, "experts: weight of the router's log(Z)^2")
    loss_chunk: Count = setting(
        0, "positions whose logits the loss holds at once; 0: chosen by vocabulary and batch"
    )
    scan_layers: bool = setting(
        False,
        "compile one block and loop over the layers: the time to compile does not grow with their "
        "number, and checkpoints are the same",
    )
    remat: Literal["none", "dots", "block", "offload"] = setting(
        "none",
        "what a block keeps for its backward pass: everything, its matrix products, its input, or "
        "its input in the host's memory; less memory for more computation",
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop", "if the loss or a gradient is not finite: stop (exit 5), or skip that update"
    )
    spike_zscore: NonNegativeFloat = setting(
        0.0, "skip an update whose loss is this many standard deviations above recent ones; 0: off"
    )
    max_skipped: Positive = setting(10, "skipped updates in a row after which to stop")
    init_from: Folder = setting(
        "",
        "begin with the parameters and the tokenizer of another run (RUN, or RUN@STEP) or of a "
        "Hugging Face folder; the model's settings are those it has there",
    )
    resize_vocabulary: bool = setting(
        False,
        "with init_from: take the tokenizer that tokenizer.kind names, which may add tokens; their "
        "rows begin as the mean of the others",
    )

    @property
    def evaluation_size(self) -> int:
        """Sequences at once in an evaluation."""
        return self.eval_batch_size or self.micro_batch_size or self.batch_size

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    @pydantic.model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.batch_size = {self.batch_size} is not divisible by "
                f"training.micro_batch_size = {self.micro_batch_size}"
            )
        return self


class MeshConfig(Settings):
    """The number of devices along each axis; -1 takes the rest, on at most one axis."""

    data: AxisSize = setting(-1, "copies of the model, each with its share of the batch")
    fsdp: AxisSize = setting(1, "shares of weights and optimizer, gathered as they are used")
    expert: AxisSize = setting(1, "shares of the experts; outside the experts, of the batch")
    tensor: AxisSize = setting(1, "shares of heads, MLP columns and vocabulary")
    context: AxisSize = setting(1, "shares of the sequence")

    @pydantic.model_validator(mode="after")
    def _check_axes(self) -> Self:
        sizes = list(self.model_dump().values())
        if sizes.count(-1) > 1 or 0 in sizes:
            found = " ".join(f"{axis}={size}" for axis, size in self)
            raise ValueError(
                f"mesh sizes are positive, with -1 ('the rest') on at most one axis; found {found}"
            )
        return self


class CheckpointConfig(Settings):
    """When the state is saved, and which saves are kept."""

    every: Count = setting(250, "steps between checkpoints; 0: only at the end")
    keep: Positive = setting(2, "newest checkpoints to keep")
    keep_best: bool = setting(True, "also save and keep the step with the lowest validation loss")


class LoggingConfig(Settings):
    """Where progress is written besides RUN/metrics.jsonl."""

    every: Positive = setting(1, "steps between lines of metrics.jsonl")
    progress: Literal["auto", "bar", "plain", "none"] = setting(
        "auto", "progress on the terminal; auto: a bar on a terminal, plain lines elsewhere"
    )
    page: Annotated[int, Field(ge=0, le=65535)] = setting(
        0, "port at which this machine's browsers see RUN/report.html grow; 0: none"
    )
    probe_every: Count = setting(
        0,
        "steps between scorings of the probes, which are held-out text and [[probe]] tables of "
        "the file; 0: at each evaluation",
    )
    tensorboard: bool = setting(False, "also write RUN/tensorboard (needs the 'tensorboard' extra)")
    wandb_project: str = setting("", "also log to this W&B project (needs the 'wandb' extra)")


class ProbeText(Settings):
    """A text whose probabilities are followed as the model learns it: a table [[probe]]."""

    text: str = setting(..., "a text of at least two tokens, at most 256")
    name: str = setting("", "what the report calls it; empty: its beginning")


class SamplingConfig(Settings):
    """How the next token is drawn: in evaluations, and by default in sample.py."""

    prompt: str = setting("", "text to continue; empty: start from an end of text")
    max_new_tokens: Count = setting(200, "tokens to write after the prompt")
    num_samples: Annotated[Positive, Field(le=100_000)] = setting(1, "samples of each prompt")
    temperature: NonNegativeFloat = setting(0.8, "divides the logits; 0: greedy")
    top_k: TopK = setting(0, "keep the k likeliest tokens; 0: all")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = setting(
        1.0, "keep the likeliest tokens whose probabilities sum to this"
    )
    min_p: Probability = setting(0.0, "keep tokens this fraction as likely as the likeliest")
    # The noise takes 64 bits of seed, and so does a request to the server (completions.py).
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = setting(
        1337, "sample i depends on the seed and i alone; below 2^63"
    )


class DistributedConfig(Settings):
    """The processes of one run. On known clusters JAX finds them if nothing is set."""

    coordinator: str = setting("", "host:port of process 0")
    num_processes: Count = setting(0, "number of processes")
    process_id: AxisSize = setting(-1, "number of this process, from 0")
    timeout: Positive = setting(
        300,
        "seconds without a sign of life after which a process counts as lost and the others end; "
        "longer than any compilation",
    )


class Config(Settings):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    sample: SamplingConfig = SamplingConfig()
    probe: Annotated[tuple[ProbeText, ...], BeforeValidator(as_tuple)] = ()

    @pydantic.model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        peak, least = self.optimizer.learning_rate, self.optimizer.min_learning_rate
        if self.optimizer.schedule != "constant" and least > peak:
            raise ValueError(
                f"optimizer.min_learning_rate = {least} is above optimizer.learning_rate = {peak}"
            )
        return self

    def resolved(self) -> Self:
        """The same settings with every size that follows from another written out."""
        return self.model_copy(update={"model": self.model.resolved()})


# Puts what other files say into the tables of a file: (path, tables, flags) -> tables.
Inherit = Callable[[str | Path, dict[str, Any], Mapping[str, Any]], dict[str, Any]]


def load_config(
    path: str | Path, flags: Mapping[str, Any] | None = None, inherit: Inherit | None = None
) -> Config:
    """Defaults, then the file, then the flags.

    Args:
      path: a TOML file.
      flags: `section.key` -> value.
      inherit: what training.init_from names; None: its settings are not looked at.
    Raises:
      UsageError: names the setting, what was found and what was expected.
    """
    values = read_toml(path)
    values = inherit(path, values, flags or {}) if inherit else values
    config = validate(values, where=str(path))
    for name, value in (flags or {}).items():
        *sections, key = name.split(".")
        table = values
        for section in sections:
            table[section] = table = {**table.get(section, {})}
        table[key] = value
    return validate(values, "the flags", flags) if flags else config


# Of a configuration: a source for each of 100,000 files is a tenth of it.
_MOST_BYTES = 1 << 24


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file as nested dictionaries."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UsageError(f"{path} is larger than 16 MiB; expected a TOML configuration file")
        # Some editors begin a file with a byte order mark, which TOML does not know.
        return tomllib.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"no configuration file at {path}{known_files()}") from None
    except IsADirectoryError:
        raise UsageError(f"{Path(path)} is a folder; expected a TOML configuration file") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        # What Python adds about numbers of thousands of digits is for programmers.
        raise UsageError(f"{path} is not valid TOML: {str(error).split(';')[0]}") from None


def known_files() -> str:
    """The end of a message: the configuration files that there are."""
    files = sorted(map(str, Path("configs").glob("*.toml")))
    return f"; there are: {', '.join(files)}" if files else ""


def to_toml(config: Config) -> str:
    """The whole configuration as TOML; `validate(tomllib.loads(...))` gives an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def validate(values: Mapping[str, Any], where: str, flags: Collection[str] = frozenset()) -> Config:
    """Nested dictionaries to a Config; one UsageError names every wrong setting.

    Args:
      where: what holds the values.
      flags: `section.key` of those that were given as flags; a message spells them so.
    """
    try:
        return Config.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_explain(problem, flags) for problem in error.errors()]
        raise UsageError(f"in {where}: " + "\n  ".join(lines)) from None


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """`section.key` -> (old, new) for every setting that is not equal."""
    before, after = flatten(old), flatten(new)
    pairs = {key: (before.get(key), after.get(key)) for key in before | after}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flatten(config: Config) -> dict[str, Any]:
    """`section.key` -> value, in the order of the sections; then `data.filters.key` -> value;
    `data.mixture` -> the names of its sources, then `data.mixture.NAME.key` -> value."""
    sections = config.model_dump(mode="json")
    probes = sections.pop("probe")
    flat = {
        f"{section}.{key}": value
        for section, settings in sections.items()
        for key, value in settings.items()
    } | ({"probe": probes} if probes else {})
    flat |= {f"data.filters.{key}": value for key, value in flat.pop("data.filters").items()}
    tables, flat["data.mixture"] = flat["data.mixture"], [one.name for one in config.data.mixture]
    for table in tables:
        flat |= {f"data.mixture.{table['name']}.{key}": value for key, value in table.items()}
    return flat


# Values in messages: tables ten thousand deep have no other representation.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _explain(problem: Any, flags: Collection[str]) -> str:
    """What is wrong with one setting."""
    path = [str(part) for part in problem["loc"]]
    # Where a table of a file begins, such as data.mixture.0, and what it holds.
    probes = path[:1] == ["probe"]
    table = path[: 2 if probes else 3]
    fields = ProbeText.model_fields if probes else MixtureSource.model_fields
    in_table = (probes or path[:2] == ["data", "mixture"]) and len(path) > len(table)
    in_section = 3 if path[1:2] == ["filters"] else 2
    name = ".".join(path[: len(table) + 1 if in_table else in_section])
    if problem["type"] == "missing":
        return f"{name} is missing: expected {fields[path[len(table)]].description}"
    if problem["type"] == "extra_forbidden":
        known = [f"{'.'.join(table)}.{key}" for key in fields]
        near = nearest(name, known if in_table else [*Config.model_fields, *flatten(Config())])
        sections = ", ".join(Config.model_fields)
        return f"unknown setting {name}; " + (
            f"did you mean {near}?" if near else f"the sections are {sections}"
        )
    if len(path) < 2 and problem["type"] == "value_error":
        return expected(problem)
    if name in flags:
        return f"--{name.replace('_', '-')} {problem['input']!s:.80}: {expected(problem)}"
    return f"{name} = {_SHORT.repr(problem['input'])}: {expected(problem)}"


def expected(problem: Any) -> str:
    """What pydantic expected instead of a value, in a person's words."""
    match problem["type"]:
        case "value_error":
            return str(problem["ctx"]["error"])
        case "model_type" | "dict_type":
            path = (part for part in problem["loc"] if isinstance(part, str))
            return f"expected a table, [{'.'.join(path)}]"
    message = problem["msg"].removeprefix("Input should be ")
    is_bound = message.startswith(("greater", "less"))
    return f"expected {'a number ' * is_bound}{message}"
