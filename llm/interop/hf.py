"""GPT-2, Llama and Mixtral weights to and from Hugging Face (config.json, *.safetensors).

One table per architecture pairs the names of a transformers state dict with ours. Moving a weight
is at most a transpose, a split and the padding of the vocabulary, so a round trip changes no bit.

What it is not: it does not convert tokenizers, and it carries no dropout, which belongs to training
and not to the function. A model that ModelConfig cannot express is refused by the name of the
setting, never approximated.

Sources: transformers' modeling_gpt2.py, modeling_llama.py and modeling_mixtral.py (names, layouts,
defaults); https://github.com/huggingface/safetensors (file format).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm.config import ModelConfig, validate
from llm.errors import CheckpointError, UsageError
from llm.files import write_atomic
from llm.model.gpt import ModelSpec, abstract_params, logical_axes

Arrays = dict[str, np.ndarray]
# What config.json says, as Python values.
Description = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One array of a state dict and what it is here; `{}` stands for the layer.

    theirs: name in the state dict, without the prefix of the backbone. With `{expert}` in it there
      are as many arrays as experts, and ours has them one behind the other.
    ours: names in Params; several share the array, side by side along its last dimension.
    transposed: stored [out, in] there (torch's Linear), [in, out] here.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a family of models is called, where its weights go, and how its settings translate.

    prefix: of every name but lm_head; the original GPT-2 files leave it out.
    required: setting -> the one value that we can represent, which is also its default.
    ignored: names in old files that hold no parameter.
    """

    class_name: str
    prefix: str
    weights: tuple[Weight, ...]
    required: Mapping[str, Any]
    ignored: re.Pattern[str]
    read: Callable[[Description], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]


def from_hf(folder: str | Path) -> tuple[ModelConfig, int, Arrays]:
    """(configuration, vocabulary size, float32 parameters) of a Hugging Face model folder.

    Rows that pad the vocabulary (model.vocab_multiple) are zero; they are never predicted.

    Raises:
      UsageError: not such a folder, or a model that ModelConfig cannot express.
      CheckpointError: the weights are not those that config.json describes.
    """
    folder = Path(folder)
    description = _read_description(folder)
    architecture = _architecture_of(description, folder)
    _check_required(architecture, description, folder)
    config = architecture.read(description).resolved()
    vocab_size = int(description["vocab_size"])
    spec = ModelSpec(config, vocab_size)
    tensors = _unprefixed(architecture, _read_tensors(folder))
    params: Arrays = {}
    for weight in _present(architecture, spec):
        names = _names(weight, spec)
        for name in names:
            if name not in tensors:
                raise CheckpointError(f"{folder} holds no weight {name}, which config.json needs")
        params.update(_to_ours(weight, [tensors.pop(name) for name in names], spec))
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    extra = sorted(name for name in tensors if not architecture.ignored.search(name))
    if extra:
        raise UsageError(
            f"{folder} holds weights that this model has no place for: {', '.join(extra[:5])}"
            f"{' ...' if len(extra) > 5 else ''}"
        )
    return config, vocab_size, params


def to_hf(
    config: ModelConfig,
    vocab_size: int,
    params: Mapping[str, Any],
    folder: str | Path,
    end_of_text: int | None = None,
) -> None:
    """Write config.json and model.safetensors, as transformers' from_pretrained reads them.

    Args:
      params: float32 arrays, jax or numpy; rows that pad the vocabulary are left out.
      end_of_text: id at which generation begins and ends, when the tokenizer has one.
    Raises:
      UsageError: a switch of the model that neither GPT-2 nor Llama nor Mixtral has.
    """
    from safetensors.numpy import save_file

    spec = ModelSpec(config, vocab_size)
    model_type = _model_type_for(spec.config)
    architecture = ARCHITECTURES[model_type]
    description = {
        "model_type": model_type,
        "architectures": [architecture.class_name],
        "vocab_size": vocab_size,
        "dtype": "float32",
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        **architecture.required,
        **architecture.write(spec.config),
    }
    tensors = {}
    for weight in _present(architecture, spec):
        prefix = "" if weight.theirs.startswith("lm_head") else architecture.prefix
        arrays = _to_theirs(weight, params, spec)
        for name, array in zip(_names(weight, spec), arrays, strict=True):
            tensors[prefix + name] = array
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers refuses a file that does not say which framework's layout it has.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_atomic(folder / "config.json", (json.dumps(description, indent=2) + "\n").encode())


def _linear(theirs: str, ours: str, *, transposed: bool = True) -> tuple[Weight, ...]:
    return (
        Weight(f"{theirs}.weight", (f"{ours}.weight",), transposed),
        Weight(f"{theirs}.bias", (f"{ours}.bias",)),
    )


