"""The projection head: identity before training, better separation of skills after it, and checked storage."""

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

DIMS, SKILL_DIMS, WHITENING = 32, 4, 0.1
RNG = np.random.default_rng(0)
QUICK = ProjectionSettings(hidden=64, steps=64, learning_rate=2e-3)
"""Training settings that suffice for these easy synthetic skills."""


def documents(skill: int, n: int = 80) -> np.ndarray:
    """Return document means of a synthetic skill.

    Skills differ in SKILL_DIMS dimensions; every dimension has the same noise.
    """
    means = np.random.default_rng([skill, 1]).normal(size=(n, DIMS))
    means[:, :SKILL_DIMS] += np.random.default_rng([skill, 2]).normal(size=SKILL_DIMS)
    return means.astype(np.float32)


TRAINING_SKILLS, NEW_SKILLS = [documents(skill) for skill in range(16)], [documents(skill) for skill in range(100, 108)]
REFERENCE = embedding.compute_reference(np.concatenate(TRAINING_SKILLS))


def separation(space: EmbeddingSpace, groups: list[np.ndarray], batch: int = 4) -> float:
    """Return how often a pair of batches of the same skill is closer than a pair of batches of different skills."""
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
    return projection.train_head(TRAINING_SKILLS, REFERENCE, WHITENING, QUICK)


def filled(dims: int = DIMS, hidden: int = 8) -> ProjectionHead:
    """Return a head whose output differs from its input."""
    head = ProjectionHead(dims, hidden, np.random.default_rng(0))
    head.contract.weight = mx.array(np.random.default_rng(1).normal(size=(dims, hidden)).astype(np.float32))
    return head


@pytest.mark.parametrize("shape", [(DIMS,), (5, DIMS), (2, 3, DIMS)])
def test_an_untrained_head_changes_nothing(shape):
    head, x = ProjectionHead(DIMS, 8, np.random.default_rng(0)), normalize(RNG.normal(size=shape))
    output = head(x)
    assert (output.dtype, output.shape) == (np.float32, shape)
    assert np.allclose(output, x, atol=1e-6)
    assert not np.allclose(filled()(x), x, atol=0.1), "a head with weights does"


def test_the_output_has_unit_length():
    x = np.concatenate([RNG.normal(size=(4, DIMS)) * 50, np.zeros((1, DIMS))])
    assert np.allclose(np.linalg.norm(filled()(x)[:4], axis=1), 1, atol=1e-5)
    untrained = ProjectionHead(DIMS, 8, np.random.default_rng(0))
    assert np.array_equal(untrained(x)[4], np.zeros(DIMS)), "a skill at the reference's mean has no direction"


def test_the_head_separates_skills_better_than_whitening(trained):
    """The head improves the separation of the skills of its training and of unseen skills."""
    without_head, with_head = EmbeddingSpace(REFERENCE, WHITENING), EmbeddingSpace(REFERENCE, WHITENING, trained)
    for groups, gain in ((TRAINING_SKILLS, 0.08), (NEW_SKILLS, 0.04)):
        assert separation(without_head, groups) < 0.8
        assert separation(with_head, groups) > separation(without_head, groups) + gain


