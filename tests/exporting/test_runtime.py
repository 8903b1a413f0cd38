"""The PyTorch runtime: MLX's logits in any batch and through its caches, and generation that caching does not change."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.exporting.mixtures import export, gap, ours, random_run, runtime_of, theirs, tokens_of

pytestmark = pytest.mark.export
LENGTH = 64
NEW: dict[str, Any] = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
SHORT = NEW | {"max_new_tokens": 12, "min_new_tokens": 12}
READ = {
    "final": ("final", 0.0),
    "layer-3": (3, 0.0),
    "final-in-context": ("final", 0.4),
    "layer-3-in-context": (3, 0.4),
}
"""Where the router reads, and how much of that is the document's mean."""
ONCE = pytest.mark.parametrize("mixture", ["final"], ids=["final"], indirect=True)
"""For what does not depend on that."""


@pytest.fixture(scope="module", params=READ)
def mixture(request, base, tmp_path_factory):
    """A mixture of three experts, two a token, whose router reads the final states, or the input of a layer."""
    router_layer, context = READ[request.param]
    run = random_run(base, router_layer=router_layer, context=context)
    folder = export(run, tmp_path_factory.mktemp("mixture") / "folder", "runtime")
    runtime = runtime_of(folder)
    model, tokenizer = runtime.load(folder)
    return SimpleNamespace(run=run, folder=folder, runtime=runtime, model=model, tokenizer=tokenizer)


def torch_ids(rows: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(rows.astype(np.int64))


def padded(rows: list[np.ndarray], side: str) -> tuple[Any, Any]:
    """Rows of different lengths as one batch with its mask."""
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return torch_ids(ids), torch_ids(mask)


def test_whole_texts_equal_mlx(mixture, base):
    rows = tokens_of(base, 2, 200)
    logits, gates = ours(mixture.run, rows, 2, 0.7)
    bare, _ = ours(mixture.run, rows, None, 1.0, expert_id=0)
    assert gap(theirs(mixture.model, rows), logits) < 1e-4
    assert gap(mixture.model.gates.numpy(), gates) < 1e-5
    assert gap(logits, bare) > 1
    used = gates.argmax(-1)
    assert {0, 1, 2, 3} == set(used.ravel())


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5), (120, 121, 122, 135, 136), (100, 140, 150)])
def test_pieces_through_the_caches_equal_mlx(mixture, base, cuts):
    """A prompt, and then tokens one by one or several at once, across the sliding window of 128."""
    import torch

    rows = tokens_of(base, 1, cuts[-1] + 20)
    expected, gates = ours(mixture.run, rows, 2, 0.7)
    cache, ids = mixture.runtime.PairedCache(mixture.model.config), torch_ids(rows)
    for begin, end in zip((0, *cuts), (*cuts, rows.shape[1]), strict=True):
        with torch.no_grad():
            found = mixture.model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits.numpy()
        assert gap(found, expected[:, begin:end]) < 1e-4
        assert gap(mixture.model.gates.numpy(), gates[:, begin:end]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(mixture, base, side):
    import torch

    rows = [tokens_of(base, n, seed=n) for n in (40, 7, 150)]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        found = mixture.model(ids, attention_mask=mask, use_cache=False).logits.numpy()
    assert np.isfinite(found).all()
    for row, logits, real in zip(rows, found, mask.numpy() > 0, strict=True):
        assert gap(logits[real], ours(mixture.run, row[None], 2, 0.7)[0][0]) < 1e-4


@ONCE
def test_loss_of_labels_equals_mlx(mixture, base):
    import torch

    rows = tokens_of(base, 1, 60)
    logits, _ = ours(mixture.run, rows, 2, 0.7)
    log = logits[0, :-1] - np.log(np.exp(logits[0, :-1].astype(np.float64)).sum(-1, keepdims=True))
    with torch.no_grad():
        found = mixture.model(torch_ids(rows), labels=torch_ids(rows), use_cache=False).loss
    assert abs(float(found) + log[np.arange(59), rows[0, 1:]].mean()) < 1e-4


@pytest.mark.parametrize("prompt", [12, 140], ids=["short", "beyond-the-window"])
def test_generation_with_caches_equals_recomputation(mixture, base, prompt):
    import torch

    ids = torch_ids(tokens_of(base, 1, prompt))
    cached = mixture.model.generate(ids, attention_mask=torch.ones_like(ids), **NEW)
    again = mixture.model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **NEW)
    assert cached.shape == (1, prompt + LENGTH)
    assert torch.equal(cached, again)
    expected, _ = ours(mixture.run, cached.numpy()[:, :-1], 2, 0.7)
    expected[..., base.tokenizer.eos_token_id] = -np.inf  # min_new_tokens forbids it
    assert np.array_equal(expected[0, prompt - 1 :].argmax(-1), cached.numpy()[0, prompt:])


def test_generation_of_a_batch_equals_recomputation(mixture, base):
    import torch

    ids, mask = padded([tokens_of(base, n, seed=n) for n in (30, 9)], "left")
    cached = mixture.model.generate(ids, attention_mask=mask, **NEW)
    assert torch.equal(cached, mixture.model.generate(ids, attention_mask=mask, use_cache=False, **NEW))
    alone = mixture.model.generate(ids[1:2, -9:], attention_mask=mask[1:2, -9:], **NEW)
    assert torch.equal(alone[0, 9:], cached[1, -LENGTH:])


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_carry_both_caches(mixture, base, options):
    import torch

    ids, mask = padded([tokens_of(base, n, seed=n) for n in (11, 24)], "left")
    options = SHORT | options
    cached = mixture.model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, mixture.model.generate(ids, attention_mask=mask, use_cache=False, **options))


