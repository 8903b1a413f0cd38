"""tools/benchmarks/methods: the baseline methods on a tiny base."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from methods import adapters, answers, apart, arrow, course, earlier, orthogonal, results, sequential, training
from methods.answers import Task
from methods.bench import Bench, Result, joined
from methods.course import Course, base_losses
from methods.results import Cell
from mlx.utils import tree_flatten

from dylora_mlx.config import Config, DataConfig, GrowthConfig, ModelConfig, Source, TrainingConfig
from dylora_mlx.data import packing
from dylora_mlx.data.encoding import Document
from dylora_mlx.data.questions import Question
from dylora_mlx.data.stream import Skill, Split
from dylora_mlx.errors import UserError
from dylora_mlx.evaluation.questions import question_domain
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.decoder import block
from dylora_mlx.model.experts.lora import Expert, ExpertGates
from dylora_mlx.training.skill import solo
from dylora_mlx.training.step.domains import make_domains
from dylora_mlx.training.step.evaluate import evaluate
from dylora_mlx.training.step.losses import batch_layout
from tests.tiny import DENSE, close, flat, tiny_base

NAMES = ["a", "b", "c"]
OWNERS = {"a": 0, "b": 1, "c": 0}
"""The expert of each skill. The third skill trains the first one's expert further."""


def skill(name: str, first: int, documents: int = 8) -> Skill:
    """Return random documents over a dozen tokens that only this skill uses; train, validation and test are the same."""
    rng = np.random.default_rng(first)
    rendered = []
    for n in rng.integers(6, 24, documents):
        tokens = rng.integers(first, first + 12, n + 1).astype(np.int32)
        rendered.append(Document(tokens, np.append(False, rng.random(n) < 0.8)))
    split = Split(packing.split_documents(rendered, 24), documents)
    return Skill(name, Source(name=name, source="nowhere"), split, split, split, name)


def bench_of(projections=("q_proj", "v_proj"), router_layer="final", top_k=2, layers=2) -> Bench:
    skills = [skill(name, 5 + 20 * i, 8 + 2 * i) for i, name in enumerate(NAMES)]
    config = Config(
        skills=[s.source for s in skills],
        data=DataConfig(max_seq_length=24),
        model=ModelConfig(rank=2, alpha=4.0, projections=list(projections), router_layer=router_layer),
        growth=GrowthConfig(top_k=top_k),
        training=TrainingConfig(epochs=1, max_steps=3, learning_rate=0.05),
    )
    return Bench(tiny_base(layers=layers), config, skills, skill("known", 70), 0, OWNERS)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return bench_of()


@pytest.fixture(scope="module")
def trained(bench) -> apart.SoloExperts:
    return apart.experts(bench)


def random_expert(bench: Bench, seed: int, rank: int = 2) -> Expert:
    """Return an expert whose B is random too."""
    expert, rng = bench.expert(rank, seed), np.random.default_rng(seed)
    for factors in (f for layer in expert.layers for f in layer.values()):
        factors.lora_b = mx.array(rng.normal(0, 0.2, factors.lora_b.shape).astype(np.float32))
    return expert


def same(one: dict[str, float], other: dict[str, float], tolerance: float = 1e-5) -> bool:
    assert one.keys() == other.keys()
    return close(list(one.values()), list(other.values()), tolerance)


def equal(one: Expert, other: Expert) -> bool:
    ours, theirs = flat(one.parameters()), flat(other.parameters())
    return ours.keys() == theirs.keys() and all(np.array_equal(value, theirs[name]) for name, value in ours.items())


def micro(bench: Bench, name: str = "a"):
    return training.on_device(bench, bench.domains("validation")[name])[0]


def losses_with(bench: Bench, experts: list[Expert]) -> dict[str, float]:
    return training.losses(bench, adapters.all_on(bench.model(), experts))


# The shared loop and losses.


