"""What every export format holds: the same gates, the same updates, every tensor rounded once, and nothing hostile in a card."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from dylora_mlx import assets
from dylora_mlx.adapters import mlx_lm, peft, xlora
from dylora_mlx.adapters.fuse import weight_updates
from dylora_mlx.config import ATTENTION, MLP, Source
from dylora_mlx.errors import UserError
from dylora_mlx.exporting import formats, full_model
from dylora_mlx.exporting.folder import read_arrays, read_manifest, write_folder
from dylora_mlx.exporting.model_card import LIBRARY, model_card
from dylora_mlx.exporting.write import open_for_export, parse_weights, write_export
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.routing import router
from dylora_mlx.model.routing.router import Gate, Routing
from tests.conftest import SMALL_BASE
from tests.exporting.mixtures import random_run
from tests.tiny import ARGS, alone, close, quantised_base, tiny_base

CHANGED = [f"{mlx_lm.module_path(layer, name)}.weight" for layer in range(2) for name in (*ATTENTION, *MLP)]


@pytest.fixture(scope="module")
def opened(finished):
    """The finished run, for reading."""
    return open_for_export(finished, "float32")


@pytest.fixture(scope="module")
def tiny():
    """A run of three random experts on a random base; X-LoRA can hold it."""
    return random_run(tiny_base())


def logits(model, tokens: mx.array, gates: list[float]) -> np.ndarray:
    """Logits with the same gates at every token."""
    fixed = mx.broadcast_to(mx.array(gates), (*tokens.shape, len(gates)))
    found = model(tokens, alone(tokens.shape[1], len(tokens), model.window), Routing(None, mx.array(1.0)), gates=fixed)
    return np.array(model.logits(found.hidden))


def static(run, gates: list[float]) -> np.ndarray:
    rng = np.random.default_rng(5)
    return logits(run.model, mx.array(rng.integers(3, run.base.args.vocab_size, (2, 30))), gates)


def classifier(made: formats.Export) -> Gate:
    arrays = made.content["adapter_model.safetensors"]
    return Gate(arrays[f"{xlora.CLASSIFIER}weight"], arrays[f"{xlora.CLASSIFIER}bias"])


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_classifier_has_the_temperature_divided_out(tiny, top_k):
    how = formats.mixture_routing(tiny, top_k)
    assert how.temperature == 0.7
    own, found = tiny.model.router.gate(), classifier(formats.export_mixture(tiny, how, "xlora"))
    assert mx.array_equal(found.weight, own.weight / 0.7)
    assert mx.array_equal(found.bias, own.bias / 0.7)
    features = mx.random.normal((50, ARGS.hidden_size), key=mx.random.key(1))
    expected = router.gates(router.logits(features, own), Routing(top_k, mx.array(0.7)))
    assert close(router.top_k_softmax(router.logits(features, found), top_k), expected, 1e-5)


@pytest.mark.parametrize(("top_k", "raised"), [(None, 0.0), (1, 1.0), (2, 1.0)])
def test_a_row_of_zeros_raises_every_bias_where_zero_would_mean_unchosen(top_k, raised):
    keys = mx.random.split(mx.random.key(0), 2)
    weight = mx.concatenate([mx.zeros((1, 8)), mx.random.normal((3, 8), key=keys[0])])
    gate, features = Gate(weight, mx.array([0.0, -0.4, 0.2, 0.0])), mx.random.normal((40, 8), key=keys[1])
    found = xlora.classifier(gate, 0.5, top_k)
    moved = Gate(found[f"{xlora.CLASSIFIER}weight"], found[f"{xlora.CLASSIFIER}bias"])
    assert mx.array_equal(moved.weight, gate.weight / 0.5)
    assert mx.array_equal(moved.bias, gate.bias / 0.5 + raised)
    expected = router.gates(router.logits(features, gate), Routing(top_k, mx.array(0.5)))
    assert close(router.top_k_softmax(router.logits(features, moved), top_k), expected, 1e-5)


def test_no_row_is_raised_to_zero():
    """Another constant row lies as far below as the first is raised."""
    weight = mx.concatenate([mx.zeros((3, 8)), mx.random.normal((1, 8), key=mx.random.key(0))])
    found = xlora.classifier(Gate(weight, mx.array([0.0, -1.0, -1e9, 0.5])), 1.0, 2)[f"{xlora.CLASSIFIER}bias"]
    assert found.tolist() == [2.0, 1.0, -1e9, 2.5]


def test_a_row_that_moves_raises_nothing():
    gate = Gate(mx.array([[0.0, 0.0], [1.0, -1.0]]), mx.array([0.5, 0.0]))
    assert mx.array_equal(xlora.classifier(gate, 1.0, 1)[f"{xlora.CLASSIFIER}bias"], gate.bias)


def test_the_null_expert_is_zero_everywhere(tiny):
    made = formats.export_mixture(tiny, formats.mixture_routing(tiny), "xlora")
    null, first = (made.content[f"{expert_id}/adapter_model.safetensors"] for expert_id in (0, 1))
    assert null.keys() == first.keys()
    assert not any(value.any().item() for value in null.values())
    assert made.content["0/adapter_config.json"]["r"] == 1


def test_experts_are_in_the_order_of_the_gate(tmp_path):
    """With more than ten experts the order of their names as text is another."""
    run = random_run(tiny_base(), ranks=[1 + number % 3 for number in range(12)])
    made = formats.export_mixture(run, formats.mixture_routing(run), "xlora")
    write_folder(tmp_path / "out", made.content, made.manifest)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (
        list(written["adapters"]) == list(written["adapters"].values()) == [str(expert_id) for expert_id in range(13)]
    )
    for expert_id, expert in enumerate(run.model.experts, 1):
        stored = read_arrays(tmp_path / "out" / str(expert_id) / "adapter_model.safetensors")
        assert all(mx.array_equal(stored[name], value) for name, value in peft.weights(expert).items())
    assert [e["name"] for e in made.manifest["experts"]] == ["base", *(f"skill_{number}" for number in range(12))]


@pytest.mark.parametrize("wanted", ["dense", "4", "9"])
def test_more_experts_a_token_than_there_are_is_dense(tiny, wanted):
    how = formats.mixture_routing(tiny, None if wanted == "dense" else int(wanted))
    made = formats.export_mixture(tiny, how, "xlora")
    options = made.content["adapter_config.json"]
    assert (made.manifest["top_k"], options["top_k_lora"]) == (None, None)
    assert (options["enable_softmax"], options["enable_softmax_topk"]) == (True, False)


def test_fewer_experts_a_token_are_sparse(tiny):
    options = formats.export_mixture(tiny, formats.mixture_routing(tiny, 3), "xlora").content["adapter_config.json"]
    assert (options["top_k_lora"], options["enable_softmax"], options["enable_softmax_topk"]) == (3, False, True)


def test_a_router_on_an_inner_layer_is_refused_with_both_ways_out():
    run = random_run(tiny_base(), router_layer=2)
    how = formats.mixture_routing(run)
    with pytest.raises(UserError, match=r"reads layer 2.*--format runtime.*--refit-router"):
        formats.export_mixture(run, how, "xlora")
    made = formats.export_mixture(run, how, "runtime")
    assert (made.manifest["router_layer"], made.manifest["kind"]) == (2, "runtime")
    assert "adapter_config.json" not in made.content
    assert made.content["1/adapter_config.json"]["layers_to_transform"] == [2, 3]
    refitted = formats.export_mixture(run, formats.mixture_routing(run, gate=run.model.router.gate()), "xlora")
    assert refitted.manifest["router_layer"] == "final"


def test_logits_that_are_mixed_have_no_export(tiny):
    model = SimpleNamespace(mixing="logits")
    with pytest.raises(UserError, match=r"model\.mixing: logits"):
        formats.export_mixture(
            tiny._replace(model=model), formats.mixture_routing(tiny._replace(model=tiny.model)), "xlora"
        )


@pytest.mark.parametrize("kind", ["xlora", "runtime"])
def test_a_mixture_on_a_quantised_base_is_refused(tiny, kind):
    run = tiny._replace(base=quantised_base())
    with pytest.raises(UserError, match=rf"is quantised by mlx-lm.*--format {kind}.*use --format merged.*or experts"):
        formats.export_mixture(run, formats.mixture_routing(run), kind)


def test_names_of_columns(opened):
    run = opened._replace(pool=SimpleNamespace(records=[SimpleNamespace(skill=s) for s in ("sql", "base", "sql")]))
    assert formats.expert_names(run.pool) == ["base", "sql", "base-2", "sql-3"]
    assert [
        formats.find_expert(run.pool, run.library, name) for name in ("sql", "sql-3", "3", "expert_2", "base-2")
    ] == [1, 3, 3, 2, 2]
    assert formats.find_expert(opened.pool, opened.library, "requests_more") == 1
    for wanted in ("base", "python", "0", "expert_0", "9", "-1", "²", "cobol"):
        with pytest.raises(UserError, match=rf"no expert '{wanted}'.*1 \(requests\), 2 \(sql\)"):
            formats.find_expert(opened.pool, opened.library, wanted)


@pytest.mark.parametrize("weights", [{"skill_0": 0.7, "skill_2": 0.3}, {"2": 1.5, "expert_1": -0.25, "skill_2": 0}])
def test_a_blend_equals_constant_gates(tiny, weights):
    gates = [0.0] * 4
    for name, weight in weights.items():
        gates[formats.find_expert(tiny.pool, tiny.library, name)] = weight
    made = formats.blend_by_name(tiny, weights)
    assert made.rank == sum(tiny.pool.records[expert_id - 1].rank for expert_id, gate in enumerate(gates) if gate)
    own = random_run(tiny_base(), ranks=[made.rank])
    own.model.experts[0] = made
    expected = static(tiny, gates)
    assert np.abs(static(own, [0.0, 1.0]) - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    assert np.abs(expected - static(tiny, [1.0, 0.0, 0.0, 0.0])).max() > 0.1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"sql": 0.5, "expert_2": 0.5}, "two of sql, expert_2 are the same expert"),
        ({"requests": 0.5, "requests_more": 0.5}, "are the same expert"),
        ({"sql": 1.0, "cobol": 1.0}, "no expert 'cobol'"),
        ({"sql": 0.0, "requests": 0.0}, "a weight other than 0"),
    ],
)
def test_a_blend_that_makes_no_sense(opened, weights, message):
    with pytest.raises(UserError, match=message):
        formats.export_blend(opened, weights)


@pytest.mark.parametrize("text", ["sql", "sql=", "=1", "sql=x", "sql=nan", "sql=inf", "", "sql=1,", "sql=1,sql=2"])
def test_weights_that_cannot_be_read(text):
    with pytest.raises(UserError, match="--weights"):
        parse_weights(text)
    assert parse_weights("a=1, b=-0.5") == {"a": 1.0, "b": -0.5}


def write_merged(run, expert, out, dtype=None) -> dict[str, mx.array]:
    made = full_model.export_full_model(run, expert, {}, dtype)
    write_folder(out, made.content, made.manifest)
    found = {}
    for path in sorted(out.glob("model*.safetensors")):
        found |= read_arrays(path)
    return found


@pytest.mark.parametrize("dtype", [None, mx.float32, mx.float16])
def test_a_full_model_is_rounded_once(opened, tmp_path, dtype):
    expert = opened.model.experts[1]
    stored, found = (
        read_arrays(SMALL_BASE / "model.safetensors"),
        write_merged(opened, expert, tmp_path / "m", dtype),
    )
    assert stored.keys() == found.keys()
    twice = 0
    for name, before in stored.items():
        kept = dtype or mx.bfloat16
        assert found[name].dtype == kept
        layer, _, place = name.removeprefix("model.layers.").partition(".")
        if name in CHANGED:
            factors = expert.layers[int(layer)][place.split(".")[1]]
            update = expert.scale * (factors.lora_a @ factors.lora_b).T
            assert mx.array_equal(found[name], (before.astype(mx.float32) + update).astype(kept))
            twice += int((found[name] != (before.astype(kept) + update.astype(kept))).sum().item())
        else:
            assert mx.array_equal(found[name].view(mx.uint16) if dtype is None else found[name],
                                  before.view(mx.uint16) if dtype is None else before.astype(kept))  # fmt: skip
    assert twice > 0 or kept == mx.float32
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["sliding_window_pattern"], config["rope_theta"], config["rope_local_base_freq"]) == (2, 1e5, 1e4)
    assert config["dtype"] == {None: "bfloat16", mx.float32: "float32", mx.float16: "float16"}[dtype]
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (assets.BASE / "tokenizer.json").read_bytes()
    assert not (tmp_path / "m" / "model.safetensors.index.json").exists()


def write_base(place, quantised: bool, shards: int) -> Base:
    """The tiny base as a checkpoint folder. Shards are dealt out in turn, so that a weight's scales lie in other files."""
    place.mkdir()
    model = load_base("embedded").model.__class__(ARGS)
    model.update(tiny_base().model.parameters())
    config = {name: value for name, value in vars(ARGS).items() if name != "rope_scaling"}
    del config["sliding_window_pattern"], config["rope_theta"]
    if quantised:
        model, config = quantize_model(model, config, 32, 4)
    weights = dict(tree_flatten(model.parameters()))
    names = [
        f"model-{n + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors" for n in range(shards)
    ]
    dealt = {name: {key: weights[key] for key in sorted(weights)[n::shards]} for n, name in enumerate(names)}
    for name, part in dealt.items():
        mx.save_safetensors(str(place / name), part, metadata={"format": "mlx"})
    if shards > 1:
        listing = {
            "metadata": {"total_size": 1},
            "weight_map": {key: name for name, part in dealt.items() for key in part},
        }
        (place / "model.safetensors.index.json").write_text(json.dumps(listing))
    # sliding_window_pattern 6 and the usual rope_theta: what mlx-lm takes where a config does not say
    (place / "config.json").write_text(
        json.dumps(config | {"quantization_config": config["quantization"]} if quantised else config)
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(assets.BASE / name, place / name)
    return load_base(str(place), "float32")


@pytest.mark.parametrize(("quantised", "shards"), [(False, 3), (True, 1), (True, 3)])
@pytest.mark.parametrize("dtype", [None, mx.float32])
def test_a_full_model_of_another_base(tmp_path, quantised, shards, dtype):
    base = write_base(tmp_path / "base", quantised, shards)
    assert base.is_quantized == quantised
    run = random_run(
        replace(base, tokenizer=None), ranks=[3, 2]
    )  # this base has fewer rows than its tokenizer has tokens
    found = write_merged(run, run.model.experts[0], tmp_path / "out", dtype)
    assert not [name for name in found if name.endswith((".scales", ".biases"))]
    last = dtype or (mx.bfloat16 if quantised else mx.float32)
    assert {value.dtype for value in found.values()} == {last}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    assert (config["sliding_window_pattern"], config["rope_theta"]) == (6, base.args.rope_theta)
    files = {path.name for path in (tmp_path / "out").glob("model*.safetensors")}
    assert files == {path.name for path in (tmp_path / "base").glob("model*.safetensors")}
    if shards > 1:
        listing = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        assert listing.keys() == found.keys()
        assert all(key in read_arrays(tmp_path / "out" / name) for key, name in listing.items())
    again = load_base(str(tmp_path / "out"), "float32")
    assert not again.is_quantized
    expected = static(run, [0.0, 1.0, 0.0])
    worst = np.abs(static(random_run(again, ranks=[1]), [1.0, 0.0]) - expected).max()
    assert worst < (1e-3 if last == mx.float32 else 0.05) * np.abs(expected).max()
    assert np.abs(static(run, [1.0, 0.0, 0.0]) - expected).max() > 0.3 * np.abs(expected).max()


def test_updates_are_those_of_the_forced_gate(tiny):
    expert = tiny.model.experts[2]
    x = mx.random.normal((1, 4, ARGS.hidden_size), key=mx.random.key(3))
    factors = expert.layers[1]["q_proj"]
    update = weight_updates(expert)["model.layers.1.self_attn.q_proj.weight"]
    assert close(x @ update.T, expert.alpha / expert.rank * ((x @ factors.lora_a) @ factors.lora_b), 1e-5)


def test_a_card_tells_what_is_in_the_folder(opened, finished):
    results = json.loads((finished / "results.json").read_text())
    made = {
        "experts": formats.export_experts(opened, [1, 2]),
        "gguf-lora": formats.export_gguf_lora(opened, [1, 2]),
        "xlora": formats.export_mixture(opened, formats.mixture_routing(opened), "xlora"),
        "runtime": formats.export_mixture(opened, formats.mixture_routing(opened), "runtime"),
        "blend": formats.export_blend(opened, {"sql": 0.7, "requests": 0.3}),
        "merged": full_model.export_full_model(opened, opened.model.experts[0], {"expert": "requests"}),
    }
    wanted = {
        "experts": [
            'PeftModel.from_pretrained(base, "FOLDER/expert_1")',
            "| sql | sql | 4 | 4 |",
            "router, which mixes",
        ],
        "gguf-lora": [
            'Llama("BASE.gguf", lora_path="FOLDER/expert_1.gguf")',
            "| sql | sql | 4 | 4 |",
            "router, which mixes",
            "llama-cli -m BASE.gguf --lora FOLDER/expert_1.gguf",
            "--lora FOLDER/expert_1.gguf --lora FOLDER/expert_2.gguf --",
            f"the base (`{SMALL_BASE.name}`)",
            '"lora": [{"id": 0, "scale": 1.0}]',
        ],
        "xlora": ["import dylora_torch", "for i in range(3)}", "1 likeliest of 3 experts", "| base | python | 1 | 1 |"],
        "runtime": ["import dylora_torch", "| requests | requests, requests_more | 8 | 16 |"],
        "blend": ["Weights: sql 0.7, requests 0.3.", 'PeftModel.from_pretrained(base, "FOLDER")'],
        "merged": ["Folded in: `requests`.", 'AutoModelForCausalLM.from_pretrained("FOLDER")'],
    }
    losses = results["test"]["requests"]
    cells = [f"{losses[kind]:.3f}" for kind in ("base", "mixture", "own_expert")]
    results["test"]["sql"] |= {"of_documents": 9}
    for kind, export in made.items():
        text = model_card(export.manifest, results)
        lines = [f"| requests | {' | '.join(cells)} | 2 |", "| 2 of 9 |", "license: other"]
        for line in (*wanted[kind], *lines, f"library_name: {LIBRARY[kind]}", "- sql: `sql`"):
            assert line in text, (kind, line)
        assert "Test losses" not in model_card(export.manifest, None)
        code = text.split("```python\n")[1].split("\n```")[0]
        compile(code, kind, "exec")
    hub = model_card(made["merged"].manifest | {"base": {"name": "google/gemma-3-270m"}}, None)
    assert all(
        line in hub for line in ("license: gemma", "base_model: google/gemma-3-270m", "base_model_relation: merge")
    )


def test_a_card_does_not_tell_where_data_lies(opened, tmp_path):
    """Neither of data that is there, nor of data that was moved since."""
    (tmp_path / "there.jsonl").write_text("{}\n")
    skills = [
        Source("there", str(tmp_path / "there.jsonl")),
        Source("gone", str(tmp_path / "gone.jsonl")),
        Source("moved", "data/moved.jsonl"),
        Source("hub", "owner/name"),
        Source("ours", "packaged/sql"),
    ]
    made = formats.export_experts(opened._replace(config=replace(opened.config, skills=skills)), [1])
    found = {source["name"]: source["source"] for source in made.manifest["sources"]}
    assert found == {"there": "there.jsonl", "gone": "gone.jsonl", "moved": "moved.jsonl", "hub": "owner/name",
                     "ours": "packaged/sql"}  # fmt: skip
    assert str(tmp_path) not in model_card(made.manifest, None)


def test_hostile_names_do_no_harm(opened):
    bad = "a|b`c<script>alert(1)</script>\n## d\\"
    manifest = formats.export_mixture(opened, formats.mixture_routing(opened), "xlora").manifest
    manifest |= {
        "base": {"name": f'/x/"); evil(){bad}'},
        "sources": [{"name": bad, "source": bad}],
        "weights": {bad: 1.0},
    }
    manifest["experts"] = [{"name": bad, "skills": [bad], "rank": 1, "alpha": 1.0}, *manifest["experts"][1:]]
    text = model_card(manifest | {"expert": bad}, {"test": {bad: {"base": 1, "mixture": 2, "own_expert": 3}}})
    assert not [mark for mark in ("<script", "</", "\n## d", "a|b", "b`c", "\n## d") if mark in text]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5, 6}, "of experts, and of losses"
    parts = text.split("```")
    assert len(parts) == 5
    names = [word for part in parts[1::2] for word in compile(part.removeprefix("python"), "card", "exec").co_names]
    assert "evil" not in names


def test_a_run_that_has_not_finished(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "final")
    with pytest.raises(UserError, match=rf"has not finished.*--resume {run}.*--unfinished"):
        open_for_export(run, "auto")
    found = open_for_export(run, "auto", unfinished=True)
    assert found.checkpoint.name.startswith("step-")
    write_export(run, formats.export_experts(found, [1]), tmp_path / "out")
    assert read_manifest(tmp_path / "out")["kind"] == "experts"
    pool = run / "checkpoints" / found.checkpoint.name / "pool.json"
    pool.write_text(pool.read_text() + " ")
    older = open_for_export(run, "auto", unfinished=True)
    assert older.checkpoint < found.checkpoint


def test_a_checkpoint_of_a_newer_format(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    listing = run / "checkpoints" / "final" / "MANIFEST.json"
    listing.write_text(json.dumps(json.loads(listing.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match=r"format 99, but this version"):
        open_for_export(run, "auto")
