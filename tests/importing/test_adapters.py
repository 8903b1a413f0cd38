"""External adapters: an imported expert has the update that PEFT and mlx-lm define; anything else is named and refused."""

from __future__ import annotations

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import assets
from dylora_mlx.adapters import mlx_lm, peft
from dylora_mlx.errors import UserError
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.importing import adapters
from dylora_mlx.importing.common import check_base
from tests.conftest import SMALL_BASE
from tests.tiny import close, flat, tiny_pool

Q, V = "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.v_proj"


@pytest.fixture(scope="module")
def expert():
    return tiny_pool([3]).model.experts[0]


@pytest.fixture
def folder(expert, tmp_path):
    """A PEFT LoRA folder of rank 3 on q_proj and v_proj."""
    return written(tmp_path / "adapter", peft.config(expert, "some/base"), peft.weights(expert))


def written(place, config, weights, name="adapter_model.safetensors"):
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(place / name), weights, metadata={"format": "pt"})
    return place


def change_config(folder, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, change, name="adapter_model.safetensors") -> None:
    weights = mx.load(str(folder / name))
    mx.eval(weights)
    change(weights)
    (folder / name).unlink()
    mx.save_safetensors(str(folder / name), weights)


def factor_name(path: str, letter: str = "A") -> str:
    return f"base_model.model.{path}.lora_{letter}.weight"


def updates(expert) -> dict[str, np.ndarray]:
    """Return scale * A @ B of every module."""
    return {
        mlx_lm.module_path(layer, name): np.array(expert.scale * (factors.lora_a @ factors.lora_b))
        for layer, projections in enumerate(expert.layers)
        for name, factors in projections.items()
    }


def read(folder, shapes):
    return adapters.to_expert(adapters.read_adapter(folder), shapes, folder)


def shapes():
    return tiny_pool().model.shapes


def test_an_exported_adapter_is_imported_bit_for_bit(expert, folder):
    imported = read(folder, shapes())
    ours, theirs = flat(expert.parameters()), flat(imported.parameters())
    assert (imported.rank, imported.alpha) == (expert.rank, expert.alpha)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_half_precision_is_read_as_float32(expert, folder):
    change_weights(folder, lambda w: w.update({k: v.astype(mx.bfloat16) for k, v in w.items()}))
    imported = flat(read(folder, shapes()).parameters())
    assert {value.dtype for value in imported.values()} == {np.dtype(np.float32)}
    assert all(close(imported[name], value, 1e-2) for name, value in flat(expert.parameters()).items())


OPTIONS = [
    ({}, {}),
    ({"use_rslora": True}, {}),
    ({"alpha_pattern": {"v_proj": 9.0}}, {"v_proj": 9.0}),
    ({"alpha_pattern": {"layers.1.self_attn.q_proj": 9.0, "q_proj": 5.0}}, {Q: 9.0, "q_proj": 5.0}),
    ({"alpha_pattern": {"^model\\.layers\\.1\\.self_attn\\.q_proj": 9.0, "^q_proj": 5.0}}, {Q: 9.0}),
    ({"use_rslora": True, "alpha_pattern": {Q: 0.5}}, {Q: 0.5}),
]


@pytest.mark.parametrize(("options", "alphas"), OPTIONS)
@pytest.mark.parametrize("wider", [0, 2])
def test_ranks_and_alphas_of_modules_have_their_updates(expert, folder, options, alphas, wider):
    """A module's update is alpha / r (or alpha / sqrt(r)) times its factors; a module of larger rank keeps that rank."""
    keys = mx.random.split(mx.random.key(4), 2)
    weights = peft.weights(expert)
    weights[factor_name(V)] = mx.random.normal((3 + wider, weights[factor_name(V)].shape[1]), key=keys[0])
    weights[factor_name(V, "B")] = mx.random.normal((weights[factor_name(V, "B")].shape[0], 3 + wider), key=keys[1])
    change_weights(folder, lambda w: w.update(weights))
    change_config(folder, lora_alpha=6, **options, **({"rank_pattern": {V: 3 + wider}} if wider else {}))
    imported = read(folder, shapes())
    assert imported.rank == 3 + wider
    for path, update in updates(imported).items():
        rank, name = (3 + wider if path == V else 3), path.rsplit(".", 1)[1]
        scale = alphas.get(path, alphas.get(name, 6)) / (math.sqrt(rank) if "use_rslora" in options else rank)
        assert close(
            update, scale * np.array(weights[factor_name(path)].T @ weights[factor_name(path, "B")].T), 1e-5
        ), path


