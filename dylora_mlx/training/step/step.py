"""One optimisation step: micro-batches, gradients, clipping, two optimizers; compiled on accelerators.

The state of a compiled step is explicit (model, optimizers), a Python value inside it is frozen when it is traced: so a
change of phase or of the pool builds a new step, while temperature and learning rates are arrays and never do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from dylora_mlx.config import TrainingConfig
from dylora_mlx.distributed.group import world
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
    """Of a step that several ranks share, float32 scalars: its learned tokens, its micro-batches with any text, and whether
    this rank was asked to leave."""

    tokens: mx.array
    nonempty: mx.array
    stop_requested: mx.array


def all_reduce_results(found: Any, whole: GlobalCounts, compiled: bool) -> Any:
    """What all ranks found together, a tree of sums in one array on the wire, and how many of them were asked to leave."""
    group = world()
    if compiled:
        return group.all_reduce_tree((found, whole.stop_requested))
    mx.eval(found)  # so that waiting for others is not taken for work
    summed = group.all_reduce_tree((found, whole.stop_requested))
    with group.watch_for_lost_ranks():
        mx.eval(summed)
    return summed


def zero_results(
    learned: dict[str, Any],
) -> tuple[tuple[mx.array, mx.array, tuple[mx.array, mx.array]], dict[str, Any]]:
    """What a rank without a micro-batch finds: zeros, as a micro-batch without a token would. learned: what is
    differentiated."""
    zero, expert_ids = mx.array(0.0), len(learned["gate"][1])
    value = zero, mx.zeros(len(LossTerms._fields)), (mx.zeros(expert_ids), zero)
    return value, tree_map(mx.zeros_like, learned)


class StepMetrics(NamedTuple):
    """Arrays that a step returns; reading one waits for the device.

    train_loss: the whole objective; terms: its parts, per token or per batch; tokens: learned tokens; grad_norm: global,
    before clipping; expert_norms: by column, 0 for a frozen expert; router_norm; usage [E]; entropy, in nats; asked: how many
    ranks were asked to leave, if there are several.
    """

    train_loss: mx.array
    terms: LossTerms
    tokens: mx.array
    grad_norm: mx.array
    expert_norms: list[mx.array]
    router_norm: mx.array
    usage: mx.array
    entropy: mx.array
    ranks_asked_to_stop: mx.array | None = None


def _sum(parts: Iterable[mx.array]) -> mx.array:
    first, *rest = parts
    return sum(rest, first)


def global_norm(tree: Any) -> mx.array:
    """Euclidean norm over all arrays of a tree, float32."""
    squares = [mx.sum(mx.square(v.astype(mx.float32))) for v in dict(tree_flatten(tree)).values()]
    return mx.sqrt(sum(squares, mx.array(0.0)))


StepState = list[Any]
"""Trees of arrays: the experts that are learned, the router, both optimizers."""


class Step:
    """The step of one phase: `top_k` experts a token (None: dense), `expert` the gate column that is learning, and the
    least gate, `floor`, that it has.

    It updates model and optimizers in place. The experts that are not frozen are learned; frozen ones are concatenated
    here, once, or looked up. `compilations` counts how often a compiled step was traced; `ranks`, those that a token is
    multiplied with.
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
    ):
        self.model, self.optimizers, self.training = model, optimizers, training
        self.top_k, self.expert, self.min_gate = top_k, expert, min_gate
        self.compilations = 0
        expert_ids = range(1, len(model.experts) + 1)
        self.trainable = [c for c in expert_ids if tree_flatten(model.experts[c - 1].trainable_parameters())]
        self.dtype = model.base.model.norm.weight.dtype
        self.frozen = model.stack_experts([c for c in expert_ids if c not in self.trainable], top_k)
        mx.eval(self.frozen)
        self.compiled = compiled and self.frozen.load_experts is None  # which experts are read depends on the gates
        widths = {expert_id: model.experts[expert_id - 1].rank for expert_id in expert_ids}
        old, new = (sorted(r for c, r in widths.items() if (c in self.trainable) is young) for young in (False, True))
        looked_up = self.frozen.table_index is not None
        self.active_ranks = sum(new) + (old[-1] * min(top_k or 0, len(old)) if looked_up else sum(old))
        self._gradient, self._replayed = mx.value_and_grad(self._loss), mx.value_and_grad(self._replay_loss)
        # What it changes, and no more: hundreds of frozen experts would be thousands of arrays to hand in and out.
        self.state: StepState = [*(model.experts[c - 1] for c in self.trainable), model.router, *optimizers.state]
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
        """One update from some micro-batches, remembered features, the router's temperature (float32 scalar), and
        replayed text. whole: of several ranks, whose gradients are added up, each from its share of the step."""
        outcome = self._run(batches, memory, temperature, replayed, global_counts)
        if global_counts is not None and self.compiled:
            with world().watch_for_lost_ranks(counted=False):
                mx.eval(outcome)
        return outcome

    def snapshot(self) -> StepState:
        """What an update changes, as it is now: references, no copies."""
        return tree_map(lambda array: array, self.state)

    def restore(self, kept: StepState) -> None:
        """Take updates back, in place: a compiled step holds the trees themselves."""
        _restore_tree(self.state, kept)

    def _loss(
        self,
        learned: dict[str, Any],
        adapters: Adapters,
        batch: MicroBatch,
        memory: RehearsalBatch,
        temperature: mx.array,
        lm_scale: mx.array,
        share: mx.array,
    ) -> tuple[mx.array, mx.array, tuple[mx.array, mx.array]]:
        """A micro-batch's part of the objective, of its terms [7], and of usage and entropy."""
        adapters = _with_trainable(learned, adapters)
        routing = Routing(self.top_k, temperature, self.expert, self.min_gate, self.training.capacity_factor)
        _, terms, gates = loss_terms(self.model, batch, routing, memory, self.expert, self.training, adapters)
        terms = LossTerms(terms.lm_loss * lm_scale, *(term * share for term in terms[1:]))
        usage, entropy = expert_usage(mx.stop_gradient(gates), batch.valid_mask)
        # As one array: mx.compile fails on equal arrays beside a gradient, and terms that are off are equal.
        return total_loss(terms, self.training), mx.stack(list(terms)), (usage * share, entropy * share)

    def _replay_loss(
        self, learned: dict[str, Any], adapters: Adapters, recalled: ReplayBatch, temperature: mx.array
    ) -> tuple[mx.array, mx.array, tuple[mx.array, mx.array]]:
        """What `_loss` returns, of replayed text; it has no part in usage and entropy. No expert is young there."""
        routing = Routing(self.top_k, temperature)
        terms = replay_loss_terms(self.model, recalled, routing, _with_trainable(learned, adapters))
        unused = mx.zeros(len(learned["gate"][1])), mx.array(0.0)
        return total_loss(terms, self.training), mx.stack(list(terms)), unused

    def _step(
        self,
        batches: list[MicroBatch],
        memory: RehearsalBatch,
        temperature: mx.array,
        replayed: ReplayBatch | None,
        global_counts: GlobalCounts | None,
    ) -> StepMetrics:
        self.compilations += self.compiled
        young = lora.stack_dense(self.model.experts, self.trainable, self.dtype)
        adapters = Adapters(lora.join_stacks(self.frozen, young), self.model.router.gate())
        # A micro-batch of nothing but padding, which fills up a last step, counts for nothing.
        filled = [mx.minimum(b.valid_mask.sum(), 1.0) for b in batches]
        tokens = _sum(b.weights.sum() for b in batches) if global_counts is None else global_counts.tokens
        count = _sum(filled) if global_counts is None else global_counts.nonempty
        lm_scale, shares = 1 / mx.maximum(tokens, 1), [f / count for f in filled]
        if not self.compiled:
            mx.eval(young, adapters, lm_scale, shares, batches, memory, temperature, replayed)
        work = []
        for batch, share in zip(batches, shares, strict=True):
            learned = _trainable_tree(young, adapters)
            work.append(partial(self._gradient, learned, adapters, batch, memory, temperature, lm_scale, share))
        if replayed is not None:
            work.append(partial(self._replayed, _trainable_tree(young, adapters), adapters, replayed, temperature))
        if not work:  # fewer micro-batches than ranks
            work.append(partial(zero_results, _trainable_tree(young, adapters)))
        results = [piece() for piece in work] if self.compiled else streams.run_concurrently(work)
        found, asked = tree_map(lambda *parts: _sum(parts), *results), None
        if global_counts is not None:
            found, asked = all_reduce_results(found, global_counts, self.compiled)
        (total, terms, (usage, entropy)), gradients = found
        grads = self._unstack_gradients(gradients)
        size, expert_norms, router_norm = (
            global_norm(grads),
            [global_norm(g) for g in grads["experts"]],
            global_norm(grads["router"]),
        )
        if self.training.max_grad_norm:
            grads = tree_map(lambda g: g * mx.minimum(1.0, self.training.max_grad_norm / (size + 1e-6)), grads)
        _update(self.model, self.optimizers, grads, self.trainable)
        return StepMetrics(total, LossTerms(*terms), tokens, size, expert_norms, router_norm, usage, entropy, asked)

    def _unstack_gradients(self, gradients: dict[str, Any]) -> dict[str, Any]:
        """Gradients of the factors and the gate as a tree like the model's parameters."""
        experts = trainable_parameters(self.model, self.trainable)
        chosen = [self.model.experts[expert_id - 1] for expert_id in self.trainable]
        for expert_id, grads in zip(self.trainable, lora.split_gradients(gradients["factors"], chosen), strict=True):
            experts[expert_id - 1] = _drop_frozen(grads, experts[expert_id - 1])
        return {"experts": experts, "router": Gate(*gradients["gate"])._asdict()}


