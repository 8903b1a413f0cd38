"""Convert step outcomes to metric records, with one device synchronisation per record instead of one per step."""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np

from dylora_mlx.distributed.group import world
from dylora_mlx.growth.phases import RoutingSchedule
from dylora_mlx.growth.pool import Pool
from dylora_mlx.training.checkpoint.state import TrainerState
from dylora_mlx.training.metrics import flops
from dylora_mlx.training.metrics.recorder import MetricsRecorder
from dylora_mlx.training.step.evaluate import Evaluation
from dylora_mlx.training.step.optimizers import Optimizers
from dylora_mlx.training.step.step import StepMetrics

MAX_COLUMNS = 64
"""Largest number of experts whose usage and gradient norm a record lists; in a larger pool those with the largest usage."""


class StepMeter:
    """Collect step outcomes and write a metrics record every `every` steps.

    Values stay lazy arrays until a record is due: reading one waits for the device.
    """

    def __init__(self, recorder: MetricsRecorder, pool: Pool, optimizers: Optimizers, state: TrainerState, every: int):
        self.recorder, self.pool, self.optimizers, self.state, self.every = recorder, pool, optimizers, state, every
        # Token counts of the steps since the last record, unread.
        self.pending: list[mx.array] = []
        self.seconds, self.since, self.loss = 0.0, time.perf_counter(), float("nan")

    def pause(self) -> None:
        """Stop the clock of tokens_per_second, around work that is not training."""
        self.seconds += time.perf_counter() - self.since

    def resume(self) -> None:
        """Restart the clock of tokens_per_second."""
        self.since = time.perf_counter()

    def step(self, outcome: StepMetrics, now: RoutingSchedule, skill: str, compilations: int) -> None:
        """Record a step; write a metrics record if the step count is a multiple of `every`.

        Args:
            outcome: Metrics of the step, unevaluated.
            now: Routing of the step.
            skill: Name of the skill being learned.
            compilations: Traces of compiled functions in this process so far.
        """
        self.pending.append(outcome.tokens)
        if self.state.step % self.every:
            return
        self.pause()
        tokens = sum(t.item() for t in self.pending)
        terms = {name: value.item() for name, value in outcome.terms._asdict().items()}
        self.loss = terms["lm_loss"]
        values = np.array(outcome.usage)
        columns = set(range(len(values)))
        if len(values) > MAX_COLUMNS:
            columns = {*np.argsort(-values, kind="stable")[:MAX_COLUMNS].tolist(), *self.pool.trainable}
        norms = {f"grad_norm_expert_{i}": n.item() for i, n in enumerate(outcome.expert_norms, 1) if i in columns}
        usage = {f"expert_usage_{i}": value for i, value in enumerate(values.tolist()) if i in columns}
        trainable = flops.trainable_parameters(self.pool.model)
        record = {
            "skill": skill,
            "phase": now.phase,
            "train_loss": outcome.train_loss.item(),
            **terms,
            "grad_norm": outcome.grad_norm.item(),
            **norms,
            "grad_norm_router": outcome.router_norm.item(),
            "tokens_per_second": tokens / max(self.seconds, 1e-9),
            "routing_entropy": outcome.entropy.item(),
            **usage,
            "num_experts": len(self.pool),
            "temperature": now.temperature,
            "top_k": now.top_k or len(self.pool) + 1,
            "trainable_params": trainable,
            "trainable_percent": 100 * trainable / flops.base_parameters(self.pool.model),
            "total_flos": self.state.flops,
            "learning_rate": self.optimizers.experts.learning_rate.item(),
            "compilations": compilations,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "cache_memory_gb": mx.get_cache_memory() / 1e9,
            **communication_metrics(),
        }
        self.recorder.log(self.state.step, record)
        self.pending, self.seconds = [], 0.0
        self.resume()

    def evaluation(self, evaluated: dict[str, Evaluation], skill: str) -> None:
        """Write the validation losses of the evaluated domains as one record."""
        losses = {f"eval_{name}_loss": result.loss for name, result in evaluated.items()}
        self.recorder.log(self.state.step, {"skill": skill, **losses})


def communication_metrics() -> dict[str, float]:
    """Return the world size as `ranks`, seconds spent waiting for other ranks, and megabytes sent so far; empty on a single rank."""
    group = world()
    if group.world_size == 1:
        return {}
    return {
        "ranks": group.world_size,
        "communication_seconds": group.wait_seconds,
        "communication_mb": group.bytes_sent / 1e6,
    }
