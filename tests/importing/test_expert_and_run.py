"""Import of experts and mixtures: only the new expert changes a run, an exported run is imported bit for bit, and
unsupported routing is refused before anything is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import assets, explain, import_expert, import_run
from dylora_mlx.adapters import peft
from dylora_mlx.adapters.xlora import CLASSIFIER
from dylora_mlx.config import Source
from dylora_mlx.config.load import load_config, to_yaml
from dylora_mlx.errors import UserError
from dylora_mlx.export import command as export_run
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.folder import CARD, MANIFEST, read_arrays, read_manifest, write_folder
from dylora_mlx.exporting.write import open_for_export
from dylora_mlx.growth.library import LibraryEntry
from dylora_mlx.importing.common import parse_source
from dylora_mlx.importing.run import import_mixture, read_mixture
from dylora_mlx.model.base.load import load_base
from dylora_mlx.model.routing import router
from dylora_mlx.system.files import sha256
from dylora_mlx.training.checkpoint import checkpoint as checkpoint_files
from tests.conftest import FEW, SMALL_BASE
from tests.exporting.mixtures import change_arrays, change_json, export, random_run
from tests.tiny import flat

GATE = "adapter_model.safetensors"


def hashes(place) -> dict[str, str]:
    return {path.relative_to(place).as_posix(): sha256(path) for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def base():
    """The small base of the finished run, instead of the embedded one."""
    return load_base(str(SMALL_BASE), "float32")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that may be changed."""
    place = tmp_path / "run"
    shutil.copytree(finished, place, ignore=shutil.ignore_patterns("step-*"))
    return place


