"""One optimization step: micro-batches, gradients, all_reduce, clipping, two optimizers; compiled on accelerators.

A compiled step declares its state (model, optimizers). Python values inside it become constants of the trace, so a
change of phase or of the pool needs a new `Step`. Temperature and learning rates are arrays and change without one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from dylora_mlx.config import TrainingConfig
from dylora_mlx.distributed.group import world
from dylora_mlx.growth.feature_statistics import FeatureScale
from dylora_mlx.model.decoder.decoder import Adapters, RoutedDecoder
from dylora_mlx.model.experts import lora
from dylora_mlx.model.experts.lora import Stack
from dylora_mlx.model.kernels import streams
from dylora_mlx.model.routing.router import Gate, Routing
from dylora_mlx.training.step.losses import (
    LossTerms,
    MicroBatch,
    RehearsalBatch,
    ReplayBatch,
    expert_usage,
    loss_terms,
    replay_loss_terms,
    total_loss,
)
from dylora_mlx.training.step.optimizers import Optimizers, trainable_parameters


class GlobalCounts(NamedTuple):
    """Counts of a step that is sharded over several ranks, float32 scalars."""

    tokens: mx.array
    """Target tokens of the whole step."""
    nonempty: mx.array
    """Micro-batches of the whole step that have any tokens."""
    stop_requested: mx.array
    """1 if this rank received a stop signal, else 0; the only value that differs between ranks."""


def all_reduce_results(results: Any, global_counts: GlobalCounts, compiled: bool) -> Any:
    """All-reduce a tree of results in a single message; return the sums and the number of ranks asked to stop.

    The stop flag travels with the gradients, so all ranks stop after the same step without a message of its own.
    """
    group = world()
    if compiled:
        return group.all_reduce_tree((results, global_counts.stop_requested))
    mx.eval(results)  # own work first, so that wait_seconds counts only the waiting for other ranks
    summed = group.all_reduce_tree((results, global_counts.stop_requested))
    with group.watch_for_lost_ranks():
        mx.eval(summed)
    return summed


def zero_results(
    trainable: dict[str, Any],
) -> tuple[tuple[mx.array, mx.array, tuple[mx.array, mx.array]], dict[str, Any]]:
    """Return zero loss, metrics and gradients, for a rank without a micro-batch in this step.

    It still has to take part in the all_reduce, with the same tree as the other ranks. `trainable` is the tree that is
    differentiated; see `_trainable_tree`.
    """
    zero, num_experts = mx.array(0.0), len(trainable["gate"][1])
    value = zero, mx.zeros(len(LossTerms._fields)), (mx.zeros(num_experts), zero)
    return value, tree_map(mx.zeros_like, trainable)


class StepMetrics(NamedTuple):
    """Results of a step over all micro-batches and ranks, as lazy arrays: reading one waits for the device."""

    train_loss: mx.array
    """The whole objective."""
    terms: LossTerms
    """Terms: lm_loss per target token, router terms as means over micro-batches, replay terms per replayed token."""
    tokens: mx.array
    """Number of target tokens."""
    grad_norm: mx.array
    """Gradient norm of experts and router together, before they are clipped apart."""
    expert_norms: list[mx.array]
    """Gradient norm of each expert, from expert_id 1 on; 0 for a frozen expert."""
    router_norm: mx.array
    """Gradient norm of the router's rows, for standardised features if the step has a scale."""
    usage: mx.array
    """Mean gate of each expert, [E], the null expert first."""
    entropy: mx.array
    """Mean routing entropy in nats."""
    ranks_asked_to_stop: mx.array | None = None
    """Number of ranks that received a stop signal; None on a single rank."""


def _sum(parts: Iterable[mx.array]) -> mx.array:
    """Sum arrays without the initial 0 of `sum`, which would add an operation."""
    first, *rest = parts
    return sum(rest, first)


def global_norm(tree: Any) -> mx.array:
    """Return the Euclidean norm over all arrays of a tree, computed in float32."""
    squares = [mx.sum(mx.square(v.astype(mx.float32))) for v in dict(tree_flatten(tree)).values()]
    return mx.sqrt(sum(squares, mx.array(0.0)))