def test_guessed_tokens_are_taken_back_from_both_caches(mixture, base):
    """Prompt lookup guesses several tokens at a time and crops the caches where they were wrong."""
    import torch

    ids = torch_ids(np.tile(tokens_of(base, 1, 10), 3))
    mask = torch.ones_like(ids)
    plain = mixture.model.generate(ids, attention_mask=mask, **SHORT)
    guessed = mixture.model.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=4, **SHORT)
    assert torch.equal(plain, guessed)


def test_every_token_can_be_sent_to_one_expert(mixture, base):
    rows = tokens_of(base, 1, 50)
    routed = theirs(mixture.model, rows)
    found = {}
    for expert_id, name in enumerate(("base", "skill_0", "skill_1", "skill_2")):
        with mixture.model.routed_to(name):
            found[name] = theirs(mixture.model, rows)
        assert gap(found[name], ours(mixture.run, rows, None, 1.0, expert_id)[0]) < 1e-4
        assert gap(found[name], routed) > 0.1
    assert np.array_equal(theirs(mixture.model, rows), routed)
    with pytest.raises(KeyError, match="no expert 'cobol', there are base, skill_0"), mixture.model.routed_to("cobol"):
        pass


def test_one_expert_generates_through_the_cache(mixture, base):
    import torch

    ids = torch_ids(tokens_of(base, 1, 12))
    mask = torch.ones_like(ids)
    with mixture.model.routed_to("skill_2"):
        cached = mixture.model.generate(ids, attention_mask=mask, **SHORT)
        assert torch.equal(cached, mixture.model.generate(ids, attention_mask=mask, use_cache=False, **SHORT))
    assert not torch.equal(cached, mixture.model.generate(ids, attention_mask=mask, **SHORT))


def test_half_precision(mixture, base):
    """bfloat16 runs, and is the same model up to its rounding."""
    import torch

    model, _ = mixture.runtime.load(mixture.folder, dtype=torch.bfloat16)
    rows = tokens_of(base, 1, 60)
    with torch.no_grad():
        found = model(torch_ids(rows)).logits
    assert found.dtype == torch.bfloat16
    expected, gates = ours(mixture.run, rows, 2, 0.7)
    assert np.mean(model.gates.numpy().argmax(-1) == gates.argmax(-1)) > 0.9
    assert np.corrcoef(found.float().numpy().ravel(), expected.ravel())[0, 1] > 0.98
    out = model.generate(torch_ids(rows), attention_mask=torch.ones(1, 60), max_new_tokens=8, min_new_tokens=8)
    assert out.shape == (1, 68)


def test_a_cache_of_another_kind_is_refused(mixture, base):
    from transformers import DynamicCache

    with pytest.raises(TypeError, match="PairedCache"):
        mixture.model(torch_ids(tokens_of(base, 1, 4)), past_key_values=DynamicCache(config=mixture.model.config))
    assert mixture.model._route.ranks is None


@ONCE
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_by_either_name(mixture, base, name):
    """transformers 5 renamed it, and a cache that is not taken would let the router read the last token alone."""
    import torch

    ids, made = torch_ids(tokens_of(base, 1, 12)), [mixture.runtime.PairedCache(mixture.model.config) for _ in "ab"]
    mixture.model(ids, use_cache=True, **{name: made[0]})
    assert made[0].get_seq_length() == made[0].base.get_seq_length() == 12
    plain = mixture.model.generate(ids, attention_mask=torch.ones_like(ids), **SHORT)
    given = mixture.model.generate(ids, attention_mask=torch.ones_like(ids), **SHORT, **{name: made[1]})
    assert torch.equal(plain, given)
    assert made[1].get_seq_length() == made[1].base.get_seq_length() == 23


@ONCE
def test_saving_is_refused(mixture, tmp_path):
    with pytest.raises(NotImplementedError, match="keep the exported folder"):
        mixture.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


ALONE = """import runpy, sys
sys.modules["dylora_mlx"] = sys.modules["mlx"] = None  # an import of either fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""
"""A script as it would run on a machine that has neither."""


@ONCE
def test_the_file_runs_alone(mixture, tmp_path):
    """In an isolated Python, from another folder, without dylora_mlx."""
    line = [sys.executable, "-I", "-c", ALONE, str(mixture.folder / "dylora_torch.py"), str(mixture.folder)]
    line += ["--prompt", "SELECT name", "--max-tokens", "12"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out = mixture.model.generate(**mixture.tokenizer("SELECT name", return_tensors="pt"), max_new_tokens=12)
    assert done.stdout.strip() == mixture.tokenizer.decode(out[0], skip_special_tokens=True).strip()


@ONCE
def test_a_bad_folder_is_one_line(mixture, tmp_path, capsys):
    assert mixture.runtime.main([str(tmp_path), "--prompt", "SELECT"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {tmp_path}/dylora.json: missing; give a folder that dylora export wrote\n")


@pytest.mark.parametrize("mixture", [name for name in READ if name != "layer-3"], indirect=True)
def test_a_cache_that_the_router_has_not_read_is_refused(mixture, base):
    cache, ids = mixture.runtime.PairedCache(mixture.model.config), torch_ids(tokens_of(base, 1, 6))
    with mixture.model.routed_to("skill_0"):
        mixture.model(ids[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="filled within routed_to"):
        mixture.model(ids[:, 4:], past_key_values=cache)