def _drop_frozen(grads: dict, kept: dict) -> dict:
    """An expert's gradients without those of projections that have stopped learning."""
    layers = [
        {name: found if own[name] else {} for name, found in named.items()}
        for named, own in zip(grads["layers"], kept["layers"], strict=True)
    ]
    return {"layers": layers}


def _restore_tree(tree: Any, kept: Any) -> None:
    for key, value in kept.items() if isinstance(kept, dict) else enumerate(kept):
        if isinstance(value, mx.array):
            tree[key] = value
        else:
            _restore_tree(tree[key], value)


def _trainable_tree(young: Stack, adapters: Adapters) -> dict[str, Any]:
    """What is differentiated, as a fresh tree: a gradient's tracers stand in its own argument while it is traced."""
    return {"factors": lora.factor_pairs(young), "gate": list(adapters.gate)}


def _with_trainable(learned: dict[str, Any], adapters: Adapters) -> Adapters:
    """Adapters that use what is differentiated."""
    layers = {
        layer: {name: f._replace(trainable=learned["factors"][layer][name]) for name, f in named.items()}
        for layer, named in adapters.stack.layers.items()
    }
    return Adapters(adapters.stack._replace(layers=layers), Gate(*learned["gate"]))


def _update(model: RoutedDecoder, optimizers: Optimizers, grads: dict[str, Any], young: Collection[int]) -> None:
    if any(grads.get("experts", [])):
        before = {"experts": trainable_parameters(model, young)}
        model.update(optimizers.experts.apply_gradients({"experts": grads["experts"]}, before))
    gate = model.router.gate()._asdict()
    model.router.set_gate(Gate(**optimizers.router.apply_gradients(grads["router"], gate)))
