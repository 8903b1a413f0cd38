"""The projection head: untrained it is nothing, trained it tells skills apart that whitening does not, and it is kept safely."""

from __future__ import annotations

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dylora_mlx.errors import UserError
from dylora_mlx.growth.novelty import embedding, projection
from dylora_mlx.growth.novelty.embedding import EmbeddingSpace, Reference, normalize
from dylora_mlx.growth.novelty.projection import ProjectionHead, ProjectionSettings

DIMS, TELLING, WHITENING = 32, 4, 0.1
RNG = np.random.default_rng(0)
QUICK = ProjectionSettings(hidden=64, steps=64, learning_rate=2e-3)
"""For skills that are plainly alike."""


def documents(skill: int, n: int = 80) -> np.ndarray:
    """Document means of a synthetic skill: what tells it lies in a few directions, and every direction is as noisy."""
    means = np.random.default_rng([skill, 1]).normal(size=(n, DIMS))
    means[:, :TELLING] += np.random.default_rng([skill, 2]).normal(size=TELLING)
    return means.astype(np.float32)


TAUGHT, NEW = [documents(skill) for skill in range(16)], [documents(skill) for skill in range(100, 108)]
REFERENCE = embedding.compute_reference(TAUGHT)


def separation(space: EmbeddingSpace, groups: list[np.ndarray], batch: int = 4) -> float:
    """Share of pairs of batches, one pair of the same skill and one of two, in which the former is closer."""
    rng, same, other = np.random.default_rng(3), [], []
    for _ in range(10):
        halves = [np.split(group[rng.permutation(len(group))[: 2 * batch]], 2) for group in groups]
        first, second = (space(np.array([pair[side].mean(0) for pair in halves])) for side in (0, 1))
        cosines = first @ second.T
        same += list(np.diag(cosines))
        other += list(cosines[~np.eye(len(groups), dtype=bool)])
    return float((np.array(same)[:, None] > np.array(other)).mean())


@pytest.fixture(scope="module")
def trained() -> ProjectionHead:
    return projection.train_head(TAUGHT, REFERENCE, WHITENING, QUICK)


def filled(dims: int = DIMS, hidden: int = 8) -> ProjectionHead:
    """A head that does something."""
    head = ProjectionHead(dims, hidden, np.random.default_rng(0))
    head.contract.weight = mx.array(np.random.default_rng(1).normal(size=(dims, hidden)).astype(np.float32))
    return head


@pytest.mark.parametrize("shape", [(DIMS,), (5, DIMS), (2, 3, DIMS)])
def test_an_untrained_head_changes_nothing(shape):
    head, x = ProjectionHead(DIMS, 8, np.random.default_rng(0)), normalize(RNG.normal(size=shape))
    found = head(x)
    assert (found.dtype, found.shape) == (np.float32, shape)
    assert np.allclose(found, x, atol=1e-6)
    assert not np.allclose(filled()(x), x, atol=0.1), "one that is not untrained does"


def test_unit_length_whatever_comes():
    x = np.concatenate([RNG.normal(size=(4, DIMS)) * 50, np.zeros((1, DIMS))])
    assert np.allclose(np.linalg.norm(filled()(x)[:4], axis=1), 1, atol=1e-5)
    untrained = ProjectionHead(DIMS, 8, np.random.default_rng(0))
    assert np.array_equal(untrained(x)[4], np.zeros(DIMS)), "a skill at the reference's mean has no direction"


def test_it_separates_skills_that_whitening_does_not(trained):
    """Those it was trained on, and those it never saw."""
    plain, sharpened = EmbeddingSpace(REFERENCE, WHITENING), EmbeddingSpace(REFERENCE, WHITENING, trained)
    for groups, gained in ((TAUGHT, 0.08), (NEW, 0.04)):
        assert separation(plain, groups) < 0.8
        assert separation(sharpened, groups) > separation(plain, groups) + gained


