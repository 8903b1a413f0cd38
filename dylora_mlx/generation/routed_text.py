"""The router's gates for every token of a text."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

import numpy as np

from dylora_mlx.data import encoding
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.system import palette
from dylora_mlx.training.summary import document_gates, token_texts


class RoutedText(NamedTuple):
    """The router's gates for every token of a text."""

    tokens: list[str]
    """Text of each token [L]."""
    gates: np.ndarray
    """float32 [L, E]: the gates at the position that predicts each token."""
    names: list[str]
    """Names of the E gates by expert_id; the null expert (base) is first."""

    @property
    def experts(self) -> list[str]:
        """Name of the expert with the largest gate, for each token."""
        return [self.names[expert_id] for expert_id in self.gates.argmax(-1)]

    @property
    def shares(self) -> dict[str, float]:
        """Mean gate over all tokens by expert name, the largest first."""
        mean = self.gates.mean(0)
        return {self.names[int(expert_id)]: float(mean[expert_id]) for expert_id in np.argsort(-mean)}

    def _repr_html_(self) -> str:
        expert_ids, strength = self.gates.argmax(-1), self.gates.max(-1)
        text = "".join(
            f'<span title="{escape(self.names[c])} {g:.2f}" style="{_background(int(c))}">{escape(token)}</span>'
            for token, c, g in zip(self.tokens, expert_ids, strength, strict=True)
        )
        shares = ", ".join(
            f'<span style="{_background(self.names.index(name))}">{escape(name)}</span> {share:.0%}'
            for name, share in self.shares.items()
        )
        return f'<pre style="white-space:pre-wrap">{text}</pre><p>{shares}</p>'


def route_text(run: OpenedRun, text: str) -> RoutedText:
    """Return the gates of every token of a text under the final (mature) routing.

    Raises UserError for an empty text and for one longer than the base's context.
    """
    base = run.base
    ids = encoding.prompt_ids(text, base.tokenizer)
    if len(ids) < 2:
        raise UserError("the text is empty; there is nothing to route")
    if len(ids) > base.context_length:
        raise UserError(f"the text has {len(ids)} tokens, the base reads {base.context_length} at most; shorten it")
    gates = document_gates(run.model, run.config.growth, ids[:-1])
    return RoutedText(token_texts(base.tokenizer, ids[1:].tolist()), gates, formats.expert_names(run.pool))


def _background(expert_id: int) -> str:
    """Return a CSS background that is readable in light and dark notebooks; none for the null expert."""
    return "background:rgba({},{},{},0.27)".format(*palette.rgb(expert_id)) if expert_id else ""
