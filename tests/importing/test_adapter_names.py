"""Names of an adapter's tensors: text layers are found under any wrapper, and what a run lacks is named with its remedy."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import assets, import_expert
from dylora_mlx.adapters import mlx_lm, peft
from dylora_mlx.config import ATTENTION, MLP
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.importing import adapters
from dylora_mlx.model.experts.lora import Expert
from tests.tiny import close, tiny_pool

PEFT_FILE, MLX_FILE = "adapter_model.safetensors", "adapters.safetensors"
Q, V = "layers.1.self_attn.q_proj", "layers.2.self_attn.v_proj"
WRAPPERS = [
    "model.",
    "model.language_model.",  # Gemma 3 with vision, transformers 4.52 and later
    "language_model.model.",  # Gemma 3 with vision before, and mlx-lm and mlx-vlm
    "language_model.",
    "model.language_model.model.",
    "model.model.",
    "",  # AutoModel: no head, so no wrapper
    "module.model.",  # DistributedDataParallel
    "_orig_mod.model.",  # torch.compile
]
VISION = [
    ("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", "the vision tower"),
    ("vision_tower.vision_model.encoder.layers.3.mlp.fc1", "the vision tower"),
    ("model.multi_modal_projector.linear", "the projector of images"),
    ("multi_modal_projector.mm_input_projection", "the projector of images"),
    ("model.visual.blocks.0.attn.qkv", "the vision tower"),
    ("model.audio_tower.layers.0.self_attn.q_proj", "the audio tower"),
]
"""Modules beside a text model, as PEFT names them below base_model.model."""


@pytest.fixture(scope="module")
def expert():
    return tiny_pool([3]).model.experts[0]


def write(place: Path, config: dict, arrays: dict[str, mx.array], name: str) -> Path:
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(place / name), arrays)
    return place


def peft_folder(place: Path, expert, wrapper: str = "model.", more: dict | None = None, **options) -> Path:
    """A PEFT folder of the expert, whose text layers are under `wrapper`."""
    start = "base_model.model."
    arrays = {name.replace(f"{start}model.", start + wrapper): value for name, value in peft.weights(expert).items()}
    return write(place, peft.config(expert, "some/base") | options, arrays | (more or {}), PEFT_FILE)


def mlx_folder(place: Path, expert, wrapper: str, more: dict | None = None) -> Path:
    """An mlx-lm folder of the expert, whose text layers are under `wrapper`."""
    arrays = {name.replace("model.", wrapper, 1): value for name, value in mlx_lm.weights(expert).items()}
    return write(place, mlx_lm.config(expert, "some/base"), arrays | (more or {}), MLX_FILE)


def read(folder: Path, shapes=None):
    return adapters.to_expert(adapters.read_adapter(folder), shapes or tiny_pool().model.shapes, folder)


def refusal(folder: Path, shapes=None) -> str:
    with pytest.raises(UserError) as raised:
        read(folder, shapes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def update(expert, path: str) -> np.ndarray:
    """scale * A @ B of the module at a path such as layers.1.self_attn.q_proj."""
    _, layer, _, name = path.split(".")
    factors = expert.layers[int(layer)][name]
    return np.array(expert.scale * (factors.lora_a @ factors.lora_b))


def same(one, other) -> bool:
    ours, theirs = mlx_lm.weights(one), mlx_lm.weights(other)
    return ours.keys() == theirs.keys() and all(mx.array_equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_peft_adapter_has_its_factors_under_any_wrapper(expert, tmp_path, wrapper):
    imported = read(peft_folder(tmp_path / "a", expert, wrapper))
    assert (imported.rank, imported.alpha) == (expert.rank, expert.alpha)
    assert same(imported, expert)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_mlx_lm_adapter_has_its_factors_under_any_wrapper(expert, tmp_path, wrapper):
    imported = read(mlx_folder(tmp_path / "a", expert, wrapper))
    assert imported.scale == expert.scale
    assert same(imported, expert)


def test_the_command_imports_an_adapter_of_a_multimodal_base(finished, tmp_path, capsys):
    run, shapes = tmp_path / "run", open_for_export(finished, "float32").model.shapes
    expert = Expert(shapes, 5, 10.0, mx.random.key(3))
    for factors in (factors for named in expert.layers for factors in named.values()):
        factors.lora_b = mx.random.normal(factors.lora_b.shape, key=mx.random.key(4)) * 0.1
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("step-*"))
    folder = peft_folder(
        tmp_path / "a", expert, "model.language_model.", base_model_name_or_path="google/gemma-3-4b-pt"
    )
    text = tmp_path / "text.jsonl"
    lines = (assets.SKILLS / "stripe" / "train.jsonl").read_text().splitlines()[:60]
    text.write_text("".join(json.dumps({"text": json.loads(line)["text"][:80]}) + "\n" for line in lines))
    arguments = [str(run), str(folder), "--name", "stripe", "--text", str(text)]
    assert import_expert.main(arguments) == 2
    assert "--same-base" in capsys.readouterr().err
    assert import_expert.main([*arguments, "--same-base"]) == 0
    assert "expert 3 is stripe." in capsys.readouterr().out
    assert same(open_for_export(run, "float32").model.experts[2], expert)


def test_the_name_of_the_default_adapter_may_be_left_in(expert, tmp_path):
    """As tools write that save a PEFT model's weights without PEFT."""
    folder = peft_folder(tmp_path / "a", expert, "model.language_model.")
    arrays = mx.load(str(folder / PEFT_FILE))
    mx.eval(arrays)
    (folder / PEFT_FILE).unlink()
    mx.save_safetensors(
        str(folder / PEFT_FILE), {n.replace(".weight", ".default.weight"): v for n, v in arrays.items()}
    )
    assert same(read(folder), expert)