def test_missing_modules_are_zero(expert, folder):
    change_weights(folder, lambda w: [w.pop(name) for name in list(w) if Q not in name])
    imported, before = updates(read(folder, shapes())), updates(expert)
    assert imported.keys() == before.keys()
    assert all(not update.any() for path, update in imported.items() if path != Q)
    assert close(imported[Q], before[Q], 1e-6)


def test_adapters_of_a_run_are_adapters_of_mlx_lm(finished):
    folder, run = finished / "checkpoints" / "final" / "experts", open_for_export(finished, "float32")
    for name, rank, alpha in (("expert_1", 8, 16.0), ("expert_2", 4, 4.0)):
        adapter = adapters.read_adapter(folder / name)
        assert (adapter.base, adapter.rank, adapter.alpha) == (str(SMALL_BASE), rank, alpha)
        expert = adapters.to_expert(adapter, run.model.shapes, folder)
        stored = mx.load(str(folder / name / "adapters.safetensors"))
        assert stored.keys() == mlx_lm.weights(expert).keys()
        assert all(mx.array_equal(value, stored[path]) for path, value in mlx_lm.weights(expert).items())


CONFIGS = [
    (
        {"use_dora": True},
        r"DoRA \(use_dora\) cannot .*; merge it with PEFT \(merge_and_unload.*train it without use_dora",
    ),
    ({"velora_config": {"num_groups": 4}}, r"VeLoRA \(velora_config\) .*save_as_lora with the same rank"),
    ({"ensure_weight_tying": True}, r"tied \(ensure_weight_tying\) .*set it to false in adapter_config\.json"),
    ({"kasa_config": {"beta": 1e-4}}, r"KaSA .*train it without kasa_config"),
    ({"monteclora_config": {}, "use_bdlora": {"nblocks": 2}}, r"BD-LoRA .*train it without use_bdlora"),
    ({"bias": "lora_only"}, "trained biases"),
    ({"lora_bias": True}, "LoRA biases"),
    ({"modules_to_save": ["lm_head"]}, "modules saved whole .*merge it with PEFT .*train it without modules_to_save"),
    ({"trainable_token_indices": [1]}, "trained tokens"),
    ({"layer_replication": [[0, 2]]}, "layer replication"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"target_parameters": ["experts"]}, "target_parameters"),
    ({"alora_invocation_tokens": [5, 6]}, "aLoRA"),
    ({"use_qalora": True}, "QALoRA"),
    ({"arrow_config": {"top_k": 2}}, "Arrow"),
    ({"init_lora_weights": "pissa_niter_4"}, "a base that was changed .*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "corda"}, "a base that was changed"),
    ({"init_lora_weights": "loftq"}, "a base that was changed"),
    ({"init_lora_weights": "olora"}, "a base that was changed"),
    ({"peft_type": "XLORA"}, "use dylora import-run"),
    ({"peft_type": "LOHA"}, "a LOHA adapter, .*save_as_lora converts"),
    ({"peft_type": "IA3"}, "a IA3 adapter"),
    ({"r": 4}, r"has rank 3, adapter_config\.json says 4"),
    ({"rank_pattern": {"v_proj": 5}}, "v_proj' has rank 3, adapter_config.json says 5"),
    ({"r": None}, "r is None"),
    ({"r": "3"}, "r is '3'"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"lora_alpha": True}, "lora_alpha is True"),
    ({"alpha_pattern": {"v_proj": -1}}, "v_proj is -1"),
    ({"alpha_pattern": {r".*\.(q|v)_proj": 8}}, "is a regular expression"),
    ({"rank_pattern": {"(a+)+$": 8}}, "is a regular expression"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIGS)
