"""Each file in configs/ is a whole page that says what it is, and what it says is so."""

import re
import tomllib
from pathlib import Path

import pytest

from llm.config import Config, flatten, load_config, to_toml, validate
from llm.errors import UsageError
from llm.interop.description import describe
from llm.model.flops import parameter_count
from llm.model.gpt import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").glob("*.toml"))
VOCABULARIES = {"bytes": 257, "characters": 65, "gpt2": 50257, "cl100k_base": 100277}
GPT2 = {
    "gpt2_124m": (12, 12, 768, 124_439_808),
    "gpt2_350m": (24, 16, 1024, 354_823_168),
    "gpt2_774m": (36, 20, 1280, 774_030_080),
    "gpt2_1558m": (48, 25, 1600, 1_557_611_200),
}


def load(name: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.toml")


def opening(path: Path) -> str:
    """The comment that a file begins with, as text."""
    lines = path.read_text().splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").strip() for line in comment)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_the_recipes_of_the_readme_are_there():
    assert {path.stem for path in FILES} >= {
        *GPT2, "quickstart", "shakespeare_char", "shakespeare_char_cpu", "modern_124m",
        "llama3_8b", "moe_8x124m", "shakespeare_char_fast", "modern_shakespeare_char",
    }  # fmt: skip


def test_a_config_survives_being_written_and_read(path):
    config = load_config(path)
    assert validate(tomllib.loads(to_toml(config)), where="test") == config


def test_a_config_is_exported_to_hugging_face_or_says_why_not(path):
    """The settings alone; tests/test_families.py compares what is written."""
    try:
        describe(load_config(path).model.resolved(), lambda family, described: "")
    except UsageError:
        assert "export-hf does not write it" in opening(path)
    else:
        assert "export-hf does not write it" not in opening(path)


def test_a_config_opens_with_its_command_and_its_figures(path):
    text = opening(path)
    assert f"python train.py configs/{path.name}" in text
    for label in ("Hardware", "Time", "Loss"):
        assert re.search(rf"^{label}  +\S", text, re.MULTILINE), label


def test_a_config_counts_its_parameters_right(path):
    config = load_config(path)
    counted = parameter_count(ModelSpec(config.model, VOCABULARIES[config.tokenizer.kind]))
    assert f"{counted:,} parameters" in opening(path)


def test_the_arithmetic_of_a_config_is_right(path):
    config = load_config(path)
    sequences, length = config.training.batch_size, config.model.context_length
    text = opening(path)
    per_step = f"{sequences} sequences x {length} "
    assert per_step in text
    assert re.search(rf"{per_step}\w+ = {sequences * length:,} \w+ a step", text)
    assert re.search(rf"{config.training.steps:,} steps|{config.training.steps} steps", text)
    if config.training.micro_batch_size:
        micro = config.training.micro_batch_size
        claim = re.search(
            r"(\d+) sequences at once over 8 devices, (\d+) on each; (\d+) times", text
        )
        assert claim is not None
        assert list(map(int, claim.groups())) == [micro, micro // 8, config.training.accumulation]
        assert micro % 8 == 0


@pytest.mark.parametrize("name", GPT2)
def test_gpt2_has_the_published_shape_and_size(name):
    layers, heads, width, parameters = GPT2[name]
    config = load(name)
    model = config.model
    assert (model.n_layer, model.n_head, model.d_model) == (layers, heads, width)
    assert (model.context_length, model.bias, model.tie_embeddings) == (1024, True, True)
    assert (model.norm, model.positions, model.activation) == ("layernorm", "learned", "gelu_tanh")
    assert parameter_count(ModelSpec(model, 50257)) == parameters
    assert config.training.batch_size * model.context_length == 491_520


# From nanoGPT's config/train_shakespeare_char.py, train.py and README.md.
NANOGPT_CHARACTERS = {
    "data.validation": "tail:0.1",
    "tokenizer.kind": "characters",
    "model.positions": "learned",
    "model.norm": "layernorm",
    "model.norm_epsilon": 1e-5,
    "model.bias": False,
    "model.activation": "gelu",
    "model.tie_embeddings": True,
    "model.qk_norm": False,
    "model.init_std": 0.02,
    "model.zero_init_projections": False,
    "optimizer.kind": "adamw",
    "optimizer.learning_rate": 1e-3,
    "optimizer.min_learning_rate": 1e-4,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 100,
    "optimizer.weight_decay": 0.1,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.99,
    "optimizer.epsilon": 1e-8,
    "optimizer.grad_clip": 1.0,
    "training.micro_batch_size": 0,
    "training.eval_every": 250,
    "training.label_smoothing": 0.0,
}
ON_A_GPU = {
    "model.n_layer": 6, "model.n_head": 6, "model.d_model": 384, "model.context_length": 256,
    "model.dropout": 0.2, "training.steps": 5000, "training.batch_size": 64,
}  # fmt: skip
ON_A_CPU = {
    "model.n_layer": 4, "model.n_head": 4, "model.d_model": 128, "model.context_length": 64,
    "model.dropout": 0.0, "training.steps": 2000, "training.batch_size": 12,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "own"), [("shakespeare_char", ON_A_GPU), ("shakespeare_char_cpu", ON_A_CPU)]
)
def test_the_shakespeare_recipes_are_nanogpts(name, own):
    found = flatten(load(name))
    expected = {**NANOGPT_CHARACTERS, **own}
    assert {key: found[key] for key in expected} == expected
    # nanoGPT does not pad a vocabulary of characters.
    assert ModelSpec(load(name).model, 65).padded_vocab_size == 65


def test_gpt2_124m_trains_as_nanogpt_does():
    found = flatten(load("gpt2_124m"))
    expected = {
        "optimizer.learning_rate": 6e-4,
        "optimizer.min_learning_rate": 6e-5,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 2000,
        "optimizer.weight_decay": 0.1,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.95,
        "optimizer.grad_clip": 1.0,
        "training.steps": 600_000,
        "training.batch_size": 12 * 5 * 8,
        "training.micro_batch_size": 12 * 8,
    }
    assert {key: found[key] for key in expected} == expected


def test_the_quickstart_needs_nothing_from_outside():
    config = load("quickstart")
    assert (config.data.source, config.tokenizer.kind) == ("stdlib", "bytes")