def _norm(theirs: str, ours: str) -> tuple[Weight, ...]:
    return (
        Weight(f"{theirs}.weight", (f"{ours}.scale",)),
        Weight(f"{theirs}.bias", (f"{ours}.bias",)),
    )


_QUERY_KEY_VALUE = [f"blocks.{{}}.attention.{part}" for part in ("query", "key", "value")]

# GPT-2's Conv1D stores [in, out], as we do.
_GPT2_WEIGHTS = (
    Weight("wte.weight", ("embed.weight",)),
    Weight("wpe.weight", ("embed.position",)),
    *_norm("h.{}.ln_1", "blocks.{}.attention_norm"),
    Weight("h.{}.attn.c_attn.weight", tuple(f"{name}.weight" for name in _QUERY_KEY_VALUE)),
    Weight("h.{}.attn.c_attn.bias", tuple(f"{name}.bias" for name in _QUERY_KEY_VALUE)),
    *_linear("h.{}.attn.c_proj", "blocks.{}.attention.out", transposed=False),
    *_norm("h.{}.ln_2", "blocks.{}.mlp_norm"),
    *_linear("h.{}.mlp.c_fc", "blocks.{}.mlp.up", transposed=False),
    *_linear("h.{}.mlp.c_proj", "blocks.{}.mlp.down", transposed=False),
    *_norm("ln_f", "final_norm"),
    Weight("lm_head.weight", ("head.weight",), transposed=True),
)

# Llama rotates the halves of a head against each other, as attention.rotate does.
_LLAMA_ALL_BUT_MLP = (
    Weight("embed_tokens.weight", ("embed.weight",)),
    *_norm("layers.{}.input_layernorm", "blocks.{}.attention_norm"),
    *_linear("layers.{}.self_attn.q_proj", "blocks.{}.attention.query"),
    *_linear("layers.{}.self_attn.k_proj", "blocks.{}.attention.key"),
    *_linear("layers.{}.self_attn.v_proj", "blocks.{}.attention.value"),
    *_linear("layers.{}.self_attn.o_proj", "blocks.{}.attention.out"),
    *_norm("layers.{}.post_attention_layernorm", "blocks.{}.mlp_norm"),
    *_norm("norm", "final_norm"),
    Weight("lm_head.weight", ("head.weight",), transposed=True),
)

_LLAMA_WEIGHTS = (
    *_LLAMA_ALL_BUT_MLP,
    *_linear("layers.{}.mlp.gate_proj", "blocks.{}.mlp.gate"),
    *_linear("layers.{}.mlp.up_proj", "blocks.{}.mlp.up"),
    *_linear("layers.{}.mlp.down_proj", "blocks.{}.mlp.down"),
)

_MIXTRAL_WEIGHTS = (
    *_LLAMA_ALL_BUT_MLP,
    *_linear("layers.{}.block_sparse_moe.gate", "blocks.{}.mlp.router"),
    *_linear("layers.{}.block_sparse_moe.experts.{expert}.w1", "blocks.{}.mlp.gate"),
    *_linear("layers.{}.block_sparse_moe.experts.{expert}.w3", "blocks.{}.mlp.up"),
    *_linear("layers.{}.block_sparse_moe.experts.{expert}.w2", "blocks.{}.mlp.down"),
)

_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}


