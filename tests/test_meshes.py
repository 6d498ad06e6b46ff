"""The same losses on every mesh, however a step is arranged.

Each mesh is trained on twice, so that accumulation, rematerialisation and the scan are each on once
and off once, and all eight ways to combine them are met over the meshes.
"""

import functools
import math

import jax
import numpy as np
import pytest

from llm.config import MeshConfig, OptimizerConfig, TrainingConfig
from llm.model.gpt import ModelSpec
from llm.model.sharding import make_mesh, shard_batch
from llm.model_config import ModelConfig
from llm.text.batches import Batch
from llm.training.optimizer import make_optimizer
from llm.training.state import create_state
from llm.training.step import BATCH_AXES, make_train_step

SPEC = ModelSpec(
    ModelConfig(
        n_layer=2, n_head=8, d_model=32, context_length=16, vocab_multiple=16, norm="rmsnorm",
        bias=False,
    ),
    70,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2)
STEPS, BATCH, ROWS = 30, 16, 8

PLAIN = {}
ACCUMULATED = {"micro_batch_size": ROWS}
RECOMPUTED = {"remat": "block"}
SCANNED = {"scan_layers": True}


def losses_on(axes, training, spec=SPEC, steps=STEPS):
    """float64 [steps], of batches that are learnt: the same few sequences in another order."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: math.prod(axes.values())])
    config = TrainingConfig(steps=STEPS, batch_size=BATCH, **training)
    state = create_state(
        spec, make_optimizer(OPTIMIZER), 0, mesh, stacked=training.get("scan_layers", False)
    )
    step = make_train_step(spec, OPTIMIZER, config, mesh)
    random = np.random.default_rng(0)
    pool = random.integers(0, 70, (2 * BATCH, 17), dtype=np.int32)
    losses = []
    for _ in range(steps):
        rows = pool[random.permutation(len(pool))[:BATCH]]
        state, metrics = step(state, shard_batch(mesh, Batch(rows), BATCH_AXES))
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@functools.cache
def losses_of_one_device():
    return losses_on({}, PLAIN)


@pytest.mark.thorough(keep=1)
@pytest.mark.parametrize(
    ("axes", "training"),
    [
        ({}, ACCUMULATED | RECOMPUTED | SCANNED),
        ({"data": 8}, RECOMPUTED | SCANNED),
        ({"data": 8}, ACCUMULATED),
        ({"data": 1, "fsdp": 8}, ACCUMULATED | SCANNED),
        ({"data": 1, "fsdp": 8}, RECOMPUTED),
        ({"data": 1, "tensor": 8}, ACCUMULATED | RECOMPUTED),
        ({"data": 1, "tensor": 8}, SCANNED),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ACCUMULATED | RECOMPUTED | SCANNED),
        ({"data": 2, "fsdp": 2, "tensor": 2}, PLAIN),
        ({"data": 1, "context": 4}, RECOMPUTED | SCANNED),
        ({"data": 2, "context": 4}, ACCUMULATED),
        ({"data": 1, "fsdp": 2, "tensor": 2, "context": 2}, SCANNED),
    ],
    ids=str,
)
def test_losses_are_those_of_one_device(axes, training):
    expected = losses_of_one_device()
    assert expected[-1] < 0.92 * expected[0]
    np.testing.assert_allclose(losses_on(axes, training), expected, rtol=1e-5)


@pytest.mark.thorough
def test_a_head_with_a_bias_gives_the_same_losses_on_a_mesh():
    """Its matrix has D + 1 rows, which no axis of a mesh divides evenly."""
    config = SPEC.config.model_copy(
        update={"block": "parallel_one_norm", "tie_embeddings": False, "head_bias": True}
    )
    spec = ModelSpec(config, 70)
    expected = losses_on({}, PLAIN, spec, steps=3)
    found = losses_on({"data": 2, "fsdp": 2, "tensor": 2}, PLAIN, spec, steps=3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
