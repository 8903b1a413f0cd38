"""The run's report and the samples in it. Neither may ever stop a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from rich.table import Table

from dylora_mlx.config import Config, GrowthConfig
from dylora_mlx.distributed.group import is_main_process
from dylora_mlx.growth import phases
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import router
from dylora_mlx.reporting import page, records
from dylora_mlx.reporting.continual import ContinualMetrics
from dylora_mlx.system import console
from dylora_mlx.system.console import info, render
from dylora_mlx.system.files import write_text
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.step.evaluate import Domain


def write_report(run: TrainingRun) -> None:
    """Draw report.html anew."""
    if not is_main_process():
        return
    try:
        page.write_page(run.folder)
    except Exception as error:  # whatever it is, the run goes on
        _warn_once(run, "the report could not be written", error)


def write_samples(run: TrainingRun) -> None:
    """Write samples.json: a document of every domain with the experts that serve it now."""
    if not is_main_process():
        return
    try:
        write_text(run.folder / records.SAMPLES, json.dumps(text_samples(run), ensure_ascii=False) + "\n")
    except Exception as error:  # whatever it is, the run goes on
        _warn_once(run, "samples of the text could not be written", error)


def _warn_once(run: TrainingRun, what: str, error: Exception) -> None:
    if not run.report_failed:
        run.report_failed = True
        reason = (str(error).splitlines() or [""])[0][:200]
        console.warn(
            f"{what} ({type(error).__name__}: {reason}); the run goes on, dylora report {run.folder} draws it later"
        )


def print_decision(found: Decision, number: int, count: int) -> None:
    info(f"\n[{number}/{count}] {found.skill}: {found.action} -> expert {found.expert}", style="bold")
    info(f"  {found.reason}")
    if found.similarities:
        pairs = ", ".join(f"{name} {value:.3f}" for name, value in found.similarities.items())
        low, high = found.interval or (0.0, 0.0)
        info(f"  similarity: {pairs}; interval {low:.3f} to {high:.3f}; threshold {found.threshold:.3f}")


def print_loss_matrix(rows: list[dict[str, float]], skills: list[str], domains: list[str]) -> None:
    """The loss of every domain after every skill, each skill's own loss marked by an asterisk."""
    table = Table(title="validation loss (nats per token): domain by skill learned", title_justify="left")
    table.add_column("after")
    for name in domains:
        table.add_column(name, justify="right", overflow="fold")
    for label, row in zip(["base", *skills], rows, strict=False):
        table.add_row(label, *(f"{row[d]:.3f}{'*' if d == label else ' '}" if d in row else "" for d in domains))
    if len(rows) > 1:
        change = (f"{rows[-1][d] - rows[0][d]:+.3f} " for d in domains)
        table.add_row("change", *change, style="bold")
    render(table)


def print_continual_metrics(found: ContinualMetrics) -> None:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:+.4f}"

    info(
        f"mean of skills {found.final_mean:.4f}, backward transfer {shown(found.bwt)}, forgetting "
        f"{shown(found.forgetting)}, forward transfer {shown(found.fwt)} (loss: lower is better)"
    )


def print_test_losses(
    base: dict[str, float], mixture: dict[str, float], own: dict[str, float], experts_of: dict[str, int]
) -> None:
    """Held-out test losses: the base, the routed mixture, and the skill's own expert alone (an oracle's routing)."""
    table = Table(title="test loss (nats per token)", title_justify="left")
    for name in ("domain", "expert", "base", "mixture", "own expert", "router regret"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for name in base:
        cells = (base[name], mixture[name], own[name])
        regret = f"{mixture[name] - own[name]:+.3f}"
        table.add_row(name, str(experts_of.get(name, "-")), *(f"{value:.3f}" for value in cells), regret)
    render(table)


MIN_TOKENS, MAX_TOKENS = 24, 220
"""Tokens of a document that is shown: enough to see something, not more than can be read."""


def text_samples(run: TrainingRun) -> dict[str, Any]:
    """Of every domain a validation document: its tokens' texts, and for each the likeliest column with its gate.

    The gates are those of the position before, whose experts predict the token, under the routing when every expert is
    mature. One forward of the base's (or of the layers below the tap) a domain.
    """
    experts = ["base", *(record.skill for record in run.pool.records)]
    found = {
        name: _sample(run.config, run.base, run.model, pick_document(domain)) for name, domain in run.domains.items()
    }
    return {"step": run.state.step, "experts": experts, "domains": found}


def pick_document(domain: Domain) -> np.ndarray:
    """Token ids int32 [n], BOS first, of the first document of a domain with a length worth showing, or of the first."""
    pieces: dict[int, np.ndarray] = {}
    for batch in domain.batches:
        for r, row in enumerate(batch.rows):
            for segment, number in enumerate(row, 1):
                places = np.flatnonzero(batch.segment_ids[r] == segment)
                pieces[number] = np.append(batch.inputs[r, places], batch.targets[r, places[-1]])
    tokens = [pieces[number] for number in sorted(pieces)]
    return next((ids for ids in tokens if MIN_TOKENS <= len(ids) - 1 <= MAX_TOKENS), tokens[0])


def _sample(config: Config, base: Base, model: RoutedDecoder, ids: np.ndarray) -> dict[str, Any]:
    eos = base.tokenizer.eos_token_id
    whole = ids[:-1] if ids[-1] == eos and len(ids) > 2 else ids
    shown = whole[: MAX_TOKENS + 1]
    gates = document_gates(model, config.growth, shown[:-1])
    expert_ids = gates.argmax(-1)
    return {
        "tokens": token_texts(base.tokenizer, shown[1:].tolist()),
        "expert_ids": expert_ids.tolist(),
        "gates": [round(float(gate), 3) for gate in gates.max(-1)],
        "truncated": len(shown) < len(whole),
    }


def document_gates(model: RoutedDecoder, growth: GrowthConfig, ids: np.ndarray) -> np.ndarray:
    """Gates float32 [L, E] of one document's tokens [L] under the final routing."""
    inputs = mx.array(ids[None])
    where = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    features = model.router_inputs(model.router_features(inputs, where))
    _, gates = router.route(features, model.router.gate(), phases.final_schedule(growth).routing)
    return np.array(gates[0].astype(mx.float32))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token; together they are the text of all. A character of several tokens counts for its last."""
    found, done = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:count]))
        whole = count == len(ids) or not text.endswith("\ufffd")
        found.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return found
