"""The update rule, from optax, and the learning rate over time.

AdamW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization". Muon: Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/. Warmup-stable-decay: Hu et al. 2024, "MiniCPM".
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm.config import Config, OptimizerConfig
from llm.model.products import contract
from llm.model.sharding import constrain, kind_in_context, shares
from llm.model.stack import is_stacked

# Of Newton-Schulz, by Jordan et al.: they raise the smallest singular values fastest.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# A CPU computes so many elements of a stack at once, a MB, so that they stay in its caches.
AT_ONCE = 2**18

# How far below its final value Muon's momentum begins, when it is warmed up.
MOMENTUM_WARMUP = 0.1


def learning_rate_factor(config: OptimizerConfig, steps: int, step: jax.Array) -> jax.Array:
    """Learning rate of update `step` (from 0) as a fraction of its peak, in [0, 1].

    warmup     (step + 1) / (warmup_steps + 1), as nanoGPT
    cosine     m + (1 - m) (1 + cos(pi p)) / 2,   p = progress from the end of warmup to `end`
    linear     1 - (1 - m) p
    wsd        1 until the last decay_fraction of the steps to `end`, then linear to m
    constant   1

    with m = min_learning_rate / learning_rate and end = decay_steps, or `steps` without it. From
    `end` on the rate is held at m. The factor is the smaller of warmup's and decay's,
    so that the rate never jumps, even if wsd begins to decay before its warmup ends.
    """
    floor = config.min_learning_rate / config.learning_rate
    warmup, end = config.warmup_steps, config.decay_steps or steps
    begin = end * (1.0 - config.decay_fraction) if config.schedule == "wsd" else warmup
    progress = jnp.clip((step - begin) / max(end - begin, 1.0), 0.0, 1.0)
    match config.schedule:
        case "cosine":
            decayed = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        case "linear" | "wsd":
            decayed = 1.0 - (1.0 - floor) * progress
        case "constant":
            decayed = jnp.ones_like(progress)
        case _:
            assert_never(config.schedule)
    return jnp.minimum((step + 1) / (warmup + 1), decayed)


def jump_of_rate(config: Config, changed: Mapping[str, tuple[Any, Any]], step: int) -> str | None:
    """What a person must know if update `step` gets another learning rate than it would have had.

    Args:
      changed: `section.key` -> (before, now) of the settings that a resumed run changes.
    """
    before = config.optimizer.model_copy(
        update={
            name.removeprefix("optimizer."): values[0]
            for name, values in changed.items()
            if name.startswith("optimizer.")
        }
    )
    steps, now = changed.get("training.steps", (config.training.steps,))[0], config.optimizer
    at = jnp.float32(step)
    old = before.learning_rate * float(learning_rate_factor(before, steps, at))
    new = now.learning_rate * float(learning_rate_factor(now, config.training.steps, at))
    if abs(new - old) <= 1e-3 * old:
        return None
    end = before.decay_steps or steps
    hold = f"; to keep the old schedule: --optimizer.decay-steps {end}"
    # To hold a rate of zero would be no training.
    can_hold = "training.steps" in changed and not now.decay_steps and old > 0
    said = f"the learning rate of step {step + 1} is {new:.3g}, and was to be {old:.3g}"
    return said + hold * can_hold


def muon_momentum(config: OptimizerConfig, step: jax.Array) -> jax.Array | float:
    """Muon's momentum at update `step` (from 0): it rises linearly to config.muon_momentum.

    While the first gradients still turn quickly, a short memory follows them better (Jordan et
    al.; https://github.com/KellerJordan/modded-nanogpt raises it from 0.85 to 0.95).
    """
    steps = config.muon_momentum_warmup_steps
    if not steps:
        return config.muon_momentum
    start = max(0.0, config.muon_momentum - MOMENTUM_WARMUP)
    progress = jnp.minimum(step / steps, 1.0)
    return start + (config.muon_momentum - start) * progress


def make_optimizer(
    config: OptimizerConfig, momentum: jax.Array | float | None = None
) -> optax.GradientTransformation:
    """Gradients to updates at the peak rate; the step multiplies by `learning_rate_factor`.

    Keeping the schedule out of the optimizer's state lets a resumed run change its length, and
    lets the update number, not a count of updates that were not skipped, set the learning rate.

    Args:
      momentum: Muon's at this update; None: config.muon_momentum. The state is the same for any.
    """
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    adamw = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
        optax.scale(-config.learning_rate),
    )
    if config.kind == "adamw":
        return optax.chain(clip, adamw)
    muon = optax.chain(
        # Its momentum alone: without an iteration, this preconditioning changes no update.
        optax.contrib.scale_by_muon(
            COEFFICIENTS,
            ns_steps=0,
            preconditioning="aol",
            beta=config.muon_momentum if momentum is None else momentum,
            # Of the last two dimensions, so that a stack is as many matrices. A tree like the
            # updates; optax 0.2.8's default of None fails inside a partition.
            weight_dimension_numbers=lambda updates: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates
            ),
        ),
        optax.stateless(lambda updates, _: orthogonal(updates, config.muon_iterations)),
        optax.stateless(lambda updates, _: jax.tree.map(_scale_by_shape, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-config.muon_learning_rate),
    )
    return optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, partition_labels))


def orthogonal(updates: Mapping[str, Any], iterations: int) -> dict[str, Any]:
    """Each matrix [in, out] brought close to the nearest orthogonal one, by Newton-Schulz.

    Matrices of one shape are one stack, and its matrices are divided over the devices: rows are
    traded for whole matrices once, and back, because products of divided matrices would send more
    in each iteration. An expert's matrix stays where its expert lies.

    Args:
      updates: name -> [in, out], with experts [E, in, out], each with [L] before it if it is
        stacked; leaves without arrays are left alone.
    """
    stacks: dict[tuple[int, ...], dict[str, jax.Array]] = {}
    for name, update in updates.items():
        if isinstance(update, jax.Array):
            layers = update if is_stacked(name) else update[None]
            stacks.setdefault(layers.shape[1:], {})[name] = layers
    result = dict(updates)
    for shape, members in stacks.items():
        experts = ("expert",) * (len(shape) - 2)
        sizes = [len(layers) for layers in members.values()]
        stack = constrain(jnp.concatenate([*members.values()]), None, *experts, "embed", None)
        # Filled up with zeros, which stay zeros.
        padding = -len(stack) % shares("matrix")
        stack = jnp.pad(stack, [(0, padding), *[(0, 0)] * len(shape)])
        stack = constrain(stack, "matrix_of_rows", *experts, "embed", None)
        stack = constrain(stack, "matrix", *experts, None, None)
        stack = _in_parts(functools.partial(_newton_schulz, iterations=iterations), stack)
        stack = constrain(stack, "matrix", *experts, None, None)
        stack = constrain(stack, "matrix_of_rows", *experts, "embed", None)
        stack = constrain(stack, None, *experts, "embed", None)
        parts = jnp.split(stack[: sum(sizes)], np.cumsum(sizes)[:-1].tolist())
        for name, layers in zip(members, parts, strict=True):
            result[name] = layers.reshape(updates[name].shape)
    return result


def _in_parts(function: Callable[[jax.Array], jax.Array], stack: jax.Array) -> jax.Array:
    """The function of a stack, of one part after the other if one CPU computes them all."""
    if jax.sharding.get_abstract_mesh().size > 1 or kind_in_context() != "cpu":
        return function(stack)
    fitting = max(1, AT_ONCE // math.prod(stack.shape[1:]))
    at_once = math.gcd(len(stack), 2 ** (fitting.bit_length() - 1))
    return jax.lax.map(function, stack.reshape(-1, at_once, *stack.shape[1:])).reshape(stack.shape)


def _newton_schulz(x: jax.Array, iterations: int) -> jax.Array:
    """X <- a X + (b A + c A A) X with A = X X^T, from X / |X|, for each matrix [N, (E), in, out].

    Products are rounded as training's are (llm/model/products.py).
    """
    if x.shape[-2] > x.shape[-1]:  # the shorter side makes the smaller A
        return _newton_schulz(x.mT, iterations).mT
    a, b, c = COEFFICIENTS
    of = "NE"[: x.ndim - 2]
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8
    for _ in range(iterations):
        gram = contract(f"{of}IK,{of}JK->{of}IJ", x, x)
        square = contract(f"{of}IJ,{of}JK->{of}IK", gram, gram)
        x = a * x + contract(f"{of}IJ,{of}JK->{of}IK", b * gram + c * square, x)
    return x


def is_matrix(params: Mapping[str, Any]) -> dict[str, bool]:
    """Which parameters decay: matrices and embeddings, not biases and norms.

    By name: a stack of norms has two dimensions as a matrix has.
    """
    return {name: not name.endswith((".bias", ".scale")) for name in params}


def partition_labels(params: Mapping[str, Any]) -> dict[str, str]:
    """Muon for the matrices inside blocks; AdamW for embeddings, head, routers, norms and biases.

    A router is a head: its columns score experts as those of the head score tokens.
    """
    return {
        name: "muon"
        if matrix and name.startswith("blocks.") and ".router." not in name
        else "adamw"
        for name, matrix in is_matrix(params).items()
    }


def _scale_by_shape(update: jax.Array) -> jax.Array:
    """An orthogonal [in, out] update changes its output by about sqrt(out / in) (Jordan et al.)."""
    d_in, d_out = update.shape[-2:]
    return update * max(1.0, d_out / d_in) ** 0.5
