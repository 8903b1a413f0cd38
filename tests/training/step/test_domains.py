"""Which held-out documents are evaluated: whole ones, within a budget of tokens, always the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dylora_mlx.config import Config, DataConfig, EvalConfig, Source, TrainingConfig
from dylora_mlx.data.packing import Segment
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.errors import UserError
from dylora_mlx.training.step.domains import Coverage, check_eval_budget, make_held_out

ROW = 16
SIZES = (10, 40, 7, 25, 12, 9, 100, 11)
"""Positions of each document; those above ROW are cut into windows."""


def split(sizes=SIZES) -> Split:
    """Make documents whose tokens all are the document's number."""
    segments = []
    for number, size in enumerate(sizes):
        for start in range(0, size, ROW):
            n = min(ROW, size - start) + 1
            segments.append(Segment(np.full(n, number, np.int32), np.ones(n, bool), number, start + 1))
    return Split(segments, len(sizes))


def skill(name: str, validation: Split, test: Split) -> Skill:
    return Skill(name, Source(name=name, source=f"{name}.jsonl"), validation, validation, test, "")


def config(tokens: int | None = 60, **options) -> Config:
    source = Source(name="a", source="a.jsonl")
    data, training = DataConfig(max_seq_length=ROW), TrainingConfig(batch_size=2)
    return Config([source], data=data, training=training, eval=EvalConfig(tokens, **options))


def documents(domain) -> set[int]:
    """Return the documents in a domain's batches, by their tokens."""
    return {int(i) for batch in domain.batches for i in np.unique(batch.inputs[batch.segment_ids > 0])}


def test_documents_are_whole_and_within_the_budget():
    sizes = split().document_sizes()
    assert sizes.tolist() == list(SIZES)
    seen = set()
    for seed in range(40):
        drawn = split().sample(60, np.random.default_rng(seed))
        numbers = [int(segment.tokens[0]) for segment in drawn.segments]
        chosen = sorted(set(numbers))
        assert numbers == sorted(numbers), "in their own order"
        assert drawn.num_tokens == sizes[chosen].sum() <= 60
        assert drawn.num_documents == len(chosen)
        assert sorted({segment.document for segment in drawn.segments}) == list(range(len(chosen))), "renumbered"
        seen |= set(chosen)
    assert seen == set(range(len(SIZES))) - {6}, "every document that fits is drawn by some seed"


def test_the_draw_ends_at_the_first_document_that_does_not_fit():
    """Going on to shorter ones would favour them."""
    rng = np.random.default_rng(3)
    short = [i for i, size in enumerate(SIZES) if size <= 30]
    expected, used = [], 0
    for index in np.random.default_rng(3).permutation(len(short)):
        used += SIZES[short[index]]
        if used > 30:
            break
        expected.append(short[index])
    assert 0 < len(expected) < len(short)
    assert sorted({int(s.tokens[0]) for s in split().sample(30, rng).segments}) == sorted(expected)


@pytest.mark.parametrize("budget", [None, sum(SIZES), 10**6])
def test_a_set_that_fits_is_taken_as_it_is(budget):
    whole = split()
    assert whole.sample(budget, np.random.default_rng(0)) is whole


def test_the_shortest_document_stands_in_for_a_part_of_long_ones():
    drawn = split((40, 25, 100)).sample(20, np.random.default_rng(0))
    assert {int(segment.tokens[0]) for segment in drawn.segments} == {1}


def test_the_same_documents_every_time_wherever_a_skill_stands():
    first, second = skill("first", split(), split()), skill("second", split(), split())
    both, alone = make_held_out([first, second], config(), False), make_held_out([second], config(), False)
    assert documents(both.validation["second"]) == documents(alone.validation["second"])
    draws = {
        frozenset(documents(domains[name])) for domains in (both.validation, both.test) for name in ("first", "second")
    }
    assert len(draws) > 1, "each domain and split has a draw of its own"
    seeds = {
        frozenset(documents(make_held_out([second], replace(config(), seed=seed), False).validation["second"]))
        for seed in range(5)
    }
    assert len(seeds) > 1


def test_what_was_drawn_is_known():
    held_out = make_held_out([skill("a", split(), split((10, 20)))], config(), False)
    chosen = sorted(documents(held_out.validation["a"]))
    tokens = sum(SIZES[i] for i in chosen)
    assert held_out.validation["a"].coverage == Coverage(len(chosen), len(SIZES), tokens, sum(SIZES))
    assert held_out.test["a"].coverage == Coverage(2, 2, 30, 30)
    assert not held_out.validation["a"].is_complete
    assert held_out.test["a"].is_complete
    assert held_out.final["a"] is held_out.validation["a"]


def test_full_sets_at_the_end():
    held_out = make_held_out(
        [skill("a", split(), split()), skill("b", split((10, 20)), split())], config(full=True), False
    )
    assert len(documents(held_out.validation["a"])) < len(SIZES), "during the run the budget holds"
    assert documents(held_out.final["a"]) == documents(held_out.test["a"]) == set(range(len(SIZES)))
    assert held_out.final["b"] is held_out.validation["b"], "it is complete already and need not be evaluated twice"


def test_a_budget_that_no_document_fits():
    fine, long = skill("fine", split(), split()), skill("long", split(), split((40, 30)))
    check_eval_budget([fine, long], config(30))
    check_eval_budget([fine, long], config(None))
    with pytest.raises(UserError) as raised:
        check_eval_budget([fine, long], config(29))
    assert str(raised.value) == (
        "eval.tokens: 29 is less than the shortest test document of 'long' (long.jsonl), which has 30 tokens; raise it, or "
        "give null for all documents"
    )
