"""Write the HTML report and its text samples, and print tables at the end of a run.

A failure to write the report or the samples never stops a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import mlx.core as mx
import numpy as np
from rich.table import Table

from dylora_mlx.config import Config, GrowthConfig, presets
from dylora_mlx.data.counts import is_harmful, remarks
from dylora_mlx.distributed.group import is_main_process
from dylora_mlx.growth import phases
from dylora_mlx.growth.decide.decision_log import limits_text
from dylora_mlx.growth.decide.policy import Decision
from dylora_mlx.model.base.load import Base
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import router
from dylora_mlx.reporting import page, records
from dylora_mlx.reporting.continual import ContinualMetrics
from dylora_mlx.system import console, signals
from dylora_mlx.system.console import detail, info, render
from dylora_mlx.system.files import write_text
from dylora_mlx.training.final_losses import FinalLosses
from dylora_mlx.training.run import TrainingRun
from dylora_mlx.training.step.domains import Domain

REPORT_SHARE = 0.05
"""Share of a run's time that the report may take while the run goes on. What it draws grows with the stream."""


def report_is_due(run: TrainingRun) -> bool:
    """Return whether to write the report now: if it took little of the time so far, or if the run is about to stop."""
    return signals.stop_requested() or run.timers.share("report") <= REPORT_SHARE


def write_report(run: TrainingRun) -> None:
    """Write report.html on rank 0. A failure is a warning."""
    if not is_main_process():
        return
    try:
        page.write_page(run.folder)
    except Exception as error:  # any failure: the run must continue
        _warn_once(run, "the report could not be written", error)


def write_samples(run: TrainingRun) -> None:
    """Write samples.json on rank 0: one document per domain with the experts that its tokens are routed to now.

    A failure is a warning.
    """
    if not is_main_process():
        return
    try:
        write_text(run.folder / records.SAMPLES, json.dumps(text_samples(run), ensure_ascii=False) + "\n")
    except Exception as error:  # any failure: the run must continue
        _warn_once(run, "samples of the text could not be written", error)


def _warn_once(run: TrainingRun, what: str, error: Exception) -> None:
    """Warn about the first failed write of a run; the cause is likely to persist."""
    if not run.report_failed:
        run.report_failed = True
        reason = (str(error).splitlines() or [""])[0][:200]
        console.warn(
            f"{what} ({type(error).__name__}: {reason}); the run goes on, dylora report {run.folder} draws it later"
        )


def print_preset(config: Config) -> None:
    """Print which options have their value from the base's preset, if there are any."""
    name = presets.preset_for(config.model.base, config.model.preset)
    values = {
        option: value for option, value in presets.PRESETS[name].options.items() if attrgetter(option)(config) == value
    }
    console.event("preset", name=name, options=values)
    if values:
        listed = ", ".join(f"{option} {value:g}" for option, value in values.items())
        info(f"defaults for a {name} base (model.preset): {listed}")


def print_data(run: TrainingRun) -> None:
    """Print a line on each skill to come whose data have something wrong, and in JSON mode the counts of all."""
    for skill in run.skills[run.state.skill_index :]:
        counts = run.data_counts.get(skill.name)  # none for the parts of a skill that was split
        if counts is None:
            continue
        console.event("data", skill=skill.name, **counts.to_dict())
        if note := skill.info.files_note(skill.name):
            info(note)
        if lines := remarks(counts):
            (console.warn if is_harmful(counts) else info)(f"{skill.name}: {'; '.join(lines)}")


def print_decision(decision: Decision, number: int, count: int) -> None:
    """Print the decision about skill `number` of `count`: action, expert, reason, and similarities if there are any."""
    detail("")
    info(f"[{number}/{count}] {decision.skill}: {decision.action} -> expert {decision.expert}", style="bold")
    info(f"  {decision.reason}")
    if decision.similarities:
        pairs = ", ".join(f"{name} {value:.3f}" for name, value in decision.similarities.items())
        low, high = decision.interval or (0.0, 0.0)
        judged_by = limits_text(decision.threshold, decision.limits)
        detail(f"  similarity: {pairs}; interval {low:.3f} to {high:.3f}; {judged_by}")