def clip_norm(tree: Any, max_norm: float) -> Any:
    """Scale the arrays of a tree so that their global norm is at most `max_norm`."""
    # mx.minimum, not a branch: reading the norm would wait for the device. 1e-6 avoids a division by zero.
    factor = mx.minimum(1.0, max_norm / (global_norm(tree) + 1e-6))
    return tree_map(lambda array: array * factor, tree)


StepState = list[Any]
"""Trees of arrays that a step updates: the trainable experts, the router, both optimizer states."""


class Step:
    """A training step for one phase and pool; a call updates model and optimizers in place.

    All experts that are not frozen are trained. The frozen ones are stacked once, on construction, for dense or gather
    computation. `compilations` counts traces of the compiled step. `active_ranks` is the number of LoRA ranks that a
    token is multiplied with.

    Args:
        model: The routed model.
        optimizers: Optimizers with moments for all trainable parameters.
        training: Training options.
        top_k: Experts per token; None for dense routing.
        expert: expert_id of the expert that learns the skill.
        compiled: Use `mx.compile`. Ignored when frozen experts are offloaded.
        min_gate: Lower bound of that expert's gate.
        feature_scale: Scale of the router's features. The rows are updated in the coordinates of standardised features,
            so that router_learning_rate means the same on every base. None: in those of the raw features.
    """

    def __init__(
        self,
        model: RoutedDecoder,
        optimizers: Optimizers,
        training: TrainingConfig,
        top_k: int | None,
        expert: int,
        compiled: bool,
        min_gate: float = 0.0,
        feature_scale: FeatureScale | None = None,
    ):
        self.model, self.optimizers, self.training = model, optimizers, training
        self.feature_scale = feature_scale
        self.top_k, self.expert, self.min_gate = top_k, expert, min_gate
        self.compilations = 0
        expert_ids = range(1, len(model.experts) + 1)
        self.trainable = [i for i in expert_ids if tree_flatten(model.experts[i - 1].trainable_parameters())]
        self.dtype = model.base.model.norm.weight.dtype
        self.frozen = model.stack_experts([i for i in expert_ids if i not in self.trainable], top_k)
        # Evaluate once, here: a lazy stack would become part of the graph of a step.
        mx.eval(self.frozen)
        # Which offloaded experts to read depends on gate values, which a compiled graph cannot look at.
        self.compiled = compiled and self.frozen.load_experts is None
        rank_of = {expert_id: model.experts[expert_id - 1].rank for expert_id in expert_ids}
        frozen_ranks, trainable_ranks = (
            sorted(r for i, r in rank_of.items() if (i in self.trainable) is is_trainable)
            for is_trainable in (False, True)
        )
        # Gather multiplies a token with the factors of its top-k experts only, dense with those of all.
        use_gather = self.frozen.table_index is not None
        self.active_ranks = sum(trainable_ranks) + (
            frozen_ranks[-1] * min(top_k or 0, len(frozen_ranks)) if use_gather else sum(frozen_ranks)
        )
        self._gradient, self._replay_gradient = mx.value_and_grad(self._loss), mx.value_and_grad(self._replay_loss)
        # Only what the step changes: hundreds of frozen experts would be thousands of arrays in and out of each call.
        self.state: StepState = [*(model.experts[i - 1] for i in self.trainable), model.router, *optimizers.state]
        self._run = (
            partial(mx.compile, inputs=self.state, outputs=self.state)(self._step) if self.compiled else self._step
        )

    def __call__(
        self,
        batches: list[MicroBatch],
        memory: RehearsalBatch,
        temperature: mx.array,
        replayed: ReplayBatch | None = None,
        global_counts: GlobalCounts | None = None,
    ) -> StepMetrics:
        """Run one update.

        Args:
            batches: This rank's micro-batches.
            memory: Remembered features for the rehearsal loss.
            temperature: Router temperature, float32 scalar.
            replayed: Replayed text, or None.
            global_counts: Counts of the whole step if it is sharded over ranks; gradients are summed with all_reduce.
                None on a single rank.
        """
        outcome = self._run(batches, memory, temperature, replayed, global_counts)
        if global_counts is not None and self.compiled:
            # Not counted as waiting: the evaluation of a compiled step includes this rank's own work.
            with world().watch_for_lost_ranks(counted=False):
                mx.eval(outcome)
        return outcome

    def snapshot(self) -> StepState:
        """Return the state that an update changes, as references: arrays are immutable, an update replaces them."""
        return tree_map(lambda array: array, self.state)

    def restore(self, snapshot: StepState) -> None:
        """Undo updates since the snapshot, in place: a compiled step holds on to the state trees themselves."""
        _restore_tree(self.state, snapshot)

    def _loss(
        self,
        trainable: dict[str, Any],
        adapters: Adapters,
        batch: MicroBatch,
        memory: RehearsalBatch,
        temperature: mx.array,
        lm_scale: mx.array,
        share: mx.array,
    ) -> tuple[mx.array, mx.array, tuple[mx.array, mx.array]]:
        """Return a micro-batch's contribution to the objective, its terms [7], and (usage [E], entropy).

        Args:
            trainable: The tree that is differentiated; it replaces its counterpart in `adapters`.
            adapters: Stacked experts and gate.
            batch: The micro-batch.
            memory: Remembered features.
            temperature: Router temperature.
            lm_scale: 1 / target tokens of the whole step.
            share: Weight of this micro-batch in means over micro-batches; 0 if it is all padding.
        """
        adapters = _with_trainable(trainable, adapters)
        if batch.dropout_key is not None:
            stack = lora.with_dropout(adapters.stack, self.training.lora_dropout, batch.dropout_key)
            adapters = adapters._replace(stack=stack)
        routing = Routing(self.top_k, temperature, self.expert, self.min_gate, self.training.capacity_factor)
        _, terms, gates = loss_terms(self.model, batch, routing, memory, self.expert, self.training, adapters)
        terms = LossTerms(terms.lm_loss * lm_scale, *(term * share for term in terms[1:]))
        usage, entropy = expert_usage(mx.stop_gradient(gates), batch.valid_mask)
        # Stacked into one array: mx.compile fails on equal arrays returned beside a gradient, and terms with
        # coefficient 0 are equal.
        return total_loss(terms, self.training), mx.stack(list(terms)), (usage * share, entropy * share)

    def _replay_loss(
        self, trainable: dict[str, Any], adapters: Adapters, replayed: ReplayBatch, temperature: mx.array
    ) -> tuple[mx.array, mx.array, tuple[mx.array, mx.array]]:
        """Return the same as `_loss` for replayed text, with zero usage and entropy.

        The routing has no minimum gate: replayed text belongs to earlier experts.
        """
        routing = Routing(self.top_k, temperature)
        terms = replay_loss_terms(self.model, replayed, routing, _with_trainable(trainable, adapters))
        unused = mx.zeros(len(trainable["gate"][1])), mx.array(0.0)
        return total_loss(terms, self.training), mx.stack(list(terms)), unused

    def _step(
        self,
        batches: list[MicroBatch],
        memory: RehearsalBatch,
        temperature: mx.array,
        replayed: ReplayBatch | None,
        global_counts: GlobalCounts | None,
    ) -> StepMetrics:
        """Compute gradients and update experts and router. This is the function that is compiled."""
        # In a compiled step this Python code runs only while it is traced, so the counter counts traces.
        self.compilations += self.compiled
        trainable = lora.stack_dense(self.model.experts, self.trainable, self.dtype)
        adapters = Adapters(lora.join_stacks(self.frozen, trainable), self.model.router.gate())
        # A micro-batch of padding only, which completes the last step to a fixed shape, has weight 0.
        nonempty = [mx.minimum(b.valid_mask.sum(), 1.0) for b in batches]
        tokens = _sum(b.weights.sum() for b in batches) if global_counts is None else global_counts.tokens
        count = _sum(nonempty) if global_counts is None else global_counts.nonempty
        lm_scale, shares = 1 / mx.maximum(tokens, 1), [f / count for f in nonempty]
        if not self.compiled:
            # On a CPU the pieces of work run on threads with an MLX stream each: evaluate what they share beforehand.
            mx.eval(trainable, adapters, lm_scale, shares, batches, memory, temperature, replayed)
        work = []
        for batch, share in zip(batches, shares, strict=True):
            fresh_tree = _trainable_tree(trainable, adapters)
            work.append(partial(self._gradient, fresh_tree, adapters, batch, memory, temperature, lm_scale, share))
        if replayed is not None:
            work.append(
                partial(self._replay_gradient, _trainable_tree(trainable, adapters), adapters, replayed, temperature)
            )
        if not work:  # fewer micro-batches than ranks
            work.append(partial(zero_results, _trainable_tree(trainable, adapters)))
        results = [run() for run in work] if self.compiled else streams.run_concurrently(work)
        totals, ranks_asked = tree_map(lambda *parts: _sum(parts), *results), None
        if global_counts is not None:
            totals, ranks_asked = all_reduce_results(totals, global_counts, self.compiled)
        (total, terms, (usage, entropy)), gradients = totals
        grads = self._unstack_gradients(gradients)
        grad_norm, expert_norms, router_norm = (
            global_norm(grads),
            [global_norm(g) for g in grads["experts"]],
            global_norm(grads["router"]),
        )
        if self.training.max_grad_norm:
            # Apart, so that a large gradient of the router does not shrink the expert's step.
            grads = {name: clip_norm(part, self.training.max_grad_norm) for name, part in grads.items()}
        _update(self.model, self.optimizers, grads, self.trainable, self.feature_scale)
        return StepMetrics(
            total, LossTerms(*terms), tokens, grad_norm, expert_norms, router_norm, usage, entropy, ranks_asked
        )

    def _unstack_gradients(self, gradients: dict[str, Any]) -> dict[str, Any]:
        """Split gradients of the stacked factors and gate into a tree with the layout of the model's parameters."""
        experts = trainable_parameters(self.model, self.trainable)
        trained = [self.model.experts[expert_id - 1] for expert_id in self.trainable]
        for expert_id, grads in zip(self.trainable, lora.split_gradients(gradients["factors"], trained), strict=True):
            experts[expert_id - 1] = _drop_frozen(grads, experts[expert_id - 1])
        gate = Gate(*gradients["gate"])
        if self.feature_scale is not None:
            gate = self.feature_scale.gradient_for_standardised(gate)
        return {"experts": experts, "router": gate._asdict()}


