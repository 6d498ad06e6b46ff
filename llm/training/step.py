"""One optimizer step, pure: (state, batch) -> (state, metrics). No files, no clock, no globals.

B sequences per step  T positions  A micro-batches
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llm.config import OptimizerConfig, TrainingConfig
from llm.model.gpt import ModelSpec, Params, bind
from llm.model.loss import next_token_loss
from llm.model.products import rounded
from llm.model.remat import check_remat
from llm.model.router import Routing
from llm.model.sharding import constrain, sharding_of
from llm.text.batches import Batch
from llm.training.compiler import compiler_options
from llm.training.optimizer import learning_rate_factor, make_optimizer, muon_momentum
from llm.training.state import HISTORY, TrainState, state_shardings

Metrics = dict[str, jax.Array]
ROUTER_METRICS = ("load_balancing_loss", "router_z_loss", "router_load_max")

# How the arrays of a batch lie on the mesh. The odd position of its tokens, [B, T + 1], keeps the
# windows whole; the context axis divides the T inputs inside the step.
BATCH_AXES = ("batch", None)


class StepTerms(NamedTuple):
    """Sums over micro-batches, each with its share of the step's targets.

    objective: what is minimised. nll: nats per token. routing: of all blocks, None without experts.
    """

    objective: jax.Array
    nll: jax.Array
    routing: Routing | None


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A step for one mesh, compiled when it is first taken: (state, batch) -> (state, metrics)."""

    mesh: Mesh
    jitted: Any

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(self.mesh):
            return self.jitted(state, batch)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The program before it is compiled, of shapes or arrays; for those who look at it."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(state, batch)