def test_halves_of_a_new_skill_come_closer(trained):
    for means in NEW:
        halves = means.reshape(2, len(means) // 2, DIMS).mean(1)
        plain, sharpened = (np.dot(*EmbeddingSpace(REFERENCE, WHITENING, head)(halves)) for head in (None, trained))
        assert sharpened > plain


def test_the_seed_decides_the_head(trained):
    x = normalize(RNG.normal(size=(3, DIMS)))
    again, other = (projection.train_head(TAUGHT, REFERENCE, WHITENING, QUICK._replace(seed=seed)) for seed in (0, 1))
    assert np.array_equal(trained(x), again(x))
    assert not np.allclose(trained(x), other(x), atol=1e-3)


def moved(head: ProjectionHead) -> float:
    x = normalize(np.random.default_rng(8).normal(size=(20, DIMS)))
    return float(np.abs(head(x) - x).max())


def test_what_does_not_serve_new_skills_is_not_learned(trained):
    """Six skills of which each lies in a direction of its own: what is learned of five says nothing of the sixth."""
    apart = [RNG.normal(size=(40, DIMS)) + 2 * np.eye(DIMS)[skill] for skill in range(6)]
    head = projection.train_head(apart, Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0, QUICK)
    assert moved(head) < 1e-5
    assert moved(trained) > 0.05


def test_a_course_stops_where_it_should():
    groups = [g.astype(np.float64) for g in TAUGHT[:3]]
    whole = [dict(tree_flatten(head.parameters())) for head in projection._train_steps(groups, [0, 2, 5], QUICK)]
    assert len(whole) == 3
    *_, alone = projection._train_steps(groups, [2], QUICK)
    assert np.array_equal(whole[1]["contract.weight"], alone.contract.weight)
    assert np.array_equal(whole[0]["contract.weight"], np.zeros((DIMS, 64)))
    assert not np.array_equal(whole[1]["contract.weight"], whole[2]["contract.weight"])


@pytest.mark.parametrize(("steps", "choices"), [(160, [0, 5, 10, 20, 40, 80, 160]), (3, [0, 1, 3]), (1, [0, 1])])
def test_numbers_of_steps(steps, choices):
    assert projection._step_choices(steps) == choices


def test_a_skill_is_judged_by_heads_that_never_saw_it(monkeypatch):
    marked = [np.full((20, DIMS), 100.0 * skill) for skill in range(6)]
    original, folds = projection._held_out_losses, []

    def unseen(taught, fold, looks, settings):
        before = len(drawn)
        found = original(taught, fold, looks, settings)
        folds.extend(fold)
        assert not {g for groups in drawn[before:] for g in groups} & {100.0 * skill for skill in fold}
        return found

    drawn: list[set[float]] = []
    draw = projection.draw_batches
    monkeypatch.setattr(
        projection, "draw_batches", lambda groups, *r: drawn.append({g[0, 0] for g in groups}) or draw(groups, *r)
    )
    monkeypatch.setattr(projection, "_held_out_losses", unseen)
    projection.train_head(marked, Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0, QUICK._replace(steps=2))
    assert sorted(folds) == list(range(6)), "and each is judged once"


def test_held_out_documents_are_never_trained_on(monkeypatch):
    marked = [np.full((20, DIMS), 1.0) + np.arange(20)[:, None] + 100 * skill for skill in range(3)]
    seen: dict[bool, set[float]] = {True: set(), False: set()}
    original = projection.draw_batches

    def draw(groups, *rest):
        seen[len(groups[0]) == 5] |= {float(row[0]) for group in groups for row in group}
        return original(groups, *rest)

    monkeypatch.setattr(projection, "draw_batches", draw)
    projection.train_head(marked, Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0, QUICK._replace(steps=3))
    assert len(seen[True]) == 15
    assert len(seen[False]) == 45
    assert not seen[True] & seen[False]


def test_a_draw_has_disjoint_batches_and_even_mixtures():
    """Documents are unit vectors of their own, so that a batch's mean tells which it holds."""
    groups = list(np.eye(60).reshape(3, 20, 60))
    for seed in range(5):
        drawn = projection.draw_batches(groups, 8, 7, np.random.default_rng(seed))
        anchors, positives, mixtures = (np.array(side) for side in drawn)
        assert anchors.shape == positives.shape == (3, 60)
        assert mixtures.shape == (7, 60)
        for side in drawn:
            assert np.allclose(np.linalg.norm(np.array(side), axis=1), 1, atol=1e-6)
        for g in range(3):
            own = np.arange(60) // 20 == g
            for side in (anchors, positives):
                assert (side[g, own] > 0).sum() == 8
                assert (side[g, ~own] == 0).all()
        assert not ((anchors > 0) & (positives > 0)).any()
        skills = (mixtures.reshape(7, 3, 20) > 0).sum(2)
        assert ((skills > 0).sum(1) >= 2).all()
        assert (skills <= 4).all(), "none has more than half of eight"


def test_small_skills_give_small_batches():
    drawn = projection.draw_batches(list(np.eye(12).reshape(2, 6, 12)), 8, 1, np.random.default_rng(0))
    assert (np.array(drawn.anchors) > 0).sum(1).tolist() == [3, 3]


def test_info_nce_by_hand():
    head, t = ProjectionHead(3, 4, np.random.default_rng(0)), 0.5
    a, p, m = (mx.array(normalize(RNG.normal(size=(n, 3))).astype(np.float32)) for n in (2, 2, 3))
    keys = np.concatenate([np.array(a), np.array(p), np.array(m)])
    losses = []
    for i in range(4):
        logits = keys @ keys[i] / t
        others = [j for j in range(7) if j != i]
        losses.append(np.log(np.exp(logits[others]).sum()) - logits[(i + 2) % 4])
    found = projection.info_nce(head, projection.ContrastiveBatch(a, p, m), t)
    assert np.allclose(np.array(found), losses, atol=1e-5)


@pytest.mark.parametrize("groups", [[], [documents(0), documents(1)], [documents(0), documents(1), documents(2, 15)]])
def test_too_little_to_train_on(groups):
    with pytest.raises(UserError, match=r"at least three skills of 16 documents"):
        projection.train_head(groups, REFERENCE, WHITENING)


def test_round_trip(tmp_path, trained):
    path, x = tmp_path / "new" / "head.bin", normalize(RNG.normal(size=(3, DIMS)))
    trained.save(path, "base", WHITENING)
    assert [file.name for file in path.parent.iterdir()] == ["head.bin"]
    assert np.array_equal(projection.load_head(path, "base", WHITENING, DIMS)(x), trained(x))
    filled().save(path, "base", WHITENING)
    assert np.array_equal(projection.load_head(path, "base", WHITENING, DIMS)(x), filled()(x)), (
        "replaced, another width"
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("other", WHITENING, DIMS), "trained for another base"),
        (("base", 0.2, DIMS), "trained with whitening 0.1, but growth.whitening is 0.2"),
        (("base", WHITENING, DIMS + 1), f"for embeddings of another size than {DIMS + 1}"),
    ],
)
def test_a_head_that_does_not_fit(tmp_path, asked, said):
    filled().save(tmp_path / "head", "base", WHITENING)
    refused(tmp_path / "head", said, *asked)


def refused(path, said, *asked):
    with pytest.raises(UserError) as caught:
        projection.load_head(path, *(asked or ("base", WHITENING, DIMS)))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_heads(tmp_path):
    path = tmp_path / "head.safetensors"
    refused(path, "no such file")
    refused(tmp_path, "no such file")
    path.write_bytes(b"nonsense")
    refused(path, "not readable")
    mx.save_safetensors(str(path), {"mean": mx.zeros(3)})
    refused(path, "not a projection head of this release")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_torn_files(tmp_path, share):
    path = tmp_path / "head"
    filled().save(path, "base", WHITENING)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "not readable")


def test_a_flipped_bit(tmp_path):
    path = tmp_path / "head"
    filled().save(path, "base", WHITENING)
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4
    path.write_bytes(bytes(damaged))
    refused(path, "damaged")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    head = filled()
    head.expand.bias = mx.array([value] * 8)
    head.save(tmp_path / "head", "base", WHITENING)
    refused(tmp_path / "head", "not finite")
