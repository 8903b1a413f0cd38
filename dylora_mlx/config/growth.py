"""Options of growth: novelty, the decision, its budget, and maturity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dylora_mlx.config.checks import require, require_finite
from dylora_mlx.config.source import Source


@dataclass(frozen=True)
class Growth:
    """Novelty detection, the decision, and maturity."""

    base_skill: Source | None = field(default_factory=lambda: Source(name="python", source="packaged/python"))
    """What the base already knows: the library's first entry, held by the null expert. Null for none."""
    threshold: float = 0.75
    """Cosine similarity at and above which a skill counts as known (tau before any adaptation)."""
    adaptive_delta: float = 0.0
    """tau_k = threshold - adaptive_delta * log(1 + k) for a library of k skills."""
    similarity: Literal["max", "median"] = "max"
    """Which of the similarities to the library is compared with the threshold."""
    whitening: float = 0.1
    """Whiten embeddings by the reference covariance, this much of its mean eigenvalue added; 0 only centres."""
    min_samples: int = 32
    """A skill with fewer documents is refused."""
    min_tokens: int = 1000
    """A skill with fewer tokens is refused."""
    embedding_samples: int = 128
    """Documents embedded for the decision, at most."""
    batch_samples: int = 16
    """Documents in one of the random batches that are averaged."""
    bootstrap: int = 500
    """Resamples behind the similarity's interval."""
    confidence: float = 0.95
    """Coverage of that interval."""
    cooldown_steps: int = 0
    """Training steps that must pass after a creation before the next one."""
    max_experts: int = 64
    """No expert is created beyond this number."""
    warmup_steps: int = 6
    """Steps after which a new expert is mature, and routing may turn sparse (at most a third of the skill's steps)."""
    top2_steps: int = 6
    """Steps of top-2 routing before top-1 (at most a third of the skill's steps)."""
    final_top_k: int = 2
    """Experts per token at the end of the schedule; 1 is measured to route worse, by up to 0.04 nats a skill."""
    temperature: float = 1.5
    """Router temperature while an expert is young."""
    final_temperature: float = 1.0
    """Router temperature at the end of the top-2 phase, reached in a straight line."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(-1 <= self.threshold <= 1, f"threshold: {self.threshold} is not a cosine (-1 to 1)")
        require(self.adaptive_delta >= 0, f"adaptive_delta: {self.adaptive_delta} is below 0")
        require(self.whitening >= 0, f"whitening: {self.whitening} is below 0")
        for name in ("min_samples", "min_tokens", "embedding_samples", "batch_samples", "max_experts", "final_top_k"):
            require(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is not at least 1")
        require(
            self.embedding_samples >= self.min_samples,
            f"embedding_samples: {self.embedding_samples} is below min_samples, {self.min_samples}",
        )
        require(
            self.bootstrap >= 50, f"bootstrap: {self.bootstrap} resamples are too few for an interval (at least 50)"
        )
        require(0.5 <= self.confidence < 1, f"confidence: {self.confidence} is not between 0.5 and 1")
        for name in ("cooldown_steps", "warmup_steps", "top2_steps"):
            require(getattr(self, name) >= 0, f"{name}: {getattr(self, name)} is below 0")
        require(self.temperature > 0 and self.final_temperature > 0, "temperature: must be above 0")
