"""A run behind lm-evaluation-harness's interface: likelihoods of direct passes, texts of plain decoding. Needs lm-eval."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.data.encoding import Document, prompt_ids
from dylora_mlx.data.questions import Question
from dylora_mlx.evaluation.code import model_factories
from dylora_mlx.evaluation.questions import question_domain
from dylora_mlx.exporting import formats
from dylora_mlx.generation.batch import BatchPrompt, generate_texts
from dylora_mlx.generation.stream import Sampling
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.run.run_folder import OpenedRun
from dylora_mlx.training.step.evaluate import evaluate as evaluate_domain
from tests.exporting.mixtures import ours, random_run

pytestmark = pytest.mark.export
pytest.importorskip("lm_eval")
PAIRS = [
    ("SELECT name", " FROM users WHERE id = 1"),
    ("SELECT name", " FROM orders"),
    ("def f(x):", "\n    return x + 1\n"),
    ("", "import os"),
    ("import flask\n" * 30, "app"),
]
MERGED = ("x", "y")
"""A pair that is one token, so no token of the text lies behind its context."""
EXPERTS = {"base": 0, "mixture": None, "skill_1": 2}
"""The expert_id of every token, by model."""


@pytest.fixture(scope="module")
def run(base) -> OpenedRun:
    """A run of random experts whose router reads the document so far."""
    return random_run(base, context=0.5)


def asked(pairs: list[Any]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def wrapped(run: OpenedRun, name: str, model: Any, **options: Any) -> Any:
    from dylora_mlx.evaluation.harness_model import HarnessModel

    return HarnessModel(run, name, model, **options)


def log_probabilities(run: OpenedRun, ids: np.ndarray, expert_id: int | None) -> np.ndarray:
    """Log-probabilities [L - 1, V] of what follows each token, from one pass without caches."""
    logits = ours(run, ids[None, :-1], 2, 0.7, expert_id)[0][0].astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", EXPERTS)
def test_likelihoods_are_those_of_one_direct_pass(run, name):
    with model_factories(run)[name]() as model:
        lm = wrapped(run, name, model)
        found = lm.loglikelihood(asked(PAIRS))
        alone = [lm.loglikelihood(asked([pair]))[0] for pair in PAIRS]
        # The likeliest continuation, to see a true flag too, and the same with another last token.
        ids = prompt_ids("SELECT name", run.base.tokenizer)
        best = generate_texts(model, run.base.tokenizer.stopping_at(()), [BatchPrompt(ids, 3)], Sampling())[0].text
        flags = [
            greedy for _, greedy in lm.loglikelihood(asked([("SELECT name", best), ("SELECT name", best + "\n\n")]))
        ]
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
        before = len(prompt_ids(context, run.base.tokenizer))
        whole = prompt_ids(context + continuation, run.base.tokenizer)
        table = log_probabilities(run, whole, EXPERTS[name])[before - 1 :]
        expected = table[np.arange(len(table)), whole[before:]].sum()
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == bool((table.argmax(-1) == whole[before:]).all())
    assert alone == found, "a request does not depend on the others"
    assert flags[0] is True
    assert flags != [True, True]


def test_a_continuation_without_a_token_of_its_own_is_read_alone(run):
    x, y = (prompt_ids(text, run.base.tokenizer) for text in MERGED)
    assert len(prompt_ids("".join(MERGED), run.base.tokenizer)) == len(x), "the pair is one token"
    with model_factories(run)["mixture"]() as model:
        (score, _), nothing = wrapped(run, "mixture", model).loglikelihood(asked([MERGED, ("x", "")]))
    table = log_probabilities(run, np.concatenate([x, y[1:]]), None)
    assert score == pytest.approx(table[-1, y[1]], abs=1e-4)
    assert nothing == (0.0, True)


def test_likelihoods_are_those_of_packed_evaluation(run):
    """The runs' own evaluation, which packs the texts into rows of a batch, has the same figures, expert by expert."""
    documents = []
    for context, continuation in PAIRS[:3]:
        ids = prompt_ids(context + continuation, run.base.tokenizer)
        documents.append(Document(ids, np.arange(len(ids)) >= len(prompt_ids(context, run.base.tokenizer))))
    domain = question_domain("pairs", [Question("", [], 0, documents)], 64, 2, 2048)
    for name, expert_id in EXPERTS.items():
        routing = formats.mixture_routing(run).routing if expert_id is None else forced_routing()
        losses = [nats for nats, _ in evaluate_domain(run.model, domain, routing, expert_id).documents]
        with model_factories(run)[name]() as model:
            found = [score for score, _ in wrapped(run, name, model).loglikelihood(asked(PAIRS[:3]))]
        assert found == pytest.approx([-loss for loss in losses], abs=2e-3), "evaluation keeps features in float16"


