"""The pool of experts: expert ids, records, freezing, hashes, initial gate rows, and growing ranks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from dylora_mlx.growth.feature_statistics import FeatureStatistics
from dylora_mlx.growth.library import LibraryEntry
from dylora_mlx.growth.pool import ExpertRecord, expert_hash
from dylora_mlx.model.decoder.attention import attention_layout
from dylora_mlx.model.routing.router import Routing
from tests.tiny import ALL, ARGS, close, flat, tiny_pool

DIMS = ARGS.hidden_size


def entry(skill: str, expert: int, seed: int) -> LibraryEntry:
    """Return a library entry of random features around `seed`."""
    features = np.random.default_rng(seed).normal(seed, 1, (90, DIMS)).astype(np.float32)
    return LibraryEntry(skill, expert, features[:5], FeatureStatistics.from_features(features), features)


def test_expert_ids_follow_the_order_of_creation():
    pool = tiny_pool()
    assert len(pool) == 0
    assert [pool.add(ExpertRecord(f"s{i}", 2, 4.0, 10 * i), mx.random.key(i)) for i in range(3)] == [1, 2, 3]
    assert len(pool) == len(pool.model.experts) == 3
    assert len(pool.model.router.rows) == 4, "row 0 is the null expert's"
    assert [r["skill"] for r in pool.describe()] == ["s0", "s1", "s2"]
    assert pool.describe()[2] == {
        "skill": "s2", "rank": 2, "alpha": 4.0, "created_at": 20, "steps": 0, "phase": "dense", "frozen": False, "frozen_projections": [],
    }  # fmt: skip


def test_each_expert_has_its_own_rank_and_alpha():
    pool = tiny_pool()
    pool.add(ExpertRecord("a", 2, 4.0, 0), mx.random.key(0))
    pool.add(ExpertRecord("b", 5, 3.0, 0), mx.random.key(1))
    assert [(e.rank, e.alpha) for e in pool.model.experts] == [(2, 4.0), (5, 3.0)]
    assert pool.model.experts[1].layers[0]["q_proj"].lora_a.shape == (DIMS, 5)


def test_adding_an_expert_leaves_existing_parameters_unchanged():
    pool = tiny_pool([2, 3])
    before = flat(pool.model.parameters())
    pool.add(ExpertRecord("c", 4, 8.0, 0), mx.random.key(5))
    after = flat(pool.model.parameters())
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    assert {name.rsplit(".layers")[0] for name in after.keys() - before.keys()} == {
        "experts.2", "router.rows.3.weight", "router.rows.3.bias",
    }  # fmt: skip


def test_a_frozen_expert_is_not_trainable():
    pool = tiny_pool([2, 3])
    assert pool.trainable == [1, 2]
    assert pool.frozen_hashes() == {}
    pool.freeze(1)
    assert pool.trainable == [2]
    assert pool.records[0].frozen
    assert not pool.records[1].frozen
    assert list(pool.frozen_hashes()) == [1]
    trainable = flat(pool.model.trainable_parameters())
    assert trainable
    assert not [name for name in trainable if name.startswith(("experts.0", "base"))]
    assert {name.split(".")[1] for name in trainable if name.startswith("experts")} == {"1"}


def test_expert_hash_changes_with_any_value_or_shape():
    pool = tiny_pool([2])
    expert = pool.model.experts[0]
    before = expert_hash(expert)
    assert expert_hash(tiny_pool([2]).model.experts[0]) == before
    factors = expert.layers[3]["v_proj"]
    original = factors.lora_b
    changed = np.array(original)
    changed[1, 3] = np.nextafter(changed[1, 3], np.float32(9))
    factors.lora_b = mx.array(changed)
    assert expert_hash(expert) != before
    factors.lora_b = original
    assert expert_hash(expert) == before
    factors.lora_b = original.reshape(1, -1)
    assert expert_hash(expert) != before, "the shape counts"


def test_number_of_expert_parameters(make_pool):
    """Rank 8 on q_proj (256 -> 256) and v_proj (256 -> 64) of the six layers of the embedded base."""
    assert make_pool([8]).num_parameters() == 6 * 8 * ((256 + 256) + (256 + 64)) == 39_936
    assert make_pool([8, 4]).num_parameters() == 39_936 + 39_936 // 2
    assert make_pool([8], router_layer=4).num_parameters() == 39_936 // 3
    assert tiny_pool().num_parameters() == 0
    assert tiny_pool([1], projections=ALL).num_parameters() == 4 * (2 * (64 + 96) + 2 * (64 + 48) + 3 * (64 + 96))


def test_growing_the_rank_keeps_the_outputs(make_pool, base):
    pool = make_pool([4, 2])
    tokens = mx.array(np.random.default_rng(0).integers(3, 4000, (1, 40)))
    masks = attention_layout(np.ones((1, 40), np.int32), pool.model.window)
    routing = Routing(None, mx.array(1.0))
    before = pool.model(tokens, masks, routing).hidden
    scale = pool.model.experts[0].scale
    pool.grow_rank(1, 8, mx.random.key(3))
    expert = pool.model.experts[0]
    assert (pool.records[0].rank, pool.records[0].alpha, expert.rank) == (8, 8 * scale, 8)
    assert expert.scale == scale
    factors = expert.layers[5]["q_proj"]
    assert factors.lora_a.shape == (256, 8)
    assert mx.all(factors.lora_b[4:] == 0).item(), "new ranks do nothing yet"
    assert mx.all(mx.any(factors.lora_a[:, 4:] != 0, axis=0)).item(), "and can be trained"
    after = pool.model(tokens, masks, routing).hidden
    assert mx.max(mx.abs(after - before)).item() <= 1e-5 * mx.max(mx.abs(before)).item()


def test_removing_and_appending_keep_experts_with_their_gate_rows(make_pool):
    pool = make_pool([1, 2, 3])
    experts, rows = list(pool.model.experts), list(pool.model.router.rows)
    assert pool.remove([2]) == {0: 0, 1: 1, 3: 2}
    assert [record.rank for record in pool.records] == [1, 3]
    assert pool.model.experts == [experts[0], experts[2]]
    assert pool.model.router.rows == [rows[0], rows[1], rows[3]]
    assert pool.append(experts[1], ExpertRecord("again", 2, 4.0, 0), rows[2]) == 3
    assert pool.model.experts[2] is experts[1]
    assert pool.model.router.rows[3] is rows[2]


def test_an_unfrozen_expert_is_trainable_again(make_pool):
    pool = make_pool([2, 2])
    pool.freeze(1)
    assert pool.trainable == [2]
    pool.unfreeze(1)
    assert pool.trainable == [1, 2]
    assert flat(pool.model.experts[0].trainable_parameters())
    assert pool.frozen_hashes() == {}


def test_a_new_expert_starts_from_the_mean_of_its_nearest_experts():
    pool = tiny_pool([2, 3])
    before = flat(pool.model.parameters())
    expert_id = pool.add(ExpertRecord("c", 6, 12.0, 0), mx.random.key(5), nearest_experts=[2, 1])
    after = flat(pool.model.parameters())
    assert all(np.array_equal(after[name], value) for name, value in before.items())

    def update(number: int, layer: int, name: str) -> np.ndarray:
        """Return the dense update of an expert on one projection."""
        expert = pool.model.experts[number - 1]
        return expert.scale * np.array(expert.layers[layer][name].lora_a @ expert.layers[layer][name].lora_b)

    for layer, named in pool.model.shapes.items():
        for name in named:
            mean = (update(1, layer, name) + update(2, layer, name)) / 2
            assert close(mx.array(update(expert_id, layer, name)), mean, 1e-5)