def _read_gpt2(described: Description) -> ModelConfig:
    return _model_config(
        n_layer=described.get("n_layer", 12),
        n_head=described.get("n_head", 12),
        d_model=described.get("n_embd", 768),
        d_ff=described.get("n_inner") or 0,
        context_length=described.get("n_positions", 1024),
        norm_epsilon=described.get("layer_norm_epsilon", 1e-5),
        activation=_choice(described, "activation_function", "gelu_new", _GPT2_ACTIVATIONS),
        tie_embeddings=described.get("tie_word_embeddings", True),
        init_std=described.get("initializer_range", 0.02),
        positions="learned",
        norm="layernorm",
        bias=True,
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_GPT2_ACTIVATIONS.items())}
    return {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_positions": config.context_length,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": names[config.activation],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _read_llama(described: Description, **more: Any) -> ModelConfig:
    width, heads = described.get("hidden_size", 4096), described.get("num_attention_heads", 32)
    head_size = described.get("head_dim")
    if head_size is not None and head_size * heads != width:
        raise UsageError(
            f"head_dim = {head_size} cannot be represented: heads here are hidden_size / "
            f"num_attention_heads = {width} / {heads} wide"
        )
    bias = described.get("attention_bias", False)
    if described.get("mlp_bias", False) != bias:
        raise UsageError(
            f"attention_bias = {bias} with mlp_bias = {not bias} cannot be represented: linear "
            f"layers here have biases everywhere or nowhere"
        )
    return _model_config(
        n_layer=described.get("num_hidden_layers", 32),
        n_head=heads,
        n_kv_head=described.get("num_key_value_heads") or heads,
        d_model=width,
        d_ff=described.get("intermediate_size", 11008),
        context_length=described.get("max_position_embeddings", 2048),
        norm_epsilon=described.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(described),
        tie_embeddings=described.get("tie_word_embeddings", False),
        init_std=described.get("initializer_range", 0.02),
        activation="swiglu",
        positions="rotary",
        norm="rmsnorm",
        bias=bias,
        **more,
    )


def _read_mixtral(described: Description) -> ModelConfig:
    defaults = {
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
    return _read_llama(
        {**defaults, **described},
        n_expert=described.get("num_local_experts", 8),
        n_expert_active=described.get("num_experts_per_tok", 2),
        normalize_gates=True,
    )


def _rope_theta(described: Description) -> float:
    """The base of the frequencies: in rope_parameters since transformers 5, at the top before."""
    rope: dict[str, Any] = {
        **(described.get("rope_scaling") or {}),
        **(described.get("rope_parameters") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UsageError(
            f"rope scaling of type {kind!r} cannot be represented; supported: 'default'"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']} cannot be represented: the "
            f"whole head is rotated here"
        )
    theta = rope.get("rope_theta", described.get("rope_theta"))
    return 10000.0 if theta is None else float(theta)


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.d_model,
        "head_dim": config.head_size,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        # Both spellings, for transformers before and since 5.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.bias,
        "attention_dropout": 0.0,
        "mlp_bias": config.bias,
    }


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    without = ("attention_bias", "mlp_bias")
    return {
        **{name: value for name, value in _write_llama(config).items() if name not in without},
        "num_local_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_active,
    }


ARCHITECTURES = {
    "gpt2": Architecture(
        class_name="GPT2LMHeadModel",
        prefix="transformer.",
        weights=_GPT2_WEIGHTS,
        required={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        # The causal mask, which old files store beside the weights.
        ignored=re.compile(r"\.attn\.(masked_)?bias$"),
        read=_read_gpt2,
        write=_write_gpt2,
    ),
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        prefix="model.",
        weights=_LLAMA_WEIGHTS,
        required={"hidden_act": "silu"},
        ignored=re.compile(r"\.rotary_emb\.inv_freq$"),
        read=_read_llama,
        write=_write_llama,
    ),
    "mixtral": Architecture(
        class_name="MixtralForCausalLM",
        prefix="model.",
        weights=_MIXTRAL_WEIGHTS,
        required={"hidden_act": "silu"},
        ignored=re.compile(r"\.rotary_emb\.inv_freq$"),
        read=_read_mixtral,
        write=_write_mixtral,
    ),
}

# Settings of transformers that change the function of any architecture, and their only value here.
_REQUIRED_EVERYWHERE = {
    "quantization_config": None,
    "sliding_window": None,
    "is_encoder_decoder": False,
}

# Switches that no architecture of transformers has, here at the value that is none.
_NOWHERE: dict[str, tuple[Any, ...]] = {
    "qk_norm": (False,),
    "logit_soft_cap": (0.0,),
}

# What an exported model must be, beside the switches that its config.json carries.
_EXPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "positions": ("learned",),
        "norm": ("layernorm",),
        "activation": ("gelu", "gelu_tanh"),
        "bias": (True,),
        "n_expert": (1,),
        **_NOWHERE,
    },
    "llama": {
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "activation": ("swiglu",),
        "n_expert": (1,),
        **_NOWHERE,
    },
    "mixtral": {
        "positions": ("rotary",),
        "norm": ("rmsnorm",),
        "activation": ("swiglu",),
        "bias": (False,),
        "normalize_gates": (True,),
        **_NOWHERE,
    },
}


def _model_type_for(config: ModelConfig) -> str:
    """The architecture that is exactly this model, or a UsageError with what keeps it from each."""
    reasons = []
    for model_type, allowed in _EXPORTED.items():
        wrong = [
            f"model.{name} = {getattr(config, name)!r} (needs {' or '.join(map(repr, values))})"
            for name, values in allowed.items()
            if getattr(config, name) not in values
        ]
        if model_type == "gpt2" and config.n_kv_head != config.n_head:
            wrong.append(f"model.n_kv_head = {config.n_kv_head} (needs {config.n_head})")
        if model_type == "mixtral" and not config.has_experts:
            wrong.append("model.n_expert = 1 (needs more)")
        if not wrong:
            return model_type
        reasons.append(f"not {model_type}, because of {', '.join(wrong)}")
    raise UsageError("no Hugging Face architecture is this model: " + "; ".join(reasons))


def _model_config(**settings: Any) -> ModelConfig:
    """A ModelConfig from numbers that JSON may have written as integers."""
    for name in ("norm_epsilon", "rope_theta", "init_std"):
        if name in settings:
            settings[name] = float(settings[name])
    return validate({"model": settings}, where="config.json, read as [model]").model


def _choice(described: Description, name: str, default: str, choices: Mapping[str, str]) -> str:
    found = described.get(name, default)
    if found not in choices:
        raise UsageError(
            f"{name} = {found!r} cannot be represented; supported: {', '.join(choices)}"
        )
    return choices[found]


def _read_description(folder: Path) -> Description:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} holds no config.json; expected the folder of a Hugging Face model, with "
            f"config.json and *.safetensors"
        ) from None
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'} is not valid JSON: {error}") from None


