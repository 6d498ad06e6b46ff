"""Parameters, FLOPs per token, and what a device can do at most.

MFU (model FLOPs utilisation, Chowdhery et al. 2022, PaLM, appendix B) is the share of a device's
peak that the model's own arithmetic takes: forward and backward, nothing recomputed, no optimizer.
"""

import math
import re

import jax

from llm.model.gpt import ModelSpec, abstract_params

# Dense bfloat16 FLOP/s (float32 accumulation) of one device as JAX names it, without sparsity, from
# the makers' data sheets. A name covers what begins with it and goes on with a new word, and the
# longest wins: "NVIDIA H100 80GB HBM3" is an H100, "NVIDIA L40" is no L4. A device that is not
# here has no peak, and its MFU is null: a wrong one would be worse.
PEAK_BFLOAT16_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090 Ti": 80e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


# Words in a device's name that mean less than the whole chip of that name, by an amount not listed.
_PARTIAL = ("MIG", "Laptop", "Max-Q", "D")


def parameter_count(spec: ModelSpec) -> int:
    """Trained numbers, without the padding of the vocabulary."""
    padding = (spec.padded_vocab_size - spec.vocab_size) * spec.config.d_model
    tables = 1 if spec.config.tie_embeddings else 2
    total = sum(math.prod(leaf.shape) for leaf in abstract_params(spec).values())
    return total - tables * padding


def flops_per_token(spec: ModelSpec) -> float:
    """FLOPs of one token's forward and backward pass.

        6 (matrix weights + head) + 12 L (N H) T / 2

    2 FLOPs a weight forward and 4 backward (Kaplan et al. 2020). Attention's scores and mixtures
    cost 4 N H a key seen forward, thrice that in all; causal attention sees T / 2 keys on average.
    PaLM counts all T; the half is what is needed, so this MFU is the stricter one.
    """
    config = spec.config
    matrices = sum(
        math.prod(leaf.shape)
        for name, leaf in abstract_params(spec).items()
        if name.startswith("blocks.") and len(leaf.shape) == 2
    )
    head = config.d_model * spec.vocab_size
    keys_seen = config.context_length / 2
    return 6 * (matrices + head) + 12 * config.n_layer * config.d_model * keys_seen


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None when unknown."""
    kind = device.device_kind
    names = [name for name in PEAK_BFLOAT16_FLOPS if re.match(rf"{re.escape(name)}(?![\w.])", kind)]
    if not names or any(word in _PARTIAL for word in kind.split()):
        return None
    return PEAK_BFLOAT16_FLOPS[max(names, key=len)]


def mfu(spec: ModelSpec, tokens_per_second: float, devices: list[jax.Device]) -> float | None:
    """Share of the devices' peak in [0, 1], or None when a peak is unknown."""
    peaks = [peak_flops(device) for device in devices]
    if not all(peaks):
        return None
    return tokens_per_second * flops_per_token(spec) / sum(peaks)  # type: ignore[arg-type]