@pytest.fixture
def adapter(make_pool, tmp_path):
    """A PEFT folder of random weights on the run's base."""
    expert, place = make_pool([5], seed=3).model.experts[0], tmp_path / "adapter"
    config = peft.config(expert, str(SMALL_BASE))
    write_folder(place, {GATE: peft.weights(expert), "adapter_config.json": config}, {})
    return place


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """90 short records of a skill that the run does not have."""
    lines = (assets.SKILLS / "stripe" / "train.jsonl").read_text().splitlines()[:90]
    path = tmp_path_factory.mktemp("text") / "stripe.jsonl"
    path.write_text("".join(json.dumps({"text": json.loads(line)["text"][:80]}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """A folder with a few lines of four skills, for tests in which the text does not matter."""
    home = tmp_path_factory.mktemp("brief")
    for skill in ("python", "requests", "sql", "stripe"):
        (home / skill).mkdir()
        for split, count in {"train": 8, "validation": 2, "test": 2}.items():
            lines = (assets.SKILLS / skill / f"{split}.jsonl").read_text().splitlines()[:count]
            short = [json.dumps({"text": json.loads(line)["text"][:60]}) for line in lines]
            (home / skill / f"{split}.jsonl").write_text("\n".join(short) + "\n")
    return home


def checkpoint(run, name="final"):
    return run / "checkpoints" / name


def rows(place) -> dict[str, np.ndarray]:
    return flat(read_arrays(place / "router.safetensors"))


def test_an_adapter_becomes_an_expert_and_nothing_else_changes(run, adapter, text, finished, capsys):
    before = hashes(run)
    arguments = [str(run), str(adapter), "--name", "stripe", "--text", str(text)]
    assert import_expert.main(arguments) == 0
    out = capsys.readouterr().out
    assert "expert 3 is stripe." in out
    assert f"kept in {run}/checkpoints/before-stripe" in out

    previous = {name: value for name, value in before.items() if name.startswith("checkpoints/final/")}
    assert hashes(checkpoint(run, "before-stripe")) == {
        k.removeprefix("checkpoints/final/"): v for k, v in previous.items()
    }
    after = hashes(run)
    changed = {name for name, value in before.items() if after[name] != value}
    assert changed == {"config.yaml", "decisions.jsonl", *(f"checkpoints/final/{name}" for name in (
        "MANIFEST.json", "pool.json", "router.safetensors", "trainer.json", "matrix/row_0.json"))}  # fmt: skip

    old, new = rows(checkpoint(finished)), rows(checkpoint(run))
    assert new.keys() - old.keys() == {"rows.3.weight", "rows.3.bias"}
    assert all(np.array_equal(new[name], value) for name, value in old.items())
    assert np.abs(new["rows.3.weight"]).max() > 0

    opened = open_for_export(run, "float32")
    record = opened.pool.records[2]
    assert (record.skill, record.rank, record.frozen) == ("stripe", 5, True)
    theirs = read_arrays(adapter / GATE)
    imported = peft.weights(opened.model.experts[2])
    assert all(mx.array_equal(imported[name], value) for name, value in theirs.items())
    missing = [value for name, value in imported.items() if name not in theirs and "lora_B" in name]
    assert len(missing) == 2 * 5, "the run's experts are on seven projections of both layers, the adapter on two"
    assert not any(value.any() for value in missing)
    assert opened.config.skills[-1] == Source("stripe", str(text))
    assert opened.library.experts_of == {"python": 0, "requests": 1, "sql": 2, "requests_more": 1, "stripe": 3}
    routed = {e.skill: np.array(opened.model.router(mx.array(e.memory))).argmax(-1) for e in opened.library.entries}
    shares = {name: (expert_ids == 3).mean() for name, expert_ids in routed.items()}
    assert shares.pop("stripe") > 0.4
    assert max(shares.values()) < 0.25

    assert explain.main([str(run)]) == 0
    assert explain.main([str(run), "stripe"]) == 0
    assert explain.main([str(run), "--what-if", "growth.threshold=0.75"]) == 0
    assert f"stripe came from elsewhere as expert 3 (imported from {adapter})" in capsys.readouterr().out
    assert import_expert.main(arguments) == 2
    assert "has a skill of that name" in capsys.readouterr().err
    assert hashes(run) == after
    assert export_run([str(run), "--format", "xlora", "--out", str(run.parent / "mix")]) == 0
    assert read_manifest(run.parent / "mix")["experts"][3]["skills"] == ["stripe"]


def unfinished(run, adapter):
    checkpoint(run).rename(checkpoint(run, "step-000012"))


def damaged(run, adapter):
    path = checkpoint(run) / "experts" / "expert_1" / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def wider(run, adapter):
    change_arrays(
        adapter, GATE, lambda w: w.update({n: mx.pad(v, [(0, 0), (0, 8)]) for n, v in w.items() if "lora_A" in n})
    )


def more_modules(run, adapter):
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_{}.weight"
    change_arrays(
        adapter, GATE, lambda w: w.update({name.format("A"): mx.ones((5, 64)), name.format("B"): mx.ones((160, 5))})
    )


def with_domain(run, adapter):
    config = load_config(run / "config.yaml")
    config = replace(config, domains=[Source("stripe", "packaged/stripe")])
    (run / "config.yaml").write_text(to_yaml(config))


REFUSALS = [
    (unfinished, [], "has not finished"),
    (damaged, [], "damaged, its sha256 is not the manifest's"),
    (lambda run, adapter: (checkpoint(run) / "MANIFEST.json").write_text('{"format": 9, "sha256": {}}'), [], "reads formats 1 to 2"),
    (lambda run, adapter: shutil.rmtree(adapter), [], "no such folder"),
    (lambda run, adapter: change_json(adapter, "adapter_config.json", lambda c: c.update(use_dora=True)), [], "DoRA"),
    (lambda run, adapter: change_json(adapter, "adapter_config.json", lambda c: c.update(base_model_name_or_path="a/b")), [],
     "the run's base is"),
    (wider, [], "belongs to another base"),
    (more_modules, [], "experts of this run are on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj of layers 0 to 1"),
    (with_domain, [], "has a skill of that name"),
    (None, ["--name", "python"], "has a skill of that name"),
    (None, ["--name", "requests_more"], "has a skill of that name"),
    (None, ["--name", "base"], "has a skill of that name"),
    (None, ["--name", "../x"], "is not a name"),
    (None, ["--text", "nowhere.jsonl"], "no such file"),
    (None, ["--text", ""], "names no source"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "options", "message"), REFUSALS)
def test_a_refused_adapter_changes_nothing(run, adapter, text, capsys, change, options, message):
    if change:
        change(run, adapter)
    before = hashes(run)
    arguments = [str(run), str(adapter), "--name", "stripe", "--text", str(text), *options]
    assert import_expert.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert hashes(run) == before


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(28, "No space left"), 1, "cannot be written (No space left); free some space, then do it again"),
        (
            RuntimeError("[write] Unable to write 9 bytes to file."),
            1,
            "9 bytes to file.); free some space, then do it again",
        ),
        (OSError(30, "Read-only"), 2, "cannot be written (Read-only); the run is as it was"),
    ],
)
def test_a_failing_disk_leaves_the_run_unchanged(run, adapter, brief, monkeypatch, capsys, failure, code, message):
    def full(place, files, stored):
        raise failure

    monkeypatch.setattr(checkpoint_files, "write", full)
    before = hashes(run)
    assert import_expert.main([str(run), str(adapter), "--name", "stripe", "--text", str(brief / "stripe")]) == code
    assert message in capsys.readouterr().err
    assert hashes(run) == before