def _architecture_of(described: Description, folder: Path) -> Architecture:
    found = described.get("model_type")
    if found not in ARCHITECTURES:
        raise UsageError(
            f"{folder} is a model of type {found!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[found]


def _check_required(architecture: Architecture, described: Description, folder: Path) -> None:
    for name, value in {**_REQUIRED_EVERYWHERE, **architecture.required}.items():
        found = described.get(name, value)
        if found != value:
            raise UsageError(
                f"{folder / 'config.json'}: {name} = {found!r} cannot be represented; supported: "
                f"{value!r}"
            )


def _read_tensors(folder: Path) -> Arrays:
    """Every array of the folder's safetensors files, in float32."""
    import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    tensors: Arrays = {}
    for file in files:
        if not file.exists():
            raise UsageError(
                f"{folder} holds no {file.name}; weights in another format can be saved anew with "
                f"transformers' save_pretrained"
            )
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    tensors[name] = opened.get_tensor(name).astype(np.float32)
        except SafetensorError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    return tensors


def _unprefixed(architecture: Architecture, tensors: Arrays) -> Arrays:
    return {name.removeprefix(architecture.prefix): array for name, array in tensors.items()}


def _present(architecture: Architecture, spec: ModelSpec) -> Iterator[Weight]:
    """The weights that this model has, layer by layer, with the layer's number in their names."""
    params = abstract_params(spec)
    for weight in architecture.weights:
        layers = range(spec.config.n_layer if "{}" in weight.theirs else 1)
        for layer in layers:
            ours = tuple(name.format(layer) for name in weight.ours)
            if ours[0] in params:
                theirs = weight.theirs.replace("{}", str(layer))
                yield Weight(theirs, ours, weight.transposed)


def _is_of_experts(weight: Weight) -> bool:
    return "{expert}" in weight.theirs


def _names(weight: Weight, spec: ModelSpec) -> list[str]:
    """Of its arrays in a state dict: one, or one for each expert."""
    if not _is_of_experts(weight):
        return [weight.theirs]
    return [weight.theirs.format(expert=expert) for expert in range(spec.config.n_expert)]


def _to_ours(weight: Weight, arrays: list[np.ndarray], spec: ModelSpec) -> Arrays:
    params, axes = abstract_params(spec), logical_axes(spec)
    widths = [_real_shape(spec, axes[name], params[name].shape)[-1] for name in weight.ours]
    rows = _real_shape(spec, axes[weight.ours[0]], params[weight.ours[0]].shape)[:-1]
    arrays = [array.T if weight.transposed else array for array in arrays]
    expected = (*(rows[1:] if _is_of_experts(weight) else rows), sum(widths))
    for name, array in zip(_names(weight, spec), arrays, strict=True):
        if array.shape != expected:
            raise CheckpointError(
                f"weight {name} has shape {list(array.shape)}, but config.json needs "
                f"{list(expected)}{' (transposed)' if weight.transposed else ''}"
            )
    array = np.stack(arrays) if _is_of_experts(weight) else arrays[0]
    parts = np.split(array, np.cumsum(widths)[:-1], axis=-1)
    return {
        name: np.ascontiguousarray(_pad(part, params[name].shape))
        for name, part in zip(weight.ours, parts, strict=True)
    }


def _to_theirs(weight: Weight, params: Mapping[str, Any], spec: ModelSpec) -> list[np.ndarray]:
    axes = logical_axes(spec)
    parts = []
    for name in weight.ours:
        array = np.asarray(params[name], np.float32)
        shape = _real_shape(spec, axes[name], array.shape)
        parts.append(array[tuple(slice(size) for size in shape)])
    array = np.concatenate(parts, axis=-1)
    arrays = list(array) if _is_of_experts(weight) else [array]
    return [np.ascontiguousarray(array.T if weight.transposed else array) for array in arrays]


def _real_shape(spec: ModelSpec, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter's shape without the padding of the vocabulary."""
    return tuple(
        spec.vocab_size if axis == "vocab" else size for axis, size in zip(axes, shape, strict=True)
    )


def _pad(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    widths = [(0, size - have) for size, have in zip(shape, array.shape, strict=True)]
    return np.pad(array, widths) if any(after for _, after in widths) else array
