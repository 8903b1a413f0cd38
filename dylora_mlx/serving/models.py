"""The model names of a served run: the mixture, the base, every expert, and the mixture routed once a prompt."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.generation import decode
from dylora_mlx.run.prompt_format import PromptFormat, choose_format
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.serving.errors import ApiError
from dylora_mlx.serving.gate_trace import GateTrace

PROMPT = "prompt"
"""Suffix of the mixture that is routed once for a prompt."""


class Row(NamedTuple):
    """How the tokens of one request are computed."""

    key: str
    """Rows with the same key may share the caches of a common beginning."""
    fixed_gates: np.ndarray | None
    """Gates [E] of every token; None to route each token."""
    trace: GateTrace | None = None
    """Where the gates of the answer's tokens go; None for nowhere."""


class ServedModel(NamedTuple):
    """What one model name stands for."""

    name: str
    routing: Literal["token", "prompt", "expert"]
    """Routed for every token, once for a prompt, or one expert for everything."""
    expert_id: int | None
    """The expert that serves everything, 0 for the base; None with a router."""


class ServedModels:
    """Finds what a model name stands for: NAME, NAME:base, NAME:EXPERT or NAME:prompt.

    Args:
        name: NAME.
        run: The run.
    """

    def __init__(self, name: str, run: OpenedRun):
        self.name, self._run = name, run
        self._routing = formats.mixture_routing(run).routing
        self.experts = formats.expert_names(run.pool)
        """Names of the gates."""
        # A skill named like the mixture's other routing is found by its number.
        suffixes = [str(i) if i and expert == PROMPT else expert for i, expert in enumerate(self.experts)]
        self.names = [name, *(f"{name}:{suffix}" for suffix in suffixes), f"{name}:{PROMPT}"]

    def find(self, name: str) -> ServedModel:
        """Return what a name stands for. Raises ApiError for an unknown one."""
        if name == self.name:
            return ServedModel(name, "token", None)
        if not name.startswith(f"{self.name}:"):
            raise self._unknown(name)
        suffix = name.removeprefix(f"{self.name}:")
        if suffix == PROMPT:
            return ServedModel(name, "prompt", None)
        if suffix == formats.NULL_EXPERT:
            return ServedModel(name, "expert", 0)
        try:
            return ServedModel(name, "expert", formats.find_expert(self._run.pool, self._run.library, suffix))
        except UserError as error:
            raise self._unknown(name) from error

    def _unknown(self, name: str) -> ApiError:
        there = ", ".join(self.names[:20])
        return ApiError(404, f"no model '{name[:80]}', there are {there}", "model_not_found", "model")

    def prompt_format(self, model: ServedModel, raw: bool) -> PromptFormat:
        """Return the form of a model's prompts: the one that its skills were learned in, or raw text."""
        return choose_format(self._run.library, self._run.base.tokenizer, model.expert_id, raw)

    def row(self, model: ServedModel, ids: list[int]) -> Row:
        """Return how the tokens of a prompt are computed. For routing once a prompt, this takes a pass of the base."""
        if model.routing == "token":
            return Row("token", None)
        if model.expert_id is not None:
            num_gates = len(self._run.pool) + 1
            return Row(f"expert {model.expert_id}", np.eye(num_gates, dtype=np.float32)[model.expert_id])
        gates = decode.prompt_gates(self._run.model, np.array(ids, np.int32), self._routing)
        return Row(f"gates {gates.tobytes().hex()}", gates)