def mixture(base, data, router_layer="final", top_k=2, context=0.0):
    """Return a run of two random experts that serve three skills and the base's, with short text."""
    run = random_run(
        base, ranks=[3, 2], router_layer=router_layer, projections=("v_proj", "q_proj"), top_k=top_k, context=context
    )
    names = {"python": 0, "requests": 1, "sql": 2, "stripe": 1}
    sources = {name: Source(name, str(data / name)) for name in names}
    for record, name in zip(run.pool.records, ("requests", "sql"), strict=True):
        record.skill = name
    run.library.entries += [LibraryEntry(name, expert_id, None, None, None) for name, expert_id in names.items()]  # pyright: ignore
    growth = replace(run.config.growth, base_skill=sources["python"])
    skills = [sources[name] for name in ("requests", "sql", "stripe")]
    return run._replace(config=replace(run.config, growth=growth, skills=skills))


def check_round_trip(tmp_path, data=None, kind="xlora") -> None:
    """Import tmp_path/mix, export it again, and compare the folders."""
    texts = [f"--text={name}={data / name}" for name in ("python", "requests", "sql", "stripe")] if data else []
    assert import_run.main([str(tmp_path / "mix"), "--name", "again", "--runs", str(tmp_path / "runs"), *texts]) == 0
    export_options = ["--format", kind, "--out", str(tmp_path / "mix2")]
    assert export_run([str(tmp_path / "runs" / "again"), *export_options]) == 0
    first, second = (hashes(tmp_path / name) for name in ("mix", "mix2"))
    first.pop(CARD, None), second.pop(CARD)
    assert first == second


def test_an_exported_run_is_imported_unchanged(run, finished, tmp_path, capsys):
    text = (run / "config.yaml").read_text().replace("limit: 40", "limit: 2").replace(f"{FEW}/", "packaged/")
    (run / "config.yaml").write_text(text)
    assert export_run([str(run), "--format", "xlora", "--out", str(tmp_path / "mix")]) == 0
    check_round_trip(tmp_path)
    assert "2 experts in" in capsys.readouterr().out
    imported, original = (open_for_export(place, "float32") for place in (tmp_path / "runs" / "again", finished))
    assert imported.library.experts_of == original.library.experts_of
    assert imported.pool.frozen_hashes() == original.pool.frozen_hashes()
    assert explain.main([str(tmp_path / "runs" / "again")]) == 0
    assert "sql came from elsewhere as expert 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "router_layer", "top_k", "context"),
    [("xlora", "final", None, 0.0), ("xlora", "final", 2, 0.0), ("runtime", 1, 1, 0.0), ("runtime", "final", 2, 0.6)],
)
def test_every_routing_survives_a_round_trip(base, brief, tmp_path, kind, router_layer, top_k, context):
    export(mixture(base, brief, router_layer, context=context), tmp_path / "mix", kind, top_k)
    check_round_trip(tmp_path, brief, kind)
    imported = open_for_export(tmp_path / "runs" / "again", "float32")
    assert (
        formats.mixture_routing(imported).top_k,
        imported.model.router_layer,
        imported.model.document_mean.weight,
        imported.model.document_mean.decay,
    ) == (
        top_k,
        router_layer,
        context,
        0.9,
    )
    assert imported.config.model.projections == ["v_proj", "q_proj"]


def test_an_imported_run_accepts_more_experts(base, brief, adapter, text, tmp_path, capsys):
    export(mixture(base, brief), tmp_path / "mix")
    check_round_trip(tmp_path, brief)
    place = tmp_path / "runs" / "again"
    assert import_expert.main([str(place), str(adapter), "--name", "more", "--text", str(text)]) == 0
    assert "expert 3 is more" in capsys.readouterr().out


