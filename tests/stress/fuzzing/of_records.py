"""Fuzz targets for the records of a run, as read by its report, by explain and by a model card."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
from rich.console import Console

from dylora_mlx import explain
from dylora_mlx.exporting import model_card as card
from dylora_mlx.exporting.write import _results
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.reporting import compare, page, records
from fuzzing.target import Harness, target

LOSSES = {"eval_python_loss": 3.0, "eval_sql_loss": 4.0}
METRICS: list[dict[str, Any]] = [
    {"step": 0, **LOSSES},
    {"step": 0, "skill": "sql", "novelty_threshold": 0.75},
    {"step": 0, "skill": "sql", "padding_fraction": 0.01, "packed_sequence_length_histogram": [0, 1, 3]},
    {"step": 5, "skill": "sql", "phase": "dense", "routing_entropy": 0.3, "tokens_per_second": 2000.5, "peak_memory_gb": 0.2,
     "grad_norm_router": 0.1, "grad_norm_expert_1": 0.3, "expert_usage_0": 0.4, "expert_usage_1": 0.6},
    {"step": 9, "skill": "sql", "after_skill": True, "num_experts": 1, "usage": {"sql": [0.1, 0.9]}, **LOSSES},
]  # fmt: skip
OUTCOME = {
    "loss_base": 4.0, "loss_before": 4.0, "loss": 3.5, "steps": 9, "parameters": 100, "worst_other_rise": 0.01,
    "refined": {"kept": True, "reason": "it gains"},
}  # fmt: skip
PROBE = {
    "losses": {"0": 4.0, "1": 3.9}, "entropy": 0.2, "documents": 8,
    "trial": {"steps": 12, "loss": 3.7, "gain": 0.2, "interval": [0.1, 0.3]},
}  # fmt: skip
DECISIONS: list[dict[str, Any]] = [
    {"step": 0, "seed": 0, "skill": "sql", "action": "create", "expert": 1, "similarities": {"python": 0.3}, "score": 0.3,
     "interval": [0.2, 0.4], "threshold": 0.75, "undecided": True, "samples": 96, "tokens": 1000, "reason": "novel",
     "seconds": 0.1, "probe": PROBE, "novel_documents": 0.5, "outcome": OUTCOME,
     "bandit": {"action": "create", "propensity": 0.7, "rewards": {"create": 0.2}}},
    {"step": 9, "skill": "sql + go", "action": "merge", "expert": 1, "experts": [1], "kept": True, "expert_ids": {"1": 1},
     "details": {"into": 1, "heirs": {"sql": 1}}, "reason": "the budget"},
    {"step": 9, "skill": "go", "action": "evict", "expert": 0, "experts": [1], "kept": True, "expert_ids": {},
     "details": {"heirs": {"go": 0}}, "reason": "the budget"},
]  # fmt: skip
SAMPLES = {
    "step": 9,
    "experts": ["base", "sql"],
    "domains": {"sql": {"tokens": ["a", "b"], "expert_ids": [0, 1], "gates": [0.5, 1.0], "truncated": True}},
}
RESULTS = {
    "matrix": [{"python": 3.0, "sql": 4.0}, {"python": 3.0, "sql": 3.5}], "skills": ["sql"], "steps": 9,
    "test": {"sql": {"base": 4.0, "mixture": 3.6, "own_expert": 3.5}},
}  # fmt: skip
INFO = {"status": "finished", "base": "embedded", "device": "Device(cpu, 0)", "dtype": "float32", "format": 1}
CONFIG = """
skills: [{name: sql, source: packaged/sql}]
data: {max_seq_length: 640}
growth: {base_skill: {name: python}}
domains: [{name: x}]
"""


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in rows).encode()


FILES = {
    "config.yaml": CONFIG.encode(), records.METRICS: lines(METRICS), records.DECISIONS: lines(DECISIONS),
    records.SAMPLES: json.dumps(SAMPLES).encode(), records.RESULTS: json.dumps(RESULTS).encode(), "run.json": json.dumps(INFO).encode(),
}  # fmt: skip


def register_file(file: str, form: str) -> Callable[[Path], Harness]:
    """Register two targets for one file: reading its records, and drawing a whole report of them."""
    name = Path(file).stem

    @target(f"read-{name}", form, 1)
    def read(work_dir: Path) -> Harness:
        for other, content in FILES.items():
            (work_dir / other).write_bytes(content)
        path = work_dir / file

        def run(data: bytes) -> None:
            path.write_bytes(data)
            records_of_run = records.read_records(work_dir)
            for record in records_of_run.metrics:
                assert records.finite_number(record["step"]) is not None
                records.validation_losses(record)

        return [FILES[file]], run

    @target(f"report-{name}", form, 0.5)
    def report(work_dir: Path) -> Harness:
        for other, content in FILES.items():
            (work_dir / other).write_bytes(content)
        path = work_dir / file

        def run(data: bytes) -> None:
            path.write_bytes(data)
            for html in (page.run_page(work_dir), compare.comparison_page([work_dir, work_dir])):
                assert "</html>" in html
                page.write_file(html, work_dir / "report.html")

        return [FILES[file]], run

    read.__doc__ = f"{file} of a run folder, as records (reporting/records)."
    report.__doc__ = f"{file} of a run folder, drawn as a report and compared (reporting)."
    return report


for file in FILES:
    register_file(file, "yaml" if file.endswith("yaml") else "lines" if file.endswith("jsonl") else "json")


@target("explain", "lines", 0.5)
def explain_decisions(work_dir: Path) -> Harness:
    """decisions.jsonl, as printed by dylora explain (growth/decide/decision_log, explain)."""
    path = work_dir / decision_log.FILE_NAME

    def run(data: bytes) -> None:
        path.write_bytes(data)
        original_console = explain.console
        explain.console = Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), highlight=False, soft_wrap=True)
        try:
            for skill in ([], ["sql"], ["go"]):
                explain.command([str(work_dir), *skill])
        finally:
            explain.console = original_console

    return [lines(DECISIONS)], run


@target("card", "json", 1)
def model_card(work_dir: Path) -> Harness:
    """results.json of a run, in an export's model card (exporting/write, exporting/model_card)."""
    expert = {"name": "sql", "skills": ["sql"], "rank": 8, "alpha": 16.0}
    manifest = {
        "kind": "experts",
        "dylora_mlx": "0",
        "base": {"name": "some/base"},
        "experts": [expert],
        "expert_ids": [1],
    }
    manifest["sources"] = [{"name": "sql", "source": "packaged/sql"}]
    path = work_dir / "results.json"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        assert card.model_card(manifest, _results(work_dir)).startswith("---")

    return [FILES[records.RESULTS]], run