@pytest.mark.parametrize("router_layer", ["final", 1])
def test_training_equals_the_package(router_layer):
    bench = bench_of(router_layer=router_layer)
    split, expert = bench.skills[1].train, bench.expert(2, 0)
    course = Course(bench)
    expert_trained = course.teach([expert], 1, split, 7, 3)
    theirs = solo.solo_model(bench.base, bench.config, adapters.with_weights(bench, expert, expert.parameters()))
    seed = int(np.random.default_rng([bench.seed, 20, 7]).integers(2**31))
    assert solo.train_solo(theirs, bench.config, split, None, 3, seed, False) == course.steps == 3
    ours, other = flat(expert_trained.parameters()), flat(theirs.experts[0].parameters())
    assert ours.keys() == other.keys()
    assert all(close(ours[name], other[name], 1e-4) for name in ours)
    assert any(np.abs(value - flat(expert.parameters())[name]).max() > 0.01 for name, value in ours.items())
    learned = sum(int(b.loss_mask.sum()) for step in bench.plan(split, 7).steps(0, 3) for b in step)
    assert course.tokens == learned


def test_losses_equal_the_package(bench):
    expert = random_expert(bench, 3)
    theirs = solo.solo_model(bench.base, bench.config, expert)
    for measured, expert_id in ((base_losses(bench), 0), (losses_with(bench, [expert]), 1)):
        domains = bench.domains("validation")
        expected = {name: evaluate(theirs, domain, DENSE, expert_id).loss for name, domain in domains.items()}
        assert list(measured) == ["known", *NAMES]
        assert same(measured, expected, 1e-4)
    assert not same(losses_with(bench, [expert]), base_losses(bench), 2e-3)


def test_a_new_adapter_has_the_losses_of_the_base(bench):
    assert losses_with(bench, [bench.expert(bench.budget(), 0)]) == base_losses(bench)


def simple_loss(bench, model, stack, count):
    """A loss of few operations: a C++ compiler takes half a second for each."""
    return lambda learned, batch: (
        sum(((v - 1) ** 2).sum() for _, v in tree_flatten(learned)) * (batch.weights.sum() + 1)
    )


