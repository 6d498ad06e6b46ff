"""Every setting, with its type, default and meaning, and how a file and flags become one Config.

A TOML file overrides the defaults here, and flags override the file (llm/commands/flags.py):

    python train.py configs/quickstart.toml --training.steps 500

A configuration is data: reading it executes no code of its author. Defaults exist here and nowhere
else. This file imports no JAX, so `--help` is quick.
"""

import contextlib
import os
import reprlib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import tomli_w
from pydantic import Field, NonNegativeFloat, PositiveFloat

from llm.errors import UsageError
from llm.names import nearest

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
DropoutRate = Annotated[float, Field(ge=0.0, lt=1.0)]
# Devices count in 32 bits. What is made one by one (layers, samples) has a bound of its own, since
# more would never end; and so have widths, since the compiler dies of weights of 2^63 bytes.
Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
AxisSize = Annotated[int, Field(ge=-1, lt=2**31)]
# Others write -1 for all tokens.
TopK = Annotated[Count, pydantic.BeforeValidator(lambda value: 0 if value == -1 else value)]
# JAX takes the lowest 32 bits of a seed: two that are equal in them would initialise alike.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _sources(value: Any) -> Any:
    """A list as a tuple, which cannot change; a list of one source as that source."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def _folder(value: str) -> str:
    """A path with ~ in place: the shell expands none in a file, or after the = of a flag."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"expected a user whose home is known after ~, or ./{path} for that name")
    if "\0" in path or path != path.encode(errors="ignore").decode():
        raise ValueError("expected a path of UTF-8 characters and no zero byte: rename the folder")
    return path


Folder = Annotated[str, pydantic.AfterValidator(_folder)]
Sources = Annotated[str | tuple[str, ...], pydantic.BeforeValidator(_sources)]


def setting(default: Any, meaning: str, value: str | None = None, flag: str | None = None) -> Any:
    """One setting or flag: its default and its meaning, which is also its line in --help.

    Args:
      value: what --help calls the value; by default a word for its type.
      flag: the name of the flag, if it is not the name of the field.
    """
    return Field(default=default, description=meaning, title=value, alias=flag)