@pytest.mark.parametrize("wrapper", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_name_modules_as_the_adapters_own_model_does(expert, tmp_path, wrapper, rslora):
    """PEFT compares a pattern with the end of a module's name, wrapper included; after ^ with all of it."""
    alphas = {f"{wrapper}{Q}": 9.0, f"^{wrapper}{V}".replace(".", r"\."): 5.0, "^layers.3.self_attn.q_proj": 7.0}
    imported = read(peft_folder(tmp_path / "a", expert, wrapper, lora_alpha=6, alpha_pattern=alphas, use_rslora=rslora))
    divisor = 3**0.5 if rslora else 3
    for path, alpha in ((Q, 9.0), (V, 5.0), ("layers.3.self_attn.q_proj", 6.0), ("layers.0.self_attn.v_proj", 6.0)):
        assert close(update(imported, path), alpha / divisor * update(expert, path) / expert.scale, 1e-5), path


def test_a_module_that_is_there_twice_is_refused(expert, tmp_path):
    arrays = peft.weights(expert)
    name = next(name for name in arrays if Q in name)
    again = name.replace("model.layers", "model.language_model.layers")
    message = refusal(peft_folder(tmp_path / "a", expert, more={again: arrays[name]}))
    assert re.search(rf"{Q}\.lora_[AB]\.weight' is a second adapter of 'model\.{Q}'; keep one$", message), message
    again = name.replace(".weight", ".default.weight")
    assert "is a second adapter of" in refusal(peft_folder(tmp_path / "b", expert, more={again: arrays[name]}))


@pytest.mark.parametrize(("module", "part"), VISION)
def test_an_adapted_vision_tower_is_refused_by_name(expert, tmp_path, module, part):
    more = {f"base_model.model.{module}.lora_{letter}.weight": mx.ones((3, 3)) for letter in "AB"}
    message = refusal(peft_folder(tmp_path / "a", expert, "model.language_model.", more))
    assert re.search(rf"'base_model\.model\.{re.escape(module)}\.lora_[AB]\.weight' adapts {part}", message), message
    assert message.endswith("; train the adapter on the text layers only")
    more = {f"{module}.lora_{letter}": mx.ones((3, 3)) for letter in "ab"}
    message = refusal(mlx_folder(tmp_path / "b", expert, "language_model.model.", more))
    assert f"adapts {part}, which an expert cannot hold" in message


@pytest.mark.parametrize(("module", "part"), VISION)
def test_a_vision_tower_that_was_never_trained_is_left_out(expert, tmp_path, module, part):
    """PEFT adapts it by the names of its projections too; b stays zero where no image was seen, and changes nothing."""
    more = {
        f"base_model.model.{module}.lora_A.weight": mx.ones((3, 5)),
        f"base_model.model.{module}.lora_B.weight": mx.zeros((7, 3)),
    }
    assert same(read(peft_folder(tmp_path / "a", expert, "model.language_model.", more)), expert)
    more = {f"{module}.lora_a": mx.ones((5, 3)), f"{module}.lora_b": mx.zeros((3, 7))}
    assert same(read(mlx_folder(tmp_path / "b", expert, "language_model.model.", more)), expert)
    only_a = {f"base_model.model.{module}.lora_A.weight": mx.ones((3, 5))}
    assert f"adapts {part}" in refusal(peft_folder(tmp_path / "c", expert, "model.language_model.", only_a))
    dora = {f"base_model.model.{module}.lora_magnitude_vector": mx.zeros(3)}
    assert f"adapts {part}" in refusal(peft_folder(tmp_path / "d", expert, "model.language_model.", more=dora))


@pytest.mark.parametrize("wrapper", ["model.text_model.", "transformer.", "base_model.model.model.", "layers.0."])
def test_other_wrappers_are_not_guessed(expert, tmp_path, wrapper):
    assert "is no LoRA factor of a projection in a layer" in refusal(peft_folder(tmp_path / "a", expert, wrapper))


@pytest.mark.parametrize("layer", ["01", "\u0661", "9" * 5000])
def test_a_layer_that_is_no_number_is_no_layer(expert, tmp_path, layer):
    more = {f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight": mx.ones((3, 64))}
    assert "is no LoRA factor" in refusal(peft_folder(tmp_path / "a", expert, more=more))


@pytest.mark.export
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*\.(q_proj|v_proj)"])
def test_a_gemma_3_with_vision_in_peft_has_its_updates(tmp_path, targets):
    """With plain names as targets PEFT also adapts the vision tower, which is not trained here."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    base = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    alphas = {"model.language_model.layers.1.self_attn.q_proj": 9, "^model.language_model.layers.2.self_attn.v_proj": 3}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=targets, alpha_pattern=alphas))
    updates = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and "language_model" in name:
            torch.nn.init.normal_(module.lora_B["default"].weight.data)
            updates[name.partition("language_model.")[2]] = module.get_delta_weight("default").detach().numpy()
    model.save_pretrained(str(tmp_path / "a"))
    stored = mx.load(str(tmp_path / "a" / PEFT_FILE))
    assert any("vision_tower" in name for name in stored) == isinstance(targets, list)
    imported = read(tmp_path / "a", {layer: {"q_proj": (64, 64), "v_proj": (64, 32)} for layer in range(4)})
    assert len(updates) == 8
    assert all(close(update(imported, path), value.T, 1e-5) for path, value in updates.items())


PROJECTIONS = [
    (["q_proj", "v_proj"], [*ATTENTION, *MLP], [*ATTENTION, *MLP]),
    (["q_proj", "v_proj"], ["down_proj"], ["q_proj", "v_proj", "down_proj"]),
    (["v_proj", "q_proj"], ["o_proj", "k_proj"], list(ATTENTION)),
    (["down_proj"], ["q_proj"], ["q_proj", "down_proj"]),
]


@pytest.mark.parametrize(("own", "adapted", "needed"), PROJECTIONS)
@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
def test_projections_that_the_run_lacks_are_refused_with_the_value_that_fits(tmp_path, own, adapted, needed, kind):
    expert = tiny_pool([3], projections=adapted).model.experts[0]
    folder = (
        peft_folder(tmp_path / "a", expert)
        if kind == "peft"
        else mlx_folder(tmp_path / "a", expert, "language_model.model.")
    )
    message = refusal(folder, tiny_pool(projections=own).model.shapes)
    value = f"[{', '.join(needed)}]"
    assert f"this adapter needs model.projections {value}. That is set when a run starts" in message
    assert message.endswith(f"import into a run that was trained with --model.projections '{value}'")
    imported = read(folder, tiny_pool(projections=needed).model.shapes)
    for name in adapted:
        parent = "self_attn" if name in ATTENTION else "mlp"
        assert np.array_equal(
            update(imported, f"layers.1.{parent}.{name}"), update(expert, f"layers.1.{parent}.{name}")
        )
    assert all(
        not factors.lora_b.any().item()
        for named in imported.layers
        for name, factors in named.items()
        if name not in adapted
    )


def test_layers_below_the_routers_are_refused_with_the_option(expert, tmp_path):
    folder = peft_folder(tmp_path / "a", expert)
    message = refusal(folder, tiny_pool(router_layer=2).model.shapes)
    assert "of layers 2 to 3; this adapter needs model.router_layer final, or at most 0." in message
    assert message.endswith("trained with --model.router_layer final")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("layers.4.self_attn.q_proj", "of layers 0 to 3: this adapter belongs to another base"),
        ("layers.0.self_attn.qkv_proj", "no expert can be on self_attn.qkv_proj, only on q_proj, k_proj"),
        ("layers.0.mlp.q_proj", "no expert can be on mlp.q_proj, only on"),
        ("layers.0.linear_attn.out_proj", "no expert can be on linear_attn.out_proj"),
    ],
)
def test_modules_that_no_option_gives_are_refused(expert, tmp_path, module, words):
    more = {f"base_model.model.model.{module}.lora_{letter}.weight": mx.ones((3, 3)) for letter in "AB"}
    message = refusal(peft_folder(tmp_path / "a", expert, more=more))
    assert f"'model.{module}' is adapted" in message
    assert words in message
