"""Products in bfloat16 on CPUs: what they compute, where they are used, and what a run says."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import STEPS, losses, run_process, train, write_config

from llm.config import Config, OptimizerConfig, TrainingConfig
from llm.errors import UsageError
from llm.model import attention, products
from llm.model.attention import attend_in_blocks
from llm.model.gpt import ModelSpec
from llm.model.products import contract, rounded
from llm.model_config import ModelConfig
from llm.run import provenance, setup
from llm.run.directory import RunDirectory
from llm.run.provenance import dtype_to_train
from llm.runtime import has_bfloat16_units
from llm.text.batches import Batch
from llm.training.optimizer import make_optimizer
from llm.training.state import abstract_state
from llm.training.step import accumulate_gradients, make_train_step

# Linear layers, both products of attention, and the head's gradient by device.
CONTRACTIONS = {
    "BTD,DF->BTF": ((2, 5, 8), (8, 6)),
    "BTKGH,BSKH->BKGTS": ((2, 5, 3, 2, 8), (2, 7, 3, 8)),
    "BKGTS,BSKH->BKGTH": ((2, 3, 2, 5, 7), (2, 7, 3, 8)),
    "bsRD,bsRV->bsDV": ((2, 1, 6, 8), (2, 1, 6, 5)),
    "BTV,DV->BTD": ((2, 5, 7), (8, 7)),
}


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def to_bfloat16(x):
    """Rounded to 8 significant bits, ties to even, by the bits of float32; as float64."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded_bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded_bits.astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("letters", CONTRACTIONS)
def test_operands_are_rounded_and_sums_are_not_in_all_three_products(letters):
    x, y = (normal(seed, shape) for seed, shape in enumerate(CONTRACTIONS[letters]))
    of_x, of_y, of_out = letters.replace("->", ",").split(",")

    @jax.jit
    def all_three(x, y, d_out):
        with rounded(True):
            out, pullback = jax.vjp(functools.partial(contract, letters), x, y)
            return out, *pullback(d_out)

    d_out = normal(2, np.einsum(letters, x, y).shape)
    found = all_three(x, y, d_out)
    x, y, d_out = map(to_bfloat16, (x, y, d_out))
    expected = (
        np.einsum(letters, x, y),
        np.einsum(f"{of_out},{of_y}->{of_x}", d_out, y),
        np.einsum(f"{of_x},{of_out}->{of_y}", x, d_out),
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)


def test_outside_of_rounding_products_are_plain():
    x, y = normal(0, (2, 5, 8)), normal(1, (8, 6))
    np.testing.assert_array_equal(contract("BTD,DF->BTF", x, y), jnp.einsum("BTD,DF->BTF", x, y))


