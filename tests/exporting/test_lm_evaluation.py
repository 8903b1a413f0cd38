"""lm-evaluation-harness takes the runtime's model as it is loaded."""

from __future__ import annotations

import numpy as np
import pytest

from tests.exporting.mixtures import export, ours, random_run, runtime_of

pytestmark = pytest.mark.export
PAIRS = [("SELECT name", " FROM users WHERE id = 1"), ("def f(x):", "\n    return x + 1\n"), ("import", " os")]


def test_loglikelihoods_equal_mlx(base, tmp_path):
    """Whole continuations, in a batch that the harness pads."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    run = random_run(base)
    folder = export(run, tmp_path / "folder", "runtime")
    model, tokenizer = runtime_of(folder).load(folder)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=len(PAIRS))
    found = harness.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)])
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
        before, after = harness._encode_pair(context, continuation)
        ids = np.array([before + after])
        logits = ours(run, ids[:, :-1], 2, 0.7)[0][0].astype(np.float64)
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = log[len(before) - 1 :]
        assert abs(chosen[np.arange(len(after)), after].sum() - score) < 1e-3
        assert greedy == bool((chosen.argmax(-1) == after).all())