@pytest.mark.parametrize(
    "loss", [simple_loss, pytest.param(course._sum_loss, marks=pytest.mark.slow)], ids=["simple", "whole"]
)
def test_compiled_training_is_the_same(monkeypatch, loss):
    monkeypatch.setattr(course, "_sum_loss", loss)
    if loss is simple_loss:
        monkeypatch.setattr(course, "base_losses", lambda bench: {})

    def learned(compiled: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        monkeypatch.setattr(Bench, "compiled", property(lambda self: compiled))
        bench = bench_of(projections=["q_proj"], layers=1)
        others = [random_expert(bench, 1), bench.expert(2, 0)]
        added = orthogonal.penalty(others[:1])
        expert = Course(bench).teach(others, 2, bench.skills[0].train, 0, 3, added)
        return flat(others[1].parameters()), flat(expert.parameters())

    (before, eager), (_, compiled) = learned(False), learned(True)
    assert all(close(eager[name], compiled[name], 1e-3) for name in eager)
    assert not any(close(eager[name], before[name], 1e-2) for name in eager)


# One adapter for everything.


def test_methods_have_the_same_steps_and_parameters(bench):
    methods = [sequential.sequential, sequential.with_replay, sequential.joint]
    one, replay, joint = (method(bench) for method in methods)
    steps = sum(bench.steps(s) for s in bench.skills)
    assert [r.steps for r in (one, replay, joint)] == [steps] * 3 == [9] * 3
    assert {r.parameters for r in (one, replay, joint)} == {2 * bench.parameters(bench.config.model.rank)}
    for result in (one, replay, joint):
        assert [list(row) for row in result.matrix] == [["known", *NAMES]] * 4
        assert result.matrix[0] == base_losses(bench)
        assert result.test == pytest.approx(result.matrix[-1]), "tested on what is validated here"
        assert result.routing is None
        assert result.seconds > 0
    assert replay.matrix[1] == one.matrix[1], "there is nothing to replay at first"
    assert not same(replay.matrix[2], one.matrix[2], 1e-4)
    assert joint.matrix[1] == joint.matrix[2] == joint.matrix[3]
    assert all(joint.matrix[1][name] < joint.matrix[0][name] for name in NAMES)
    assert one.matrix[1]["a"] < one.matrix[0]["a"]


def test_moments_are_reset_and_the_scale_stays(bench):
    expert = bench.expert(bench.budget(), 0)
    assert (expert.rank, expert.scale) == (4, bench.config.model.alpha / bench.config.model.rank)
    course = Course(bench)
    first = course.teach([expert], 1, bench.skills[0].train, 0, 3)
    again = Course(bench).teach([first], 1, bench.skills[1].train, 1, 3)
    after = course.teach([first], 1, bench.skills[1].train, 1, 3)
    assert equal(after, again)
    assert losses_with(bench, [after]) == sequential.sequential(bench).matrix[2]


def test_replay_draws_from_earlier_skills(bench):
    texts = [{piece.tokens.tobytes() for piece in s.train.segments} for s in bench.skills]
    current = bench.skills[2].train
    mixed = sequential.replayed(bench, 2)
    assert mixed.segments[: len(current.segments)] == current.segments
    replayed = [piece.tokens.tobytes() for piece in mixed.segments[len(current.segments) :]]
    assert all(text in texts[0] | texts[1] for text in replayed)
    assert {text in texts[0] for text in replayed} == {True, False}, "from both"
    numbers = [piece.document for piece in mixed.segments]
    assert sorted(numbers) == list(range(2 * current.num_documents)), "here each document is one piece"
    assert mixed.num_documents == 2 * current.num_documents
    assert sequential.replayed(bench, 0) is bench.skills[0].train
    again = sequential.replayed(bench, 2).segments
    assert [p.tokens.tobytes() for p in again] == [p.tokens.tobytes() for p in mixed.segments]
    other = sequential.replayed(replace(bench, seed=1), 2).segments
    assert [p.tokens.tobytes() for p in other] != [p.tokens.tobytes() for p in mixed.segments]


def test_half_of_the_training_documents_are_replayed(bench):
    plan = bench.lasting(sequential.replayed(bench, 1), 1, 40)
    documents = np.array([index for row in plan.rows[:80] for index in row])
    assert np.mean(documents < bench.skills[1].train.num_documents) == pytest.approx(0.5, abs=0.06)


def test_a_plan_has_enough_steps(bench):
    split = bench.skills[0].train
    once = len(bench.plan(split, 4))
    assert len(bench.lasting(split, 4, once)) == once
    assert len(bench.lasting(split, 4, 5 * once)) >= 5 * once
    assert joined(bench.skills).num_documents == 30


# Separately trained experts.


def test_the_oracle_is_each_expert_alone(bench, trained):
    result, base = apart.oracle(bench, trained), base_losses(bench)
    assert (result.steps, result.tokens) == (9, trained.course.tokens)
    assert result.parameters == 2 * bench.parameters(2)
    assert result.matrix[0] == base
    for number, row in enumerate(result.matrix[1:]):
        now = trained.after[number]
        wanted = {name: losses_with(bench, [now[OWNERS[name]]])[name] for name in NAMES[: number + 1]}
        assert same(row, {**base, **wanted})
    assert result.matrix[3]["b"] == result.matrix[2]["b"], "its expert has not been trained since"
    assert result.matrix[3]["a"] != result.matrix[2]["a"], "its expert went on with another skill"
    assert same(result.test, result.matrix[3])
    assert all(result.matrix[k][name] < base[name] for k, name in ((1, "a"), (2, "b"), (3, "c")))


def test_an_expert_continues_with_its_next_skill(bench, trained):
    first, third = trained.after[0][0], trained.after[2][0]
    assert trained.after[1][0] is first, "each is trained alone"
    assert equal(third, Course(bench).teach([first], 1, bench.skills[2].train, 2, 3))
    assert not equal(third, Course(bench).teach([bench.expert(2, 0)], 1, bench.skills[2].train, 2, 3))


def test_the_base_learns_nothing(bench):
    result = apart.base_alone(bench)
    assert result.matrix == [base_losses(bench)] * 4
    assert (result.parameters, result.steps, result.tokens) == (0, 0, 0)


# Arrow.


@pytest.mark.parametrize("projections", [["v_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]])
def test_a_prototype_is_the_top_singular_vector(projections):
    expert = random_expert(bench_of(projections), 5, rank=3)
    for layer in expert.layers:
        parts = list(layer.values())
        update = np.concatenate([np.array(p.lora_a) @ np.array(p.lora_b) for p in parts], axis=1)
        left, _, _ = np.linalg.svd(update)
        prototype = arrow.prototype(parts)
        assert abs(prototype @ left[:, 0]) == pytest.approx(1, abs=1e-5)
        assert np.linalg.norm(prototype) == pytest.approx(1)


def test_arrow_with_one_expert_equals_that_expert(bench, trained):
    expert = random_expert(bench, 2)
    expected = losses_with(bench, [expert])
    assert same(training.losses(bench, arrow.routed(bench.model(), [expert], 2)), expected)
    twice = training.losses(bench, arrow.routed(bench.model(), [expert, expert], 2))
    assert same(twice, expected), "gates sum to one"
    result = arrow.arrow(bench, trained)
    assert same(result.matrix[1], losses_with(bench, [trained.after[0][0]])), "only what exists by then takes part"
    pair = list(trained.after[2].values())
    assert same(result.matrix[3], training.losses(bench, arrow.routed(bench.model(), pair, 2)))
    assert not any(same(result.matrix[3], losses_with(bench, [e]), 1e-4) for e in pair)
    assert (result.steps, result.routing) == (9, None)


def test_arrow_gates_by_hand():
    rng = np.random.default_rng(0)
    x, rows = rng.normal(size=(2, 5, 8)).astype(np.float32), rng.normal(size=(3, 8)).astype(np.float32)
    logits = np.abs(np.einsum("bli,ei->ble", x, rows))
    gates = np.array(arrow.gates(mx.array(x), mx.array(rows), 2))
    assert ((gates > 0).sum(-1) == 2).all()
    assert (gates.argmax(-1) == logits.argmax(-1)).all()
    selected = np.where(gates > 0, np.exp(logits), 0)
    assert close(gates, selected / selected.sum(-1, keepdims=True), 1e-5)
    assert close(arrow.gates(mx.array(-x), mx.array(rows), 2), gates, 1e-6), "a direction has no sign"


def test_arrow_computes_gates_per_layer(bench):
    """Running the blocks in turn, each with gates computed from its input, gives the same states."""
    experts = [random_expert(bench, 6), random_expert(bench, 7)]
    model, batch = bench.model(), micro(bench)
    stack, rows = adapters.stacked(model, experts), arrow.prototypes(experts)
    states = arrow.routed(model, experts, 1)(batch)
    h = model.embed(batch.inputs)
    chosen = []
    for i, layer in enumerate(model.base.model.layers):
        x = layer.input_layernorm(h)
        gates = arrow.gates(x, rows[i], 1)
        chosen.append(np.array(gates.argmax(-1)))
        attn_layout = batch_layout(batch, model.window)
        expert_gates = ExpertGates(mx.repeat(gates, 2, axis=-1) * experts[0].scale)
        h = block.run_block(
            model.family, layer, h, attn_layout, model.is_global(i), None, stack.layers[i], expert_gates
        )
    assert close(states, model.base.model.norm(h), 1e-4)
    assert any((chosen[0] != other).any() for other in chosen[1:])


@pytest.mark.parametrize("projections", [["o_proj"], ["q_proj", "down_proj"], ["gate_proj", "up_proj"]])
def test_arrow_refuses_projections_without_a_common_input(projections, trained):
    with pytest.raises(UserError, match=r"model\.projections: Arrow needs") as raised:
        arrow.arrow(bench_of(projections), trained)
    assert "\n" not in str(raised.value)


# O-LoRA.


def test_the_penalty_and_its_gradient(bench):
    others, new = [random_expert(bench, 1), random_expert(bench, 2)], random_expert(bench, 3)
    wanted = 0.0
    for other in others:
        for layer, named in enumerate(new.layers):
            for name, factors in named.items():
                product = np.array(other.layers[layer][name].lora_a).T @ np.array(factors.lora_a)
                wanted += sum(entry**2 for entry in product.flat)
    learned = {"experts": adapters.weights_of(new)}
    penalty = orthogonal.penalty(others)
    assert float(np.array(penalty(learned))) == pytest.approx(0.5 * wanted, rel=1e-5)
    grads = flat(mx.grad(penalty)(learned))
    assert all(np.abs(value).max() > 0 for name, value in grads.items() if name.endswith("lora_a"))
    assert all(np.abs(value).max() == 0 for name, value in grads.items() if name.endswith("lora_b"))


def test_the_gradient_of_a_sum_reaches_only_the_trained_adapter(bench):
    """The loss under the sum of two adapters depends on both, but the gradient reaches only the trained one."""
    experts, model, batch = [random_expert(bench, 1), random_expert(bench, 2)], bench.model(), micro(bench)
    stack = adapters.stacking(model, experts, 1)(adapters.weights_of(experts[0]))

    def loss(layers) -> mx.array:
        changed = {k: {n: stack.layers[k][n]._replace(a=a, b=b) for n, (a, b) in v.items()} for k, v in layers.items()}
        hidden = adapters.states(model, batch, stack._replace(layers=changed), [1.0] * 3)
        return training.summed_loss(bench, hidden, batch)

    arrays = {k: {n: (f.a, f.b) for n, f in v.items()} for k, v in stack.layers.items()}
    assert all(np.abs(value).max() == 0 for value in flat(mx.grad(loss)(arrays)).values())
    weights_of_first = adapters.weights_of(experts[0])

    def loss_of_weights(weights) -> mx.array:
        hidden = adapters.states(model, batch, adapters.stacking(model, experts, 1)(weights), [1.0] * 3)
        return training.summed_loss(bench, hidden, batch)

    assert any(np.abs(value).max() > 0 for value in flat(mx.grad(loss_of_weights)(weights_of_first)).values())


def test_orthogonal_freezes_earlier_adapters(bench, trained):
    course = Course(bench)
    after = orthogonal.learn(course)
    assert [sorted(now) for now in after] == [[0], [0, 1], [0, 1]]
    assert equal(after[0][0], trained.after[0][0]), "the first has nothing to keep away from"
    assert after[1][0] is after[0][0], "frozen while the second learns"
    assert after[2][1] is after[1][1], "frozen while the first goes on"
    assert after[2][0] is not after[1][0], "an owner that exists goes on"
    for now, row in zip(after, course.matrix[1:], strict=True):
        assert same(row, losses_with(bench, list(now.values())))
    assert course.steps == 9
    result = orthogonal.orthogonal(bench)
    assert result.matrix == course.matrix
    assert result.parameters == 2 * bench.parameters(2)
    assert result.test == pytest.approx(result.matrix[-1])


def test_the_penalty_reduces_the_overlap(bench):
    slow = replace(bench, config=replace(bench.config, training=replace(bench.config.training, learning_rate=0.01)))
    experts = [random_expert(bench, 1), bench.expert(2, 2)]

    def overlap(weight: float) -> float:
        added = orthogonal.penalty(experts[:1], weight)
        new = Course(slow).teach(experts, 2, bench.skills[1].train, 1, 3, added)
        return float(np.array(orthogonal.overlap(orthogonal.subspaces(experts[:1]), new.parameters())))

    assert overlap(50.0) < 0.9 * overlap(0.0)


# The earlier attempt.


def test_mixing_states_mixes_logits(bench):
    experts, model, batch = [random_expert(bench, 1), random_expert(bench, 2)], bench.model(), micro(bench)
    each = [adapters.stacked(model, [e]) for e in experts]
    rng = np.random.default_rng(0)
    gates = mx.softmax(mx.array(rng.normal(size=(*batch.inputs.shape, 2)).astype(np.float32)), axis=-1)
    logits = [model.logits(adapters.states(model, batch, s, [0.0, 1.0])) for s in each]
    wanted = sum(np.array(gates[..., e : e + 1]) * np.array(value) for e, value in enumerate(logits))
    assert close(model.logits(earlier.mix(model, batch, each, gates)), wanted, 1e-4)
    assert np.abs(np.array(logits[0]) - np.array(logits[1])).max() > 0.1


def test_the_routing_pass_has_every_expert_on(bench):
    model, batch, experts = bench.model(), micro(bench), [random_expert(bench, 1), random_expert(bench, 2)]
    gate = earlier.grown(earlier.grown(empty_gate(bench), 0, 0), 0, 1)
    assert gate["weight"].shape == (2, 64)
    assert float(np.array(gate["weight"]).std()) == pytest.approx(0.02, rel=0.25)
    before = np.array(earlier.route(model, batch, adapters.stacked(model, experts), gate))
    assert before.shape == (*batch.inputs.shape, 2)
    for changed in ([random_expert(bench, 3), experts[1]], [experts[0], random_expert(bench, 3)]):
        after = earlier.route(model, batch, adapters.stacked(model, changed), gate)
        assert np.abs(before - np.array(after)).max() > 1e-3, "what the router reads drifts"
    h = adapters.states(model, batch, adapters.stacked(model, experts), [0.0, 0.5, 0.5])
    assert close(before, mx.softmax(h @ gate["weight"].T, axis=-1), 1e-5)


def empty_gate(bench: Bench) -> earlier.Gate:
    return {"weight": mx.zeros((0, bench.base.args.hidden_size)), "bias": mx.zeros((0,))}


def test_the_loss_reaches_the_skills_expert_and_the_router(bench):
    experts = [random_expert(bench, 1), random_expert(bench, 2)]
    gate = earlier.grown(earlier.grown(empty_gate(bench), 0, 0), 0, 1)
    learned = {"experts": adapters.weights_of(experts[1]), "router": gate}
    loss, batch = earlier._loss(bench, bench.model(), experts, 1), micro(bench)
    grads = flat(mx.grad(loss)(learned, batch))
    assert all(np.abs(value).max() > 0 for value in grads.values())
    mixed = training.summed_loss(bench, earlier.mixed_by(bench.model(), experts, gate)(batch), batch)
    assert close(loss(learned, batch), mixed, 1e-5)


def test_results_of_the_earlier_attempt(bench, trained):
    result = earlier.earlier(bench)
    first = losses_with(bench, [trained.after[0][0]])
    assert same(result.matrix[1], first, 1e-3), "one expert without a null expert is that expert"
    assert (result.steps, result.parameters) == (9, 2 * bench.parameters(2))
    assert result.routing is not None
    assert list(result.routing) == NAMES
    assert all(0 <= share <= 1 for share in result.routing.values())
    assert result.test == pytest.approx(result.matrix[-1])


def test_routing_accuracy_counts_valid_tokens(bench):
    experts = {1: random_expert(bench, 1), 0: random_expert(bench, 2)}
    sure = {"weight": mx.zeros((2, 64)), "bias": mx.array([9.0, 0.0])}
    assert earlier.accuracy(Course(bench), experts, sure) == {"a": 0.0, "b": 1.0, "c": 0.0}
    unsure = earlier.grown(earlier.grown(empty_gate(bench), 0, 0), 0, 1)
    accuracy = earlier.accuracy(Course(bench), experts, unsure)
    right = total = 0.0
    for batch in training.on_device(bench, bench.domains("validation")["b"]):
        stack = adapters.stacked(bench.model(), list(experts.values()))
        gates = np.array(earlier.route(bench.model(), batch, stack, unsure))
        valid_mask = np.array(batch.valid_mask) > 0
        right, total = right + (gates[valid_mask].argmax(-1) == 0).sum(), total + valid_mask.sum()
    assert accuracy["b"] == pytest.approx(right / total)
    assert total < sum(b.inputs.size for b in training.on_device(bench, bench.domains("validation")["b"])), "padded"


def questions_of(name: str, first: int, count: int = 5) -> list[Question]:
    """Questions with options of one to three tokens after a prompt of random tokens."""
    rng, found = np.random.default_rng(first), []
    for number in range(count):
        prompt = rng.integers(first, first + 12, 6).astype(np.int32)
        answers = [rng.integers(first, first + 12, size).astype(np.int32) for size in (1, 3, 2)]
        documents = [Document(np.concatenate([prompt, answer]), np.arange(6 + len(answer)) >= 6) for answer in answers]
        found.append(Question(f"{name}, line {number}", ["x", "yyy", "zz"], int(rng.integers(3)), documents))
    return found


def test_accuracy_is_that_of_the_likeliest_option(bench):
    """Every document alone, without packing, gives the same losses and so the same choices."""
    questions, model = questions_of("a", 5), bench.model()
    expert = random_expert(bench, 3)
    forward = adapters.all_on(model, [expert])
    task = Task(questions, question_domain("a", questions, 24, 4, 64))
    losses = answers.document_losses(bench, forward, task.domain)
    alone = []
    for document in (document for question in questions for document in question.documents):
        split = Split(packing.split_documents([document], 24), 1)
        domain = make_domains({"a": split}, 24, 1)["a"]
        (batch,) = training.on_device(bench, domain)
        alone.append(float(training.summed_loss(bench, forward(batch), batch, differentiable=False)))
    assert losses == pytest.approx(alone, rel=1e-4)
    chosen = [int(np.argmin(alone[3 * number : 3 * number + 3])) for number in range(len(questions))]
    expected = np.mean([c == question.answer for c, question in zip(chosen, questions, strict=True)])
    assert answers.accuracies(bench, {"a": task}, forward) == {"a": expected}


def test_questions_are_read_from_the_sources_that_have_options(tmp_path):
    path, plain = tmp_path / "cb.jsonl", tmp_path / "plain.jsonl"
    row = {
        "prompt": "Is it? Options: yes, no.\nAnswer:",
        "completion": " yes\n",
        "label": "yes",
        "options": ["yes", "no"],
    }
    path.write_text("".join(json.dumps({**row, "prompt": f"{n} {row['prompt']}"}) + "\n" for n in range(40)))
    plain.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    sources = [Source(name="cb", source=str(path)), Source(name="plain", source=str(plain))]
    base = load_base("embedded", "float32")
    config = Config(skills=sources, growth=GrowthConfig(base_skill=replace(sources[1], name="other")))
    bench = Bench.of(base, config, {"cb": 0, "plain": 1}, 0, num_questions=3)
    tasks = answers.read_tasks(bench)
    assert list(tasks) == ["cb"]
    assert len(tasks["cb"].questions) == 3
    assert [question.options for question in tasks["cb"].questions] == [["yes", "no"]] * 3
    assert answers.read_tasks(replace(bench, num_questions=0)) == {}


def test_measures_of_accuracy():
    rows = [{"a": 0.5, "b": 0.4}, {"a": 0.9, "b": 0.5}, {"a": 0.7, "b": 0.8}]
    matrix = [{"a": 1.0, "b": 1.0, "known": 1.0}] * 3
    cell = Cell("m", 0, 0, ["a", "b"], "known", Result(matrix, {}, 0, 0, 0, 0.0, answers=rows))
    assert results.answered(cell) == pytest.approx(0.75)
    assert results.answers_backward(cell) == pytest.approx(-0.2)
    assert results.answers_forward(cell) == pytest.approx(0.1)
    without = cell._replace(result=cell.result._replace(answers=None))
    assert np.isnan(
        [results.answered(without), results.answers_backward(without), results.answers_forward(without)]
    ).all()