def test_an_unsupported_config_is_refused(folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises(UserError, match=message):
        adapters.read_adapter(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "mica"},
        {"lora_dropout": 0.1},
        {"velora_config": None, "ensure_weight_tying": False, "use_dora": False},
    ],
)
def test_options_that_only_training_reads_are_ignored(folder, fields):
    change_config(folder, **fields)
    assert adapters.read_adapter(folder).rank == 3


def extra(name: str, value: mx.array | None = None):
    return lambda w: w.update({f"base_model.model.{name}": mx.ones((3, 3)) if value is None else value})


WEIGHTS = [
    (extra("lm_head.lora_A.weight"), r"lm_head\.lora_A\.weight' belongs to the head"),
    (extra("lm_head.weight"), "belongs to the head, which .*; merge it with PEFT .*train it without this module"),
    (extra("model.embed_tokens.lora_embedding_A"), "adapts the embedding"),
    (extra("model.embed_tokens.weight"), "belongs to the embedding"),
    (extra(f"{Q}.lora_magnitude_vector", mx.ones(3)), "is DoRA's"),
    (extra(f"{Q}.bias", mx.ones(3)), "is a bias"),
    (extra(f"{Q}.lora_B.bias", mx.ones(3)), "is a bias"),
    (extra("model.norm.weight", mx.ones(3)), "is no LoRA factor"),
    (lambda w: w.update({Q: w.pop(factor_name(Q))}), "is no LoRA factor"),
    (lambda w: w.pop(factor_name(Q)), "q_proj' has no lora_A"),
    (lambda w: w.pop(factor_name(V, "B")), "v_proj' has no lora_B"),
    (lambda w: w.update({factor_name(Q): w[factor_name(Q)][:2]}), "factors of different ranks"),
    (lambda w: w.update({factor_name(Q): mx.full(w[factor_name(Q)].shape, float("nan"))}), "not a finite matrix"),
    (lambda w: w.update({factor_name(Q): w[factor_name(Q)] / 0}), "not a finite matrix"),
    (lambda w: w.update({factor_name(Q): w[factor_name(Q)].reshape(-1)}), "not a finite matrix"),
    (lambda w: w.clear(), "holds no LoRA weight"),
]


@pytest.mark.parametrize(("change", "message"), WEIGHTS)
def test_unsupported_weights_are_refused(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(UserError, match=message):
        adapters.read_adapter(folder)


EMBED, HEAD = "model.embed_tokens", "lm_head"


def embedding(base) -> mx.array:
    return base.model.model.embed_tokens.weight


COPIES = [
    lambda base: extra(f"{EMBED}.weight", embedding(base)),
    lambda base: extra(f"{HEAD}.weight", embedding(base).astype(mx.bfloat16)),  # tied, saved in half precision
    lambda base: extra(f"{EMBED}.base_layer.weight", embedding(base)),
    lambda base: (
        lambda w: (
            extra(f"{EMBED}.lora_embedding_A", mx.zeros((3, 4096)))(w),
            extra(f"{EMBED}.lora_embedding_B", mx.ones((256, 3)))(w),
        )
    ),
]


@pytest.mark.parametrize("add", COPIES)
def test_an_embedding_that_was_not_trained_is_left_out(base, folder, add):
    """PEFT saves it with save_embedding_layers, by itself where it thinks that the vocabulary has grown."""
    before = updates(read(folder, shapes()))
    change_weights(folder, add(base))
    adapter = adapters.read_adapter(folder, base)
    after = updates(adapters.to_expert(adapter, shapes(), folder))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda base: extra(f"{EMBED}.weight", embedding(base).at[7, 3].add(0.01)), "belongs to the embedding"),
        (lambda base: extra(f"{HEAD}.weight", embedding(base)[:-1]), "belongs to the head"),
        (lambda base: extra(f"{HEAD}.bias", mx.zeros(4096)), "belongs to the head"),
        (
            lambda base: (
                lambda w: (
                    extra(f"{EMBED}.lora_embedding_A", mx.ones((3, 4096)))(w),
                    extra(f"{EMBED}.lora_embedding_B", mx.ones((256, 3)))(w),
                )
            ),
            "adapts the embedding, which an expert cannot hold; merge it with PEFT",
        ),
    ],
)
def test_an_embedding_that_was_trained_is_refused(base, folder, add, message):
    change_weights(folder, add(base))
    with pytest.raises(UserError, match=message):
        adapters.read_adapter(folder, base)


