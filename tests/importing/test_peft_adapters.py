"""Import of adapters and mixtures that PEFT wrote: the logits under MLX equal PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.config import Source
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats
from dylora_mlx.growth.library import Library
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.importing import adapters
from dylora_mlx.importing.run import import_mixture
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.routing.router import GateRow
from dylora_mlx.run.run_folder import OpenedRun, open_run
from tests.exporting.mixtures import GATE, PROJECTIONS, gap, in_peft, ours, theirs, tokens_of, transformers_base

pytestmark = pytest.mark.export
RANKS = {"model.layers.1.self_attn.q_proj": 2, "down_proj": 7}
ALPHAS = {"v_proj": 3, "model.layers.5.mlp.down_proj": 20}
KINDS = {
    "plain": {},
    "ranks": {"rank_pattern": RANKS},
    "alphas": {"alpha_pattern": ALPHAS},
    "both": {"rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "rslora": {"use_rslora": True},
    "rslora-both": {"use_rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS},
    "some-layers": {"layers_to_transform": [0, 3], "layers_pattern": "layers"},
    "one-projection": {"target_modules": ["o_proj"]},
}


def make_peft_adapter(base, folder: Path, seed: int = 0, trained: bool = True, **options: Any) -> Any:
    """Return a PEFT LoRA model, with random factors in place of zeros if it is `trained`, and save it with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(PROJECTIONS), "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(seed)
    model = get_peft_model(transformers_base(base), LoraConfig(**settings)).eval()
    for name, value in model.named_parameters():
        if trained and ("lora_B" in name or "lora_embedding_A" in name):
            torch.nn.init.normal_(value.data, std=0.3)
    model.save_pretrained(str(folder))
    return model


def imported(base, folder: Path) -> tuple[OpenedRun, adapters.ForeignAdapter]:
    """A run whose one expert is the adapter of a folder."""
    pool = Pool(RoutedDecoder(base, list(PROJECTIONS), "final"))
    adapter = adapters.read_adapter(folder, base)
    expert = adapters.to_expert(adapter, pool.model.shapes, folder)
    pool.append(expert, ExpertRecord("theirs", expert.rank, expert.alpha, 0), GateRow(base.args.hidden_size))
    return OpenedRun(None, base, pool.model, pool, Library(base.fingerprint), folder), adapter  # pyright: ignore


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_adapter_has_pefts_logits(base, tmp_path, kind):
    model, rows = make_peft_adapter(base, tmp_path / "adapter", **KINDS[kind]), tokens_of(base, 1, 60)
    run, adapter = imported(base, tmp_path / "adapter")
    expected = theirs(model, rows)
    assert gap(ours(run, rows, None, 1.0, expert_id=1)[0], expected) < 1e-4
    with model.disable_adapter():
        assert gap(theirs(model, rows), expected) > 0.1
    assert adapter.base == str(base.folder)
    assert run.model.experts[0].rank == (7 if "rank_pattern" in KINDS[kind] else 4)


# PEFT warns of what it does to a base, and of ties.
@pytest.mark.filterwarnings("ignore")
def test_pissa_is_refused_and_exact_once_peft_has_converted_it(base, tmp_path):
    import torch

    model = make_peft_adapter(base, tmp_path / "start", trained=False, init_lora_weights="pissa")
    # As PEFT's documentation says: the initial adapter is saved first, as if its initialisation were a plain one.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data += 0.02 * torch.randn_like(value)
    model.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(UserError, match=r"pissa: this adapter belongs to a base that was changed"):
        adapters.read_adapter(tmp_path / "raw", base)
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    run, _ = imported(base, tmp_path / "plain")
    rows = tokens_of(base, 1, 60)
    expected = theirs(model, rows)
    assert run.model.experts[0].rank == 8  # twice the rank
    assert gap(ours(run, rows, None, 1.0, expert_id=1)[0], expected) < 1e-4 * max(1, abs(expected).max())
    assert gap(ours(run, rows, None, 1.0, expert_id=0)[0], expected) > 0.1


@pytest.mark.filterwarnings("ignore")
def test_velora_is_refused_and_exact_once_peft_has_converted_it(base, tmp_path):
    from peft import VeloraConfig, save_as_lora

    model = make_peft_adapter(base, tmp_path / "velora", velora_config=VeloraConfig(num_groups=4))
    with pytest.raises(UserError, match=r"VeLoRA .*save_as_lora"):
        adapters.read_adapter(tmp_path / "velora", base)
    save_as_lora(str(tmp_path / "plain"), model, rank=4)
    run, rows = imported(base, tmp_path / "plain")[0], tokens_of(base, 1, 60)
    assert gap(ours(run, rows, None, 1.0, expert_id=1)[0], theirs(model, rows)) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"DoRA .*merge_and_unload"),
        ({"modules_to_save": ["embed_tokens"]}, "modules saved whole .*merge_and_unload"),
        (
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
            "tied .*train it on projections only",
        ),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed.*merge_and_unload"),
    ],
)
def test_what_peft_saves_of_other_kinds_is_refused(base, tmp_path, options, message):
    make_peft_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=message):
        adapters.read_adapter(tmp_path / "adapter", base)


def test_embeddings_that_peft_saved_unchanged_are_left_out(base, tmp_path):
    model = make_peft_adapter(base, tmp_path / "adapter")
    model.save_pretrained(str(tmp_path / "with"), save_embedding_layers=True)
    assert any("embed_tokens" in name for name in mx.load(str(tmp_path / "with" / "adapter_model.safetensors")))
    run, rows = imported(base, tmp_path / "with")[0], tokens_of(base, 1, 60)
    assert gap(ours(run, rows, None, 1.0, expert_id=1)[0], theirs(model, rows)) < 1e-4


DENSE = {"enable_softmax": True, "enable_softmax_topk": False, "softmax_temperature": 2.0}
SPARSE = {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2}


@pytest.mark.parametrize("routing", [DENSE, SPARSE], ids=["dense", "two"])
def test_an_imported_mixture_has_pefts_logits(base, tmp_path, routing):
    """X-LoRA's classifier mixes three adapters of different ranks, none of which is the base."""
    folder, rng = tmp_path / "theirs", np.random.default_rng(0)
    for expert_id, rank in enumerate((2, 4, 3)):
        make_peft_adapter(base, folder / str(expert_id), seed=expert_id, r=rank)
    classifier = {"weight": rng.normal(0, 0.1, (3, base.args.hidden_size)), "bias": rng.normal(0, 0.3, 3)}
    gate = {f"{GATE}{name}": mx.array(value.astype(np.float32)) for name, value in classifier.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), gate, metadata={"format": "pt"})
    options = {"peft_type": "XLORA", "task_type": "CAUSAL_LM", "hidden_size": base.args.hidden_size, "xlora_depth": 1}
    options |= {"base_model_name_or_path": str(base.folder), "adapters": {str(c): str(c) for c in range(3)}, **routing}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    texts = [Source(name=name, source="packaged/sql", limit=40) for name in ("a", "b", "c")]
    import_mixture(folder, tmp_path / "run", None, texts)
    run, rows = open_run(tmp_path / "run", "float32"), tokens_of(base, 1, 60)
    how = formats.mixture_routing(run)
    assert formats.expert_names(run.pool) == ["base", "a", "b", "c"]
    assert how.top_k == routing.get("top_k_lora")
    logits, gates = ours(run, rows, how.top_k, how.temperature)
    assert gap(logits, theirs(in_peft(base, folder, 3), rows)) < 1e-4
    assert gates[..., 0].max() == 0
    assert set(gates.argmax(-1).ravel()) == {1, 2, 3}