def attention_in_float64(query, key, value, visible, d_out):
    """[B, T, N, H] and its gradients in closed form; head n reads key and value n // G."""
    groups = query.shape[2] // key.shape[2]
    query, d_out = np.float64(query), np.float64(d_out)
    key, value = (np.repeat(np.float64(x), groups, axis=2) for x in (key, value))
    scores = np.einsum("BTNH,BSNH->BNTS", query, key) * query.shape[-1] ** -0.5
    weights = np.exp(np.where(visible[:, None], scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("BNTS,BSNH->BTNH", weights, value)
    d_weights = np.einsum("BTNH,BSNH->BNTS", d_out, value)
    inner = np.sum(d_out * out, axis=-1).swapaxes(1, 2)[..., None]
    d_scores = weights * (d_weights - inner) * query.shape[-1] ** -0.5
    d_key = np.einsum("BNTS,BTNH->BSNH", d_scores, query)
    d_value = np.einsum("BNTS,BTNH->BSNH", weights, d_out)
    d_key, d_value = (
        x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3) for x in (d_key, d_value)
    )
    return out, np.einsum("BNTS,BSNH->BTNH", d_scores, key), d_key, d_value


def test_attention_in_blocks_equals_float64_and_leaves_out_later_keys(monkeypatch):
    """Blocks of 3, 3 and 2 queries; two heads for each key; a document ends in the second row."""
    monkeypatch.setattr(attention, "BLOCK", 3)
    query, d_out = normal(0, (2, 8, 4, 16)), normal(1, (2, 8, 4, 16))
    key, value = normal(2, (2, 8, 2, 16)), normal(3, (2, 8, 2, 16))
    documents = np.array([[0] * 8, [0] * 4 + [1] * 4])
    visible = np.tril(np.ones((8, 8), bool)) & (documents[:, :, None] == documents[:, None])

    def with_gradients(query, key, value, d_out):
        out, pullback = jax.vjp(
            functools.partial(attend_in_blocks, visible_BTS=visible), query, key, value
        )
        return out, *pullback(d_out)

    found = jax.jit(with_gradients)(query, key, value, d_out)
    expected = attention_in_float64(query, key, value, visible, d_out)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.float32
        assert 0 < np.linalg.norm(one - other) < 0.01 * np.linalg.norm(other)
    program = str(jax.make_jaxpr(with_gradients)(query, key, value, d_out))
    # Scores of the last two queries and all keys, and never of more queries.
    assert "[2,2,8,2,2]" in program and "[2,2,8,2,3]" not in program


MODEL = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=64, context_length=64, bias=False)
SPECS = {
    "plain": ModelSpec(MODEL, 70, rounded=True),
    "experts": ModelSpec(
        MODEL.model_copy(update={"n_expert": 4, "activation": "swiglu"}), 70, rounded=True
    ),
}


@pytest.mark.thorough(keep=len(SPECS))
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_gradient_of_rounded_products_is_near_that_of_exact_ones(spec, remat):
    from llm.model.gpt import initialise

    params = initialise(spec, jax.random.key(0))
    batch = Batch(np.random.default_rng(0).integers(0, 70, (4, 65), dtype=np.int32))
    training = TrainingConfig(batch_size=4, remat=remat)

    def gradients(spec):
        return jax.jit(lambda p: accumulate_gradients(spec, training, p, batch, None))(params)

    (found, terms), (exact, exact_terms) = map(
        gradients, (spec, dataclasses.replace(spec, rounded=False))
    )
    assert 0 < abs(terms.nll - exact_terms.nll) < 1e-3
    for name, gradient in exact.items():
        assert found[name].dtype == jnp.float32
        distance = jnp.linalg.norm(found[name] - gradient) / jnp.linalg.norm(gradient)
        assert 0 < distance < 0.03, name


