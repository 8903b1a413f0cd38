"""Options of evaluation: how much held-out text is evaluated during a run and at its end."""

from __future__ import annotations

from dataclasses import dataclass

from dylora_mlx.config.checks import require, require_finite


@dataclass(frozen=True)
class EvalConfig:
    """How much held-out text is evaluated."""

    tokens: int | None = 8192
    """Tokens of each domain that are evaluated, at least 1: whole documents, drawn once by the seed, the same at every
    evaluation of the run. Lower it if evaluation takes too long. null: all documents."""
    full: bool = False
    """Evaluate all validation and test documents once more when the run ends, whatever eval.tokens says. The loss matrix
    keeps to the drawn documents."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.tokens is None or self.tokens >= 1, f"tokens: {self.tokens} is not at least 1")
