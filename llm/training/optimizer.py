"""The update rule, from optax, and the learning rate over time.

AdamW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization". Muon: Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/. Warmup-stable-decay: Hu et al. 2024, "MiniCPM".
"""

from collections.abc import Mapping
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import optax

from llm.config import Config, OptimizerConfig

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
        optax.contrib.scale_by_muon(
            ns_steps=config.muon_iterations,
            beta=config.muon_momentum if momentum is None else momentum,
            # Of the last two dimensions, so that a stack is as many matrices. A tree like the
            # updates; optax 0.2.8's default of None fails inside a partition.
            weight_dimension_numbers=lambda updates: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates
            ),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_scale_by_shape, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-config.muon_learning_rate),
    )
    return optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, partition_labels))


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