def _drop_frozen(grads: dict, trainable: dict) -> dict:
    """Remove the gradients of frozen projections from those of an expert, to match its trainable parameters."""
    layers = [
        {name: grad if trainable_layer[name] else {} for name, grad in layer.items()}
        for layer, trainable_layer in zip(grads["layers"], trainable["layers"], strict=True)
    ]
    return {"layers": layers}


def _restore_tree(tree: Any, snapshot: Any) -> None:
    """Assign the arrays of a snapshot to the same places of a tree of dicts, lists and modules, in place."""
    for key, value in snapshot.items() if isinstance(snapshot, dict) else enumerate(snapshot):
        if isinstance(value, mx.array):
            tree[key] = value
        else:
            _restore_tree(tree[key], value)


def _trainable_tree(trainable: Stack, adapters: Adapters) -> dict[str, Any]:
    """Return the factors and gate to differentiate, as a new tree for each piece of work.

    While a gradient is traced, MLX puts tracers into the argument tree, so concurrent pieces must not share one.
    """
    return {"factors": lora.factor_pairs(trainable), "gate": list(adapters.gate)}


def _with_trainable(tree: dict[str, Any], adapters: Adapters) -> Adapters:
    """Return adapters whose trainable factors and gate are those of the differentiated tree."""
    layers = {
        layer: {name: f._replace(trainable=tree["factors"][layer][name]) for name, f in projections.items()}
        for layer, projections in adapters.stack.layers.items()
    }
    return Adapters(adapters.stack._replace(layers=layers), Gate(*tree["gate"]))


def _update(
    model: RoutedDecoder,
    optimizers: Optimizers,
    grads: dict[str, Any],
    trainable_ids: Collection[int],
    feature_scale: FeatureScale | None,
) -> None:
    """Apply the gradients of experts and router to the model, in place."""
    if any(grads.get("experts", [])):
        parameters = {"experts": trainable_parameters(model, trainable_ids)}
        model.update(optimizers.updated_experts({"experts": grads["experts"]}, parameters))
    gate = model.router.gate()
    rows = gate if feature_scale is None else feature_scale.for_standardised(gate)
    updated = Gate(**optimizers.router.apply_gradients(grads["router"], rows._asdict()))
    model.router.set_gate(updated if feature_scale is None else feature_scale.for_raw(updated))