class Section(pydantic.BaseModel):
    """A frozen group of settings; unknown names and values of another type are refused."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )

    @pydantic.field_validator("*")
    @classmethod
    def _check_is_utf8(cls, value: Any) -> Any:
        """The name of a file may hold any bytes, and config.toml cannot. Texts that commands and
        requests give may too, for tokenizers that have all bytes."""
        text = str(value) if cls.__module__ == __name__ else ""
        if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
            raise ValueError("expected UTF-8: rename the file, or write * for what is not")
        return value


class RunConfig(Section):
    """Where the run lives and what makes it repeatable."""

    dir: Folder = setting("", "run directory; empty: runs/<name of the configuration file>")
    seed: Seed = setting(1337, "seed of initialisation, data order and dropout; below 2^32")
    allow_change: bool = setting(False, "resume with another learning rate, schedule or batch size")
    deterministic: bool = setting(False, "ask the backend to repeat bit for bit; step 1 checks it")


class DataConfig(Section):
    """Which documents are read and how they are split."""

    source: Sources = setting(
        "stdlib",
        "a path, folder, glob, URL (fetched once and cached), 'stdlib' (the source code of the "
        "Python standard library), 'hf:NAME' (a Hugging Face dataset, streamed); or a list",
    )
    validation: str = setting(
        "documents:0.05",
        "held-out text: 'documents:F' holds out a fraction F of the documents, chosen by the hash "
        "of their text; 'tail:F' the last fraction F of all tokens; 'none' holds out nothing",
    )
    errors: Literal["strict", "replace"] = setting(
        "strict", "bytes that are not UTF-8: stop and say where, or replace and count them"
    )
    text_field: str = setting(
        "text",
        "name of the text field in json, jsonl, parquet, Arrow and hub data; 'meta.text' is the "
        "field text of the field meta",
    )
    bad_rows: Literal["error", "skip"] = setting(
        "error", "rows without text: stop and name the row, or leave them out and count them"
    )
    cache_dir: str = setting(
        "", "token shards, downloads; empty: $LLM_CACHE_DIR, else ~/.cache/llm"
    )
    workers: Count = setting(0, "threads that tokenise; 0: one for each core")

    @pydantic.field_validator("validation")
    @classmethod
    def _check_validation(cls, value: str) -> str:
        kind, _, fraction = value.partition(":")
        with contextlib.suppress(ValueError):  # not a number
            if value == "none" or (kind in ("documents", "tail") and 0.0 < float(fraction) < 1.0):
                return value
        raise ValueError("expected 'documents:F' or 'tail:F' with 0 < F < 1, or 'none'")


class TokenizerConfig(Section):
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


class ModelConfig(Section):
    """One GPT whose parts are switches. The defaults are GPT-2's block."""

    n_layer: Annotated[Positive, Field(le=1024)] = setting(6, "blocks")
    n_head: Positive = setting(6, "attention heads")
    n_kv_head: Count = setting(
        0, "key/value heads: n_head is multi-head, fewer grouped-query, 1 multi-query; 0: n_head"
    )
    d_model: Annotated[Positive, Field(le=2**20)] = setting(384, "width of the residual stream")
    d_ff: Annotated[Count, Field(le=2**24)] = setting(
        0,
        "width of the MLP or of each expert; 0: 4 d_model, if gated 8/3 d_model rounded up to 64",
    )
    head_size: Count = setting(0, "width of a head, if its own (Qwen3, Gemma); 0: d_model / n_head")
    context_length: Positive = setting(256, "tokens that the model sees at once")
    window: Count = setting(0, "tokens that a token sees, itself among them (Mistral); 0: all")
    global_every: Count = setting(0, "each n-th layer has no window (Gemma); 0: all layers have it")
    positions: Literal["learned", "rotary", "none"] = setting("learned", "how positions enter")
    unrotated_every: Count = setting(0, "each n-th layer has no rotary positions (SmolLM3)")
    rope_theta: PositiveFloat = setting(10000.0, "base of the rotary frequencies")
    window_rope_theta: NonNegativeFloat = setting(
        0.0, "base in layers with a window, whose frequencies are not scaled (Gemma 3); 0: the same"
    )
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = setting(
        "none",
        "frequencies for longer texts: all, or the low ones (Llama 3.1; Qwen), / rope_factor",
    )
    rope_factor: PositiveFloat = setting(1.0, "divides scaled frequencies")
    rope_original_length: Positive = setting(8192, "context before scaling, for llama3 and yarn")
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "normalisation of each sub-layer")
    norm_place: Literal["before", "after", "both"] = setting(
        "before", "what is normalised: a sub-layer's input, its output (OLMo 2), or both (Gemma 2)"
    )
    norm_epsilon: PositiveFloat = setting(1e-5, "added to the variance in a norm")
    bias: bool = setting(True, "biases in linear layers and norms")
    activation: Literal["gelu", "gelu_tanh", "relu_squared", "swiglu", "geglu"] = setting(
        "gelu_tanh",
        "of the MLP; gelu_tanh is GPT-2's, geglu gates with it (Gemma), swiglu with silu",
    )
    n_expert: Annotated[Positive, Field(le=2**16)] = setting(
        1, "MLPs that a block's router chooses from; 1: a dense model"
    )
    n_expert_active: Count = setting(
        0, "experts that a token goes through (top-k); 0: two, or the one of a dense model"
    )
    normalize_gates: bool = setting(
        True,
        "make the weights of a token's experts sum to one, as Mixtral does; false: take the "
        "router's probabilities, as Switch and OLMoE do",
    )
    qk_norm: bool = setting(False, "RMS-normalise queries and keys, head by head")
    qk_norm_joint: bool = setting(False, "with qk_norm: all heads together (OLMo 2, OLMoE)")
    dropout: DropoutRate = setting(0.0, "on embeddings, attention weights and residual branches")
    tie_embeddings: bool = setting(True, "use the token embedding as the output head")
    logit_soft_cap: NonNegativeFloat = setting(0.0, "c tanh(logits / c); 0: off")
    attention_soft_cap: NonNegativeFloat = setting(0.0, "c tanh(scores / c) (Gemma 2); 0: off")
    init_std: PositiveFloat = setting(0.02, "standard deviation of initial weights")
    zero_init_projections: bool = setting(
        False, "start each residual projection at zero instead of init_std / sqrt(2 n_layer)"
    )
    vocab_multiple: Annotated[Positive, Field(le=2**20)] = setting(
        64, "pad the vocabulary to a multiple of this; padding is never predicted"
    )

    @pydantic.model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.d_model % self.n_head and not self.head_size:
            nearest_multiple = max(1, round(self.d_model / self.n_head)) * self.n_head
            raise ValueError(
                f"model.d_model = {self.d_model} is not divisible by model.n_head = {self.n_head}"
                f"; the nearest that is: {nearest_multiple}"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            divisors = [k for k in range(1, self.n_head + 1) if self.n_head % k == 0]
            raise ValueError(
                f"model.n_head = {self.n_head} is not divisible by model.n_kv_head = "
                f"{self.n_kv_head}; it can be one of {divisors}"
            )
        size = self.head_size or self.d_model // self.n_head
        if self.positions == "rotary" and size % 2:
            name = "model.head_size" if self.head_size else "d_model / n_head"
            raise ValueError(f"rotary positions need an even head size, found {name} = {size}")
        return self

    @pydantic.model_validator(mode="after")
    def _check_experts(self) -> Self:
        active = self.n_expert_active
        if active > self.n_expert:
            dense = "; n_expert = 1 is a dense model" * (self.n_expert == 1)
            raise ValueError(
                f"model.n_expert_active = {active} is more than model.n_expert = {self.n_expert}: "
                f"a token cannot go through more experts than there are{dense}"
            )
        if active == 1 < self.n_expert and self.normalize_gates:
            raise ValueError(
                f"model.n_expert_active = 1 of model.n_expert = {self.n_expert} with "
                "model.normalize_gates = true: one weight that sums to one is always 1, and the "
                "router would not learn from it; set model.normalize_gates = false, as Switch does"
            )
        return self

    @property
    def has_experts(self) -> bool:
        return self.n_expert > 1

    @property
    def is_gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    def resolved(self) -> Self:
        """The same model with every size that follows from another written out."""
        d_ff = 4 * self.d_model
        if self.is_gated:
            d_ff = -(-8 * self.d_model // (3 * 64)) * 64
        sizes = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_size": self.head_size or self.d_model // self.n_head,
            "d_ff": self.d_ff or d_ff,
            "n_expert_active": self.n_expert_active or (2 if self.has_experts else 0),
        }
        return self.model_copy(update=sizes)


class OptimizerConfig(Section):
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


class TrainingConfig(Section):
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
        "auto", "of matrix products; auto: bfloat16 on accelerators, float32 on CPU"
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


class MeshConfig(Section):
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


class CheckpointConfig(Section):
    """When the state is saved, and which saves are kept."""

    every: Count = setting(250, "steps between checkpoints; 0: only at the end")
    keep: Positive = setting(2, "newest checkpoints to keep")
    keep_best: bool = setting(True, "also save and keep the step with the lowest validation loss")


class LoggingConfig(Section):
    """Where progress is written besides RUN/metrics.jsonl."""

    every: Positive = setting(1, "steps between lines of metrics.jsonl")
    progress: Literal["auto", "bar", "plain", "none"] = setting(
        "auto", "progress on the terminal; auto: a bar on a terminal, plain lines elsewhere"
    )
    tensorboard: bool = setting(False, "also write RUN/tensorboard (needs the 'tensorboard' extra)")
    wandb_project: str = setting("", "also log to this W&B project (needs the 'wandb' extra)")


class SamplingConfig(Section):
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


class DistributedConfig(Section):
    """The processes of one run. On known clusters JAX finds them if nothing is set."""

    coordinator: str = setting("", "host:port of process 0")
    num_processes: Count = setting(0, "number of processes")
    process_id: AxisSize = setting(-1, "number of this process, from 0")
    timeout: Positive = setting(
        300,
        "seconds without a sign of life after which a process counts as lost and the others end; "
        "longer than any compilation",
    )


class Config(Section):
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


def load_config(path: str | Path, flags: Mapping[str, Any] | None = None) -> Config:
    """Defaults, then the file, then the flags.

    Args:
      path: a TOML file.
      flags: `section.key` -> value.
    Raises:
      UsageError: names the setting, what was found and what was expected.
    """
    values = read_toml(path)
    config = validate(values, where=str(path))
    for name, value in (flags or {}).items():
        section, key = name.split(".")
        values[section] = {**values.get(section, {}), key: value}
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
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def flatten(config: Config) -> dict[str, Any]:
    """`section.key` -> value, in the order of the sections."""
    return {
        f"{section}.{key}": value
        for section, settings in config.model_dump(mode="json").items()
        for key, value in settings.items()
    }


# Values in messages: tables ten thousand deep have no other representation.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _explain(problem: Any, flags: Collection[str]) -> str:
    """What is wrong with one setting."""
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path[:2])
    if problem["type"] == "extra_forbidden":
        near = nearest(name, [*Config.model_fields, *flatten(Config())])
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
            return f"expected a table, [{problem['loc'][0]}]"
    message = problem["msg"].removeprefix("Input should be ")
    is_bound = message.startswith(("greater", "less"))
    return f"expected {'a number ' * is_bound}{message}"