def test_the_base_has_the_figures_of_mlx_lm(run, base):
    """As `mlx_lm.evaluate` finds them for the base's folder: the same wrapper, on the model that mlx-lm loads."""
    from mlx_lm.evaluate import MLXLM

    plain: Any = MLXLM(str(base.folder), use_chat_template=False)
    plain._model.set_dtype(mx.float32)
    lm = wrapped(run, "base", base.model)
    for longest in (lm._max_tokens, 24):  # the second cuts the longest context
        plain._max_tokens = lm._max_tokens = longest
        found, expected = lm.loglikelihood(asked(PAIRS)), plain.loglikelihood(asked(PAIRS))
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    lm._max_tokens = base.context_length
    for context, continuation in PAIRS:  # one by one: mlx-lm 0.31 counts a pad token of each shorter text of a batch
        text = asked([(context + continuation,)])
        assert lm.loglikelihood_rolling(text) == pytest.approx(plain.loglikelihood_rolling(text), abs=1e-4)
    questions = asked([(context, {"until": ["\n\n"], "max_gen_toks": 24}) for context, _ in PAIRS])
    found, expected = lm.generate_until(questions), plain.generate_until(questions)
    assert [text.strip() for text in found] == [text.strip() for text in expected]


def test_a_long_text_is_read_in_windows(run, monkeypatch):
    """Every token is predicted once; tokens beyond the first window from a whole window before them."""
    text, longest = "SELECT a, b FROM t WHERE a = 1 ORDER BY b;\n" * 3, 16
    ids = prompt_ids(text, run.base.tokenizer)
    with model_factories(run)["mixture"]() as model:
        lm = wrapped(run, "mixture", model)
        whole = lm.loglikelihood_rolling(asked([(text,)]))
        monkeypatch.setattr(lm, "_max_tokens", longest)
        cut, empty, one = lm.loglikelihood_rolling(asked([(text,), ("",), ("a",)]))
    table = log_probabilities(run, ids, None)
    assert whole == pytest.approx([table[np.arange(len(table)), ids[1:]].sum()], abs=1e-4)
    expected = sum(log_probabilities(run, ids[: longest + 1], None)[np.arange(longest), ids[1 : longest + 1]])
    done = longest + 1
    while done < len(ids):
        end = min(done + longest, len(ids))
        window = ids[end - longest - 1 : end]
        table = log_probabilities(run, window, None)[-(end - done) :]
        expected += table[np.arange(len(table)), window[-(end - done) :]].sum()
        done = end
    assert cut == pytest.approx(expected, abs=1e-4)
    assert empty == 0.0
    a = prompt_ids("a", run.base.tokenizer)
    assert one == pytest.approx(sum(log_probabilities(run, a, None)[np.arange(len(a) - 1), a[1:]]), abs=1e-4)


def test_a_step_computes_no_more_logits_than_fit(run, monkeypatch):
    from dylora_mlx.evaluation import harness_model

    with model_factories(run)["mixture"]() as model:
        pairs = [("SELECT a, b FROM t " * 10, "WHERE a = 1 " * 10)]
        at_once = wrapped(run, "mixture", model).loglikelihood(asked(pairs))
        monkeypatch.setattr(harness_model, "STEP_LOGITS", 1)
        lm = wrapped(run, "mixture", model)
        assert lm._step_size == 16
        in_steps = lm.loglikelihood(asked(pairs))
    assert in_steps[0][0] == pytest.approx(at_once[0][0], abs=1e-4)


