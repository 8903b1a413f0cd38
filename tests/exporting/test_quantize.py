"""Quantised full models of other families and of quantised bases, loaded by mlx-lm; what has no held-out text is not measured."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from dylora_mlx.errors import UserError
from dylora_mlx.exporting.folder import write_folder
from dylora_mlx.exporting.full_model import base_weights, export_full_model
from dylora_mlx.exporting.quantize import Quantization, float_weights, quantize_export
from dylora_mlx.exporting.rounding import rounding_by_projection, served_sources
from dylora_mlx.model.base.load import load_base
from tests.bases import config_of, quantised, write
from tests.exporting.mixtures import random_run

TOKENS = mx.array([[2, 17, 300, 41, 9, 1200, 5]])


@pytest.mark.parametrize("kind", ["llama", "quantised"])
def test_mlx_lm_loads_a_quantised_model(tmp_path, kind):
    """llama has a head of its own and other names of options; the other base is 4-bit, and is quantised again to 8."""
    folder = write(tmp_path / "base", config_of("llama" if kind == "llama" else "qwen3"))
    if kind == "quantised":
        folder = quantised(folder, tmp_path / "q4", 4)
    run = random_run(load_base(str(folder), "float32"))
    expert = run.model.experts[0]
    export = export_full_model(run, expert, {})
    made = quantize_export(run.base, export, Quantization(8, 32)).export
    write_folder(tmp_path / "float", export.content, export.manifest)
    write_folder(tmp_path / "q8", made.content, made.manifest)
    float_model, model = (mlx_lm.load(str(tmp_path / name))[0] for name in ("float", "q8"))
    stored = mx.load(str(tmp_path / "q8" / "model.safetensors"))
    assert ("lm_head.scales" in stored) == (kind == "llama")
    assert json.loads((tmp_path / "q8" / "config.json").read_text())["quantization"]["bits"] == 8
    for each in (float_model, model, run.base.model):
        each.set_dtype(mx.float32)
    wanted, found = np.array(float_model(TOKENS)), np.array(model(TOKENS))
    assert np.abs(found - wanted).mean() < 0.05 * np.abs(wanted).mean()
    assert np.abs(np.array(run.base.model(TOKENS)) - wanted).mean() > 4 * np.abs(found - wanted).mean()
    options = made.content["config.json"]["quantization"]
    left = rounding_by_projection(expert, base_weights(run.base), float_weights(made), options)
    assert left.keys() == {"q_proj", "v_proj", "o_proj", "down_proj"}
    assert min(each.kept_share for each in left.values()) > 0.99
    assert all(each.direction == pytest.approx(1, abs=0.01) for each in left.values())


def test_the_sources_of_an_expert(base):
    """A split skill stands for its parts; an expert whose skills the config does not have has none."""
    run = random_run(base, ranks=(2, 2))

    def sources(expert_ids: list[int], *skills: tuple[str, int]) -> list[str]:
        library: Any = SimpleNamespace(entries=[SimpleNamespace(skill=name, expert=number) for name, number in skills])
        return [source.name for source in served_sources(run._replace(library=library), expert_ids)]

    known = (("skill_0.1", 1), ("skill_1", 2))
    assert sources([1], *known) == ["skill_0"]
    assert sources([1, 2], *known) == ["skill_0", "skill_1"]
    with pytest.raises(UserError, match="no source of a skill that this expert serves"):
        sources([1], ("other", 1))
