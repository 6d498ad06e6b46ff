"""Parameters and FLOPs against published counts, hand computation and XLA's own count."""

import types

import jax
import jax.numpy as jnp
import pytest

from llm.model.flops import PEAKS, flops_per_token, mfu, parameter_count, peak_flops
from llm.model.gpt import ModelSpec, abstract_params, bind
from llm.model_config import ModelConfig


def gpt2(layers, heads, width):
    return ModelSpec(
        ModelConfig(n_layer=layers, n_head=heads, d_model=width, context_length=1024), 50257
    )


@pytest.mark.parametrize(
    ("layers", "heads", "width", "count"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_parameter_counts_are_those_of_transformers_num_parameters(layers, heads, width, count):
    assert parameter_count(gpt2(layers, heads, width)) == count


@pytest.mark.thorough
def test_transformers_counts_the_same():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert parameter_count(gpt2(12, 12, 768)) == model.num_parameters()


def test_an_untied_head_counts_and_padding_does_not():
    spec = ModelSpec(
        ModelConfig(n_layer=1, n_head=1, d_model=8, d_ff=8, context_length=4, tie_embeddings=False,
                    bias=False, vocab_multiple=100), 7,
    )  # fmt: skip
    embeddings, head, positions = 7 * 8, 8 * 7, 4 * 8
    block = 4 * 8 * 8 + 2 * 8 * 8 + 2 * 8
    assert parameter_count(spec) == embeddings + head + positions + block + 8


def test_flops_per_token_of_gpt2_124m_by_hand():
    """Each of 12 blocks has 4 D^2 + 8 D^2 weights; a token sees 512 keys on average."""
    width, vocab = 768, 50257
    matrices = 12 * 12 * width**2 + vocab * width
    attention = 12 * 512 * width * 2 * 2
    assert flops_per_token(gpt2(12, 12, 768)) == 6 * matrices + 3 * attention


def test_grouped_heads_and_swiglu_by_hand():
    spec = ModelSpec(
        ModelConfig(n_layer=2, n_head=4, n_kv_head=1, d_model=32, d_ff=64, context_length=16,
                    activation="swiglu", positions="rotary", tie_embeddings=False), 100,
    )  # fmt: skip
    block = 2 * 32 * 32 + 2 * 32 * 8 + 3 * 32 * 64
    assert flops_per_token(spec) == 6 * (2 * block + 32 * 100) + 2 * 12 * 8 * 32


def test_flops_agree_with_xlas_count_within_five_per_cent():
    """XLA counts every key, not the causal half, and padding; the rest of the difference is what is
    no matrix product: norms, softmax, activation."""
    B, T = 2, 256
    spec = ModelSpec(
        ModelConfig(n_layer=2, n_head=4, d_model=512, context_length=T, activation="relu_squared",
                    tie_embeddings=False, vocab_multiple=1), 512,
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    gradient = jax.grad(lambda params, tokens: jnp.sum(bind(spec, params)(tokens) ** 2))
    analysis = jax.jit(gradient).lower(abstract_params(spec), tokens).compile().cost_analysis()
    whole_square = 12 * 2 * 512 * (T / 2)
    expected = B * T * (flops_per_token(spec) + whole_square)
    assert analysis["flops"] == pytest.approx(expected, rel=0.05)


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_the_longest_name_that_fits_gives_the_peak(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA H1000",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA Tesla T4",
        "NVIDIA GeForce RTX 4090 D",
        "TPU v50",
    ],
)
def test_an_unknown_device_has_no_peak(kind):
    assert peak_flops(kind) is None


def test_mfu_is_the_share_of_all_devices_peaks_and_null_when_one_is_unknown():
    spec = gpt2(12, 12, 768)
    per_second = 1e6
    expected = per_second * flops_per_token(spec) / (2 * 989e12)
    assert mfu(spec, per_second, [device("NVIDIA H100")] * 2) == pytest.approx(expected)
    assert mfu(spec, per_second, [device("NVIDIA H100"), device("cpu")]) is None
    assert mfu(spec, per_second, jax.devices()) is None


def test_every_listed_device_finds_itself():
    for name, peak in PEAKS.items():
        assert peak_flops(name) == peak