def test_files_that_are_missing_or_cut(folder):
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        adapters.read_adapter(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: missing"):
        adapters.read_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="a pickle, which is never opened"):
        adapters.read_adapter(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="neither a PEFT nor an mlx-lm adapter"):
        adapters.read_adapter(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such folder"):
        adapters.read_adapter(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fine_tune_type": "dora"}, r"fine_tune_type dora, .*fuse it \(mlx_lm\.fuse\)"),
        ({"fine_tune_type": "full"}, "fine_tune_type full"),
        ({"lora_parameters": None}, "lora_parameters are missing"),
        ({"lora_parameters": {"rank": 3}}, "scale is None"),
    ],
)
def test_an_unsupported_mlx_lm_adapter_is_refused(expert, tmp_path, fields, message):
    config = mlx_lm.config(expert, "some/base") | fields
    with pytest.raises(UserError, match=message):
        adapters.read_adapter(written(tmp_path / "a", config, mlx_lm.weights(expert), "adapters.safetensors"))


def test_weights_of_mlx_lm_adapters(expert, tmp_path):
    config = mlx_lm.config(expert, "some/base")
    place = written(tmp_path / "a", config, mlx_lm.weights(expert), "adapters.safetensors")
    assert adapters.read_adapter(place).base == "some/base"
    change_weights(place, lambda w: w.update({f"{Q}.m": mx.ones(3)}), "adapters.safetensors")
    with pytest.raises(UserError, match=r"q_proj\.m' is DoRA's"):
        adapters.read_adapter(place)


def test_modules_and_sizes_must_be_those_of_the_run(folder):
    adapter = adapters.read_adapter(folder)
    with pytest.raises(
        UserError,
        match=r"is adapted, but experts of this run are on q_proj of layers 0 to 3; this adapter needs model.projections "
        r"\[q_proj, v_proj\]. That is set when a run starts: import into a run that was trained with "
        r"--model.projections '\[q_proj, v_proj\]'",
    ):
        adapters.to_expert(adapter, tiny_pool(projections=["q_proj"]).model.shapes, folder)
    with pytest.raises(UserError, match=r"of layers 2 to 3"):
        adapters.to_expert(adapter, tiny_pool(router_layer=2).model.shapes, folder)
    wider = {layer: {name: (size[0] + 8, size[1]) for name, size in sizes.items()} for layer, sizes in shapes().items()}
    with pytest.raises(UserError, match=r"has 64 inputs and \d+ outputs, the base's has 72 .*another base"):
        adapters.to_expert(adapter, wider, folder)


def test_a_base_is_compared_by_name_and_content(base, tmp_path):
    for stated in ("", "embedded", str(assets.BASE)):
        check_base(stated, base, tmp_path, same=False)
    copy = tmp_path / "base"
    shutil.copytree(assets.BASE, copy)
    check_base(str(copy), base, tmp_path, same=False)
    with pytest.raises(UserError, match=r"trained on 'google/gemma-3-270m'.*--same-base"):
        check_base("google/gemma-3-270m", base, tmp_path, same=False)
    check_base("google/gemma-3-270m", base, tmp_path, same=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"sliding_window": 7}))
    with pytest.raises(UserError, match="another base than the run's"):
        check_base(str(copy), base, tmp_path, same=False)
