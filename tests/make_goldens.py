"""How tests/goldens/*.npz were made: tiny random models of transformers and the logits they give.

    python tests/make_goldens.py        (needs the `oracles` extra: torch, transformers)

Each file holds `config` (the text of config.json), `tokens` (int32 [B, T]), `logits` (float32
[B, T, V], computed by transformers), and under `weights/` every array of model.safetensors. The
weights are drawn large, so that each part of a model shows in its logits, and in float16 to keep
the files small.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

GOLDENS = Path(__file__).parent / "goldens"
BATCH, LENGTH, VOCAB = 2, 12, 29

SMALL = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_head=3, n_embd=24, n_positions=16, layer_norm_epsilon=1e-3, **SMALL
        )
    ),
    "llama_grouped": lambda: transformers.LlamaForCausalLM(
        llama_config(num_key_value_heads=2, rope_theta=500.0, tie_word_embeddings=False)
    ),
    "llama_multi_head": lambda: transformers.LlamaForCausalLM(
        llama_config(
            num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(mixtral_config()),
}


def mixtral_config():
    return transformers.MixtralConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=24,
        intermediate_size=20, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-3,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, **SMALL,
    )  # fmt: skip


def llama_config(rope_theta=10000.0, **settings):
    return transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=24, intermediate_size=40,
        max_position_embeddings=16, rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, **SMALL, **settings,
    )  # fmt: skip


def randomise(model, seed):
    """Every parameter from N(0, 0.3^2), norms' scales around 1, rounded to float16."""
    random = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = 0.3 * random.normal(size=parameter.shape)
        values += 1.0 if "norm" in name or ("ln_" in name and name.endswith("weight")) else 0.0
        parameter.data = torch.from_numpy(values.astype(np.float16).astype(np.float32))
    if model.config.tie_word_embeddings:
        model.tie_weights()


def make(name, seed):
    model = MODELS[name]()
    randomise(model, seed)
    model.eval()
    tokens = np.random.default_rng(seed + 1).integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens).long()).logits.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        description = json.loads((Path(folder) / "config.json").read_text())
        # As it is stored: transformers 5 holds a mixture's experts stacked in memory alone.
        stored = load_file(Path(folder) / "model.safetensors")
    weights = {f"weights/{name}": array.astype(np.float16) for name, array in stored.items()}
    np.savez_compressed(
        GOLDENS / f"{name}.npz",
        config=np.array(json.dumps(description)), tokens=tokens, logits=logits, **weights,
    )  # fmt: skip


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    for number, name in enumerate(MODELS):
        make(name, seed=10 * number)