def test_halves_of_a_new_skill_come_closer(trained):
    for means in NEW_SKILLS:
        halves = means.reshape(2, len(means) // 2, DIMS).mean(1)
        without_head, with_head = (
            np.dot(*EmbeddingSpace(REFERENCE, WHITENING, head)(halves)) for head in (None, trained)
        )
        assert with_head > without_head


def test_the_seed_decides_the_head(trained):
    x = normalize(RNG.normal(size=(3, DIMS)))
    same_seed, other_seed = (
        projection.train_head(TRAINING_SKILLS, REFERENCE, WHITENING, QUICK._replace(seed=seed)) for seed in (0, 1)
    )
    assert np.array_equal(trained(x), same_seed(x))
    assert not np.allclose(trained(x), other_seed(x), atol=1e-3)


def moved(head: ProjectionHead) -> float:
    """Return the largest change that the head makes to random unit vectors."""
    x = normalize(np.random.default_rng(8).normal(size=(20, DIMS)))
    return float(np.abs(head(x) - x).max())


def test_a_head_that_does_not_generalise_is_not_trained(trained):
    """Each of six skills has a direction of its own, so nothing learned from five of them helps with the sixth."""
    unrelated_skills = [RNG.normal(size=(40, DIMS)) + 2 * np.eye(DIMS)[skill] for skill in range(6)]
    head = projection.train_head(unrelated_skills, Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0, QUICK)
    assert moved(head) < 1e-5
    assert moved(trained) > 0.05


def test_training_yields_the_head_at_each_step_choice():
    groups = [group.astype(np.float64) for group in TRAINING_SKILLS[:3]]
    snapshots = [dict(tree_flatten(head.parameters())) for head in projection._train_steps(groups, [0, 2, 5], QUICK)]
    assert len(snapshots) == 3
    *_, stopped_at_two = projection._train_steps(groups, [2], QUICK)
    assert np.array_equal(snapshots[1]["contract.weight"], stopped_at_two.contract.weight)
    assert np.array_equal(snapshots[0]["contract.weight"], np.zeros((DIMS, 64)))
    assert not np.array_equal(snapshots[1]["contract.weight"], snapshots[2]["contract.weight"])


@pytest.mark.parametrize(("steps", "choices"), [(160, [0, 5, 10, 20, 40, 80, 160]), (3, [0, 1, 3]), (1, [0, 1])])
def test_step_choices(steps, choices):
    assert projection._step_choices(steps) == choices


def test_a_skill_is_evaluated_by_heads_not_trained_on_it(monkeypatch):
    marked_skills = [np.full((20, DIMS), 100.0 * skill) for skill in range(6)]
    held_out_losses, folds = projection._held_out_losses, []

    def unseen(skills, fold, looks, settings):
        before = len(groups_drawn)
        losses = held_out_losses(skills, fold, looks, settings)
        folds.extend(fold)
        assert not {g for groups in groups_drawn[before:] for g in groups} & {100.0 * skill for skill in fold}
        return losses

    groups_drawn: list[set[float]] = []
    draw_batches = projection.draw_batches
    monkeypatch.setattr(
        projection,
        "draw_batches",
        lambda groups, *r: groups_drawn.append({g[0, 0] for g in groups}) or draw_batches(groups, *r),
    )
    monkeypatch.setattr(projection, "_held_out_losses", unseen)
    projection.train_head(marked_skills, Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0, QUICK._replace(steps=2))
    assert sorted(folds) == list(range(6)), "each skill is held out exactly once"


def test_held_out_documents_are_never_trained_on(monkeypatch):
    marked_skills = [np.full((20, DIMS), 1.0) + np.arange(20)[:, None] + 100 * skill for skill in range(3)]
    rows_seen: dict[bool, set[float]] = {True: set(), False: set()}
    original = projection.draw_batches

    def draw(groups, *rest):
        rows_seen[len(groups[0]) == 5] |= {float(row[0]) for group in groups for row in group}
        return original(groups, *rest)

    monkeypatch.setattr(projection, "draw_batches", draw)
    projection.train_head(marked_skills, Reference(np.zeros(DIMS), np.eye(DIMS)), 0.0, QUICK._replace(steps=3))
    assert len(rows_seen[True]) == 15
    assert len(rows_seen[False]) == 45
    assert not rows_seen[True] & rows_seen[False]


def test_batches_are_disjoint_and_mixtures_are_balanced():
    """Each document is a unit vector of its own, so the non-zero entries of a batch mean identify its documents."""
    groups = list(np.eye(60).reshape(3, 20, 60))
    for seed in range(5):
        batches = projection.draw_batches(groups, 8, 7, np.random.default_rng(seed))
        anchors, positives, mixtures = (np.array(side) for side in batches)
        assert anchors.shape == positives.shape == (3, 60)
        assert mixtures.shape == (7, 60)
        for side in batches:
            assert np.allclose(np.linalg.norm(np.array(side), axis=1), 1, atol=1e-6)
        for group in range(3):
            in_group = np.arange(60) // 20 == group
            for side in (anchors, positives):
                assert (side[group, in_group] > 0).sum() == 8
                assert (side[group, ~in_group] == 0).all()
        assert not ((anchors > 0) & (positives > 0)).any()
        skills = (mixtures.reshape(7, 3, 20) > 0).sum(2)
        assert ((skills > 0).sum(1) >= 2).all()
        assert (skills <= 4).all(), "none has more than half of eight"


def test_small_skills_give_small_batches():
    batches = projection.draw_batches(list(np.eye(12).reshape(2, 6, 12)), 8, 1, np.random.default_rng(0))
    assert (np.array(batches.anchors) > 0).sum(1).tolist() == [3, 3]


def test_info_nce_equals_its_definition():
    head, temperature = ProjectionHead(3, 4, np.random.default_rng(0)), 0.5
    anchors, positives, mixtures = (mx.array(normalize(RNG.normal(size=(n, 3))).astype(np.float32)) for n in (2, 2, 3))
    keys = np.concatenate([np.array(anchors), np.array(positives), np.array(mixtures)])
    losses = []
    for i in range(4):
        logits = keys @ keys[i] / temperature
        others = [j for j in range(7) if j != i]
        losses.append(np.log(np.exp(logits[others]).sum()) - logits[(i + 2) % 4])
    computed = projection.info_nce(head, projection.ContrastiveBatch(anchors, positives, mixtures), temperature)
    assert np.allclose(np.array(computed), losses, atol=1e-5)


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
    ("expected_settings", "message"),
    [
        (("other", WHITENING, DIMS), "trained for another base"),
        (("base", 0.2, DIMS), "trained with whitening 0.1, but growth.whitening is 0.2"),
        (("base", WHITENING, DIMS + 1), f"for embeddings of another size than {DIMS + 1}"),
    ],
)
def test_a_head_for_other_settings_is_refused(tmp_path, expected_settings, message):
    filled().save(tmp_path / "head", "base", WHITENING)
    check_refused(tmp_path / "head", message, *expected_settings)


def check_refused(path, message, *expected_settings):
    with pytest.raises(UserError) as raised:
        projection.load_head(path, *(expected_settings or ("base", WHITENING, DIMS)))
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_files_that_are_not_heads_are_refused(tmp_path):
    path = tmp_path / "head.safetensors"
    check_refused(path, "no such file")
    check_refused(tmp_path, "no such file")
    path.write_bytes(b"nonsense")
    check_refused(path, "not readable")
    mx.save_safetensors(str(path), {"mean": mx.zeros(3)})
    check_refused(path, "not a projection head of this release")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, share):
    path = tmp_path / "head"
    filled().save(path, "base", WHITENING)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    check_refused(path, "not readable")


def test_a_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "head"
    filled().save(path, "base", WHITENING)
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4
    path.write_bytes(bytes(damaged))
    check_refused(path, "damaged")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    head = filled()
    head.expand.bias = mx.array([value] * 8)
    head.save(tmp_path / "head", "base", WHITENING)
    check_refused(tmp_path / "head", "not finite")