def test_import_without_text_warns_and_remembers_nothing(base, brief, adapter, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export(mixture(base, brief), tmp_path / "mix")
    assert import_run.main(["mix", "--name", "again"]) == 0
    output = "".join(capsys.readouterr())
    assert "sql: nothing of it is remembered" in output
    assert "--text sql=SOURCE" in output
    assert import_expert.main(["runs/again", str(adapter), "--name", "more", "--text", str(text)]) == 2
    assert "remembers no text" in capsys.readouterr().err
    assert import_run.main(["mix", "--name", "again"]) == 2
    assert "exists already; choose another --name" in capsys.readouterr().err


@pytest.fixture
def mix(base, tmp_path):
    """The folder of a small mixture of two experts."""
    return export(random_run(base, ranks=[2, 3], projections=("q_proj", "v_proj")), tmp_path / "mix")


def make_foreign(mix, base=str(SMALL_BASE)):
    """Turn a folder into one of PEFT: without a manifest and with a base of this name."""
    (mix / MANIFEST).unlink()
    config(mix, base_model_name_or_path=base)
    for expert_id in range(len(gate(mix).bias)):
        path = mix / str(expert_id) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def config(mix, **fields) -> None:
    path = mix / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def gate(mix) -> router.Gate:
    arrays = read_arrays(mix / GATE)
    return router.Gate(arrays[f"{CLASSIFIER}weight"], arrays[f"{CLASSIFIER}bias"])


def remove_null_adapter(mix) -> None:
    """Remove the adapter that changes nothing and shift the columns of the others down."""
    shutil.rmtree(mix / "0")
    for expert_id in (1, 2):
        (mix / str(expert_id)).rename(mix / str(expert_id - 1))
    weight, bias = (mx.array(np.array(part[1:])) for part in gate(mix))
    mx.save_safetensors(str(mix / GATE), {f"{CLASSIFIER}weight": weight, f"{CLASSIFIER}bias": bias})
    config(mix, adapters={"0": "0", "1": "1"})


def read(mix, *names: str):
    return read_mixture(mix, [Source(name, "packaged/sql") for name in names])


def import_without_text(mix, *names: str, base=None):
    """Import a mixture whose texts cannot be read."""
    texts = [Source(name, str(mix / "nowhere.jsonl")) for name in names]
    return import_mixture(mix, mix.parent / "run", base, texts)


def test_a_foreign_folder_needs_a_name_for_each_expert(mix):
    make_foreign(mix)
    for names in ((), ("a",), ("a", "b", "c")):
        with pytest.raises(UserError, match=r"what its 2 experts are for.*--text NAME=SOURCE"):
            read(mix, *names)
    assert read(mix, "b", "a").names == ["base", "b", "a"]


@pytest.mark.parametrize("options", [{}, {"top_k_lora": None, "enable_softmax": True, "enable_softmax_topk": False,
                                          "softmax_temperature": 0.5}])  # fmt: skip
def test_a_mixture_without_a_null_adapter(mix, options):
    remove_null_adapter(mix)
    make_foreign(mix)
    config(mix, **options)
    imported = import_without_text(mix, "a", "b")
    assert [record.skill for record in imported.pool.records] == ["a", "b"]
    routing = formats.mixture_routing(imported)
    assert (routing.top_k, routing.temperature) == (options.get("top_k_lora", 2), 1.0)
    features = mx.random.normal((200, imported.base.args.hidden_size), key=mx.random.key(0))
    gates = router.top_k_softmax(router.logits(features, routing.gate), routing.top_k)
    expected = mx.softmax(router.logits(features, gate(mix)) / options.get("softmax_temperature", 1.0), axis=-1)
    assert not gates[:, 0].any().item()
    assert np.allclose(gates[:, 1:], expected, atol=1e-5)
    for expert_id, expert in enumerate(imported.model.experts):
        stored = read_arrays(mix / str(expert_id) / GATE)
        assert all(mx.array_equal(stored[name], value) for name, value in peft.weights(expert).items())


def test_the_base_can_be_given_explicitly(mix):
    make_foreign(mix, "google/gemma-3-nowhere")
    imported = import_without_text(mix, "a", "b", base=str(SMALL_BASE))
    assert imported.config.model.base == str(SMALL_BASE)
    assert open_for_export(mix.parent / "run", "float32").base.fingerprint == imported.base.fingerprint


OPTIONS = [
    {"xlora_depth": 2},
    {"layerwise_scalings": True},
    {"scaling_pass_value": 0.1},
    {"scaling_pass_value": None},
    {"global_scaling_weight": 2.0},
    {"enable_softmax": True},
    {"enable_softmax_topk": False},
    {"enable_softmax": True, "enable_softmax_topk": False, "top_k_lora": 2},
    {"top_k_lora": None},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ours", [True, False])
def test_unsupported_routing_options_are_refused(mix, options, ours):
    if ours:
        change_json(mix, "adapter_config.json", lambda c: c.update(options))
    else:
        make_foreign(mix)
        config(mix, **options)
    with pytest.raises(UserError, match=r"adapter_config\.json: \w+ .*one linear gate for all layers"):
        read(mix, "a", "b")


def arrays(change):
    return lambda mix: change_arrays(mix, GATE, change)


def manifest(**fields):
    return lambda mix: change_json(mix, MANIFEST, lambda m: m.update(fields))


def base_of(**fields):
    return lambda mix: change_json(mix, MANIFEST, lambda m: m["base"].update(fields))


def another_base(mix):
    shutil.copytree(SMALL_BASE, mix.parent / "base")
    path = mix.parent / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 64}))
    base_of(name=str(mix.parent / "base"))(mix)


