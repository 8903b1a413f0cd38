"""A document of every domain, token by token, with the expert that is likeliest to predict it: for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from dylora_mlx.config import Growth
from dylora_mlx.growth import phases as maturity
from dylora_mlx.model.decoder.attention import packed_masks
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Routing
from dylora_mlx.training.run import Run
from dylora_mlx.training.step.evaluate import Domain

SHORTEST, LONGEST = 24, 220
"""Tokens of a document that is shown: enough to see something, not more than can be read."""


def take(run: Run) -> dict[str, Any]:
    """Of every domain a validation document: its tokens' texts, and for each the likeliest column with its gate.

    The gates are those of the position before, whose experts predict the token, under the routing when every expert is
    mature. One forward of the base's (or of the layers below the tap) a domain.
    """
    experts = ["base", *(record.skill for record in run.pool.records)]
    found = {name: _sample(run, document(domain)) for name, domain in run.domains.items()}
    return {"step": run.state.step, "experts": experts, "domains": found}


def document(domain: Domain) -> np.ndarray:
    """Token ids int32 [n], BOS first, of the first document of a domain with a length worth showing, or of the first."""
    pieces: dict[int, np.ndarray] = {}
    for batch in domain.batches:
        for r, row in enumerate(batch.pieces):
            for segment, number in enumerate(row, 1):
                places = np.flatnonzero(batch.segments[r] == segment)
                pieces[number] = np.append(batch.inputs[r, places], batch.targets[r, places[-1]])
    tokens = [pieces[number] for number in sorted(pieces)]
    return next((ids for ids in tokens if SHORTEST <= len(ids) - 1 <= LONGEST), tokens[0])


def _sample(run: Run, ids: np.ndarray) -> dict[str, Any]:
    eos = run.base.tokenizer.eos_token_id
    whole = ids[:-1] if ids[-1] == eos and len(ids) > 2 else ids
    shown = whole[: LONGEST + 1]
    gates = gates_of(run.model, run.config.growth, shown[:-1])
    columns = gates.argmax(-1)
    return {
        "tokens": texts(run.base.tokenizer, shown[1:].tolist()),
        "columns": columns.tolist(),
        "gates": [round(float(gate), 3) for gate in gates.max(-1)],
        "cut": len(shown) < len(whole),
    }


def gates_of(model: RoutedDecoder, growth: Growth, ids: np.ndarray) -> np.ndarray:
    """Gates float32 [L, E] of one document's tokens [L] under the settled routing."""
    settled = maturity.settled(growth)
    inputs = mx.array(ids[None])
    where = packed_masks(mx.ones(inputs.shape, mx.int32), model.window)
    logits = router.logits(model.read(model.features(inputs, where)), model.router.gate())
    return np.array(router.gates(logits, Routing(settled.top_k, mx.array(settled.temperature)))[0].astype(mx.float32))


def texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token; together they are the text of all. A character of several tokens counts for its last."""
    found, done = [], ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:count]))
        whole = count == len(ids) or not text.endswith("\ufffd")
        found.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return found