def test_an_empty_context_is_what_documents_begin_with(run, monkeypatch):
    """For a tokenizer that adds no BOS by itself too, where mlx-lm's wrapper would call everything impossible."""
    with model_factories(run)["mixture"]() as model:
        lm = wrapped(run, "mixture", model)
        expected = lm.loglikelihood(asked([("", "import os"), ("a b", " c")]))
        plain = [lm.loglikelihood_rolling(asked([("import os",)])), lm.generate_until(asked([("", {"until": "\n"})]))]
        huggingface = type(run.base.tokenizer.wrapped._tokenizer)
        encode = huggingface.encode
        monkeypatch.setattr(huggingface, "encode", lambda self, text, **_: encode(self, text, add_special_tokens=False))
        lm = wrapped(run, "mixture", model)
        assert lm.loglikelihood(asked([("", "import os"), ("<bos>a b", " c")])) == expected
        assert plain == [
            lm.loglikelihood_rolling(asked([("import os",)])),
            lm.generate_until(asked([("", {"until": "\n"})])),
        ]
    assert np.isfinite(expected[0][0])


def test_texts_are_those_of_plain_decoding_up_to_a_stop(run):
    tokenizer = run.base.tokenizer
    prompts = ["SELECT", "import flask", "def f(x):"]
    for name in EXPERTS:
        with model_factories(run)[name]() as model:
            lm = wrapped(run, name, model, max_tokens=9)
            whole = lm.generate_until(asked([(prompt, {"until": []}) for prompt in prompts]))
            batch = [BatchPrompt(prompt_ids(prompt, tokenizer), 9) for prompt in prompts]
            expected = [text.text for text in generate_texts(model, tokenizer.stopping_at(()), batch, Sampling())]
            assert whole == expected
            stop = expected[0][3:5]
            short, named = lm.generate_until(
                asked([(prompts[0], {"until": [stop]}), (prompts[1], {"until": [], "max_gen_toks": 4})])
            )
            assert short == expected[0].partition(stop)[0]
            assert expected[1].startswith(named)
            assert len(named) < len(expected[1])


def test_sampled_and_greedy_answers_of_one_task(run):
    greedy = ("SELECT", {"until": [], "max_gen_toks": 8})
    sampled = ("SELECT", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 50})
    with model_factories(run)["mixture"]() as model:
        lm = wrapped(run, "mixture", model)
        mx.random.seed(3)
        first = lm.generate_until(asked([sampled, greedy, sampled, sampled]))
        mx.random.seed(3)
        again = lm.generate_until(asked([sampled, greedy, sampled, sampled]))
        alone = lm.generate_until(asked([greedy]))
    assert first == again
    assert first[1:2] == alone
    assert len({*first}) > 2, "samples of one prompt differ"


def test_a_context_leaves_room_for_the_text(run, monkeypatch):
    with model_factories(run)["base"]() as model:
        lm = wrapped(run, "base", model, max_tokens=6)
        monkeypatch.setattr(lm, "_max_tokens", 16)
        ids = prompt_ids("a b c d e f g h i j k l m n o p q r s t", run.base.tokenizer)
        prompt = lm._batch_prompt("a b c d e f g h i j k l m n o p q r s t", {"max_gen_toks": 6, "until": ["x"]})
        assert prompt.ids.tolist() == ids[-10:].tolist()
        assert (prompt.max_tokens, prompt.stops) == (6, ("x",))
        assert lm._batch_prompt("a", {"max_gen_toks": 99, "until": []}).max_tokens == 15


def test_chats_go_through_the_runs_template(run, monkeypatch):
    tokenizer = run.base.tokenizer
    monkeypatch.setattr(tokenizer, "template_override", "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
                        "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    lm = wrapped(run, "base", run.base.model, chat=True)
    text = lm.apply_chat_template([{"role": "user", "content": "Is 7 even?"}])
    assert text == "<user>Is 7 even?</><assistant>"
    ids = lm._batch_prompt(text, {"max_gen_toks": 3, "until": []}).ids
    assert ids.tolist() == prompt_ids(text, tokenizer, special=False).tolist(), (
        "the template writes its own BOS, or none"
    )
    assert lm._batch_prompt(text, {"max_gen_toks": 3, "until": ["\n"]}).stops == ("\n", "</>")