def nameless(mix):
    make_foreign(mix, "")


W, B = f"{CLASSIFIER}weight", f"{CLASSIFIER}bias"
DAMAGE = [
    (shutil.rmtree, "no such folder"),
    (lambda mix: (mix / "1" / GATE).write_bytes((mix / "1" / GATE).read_bytes()[:-1]), "damaged or changed"),
    (lambda mix: (mix / "2" / "adapter_config.json").unlink(), "missing from the export"),
    (lambda mix: (mix / MANIFEST).write_text("{"), "not a readable JSON file"),
    (manifest(format=2), "reads format 1"),
    (manifest(kind="experts"), "a 'experts' export, not a mixture"),
    (base_of(fingerprint="0" * 64), "another base than"),
    (another_base, "another base than"),
    (base_of(name="/nowhere"), "no such folder"),
    (nameless, "give it with --base"),
    (manifest(router_layer=99), "reads layer 99, but"),
    (manifest(router_layer="first"), "reads layer first, but"),
    (manifest(document_mean_weight=1.5), "document_mean_weight: 1.5 is not between 0 and 1"),
    (manifest(document_mean_weight="half"), "does not describe a mixture"),
    (manifest(document_mean_decay=0.0), "document_mean_decay: 0.0 is not above 0 and at most 1"),
    (manifest(top_k=0), "does not describe a mixture"),
    (manifest(top_k="all"), "does not describe a mixture"),
    (manifest(base={}), "does not describe a mixture"),
    (manifest(sources=[{"name": "../x", "source": "y"}]), "does not describe a mixture"),
    (manifest(sources=[{"path": "x"}]), "does not describe a mixture"),
    (manifest(experts=[]), "not as many as the 3 columns"),
    (arrays(lambda w: w.pop(B)), "bias' is missing"),
    (arrays(lambda w: w.update(other=mx.ones(1))), "'other' is not a linear classifier's"),
    (arrays(lambda w: w.update({W: w[W][:2], B: w[B][:2]})), "not as many as the 2 columns"),
    (arrays(lambda w: w.update({B: w[B][:2]})), "not a finite linear classifier"),
    (arrays(lambda w: w.update({W: w[W] * float("nan")})), "not a finite linear classifier"),
    (arrays(lambda w: w.update({W: w[W][:, :50]})), "its gate reads states of 50 numbers"),
    (
        lambda mix: change_json(mix, "adapter_config.json", lambda c: c.update(peft_type="LORA")),
        "not an X-LoRA mixture",
    ),
    (lambda mix: change_json(mix, "1/adapter_config.json", lambda c: c.update(use_dora=True)), "DoRA"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_or_unsupported_folder_creates_no_run(mix, capsys, damage, message):
    damage(mix)
    texts = ["--text=a=packaged/sql", "--text=b=packaged/sql"] if damage is nameless else []
    assert import_run.main([str(mix), "--name", "run", "--runs", str(mix.parent), *texts]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (mix.parent / "run").exists()


@pytest.mark.parametrize("text", ["sql", "=x", "sql=", "a b=packaged/sql"])
def test_a_malformed_text_option_is_refused(mix, capsys, text):
    assert import_run.main([str(mix), "--name", "run", "--runs", str(mix.parent), "--text", text]) == 2
    assert f"--text {text}: should be NAME=SOURCE" in capsys.readouterr().err


def test_patterns_of_a_source_in_a_manifest():
    source = Source(name="s", source="folder", include=["*.py"], exclude=["tests/"], limit=9)
    assert parse_source(formats._public_source(source)) == source