def make_train_step(
    spec: ModelSpec, optimizer_config: OptimizerConfig, training: TrainingConfig, mesh: Mesh
) -> TrainStep:
    """The compiled step. It gives the state's buffers to the new state.

    Metrics (float32 scalars unless said): loss (nats per token, without smoothing and z-loss),
    grad_norm (before clipping), learning_rate (used by this update), finite (bool), spike (bool).
    An update that is not finite, or a spike, is masked out. With experts the metrics of
    `router_metrics` come too.

    Raises:
      UsageError: the devices cannot do what training.remat asks for.
    """
    check_remat(training.remat, mesh)
    optimizer = make_optimizer(optimizer_config)
    shardings = state_shardings(spec, optimizer, mesh, stacked=training.scan_layers)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout_key = jax.random.fold_in(state.key, state.step) if spec.config.dropout else None
        gradients, loss = accumulate_gradients(spec, training, state.weights, batch, dropout_key)
        grad_norm = optax.tree.norm(gradients)
        factor = learning_rate_factor(optimizer_config, training.steps, state.step)
        momentum = muon_momentum(optimizer_config, state.step)
        update = make_optimizer(optimizer_config, momentum).update
        with rounded(spec.rounded):
            updates, opt_state = update(gradients, state.opt_state, state.weights)
        updates = jax.tree.map(lambda update: factor * update, updates)
        weights = optax.apply_updates(state.weights, updates)
        # The weights too: an update that is finite can still carry one out of float32's range.
        finite = jnp.isfinite(loss.objective) & jnp.isfinite(grad_norm) & all_finite(weights)
        spike = is_spike(loss.nll, state.loss_history, training.spike_zscore)
        updated = TrainState(
            step=state.step + 1,
            weights=weights,
            opt_state=opt_state,
            key=state.key,
            loss_history=state.loss_history.at[state.step % HISTORY].set(loss.nll),
        )
        metrics = {
            "loss": loss.nll,
            "grad_norm": grad_norm,
            "learning_rate": factor * optimizer_config.learning_rate,
            "finite": finite,
            "spike": spike,
            **router_metrics(loss.routing),
        }
        return select_update(finite & ~spike, updated, state), metrics

    jitted = jax.jit(
        train_step,
        in_shardings=(shardings, sharding_of(mesh, BATCH_AXES)),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
    return TrainStep(mesh, jitted)


def accumulate_gradients(
    spec: ModelSpec,
    training: TrainingConfig,
    params: Params,
    batch: Batch,
    dropout_key: jax.Array | None,
) -> tuple[Params, StepTerms]:
    """Gradient and loss of the mean over all targets, in A micro-batches one after the other.

        loss = sum_t weight_t nll_t / sum_t weight_t          over the B T targets of the batch

    Each micro-batch's loss is a sum divided by the weights of the whole batch, so adding the
    micro-batches gives the gradient of the whole batch, not an average of averages. The router's
    losses are means of those of each micro-batch; load balancing is no sum over tokens, so that its
    part of the gradient is not quite that of the whole batch.
    """
    A, (B, window) = training.accumulation, batch.tokens.shape
    total = B * (window - 1) if batch.weights is None else batch.weights.sum()
    gradient = jax.grad(_objective, has_aux=True)

    def micro(index: int | jax.Array, part: Batch) -> tuple[Params, StepTerms]:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        with rounded(spec.rounded):
            return gradient(params, spec, training, part, total, key)

    if A == 1:
        return micro(0, batch)
    # Strided, so that each micro-batch has rows on every device that holds a share of the batch.
    parts = jax.tree.map(lambda x: x.reshape(B // A, A, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, micro(*part)), None

    none = jnp.zeros(())
    routing = Routing(none, none, none) if spec.config.has_experts else None
    zero = (jax.tree.map(jnp.zeros_like, params), StepTerms(none, none, routing))
    return jax.lax.scan(add, zero, (jnp.arange(A), parts))[0]


def _objective(
    params: Params,
    spec: ModelSpec,
    training: TrainingConfig,
    part: Batch,
    total: float | jax.Array,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, StepTerms]:
    model = bind(spec, params)
    inputs_BT, targets_BT, segments_BT = split_batch(part)
    hidden_BTD, routing_L = model.hidden_and_routing(
        inputs_BT, segments_BT, dropout_key=dropout_key, remat=training.remat
    )
    if part.weights is None:
        weights_BT = jnp.full(targets_BT.shape, 1.0 / total, jnp.float32)
    else:
        weights_BT = part.weights / total
    terms = next_token_loss(
        model,
        hidden_BTD,
        targets_BT,
        weights_BT,
        label_smoothing=training.label_smoothing,
        z_loss=training.z_loss,
        chunk_length=training.loss_chunk,
    )
    if routing_L is None:
        return terms.objective, StepTerms(terms.objective, terms.nll, None)
    share = 1 / training.accumulation
    routing = jax.tree.map(lambda value: share * value, routing_L.over_blocks())
    objective = terms.objective + router_loss(routing, training)
    return objective, StepTerms(objective, terms.nll, routing)


def split_batch(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Inputs, targets and segments of a batch, [B, T], divided along the context axis."""
    halves = (batch.tokens[:, :-1], batch.tokens[:, 1:], batch.segments)
    return jax.tree.map(lambda x_BT: constrain(x_BT, "batch", "sequence"), halves)


def router_loss(routing: Routing, training: TrainingConfig) -> jax.Array:
    """What keeps the experts in use and the router's scores small, as the settings weigh it."""
    return (
        training.load_balancing_loss * routing.load_balancing
        + training.router_z_loss * routing.z_loss
    )


def router_metrics(routing: Routing | None) -> Metrics:
    """The fields of metrics.jsonl that only a model with experts has."""
    if routing is None:
        return {}
    return dict(zip(ROUTER_METRICS, routing, strict=True))


def all_finite(weights: Params) -> jax.Array:
    """Whether no weight is NaN or infinite."""
    return jnp.stack([jnp.isfinite(weight).all() for weight in weights.values()]).all()


def is_spike(loss: jax.Array, history: jax.Array, zscore: float) -> jax.Array:
    """Whether (loss - mean) / std over a full history is above `zscore`; never for zscore = 0."""
    if not zscore:
        return jnp.zeros((), bool)
    full = jnp.isfinite(history).all()
    return full & (loss - history.mean() > zscore * history.std())


def select_update(apply: jax.Array, updated: TrainState, state: TrainState) -> TrainState:
    """The updated state, or the old one with only its step advanced.

    By `where`: multiplying a NaN update by zero would keep the NaN.
    """

    def select(new, old):
        return jax.tree.map(lambda a, b: jnp.where(apply, a, b), new, old)

    return dataclasses.replace(
        updated,
        weights=select(updated.weights, state.weights),
        opt_state=select(updated.opt_state, state.opt_state),
        loss_history=select(updated.loss_history, state.loss_history),
    )
