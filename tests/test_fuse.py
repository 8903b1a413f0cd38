"""dylora fuse: a full model that mlx-lm loads, with the logits of the forced gate."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm import chat as mlx_lm_chat
from mlx_lm.convert import QUANT_RECIPES, convert
from mlx_lm.utils import dequantize_model

from dylora_mlx import fuse
from dylora_mlx.config import ATTENTION, MLP
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.folder import read_manifest
from dylora_mlx.exporting.quantize import Quantization, check_quantization
from dylora_mlx.exporting.rounding import Rounding, rounding_by_projection
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.routing.router import Routing
from tests.tiny import alone, close, tiny_pool

TEXT = "SELECT name, count(*) FROM users WHERE age > 30 GROUP BY name\nimport requests\n"


@pytest.mark.parametrize(
    ("options", "gates"), [(["--expert", "sql"], [0.0, 0.0, 1.0]), (["--blend", "sql=2,requests=1.5"], [0.0, 1.5, 2.0])]
)
def test_mlx_lm_loads_it(finished, tmp_path, capsys, options, gates):
    out = tmp_path / "fused"
    assert fuse.main([str(finished), *options, "--out", str(out)]) == 0
    assert f"python -m mlx_lm chat --model {out}" in capsys.readouterr().out
    assert read_manifest(out)["kind"] == "merged"
    model, tokenizer = mlx_lm.load(str(out))[:2]
    model.set_dtype(mx.float32)
    run = open_for_export(finished, "float32")
    tokens = mx.array([tokenizer.encode(TEXT)])
    found, where = np.array(model(tokens)), alone(tokens.shape[1], window=run.model.window)

    def forced(fixed: list[float]) -> np.ndarray:
        all_gates = mx.broadcast_to(mx.array(fixed), (*tokens.shape, 3))
        hidden = run.model(tokens, where, Routing(None, mx.array(1.0)), gates=all_gates).hidden
        return np.array(run.model.logits(hidden))

    difference, moved = np.abs(found - forced(gates)).max(), np.abs(found - forced([1.0, 0.0, 0.0])).max()
    assert difference < 0.1  # the stored weights are bfloat16
    assert moved > 5 * difference


def test_mlx_lm_chats_with_it(finished, tmp_path, capsys, monkeypatch):
    """The base has no chat template: what is typed is passed on as text, as the skills were learned, in chat and generate alike."""
    out = tmp_path / "fused"
    assert fuse.main([str(finished), "--expert", "sql", "--out", str(out)]) == 0
    tokenizer: Any = mlx_lm.load(str(out))[1]
    messages = [{"role": "user", "content": TEXT}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == tokenizer.encode(TEXT)
    as_base = load_base(str(out), "float32").tokenizer
    assert as_base.chat_template is None, "as a base it has none still: chats are learned with the default template"
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["mlx_lm.chat", "--model", str(out), "--max-tokens", "4"])
    monkeypatch.setattr("sys.stdin", io.StringIO("SELECT name\nq\n"))
    mlx_lm_chat.main()
    text = capsys.readouterr().out
    assert mlx_lm.generate(*mlx_lm.load(str(out))[:2], "SELECT name", max_tokens=4).strip().split()[0] in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--expert", "sql", "-q"], "--q-group-size 64: model.layers.1.mlp.down_proj is 160 wide"),
        (["--expert", "cobol"], "no expert 'cobol'"),
        (["--blend", "sql"], "'sql' should be a name and a number"),
        (["--blend", "sql=1,2=1"], "the same expert"),
        (["--blend", "sql=0"], "a weight other than 0"),
    ],
)
def test_mistakes_write_nothing(finished, tmp_path, capsys, options, message):
    assert fuse.main([str(finished), *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(finished, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert fuse.main([str(finished), "--expert", "sql", "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("options", [[], ["--expert", "sql", "--blend", "sql=1"]])
def test_one_of_both_has_to_be_named(finished, tmp_path, options, capsys):
    assert fuse.main([str(finished), *options, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert (err.count("\n"), "--expert" in err, "--blend" in err) == (1, True, True)
    assert list(tmp_path.iterdir()) == []


def weights_of(folder: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def test_names_of_options_are_mlx_lms():
    assert list(fuse.RECIPES) == QUANT_RECIPES


@pytest.fixture(scope="module")
def float_folder(finished, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("float") / "sql"
    assert fuse.main([str(finished), "--expert", "sql", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (["--q-bits", "3"], {"q_bits": 3}),
        (["--quant-predicate", "mixed_4_6"], {"quant_predicate": "mixed_4_6"}),
    ],
)
def test_quantised_files_are_those_of_mlx_lm_convert(finished, float_folder, tmp_path, options, same):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert (
        fuse.main([str(finished), "--expert", "sql", "--out", str(ours), "-q", "--q-group-size", "32", *options]) == 0
    )
    convert(str(float_folder), str(theirs), quantize=True, q_group_size=32, **same)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0]["quantization"] == configs[0]["quantization_config"] == configs[1]["quantization"]
    found, wanted = weights_of(ours), weights_of(theirs)
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == wanted[name].dtype and mx.array_equal(found[name], wanted[name]) for name in found)
    assert "model.layers.0.self_attn.q_proj.scales" in found
    assert read_manifest(ours)["quantization"] == (
        {"bits": 3, "group_size": 32} if "q_bits" in same else {"recipe": "mixed_4_6", "group_size": 32}
    )
    card = (ours / "README.md").read_text()
    assert "from mlx_lm import generate, load" in card
    assert "library_name: mlx" in card


def document_loss(model, run, split) -> float:
    """Return nats per learned token of a skill's documents, each alone through mlx-lm's own forward pass."""
    total, targets = 0.0, 0
    for segment in split.segments:
        logits = model(mx.array(segment.tokens[None, :-1]))[0].astype(mx.float32)
        losses = mx.logsumexp(logits, -1) - mx.take_along_axis(logits, mx.array(segment.tokens[1:, None]), -1)[:, 0]
        total, targets = (
            total + float(np.array(losses)[segment.loss_mask[1:]].sum()),
            targets + segment.loss_mask[1:].sum(),
        )
    return total / targets


def test_a_quantised_model_is_the_dequantised_one_and_its_cost_is_printed(finished, float_folder, tmp_path, capsys):
    out = tmp_path / "q"
    argv = [str(finished), "--expert", "sql", "--out", str(out), "-q", "--q-group-size", "32", "--q-bits", "4"]
    assert fuse.main(argv) == 0
    printed = capsys.readouterr().out
    model, tokenizer = mlx_lm.load(str(out))[:2]
    model.set_dtype(mx.float32)
    tokens = mx.array([tokenizer.encode(TEXT)])
    logits, run = np.array(model(tokens)), open_for_export(finished, "float32")
    (sql,) = run.read_sources([source for source in run.config.skills if source.name == "sql"])
    float_model = mlx_lm.load(str(float_folder))[0]
    float_model.set_dtype(mx.float32)
    losses = [document_loss(each, run, sql.test) for each in (float_model, model, run.base.model)]
    assert np.abs(np.array(float_model(tokens)) - logits).max() > 0.01
    assert close(np.array(dequantize_model(model)(tokens)), logits, 1e-4)
    numbers = re.search(
        r"sql: quantising costs ([-+.\d]+) nats a token, from ([.\d]+) to ([.\d]+) on 2 held-out .*has ([.\d]+)",
        printed,
    )
    assert numbers is not None
    assert np.allclose([float(n) for n in numbers.groups()], [losses[1] - losses[0], *losses], atol=2e-3)
    shares = ", ".join(rf"{name} \d+%" for name in (*ATTENTION, *MLP))
    assert re.search(rf"keep: {shares}\n", printed)


@pytest.mark.parametrize("options", [[], ["-q", "--q-group-size", "32", "--q-bits", "8"]])
def test_an_update_that_rounding_drowns_is_said_and_written(finished, tmp_path, capsys, options):
    """A blend at a thousandth: its update is far below a quantum, of bfloat16 too."""
    out = tmp_path / "out"
    assert fuse.main([str(finished), "--blend", "sql=0.001", "--out", str(out), *options]) == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert re.search(r"drowns .*left of its energy: q_proj \d% \(update [\d.e-]+, rounding error [\d.e-]+ .*%", warning)
    assert mlx_lm.load(str(out))


def test_rounding_is_measured_on_the_written_matrices():
    """By hand: a grid of step 1 from 0 to 15, weights on it. An update of 0.3 is lost, one of 1 is held, of 1.3 to 1."""
    expert = tiny_pool([1]).model.experts[0]
    grid = mx.array(np.tile(np.arange(16, dtype=np.float32), 2))

    def measured(size: float) -> dict[str, Rounding]:
        base, written = {}, {}
        for layer, projections in enumerate(expert.layers):
            for name, factors in projections.items():
                step = size if name == "q_proj" else 0.0
                outputs, inputs = factors.lora_b.shape[1], factors.lora_a.shape[0]
                factors.lora_a = mx.zeros((inputs, 1)).at[5].add(1.0)  # on an inner point: 0 and 15 span the group
                factors.lora_b = mx.full((1, outputs), step / expert.scale)
                path = f"model.layers.{layer}.self_attn.{name}"
                weight = mx.broadcast_to(mx.tile(grid, inputs // 32), (outputs, inputs))
                base[f"{path}.weight"] = weight
                parts = mx.quantize(weight + mx.zeros((outputs, inputs)).at[:, 5].add(step), 32, 4)
                written |= {
                    f"{path}.{part}": value for part, value in zip(("weight", "scales", "biases"), parts, strict=True)
                }
        return rounding_by_projection(expert, base, written, {"group_size": 32, "bits": 4})

    assert (measured(0.3)["q_proj"].kept_share, measured(0.3)["q_proj"].direction) == (0.0, 0.0)
    assert measured(1.0)["q_proj"].kept_share == pytest.approx(1.0)
    assert measured(1.0).keys() == {"q_proj"}
    rounding = measured(1.3)["q_proj"]
    assert rounding.kept_share == pytest.approx(1 - (0.3 / 1.3) ** 2)
    assert rounding.error / rounding.update == pytest.approx(0.3 / 1.3)
    assert rounding.direction == pytest.approx(1 / 1.3)


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (7, 64, "--q-bits: The requested number of bits 7"),
        (0, 64, "--q-bits 0"),
        (10**12, 64, "--q-bits 1000000000000"),
        (4, 48, "--q-group-size: The requested group size 48"),
        (4, 0, "--q-group-size 0"),
        (4, -64, "--q-group-size -64"),
    ],
)
def test_bits_and_groups_that_mlx_does_not_have(bits, group_size, message):
    with pytest.raises(UserError, match=message):
        check_quantization(Quantization(bits, group_size))