def print_loss_matrix(rows: list[dict[str, float]], skills: list[str], final: Mapping[str, FinalLosses]) -> None:
    """Print a table of validation losses: one row per skill learned, one column per domain.

    An asterisk marks the loss of the skill just learned on its own domain. `final` has the last row's intervals.
    """
    domains = list(final)
    table = Table(title="validation loss (nats per token): domain by skill learned", title_justify="left")
    table.add_column("after")
    for name in domains:
        table.add_column(name, justify="right", overflow="fold")
    for label, row in zip(["base", *skills], rows, strict=False):
        table.add_row(label, *(f"{row[d]:.3f}{'*' if d == label else ' '}" if d in row else "" for d in domains))
    if len(rows) > 1:
        change = (f"{rows[-1][d] - rows[0][d]:+.3f} " for d in domains)
        table.add_row("change", *change, style="bold")
    if any(losses.intervals for losses in final.values()):
        ends = (losses.intervals.get("mixture") for losses in final.values())
        table.add_row("95% interval", *("" if each is None else f"{each[0]:.3f} \n{each[1]:.3f} " for each in ends))
    render(table)
    print_coverage(final)


def print_outcome(
    rows: list[dict[str, float]],
    skills: list[str],
    validation: Mapping[str, FinalLosses],
    test: Mapping[str, FinalLosses],
    experts_of: Mapping[str, int],
) -> None:
    """Print one line for each domain: validation losses of the base, when the skill was learned and now, and the test loss.

    Args:
        rows: Loss matrix: the base's row, then one for each skill.
        skills: Names of the skills, in the order of the rows.
        validation: Final validation losses by domain.
        test: Final test losses by domain.
        experts_of: expert_id by domain.
    """
    table = Table(title="validation loss (nats per token), and test loss at the end", title_justify="left")
    for name in ("domain", "expert", "base", "learned", "now", "change", "test"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    learned = {name: row.get(name) for name, row in zip(skills, rows[1:], strict=False)}
    for name, losses in validation.items():
        when_learned, tested = learned.get(name), test.get(name)
        cells = [f"{losses.base:.3f}", "-" if when_learned is None else f"{when_learned:.3f}", f"{losses.mixture:.3f}"]
        cells += [f"{losses.mixture - losses.base:+.3f}", "-" if tested is None else f"{tested.mixture:.3f}"]
        table.add_row(name, str(experts_of.get(name, "-")), *cells)
    render(table)
    print_coverage(validation)
    print_worse_than_base(test)
    print_coverage(test)


def print_continual_metrics(metrics: ContinualMetrics) -> None:
    """Print final mean loss, backward transfer, forgetting and forward transfer; a dash for one that does not apply."""

    def signed(value: float | None) -> str:
        return "-" if value is None else f"{value:+.4f}"

    info(
        f"mean of skills {metrics.final_mean:.4f}, backward transfer {signed(metrics.bwt)}, forgetting "
        f"{signed(metrics.forgetting)}, forward transfer {signed(metrics.fwt)} (loss: lower is better)"
    )


def print_losses(title: str, final: Mapping[str, FinalLosses], experts_of: Mapping[str, int]) -> None:
    """Print held-out losses by domain, with the interval of the mixture's, and what was evaluated if that is not all.

    Args:
        title: Title of the table.
        final: Losses by domain.
        experts_of: expert_id by domain.
    """
    table = Table(title=title, title_justify="left")
    own = any(losses.own_expert is not None for losses in final.values())
    for name in ("domain", "expert", "base", "mixture", "95%", *(["own expert", "router regret"] if own else [])):
        table.add_column(name, justify="left" if name == "domain" else "right", no_wrap=name == "95%")
    for name, losses in final.items():
        interval = losses.intervals.get("mixture")
        cells = [f"{losses.base:.3f}", f"{losses.mixture:.3f}"]
        cells.append("-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}")
        if losses.own_expert is not None:
            cells += [f"{losses.own_expert:.3f}", f"{losses.mixture - losses.own_expert:+.3f}"]
        table.add_row(name, str(experts_of.get(name, "-")), *cells)
    render(table)
    print_worse_than_base(final)
    print_coverage(final)


def print_worse_than_base(final: Mapping[str, FinalLosses]) -> None:
    """Print a line on the domains whose own expert is worse than the base alone; nothing if there are none."""
    worse = [
        name for name, losses in final.items() if losses.own_expert is not None and losses.own_expert > losses.base
    ]
    if worse:
        info(
            f"worse with the own expert than with the base alone, so a regret below 0 is no merit there: {', '.join(worse)}"
        )


def print_coverage(final: Mapping[str, FinalLosses]) -> None:
    """Print a line on the domains of which only some documents were evaluated; nothing if there are none."""
    parts = [
        f"{name} {c.documents} of {c.of_documents} documents ({c.tokens} of {c.of_tokens} tokens)"
        for name, losses in final.items()
        if (c := losses.coverage) is not None and c.documents < c.of_documents
    ]
    if parts:
        info(f"evaluated within eval.tokens: {', '.join(parts)}")


MAX_SAMPLES = 12
"""Number of sampled documents in a run that does not evaluate every domain after every skill."""
MIN_TOKENS, MAX_TOKENS = 24, 220
"""Token range of a sampled document: long enough to show routing, short enough to read."""


def text_samples(run: TrainingRun) -> dict[str, Any]:
    """Return the content of samples.json: one validation document of each domain, or of the newest MAX_SAMPLES that were
    evaluated if not all were, with the top-1 expert and gate per token.

    A token's gate is that of the position before it, whose experts predict the token, under the final routing (every
    expert mature). Costs one forward pass per domain through the base, or through the layers below `router_layer`.
    """
    experts = ["base", *(record.skill for record in run.pool.records)]
    samples = {
        name: _sample(run.config, run.base, run.model, pick_document(domain))
        for name, domain in list(run.selected_domains.items())[-MAX_SAMPLES if run.selected else 0 :]
    }
    return {"step": run.state.step, "experts": experts, "domains": samples}


def pick_document(domain: Domain) -> np.ndarray:
    """Return token ids int32 [n], BOS first, of the first document with MIN_TOKENS to MAX_TOKENS tokens.

    Returns the domain's first document if there is none.
    """
    tokens_by_segment: dict[int, np.ndarray] = {}
    for batch in domain.batches:
        for i, row in enumerate(batch.rows):
            for segment, segment_index in enumerate(row, 1):
                positions = np.flatnonzero(batch.segment_ids[i] == segment)
                tokens_by_segment[segment_index] = np.append(
                    batch.inputs[i, positions], batch.targets[i, positions[-1]]
                )
    documents = [tokens_by_segment[segment_index] for segment_index in sorted(tokens_by_segment)]
    return next((ids for ids in documents if MIN_TOKENS <= len(ids) - 1 <= MAX_TOKENS), documents[0])


def _sample(config: Config, base: Base, model: RoutedDecoder, ids: np.ndarray) -> dict[str, Any]:
    """Return one document of samples.json, without its EOS and truncated to MAX_TOKENS."""
    eos = base.tokenizer.eos_token_id
    trimmed = ids[:-1] if ids[-1] == eos and len(ids) > 2 else ids
    excerpt = trimmed[: MAX_TOKENS + 1]
    # The gates at position t choose the experts that predict token t + 1, hence the shift by one.
    gates = document_gates(model, config.growth, excerpt[:-1])
    expert_ids = gates.argmax(-1)
    return {
        "tokens": token_texts(base.tokenizer, excerpt[1:].tolist()),
        "expert_ids": expert_ids.tolist(),
        "gates": [round(float(gate), 3) for gate in gates.max(-1)],
        "truncated": len(excerpt) < len(trimmed),
    }


def document_gates(model: RoutedDecoder, growth: GrowthConfig, ids: np.ndarray) -> np.ndarray:
    """Return gates float32 [L, E] of one document's token ids [L] under the final routing."""
    inputs = mx.array(ids[None])
    attn_layout = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    features = model.router_inputs(model.router_features(inputs, attn_layout))
    _, gates = router.route(features, model.router.gate(), phases.final_schedule(growth).routing)
    return np.array(gates[0].astype(mx.float32))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; concatenated, they equal the decoded text.

    A character that spans several tokens belongs to its last token, the others get an empty text.
    """
    # Each token is decoded after its predecessor alone, which is what its blanks depend on: the whole text each time would
    # take a time that grows with its square.
    texts, start, shown = [], 0, 0
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[start:count]))
        # The decoder replaces an incomplete UTF-8 character by U+FFFD: wait for its remaining tokens.
        complete = count == len(ids) or not text.endswith("\ufffd")
        texts.append(text[len(tokenizer.decode(list(ids[start:shown]))) :] if complete else "")
        if complete:
            start, shown = shown, count
    return texts
