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
    total_tokens: int | None = 131_072
    """Tokens that one evaluation after a skill may take, over all domains and padding included. While all domains fit, all
    are evaluated. Above it only the skill, the domains outside the stream, the most similar earlier skills and a random
    sample of the others are; the rest keep their last value until the run ends. null: always all."""
    full: bool = False
    """Evaluate all validation and test documents once more when the run ends, whatever eval.tokens says. The loss matrix
    keeps to the drawn documents."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("tokens", "total_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}: {value} is not at least 1")
