"""Parameters, FLOPs per token, and the share of the devices' peak that they take.

MFU (model FLOPs utilisation, Chowdhery et al. 2022, PaLM, appendix B) is the share of a device's
peak that the model's own arithmetic takes: forward and backward, nothing recomputed, no optimizer.

Sources of the peaks: NVIDIA's data sheets of each product; Google's pages of each TPU version
(https://cloud.google.com/tpu/docs/system-architecture-tpu-vm).
"""

import math
import re
from collections.abc import Iterable

import jax

from llm.model.gpt import ModelSpec, abstract_params

# Dense bfloat16 FLOP/s with float32 accumulation, of one device as JAX counts devices: half a chip
# for TPU v2, v3 and 7x. A device that is not listed has no peak and an MFU of null.
PEAKS = {
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
    "TPU7x": 1153.5e12,
}
# A device with one of these words is a part of the chip that its name begins with. How large a part
# it is, the name does not say.
_PARTIAL = ("MIG", "Laptop", "Max-Q", "D")


def parameter_count(spec: ModelSpec, *, active: bool = False) -> int:
    """Trained numbers, without the padding of the vocabulary.

    Args:
      active: count what one token uses: the chosen ones of a block's experts.
    """
    row = spec.config.d_model * (1 if spec.config.tie_embeddings else 2) + spec.config.head_bias
    padding = row * (spec.padded_vocab_size - spec.vocab_size)
    return sum(_sizes(spec, active=active).values()) - padding


def _sizes(spec: ModelSpec, *, active: bool) -> dict[str, int]:
    """name -> numbers of each weight; if active, k / E of those of the experts."""
    config = spec.config
    sizes = {name: math.prod(leaf.shape) for name, leaf in abstract_params(spec).items()}
    for name in sizes:
        if active and config.has_experts and ".mlp." in name and ".router." not in name:
            sizes[name] = sizes[name] * config.n_expert_active // config.n_expert
    return sizes


def flops_per_token(spec: ModelSpec) -> float:
    """FLOPs of one token's forward and backward pass.

        6 (matrix weights + head) + 12 L (N H) T / 2

    A weight costs 2 FLOPs forward and 4 backward (Kaplan et al. 2020). A mixture of experts counts
    the K experts that a token uses, and the router, which scores all of them. Attention's scores
    and weighted sums cost 4 N H for each key seen forward, and three times that in all. Causal
    attention sees T / 2 keys on average, and a window of W tokens W (1 - W / 2T). PaLM counts all
    T, so this MFU is the stricter one.
    """
    config = spec.config
    matrices = sum(
        size
        for name, size in _sizes(spec, active=True).items()
        if name.startswith("blocks.") and name.endswith(".weight")
    )
    head = config.d_model * spec.vocab_size
    T, heads = config.context_length, config.n_head * config.head_size
    W, every = min(config.window or T, T), config.global_every
    whole = config.n_layer // every if every else 0  # layers without a window
    keys_seen = whole * T / 2 + (config.n_layer - whole) * W * (1 - W / (2 * T))
    return float(6 * (matrices + head)) + 12 * heads * keys_seen


def listed_name(kind: str, names: Iterable[str]) -> str | None:
    """The longest name that a device's kind begins with, in whole words; None if there is none.

    "NVIDIA H100 80GB HBM3" is an H100, "NVIDIA L40" is no L4.
    """
    if any(word in _PARTIAL for word in kind.split()):
        return None
    fitting = [name for name in names if re.match(rf"{re.escape(name)}(?![\w.])", kind)]
    return max(fitting, key=len, default=None)


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device by the name that JAX gives its kind, or None."""
    return PEAKS.get(listed_name(kind, PEAKS) or "")


def mfu(spec: ModelSpec, tokens_per_second: float, devices: list[jax.Device]) -> float | None:
    """Share of the devices' bfloat16 peak, in [0, 1], or None when a peak is unknown."""
    peaks = [peak_flops(device.device_kind) for device in devices]
    if not all(peaks):
        return None
    return tokens_per_second * flops_per_token(spec) / sum(peaks)  # type: ignore[arg-type]