@pytest.mark.skipif(not has_bfloat16_units(), reason="a CPU without units for bfloat16")
def test_the_compiled_step_multiplies_by_the_units():
    """Every product of blocks and head, which is easily lost: by an order of the operands, or by
    a result in bfloat16."""
    spec, optimizer = SPECS["plain"], OptimizerConfig()
    mesh = setup.make_mesh(Config().mesh, jax.devices()[:1])
    step = make_train_step(spec, optimizer, TrainingConfig(batch_size=4), mesh)
    state = abstract_state(spec, make_optimizer(optimizer), mesh)
    tokens = jax.ShapeDtypeStruct((4, 65), jnp.int32)
    text = step.lower(state, Batch(tokens)).compile().as_text()
    by_units = set(re.findall(r"calls=%([\w.]+), .*__ynn_fusion", text))
    dots = [part for part in re.split(r"\n(?=%)", text) if " dot(" in part]
    # A layer has queries, keys and values as one product, out, up and down, and two in attention;
    # then there is the head. Each has two more in the backward pass.
    assert len(dots) == 3 * (6 * MODEL.n_layer + 1)
    for product in dots:
        name, operands = re.match(r"%([\w.]+) \((.*)\) -> f32", product).groups()
        assert name in by_units and operands.count("bf16[") == 2, product
        # Row-major, M K by K N, behind the batch: another order is half as fast.
        batch = (re.search(r"lhs_batch_dims={([\d,]*)}", product) or ["", ""])[1]
        count = len(batch.split(",")) if batch else 0
        assert f"lhs_contracting_dims={{{count + 1}}}" in product, product
        assert f"rhs_contracting_dims={{{count}}}" in product, product


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with rounded products on one device, and what it printed."""
    folder = tmp_path_factory.mktemp("bfloat16")
    config = write_config(folder, training={"compute_dtype": "bfloat16"})
    code, output = run_process(config, "--logging.progress=plain")
    assert code == 0, output
    return folder / "run", output


def test_a_run_says_that_it_rounds_products(trained):
    run, output = trained
    assert " x cpu, bfloat16 products" in output
    assert json.loads((run / "run.json").read_text())["model"]["compute_dtype"] == "bfloat16"


def test_what_a_person_reads_is_exact_whatever_training_rounded(trained):
    """The validation loss of the last step is that of the opened model in float32."""
    from llm.model.gpt import bind
    from llm.model.loss import token_log_likelihood
    from llm.run.open import open_model
    from llm.text.batches import evaluation_batches
    from llm.text.shards import prepare

    opened = open_model(trained[0])
    forward = bind(opened.spec, opened.params)
    assert opened.spec.compute_dtype == "float32" and not opened.spec.rounded
    corpus = prepare(opened.config.data, opened.config.tokenizer)
    nats, count = 0.0, 0
    for batch in evaluation_batches(corpus.validation, context_length=16, batch_size=64):
        tokens = batch.tokens
        logprobs = token_log_likelihood(forward(tokens[:, :-1]), tokens[:, 1:])
        nats -= float((np.asarray(logprobs, np.float64) * batch.weights).sum())
        count += int(batch.weights.sum())
    reported = [loss for kind, step, loss in losses(trained[0]) if (kind, step) == ("eval", STEPS)]
    assert reported == [pytest.approx(nats / count, abs=1e-6)]


class CPU:
    platform = "cpu"


def test_auto_is_bfloat16_where_the_cpu_has_units_and_on_accelerators(monkeypatch):
    for units, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(setup, "has_bfloat16_units", lambda units=units: units)
        assert setup.compute_dtype("auto", CPU) == dtype
        assert setup.compute_dtype("float32", CPU) == "float32"
    assert setup.compute_dtype("auto", type("GPU", (), {"platform": "gpu"})) == "bfloat16"


def test_a_run_keeps_its_dtype_or_is_told_why_not(trained, monkeypatch):
    for module in (setup, provenance):
        monkeypatch.setattr(module, "has_bfloat16_units", lambda: False)
    run = RunDirectory(trained[0])
    with pytest.raises(
        UsageError, match=r"has 'bfloat16', this .* 'float32' .*-dtype bfloat16 .* no units for it"
    ):
        dtype_to_train(run, "auto", CPU)
    assert dtype_to_train(run, "bfloat16", CPU) == "bfloat16"
    monkeypatch.setattr(provenance, "has_bfloat16_units", lambda: True)
    with pytest.raises(UsageError, match=r"-dtype bfloat16 to go on with it, or run.dir"):
        dtype_to_train(run, "float32", CPU)


def test_a_run_that_began_in_float32_goes_on_so_where_there_are_units(copy, monkeypatch):
    monkeypatch.setattr(setup, "has_bfloat16_units", lambda: True)
    train(copy / "config.toml", "--training.steps=13", "--training.compute-dtype=auto")
    with pytest.raises(UsageError, match=r"has 'float32', this command has 'bfloat16'"):
        train(copy / "config.toml", "--training.steps=14", "--training.compute-dtype=bfloat16")


@pytest.mark.parametrize("units", [True, False])
def test_without_units_or_on_a_mesh_operands_are_rounded_all_the_same(units, monkeypatch):
    if units and not has_bfloat16_units():
        pytest.skip("a CPU without units for bfloat16")
    monkeypatch.setattr(products, "has_bfloat16_units", lambda: units)
    x, y = normal(0, (2, 5, 8)), normal(1, (8, 6))
    with rounded(True):
        found = jax.jit(functools.partial(contract, "BTD,DF->FTB"))(x, y)
    expected = np.einsum("BTD,DF->FTB", to_bfloat16(x), to_bfloat16(y))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
