"""An expert as a GGUF LoRA file: a reader of its own rebuilds the update, and base plus update has the logits of the run's expert."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx.adapters.fuse import weight_updates
from dylora_mlx.errors import Failure, UserError
from dylora_mlx.exporting import formats
from dylora_mlx.exporting.folder import MANIFEST, read_manifest, write_folder
from dylora_mlx.exporting.model_card import model_card
from dylora_mlx.model.base.families import FAMILIES
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.gguf.config import ARCHITECTURE_OF, ARCHITECTURES
from dylora_mlx.run.run_folder import OpenedRun
from tests.bases import config_of, write
from tests.exporting.mixtures import gap, ours, random_run, theirs, tokens_of, tool, transformers_base
from tests.gguf_files import NAMES, Q, byte_level, from_neighbours, spm, write_gguf
from tests.tiny import ALL

KINDS = {"gemma3": spm, "llama": lambda: byte_level("smollm"), "qwen3": lambda: byte_level("qwen2")}
"""Families, with the tokenizers of their files."""
RANKS = (4, 3)


class Exported(NamedTuple):
    """A run of two random experts on all projections of a GGUF file, and the folder of its adapters."""

    file: Path
    """The GGUF file of the base, in float32."""
    run: OpenedRun
    folder: Path


def export(run: OpenedRun, out: Path, *options: Any) -> Path:
    made = formats.export_gguf_lora(run, list(range(1, len(run.pool) + 1)), *options)
    write_folder(out, made.content, made.manifest)
    return out


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory) -> Exported:
    home = tmp_path_factory.mktemp(request.param)
    file = write_gguf(home / "base.gguf", request.param, (Q.F32,), KINDS[request.param]()).path
    run = random_run(load_base(str(file), "float32"), RANKS, projections=ALL)
    return Exported(file, run, export(run, home / "adapters"))


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file, dequantised, in the order of the file."""
    found = gguf.GGUFReader(path).tensors
    return {entry.name: gguf.quants.dequantize(entry.data, entry.tensor_type) for entry in found}


def fields_of(path: Path) -> dict[str, Any]:
    """Return the metadata of a file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def updates_of(path: Path, base: Base) -> dict[str, np.ndarray]:
    """Return what a file adds to each weight of a base, as llama.cpp computes it: alpha / r times B A, rows in the order of the
    base's GGUF file, which are put back into that of the model here."""
    tensors, alpha, updates = tensors_of(path), fields_of(path)["adapter.lora.alpha"], {}
    modules = {stored: module for module, stored in NAMES.items()}
    heads = {"attn_q": base.args.num_attention_heads, "attn_k": base.args.num_key_value_heads}
    for name in {name.rpartition(".")[0] for name in tensors}:
        block, layer, module, kind = name.split(".")
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        update = alpha / b.shape[1] * b @ a
        if base.args.model_type == "llama" and module in heads:
            update = from_neighbours(update, heads[module])
        assert (block, kind) == ("blk", "weight")
        updates[f"model.layers.{layer}.{modules[module]}.weight"] = update
    return updates


def test_a_file_has_the_metadata_of_an_adapter(exported):
    run, folder = exported.run, exported.folder
    for number, (expert, name) in enumerate(zip(run.model.experts, ("skill_0", "skill_1"), strict=True), 1):
        fields = fields_of(folder / f"expert_{number}.gguf")
        assert {key: value for key, value in fields.items() if not key.startswith("GGUF.")} == {
            "general.architecture": ARCHITECTURE_OF[run.base.args.model_type],
            "general.type": "adapter",
            "general.name": name,
            "general.file_type": 0,
            "general.quantization_version": 2,
            "adapter.type": "lora",
            "adapter.lora.alpha": expert.alpha,
            "adapter.lora.task_name": name,
        }
    assert expert.alpha != expert.rank


def test_a_file_has_a_pair_for_every_tensor_of_the_base_that_is_adapted(exported):
    """What llama.cpp checks when it loads an adapter: the tensor is in the base, and the shapes fit."""
    base = tensors_of(exported.file)
    for number, rank in enumerate(RANKS, 1):
        found = tensors_of(exported.folder / f"expert_{number}.gguf")
        pairs = {name.rpartition(".")[0] for name in found}
        assert len(found) == 2 * len(pairs) == 2 * len(ALL) * exported.run.base.args.num_hidden_layers
        for name in pairs:
            outputs, inputs = base[name].shape
            a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
            assert (a.shape, b.shape, a.dtype) == ((rank, inputs), (outputs, rank), np.float32)


def test_the_update_is_the_experts(exported):
    for number, expert in enumerate(exported.run.model.experts, 1):
        found = updates_of(exported.folder / f"expert_{number}.gguf", exported.run.base)
        expected = weight_updates(expert)
        assert found.keys() == expected.keys()
        assert max(gap(found[name], np.array(update)) for name, update in expected.items()) < 1e-5


def test_base_and_update_have_the_logits_of_the_expert(exported):
    run, rows = exported.run, tokens_of(exported.run.base, 1, 40)
    for number in (1, 2):
        model = load_base(str(exported.file), "float32").model
        parameters = {name: run.base.projection(*place).weight for name, place in places(run.base).items()}
        updates = updates_of(exported.folder / f"expert_{number}.gguf", run.base)
        model.load_weights([(n, parameters[n] + mx.array(update)) for n, update in updates.items()], strict=False)
        expected = ours(run, rows, None, 1.0, number)[0]
        assert gap(np.array(model(mx.array(rows))), expected) < 1e-4
        assert gap(ours(run, rows, None, 1.0, 0)[0], expected) > 1


def places(base: Base) -> dict[str, tuple[int, str]]:
    """Return layer and projection of every adapted weight."""
    return {
        f"model.layers.{layer}.{module}.weight": (layer, module.partition(".")[2])
        for layer in range(base.args.num_hidden_layers)
        for module in NAMES
        if module.endswith("_proj")
    }


@pytest.mark.export
def test_pytorch_has_the_logits_of_the_expert(exported):
    import torch

    run, rows = exported.run, tokens_of(exported.run.base, 1, 60, seed=1)
    for number in (1, 2):
        model = in_transformers(run.base)
        with torch.no_grad():
            for name, update in updates_of(exported.folder / f"expert_{number}.gguf", run.base).items():
                model.get_parameter(name).add_(torch.from_numpy(update))
        assert gap(theirs(model, rows), ours(run, rows, None, 1.0, number)[0]) < 1e-4
    assert gap(theirs(in_transformers(run.base), rows), ours(run, rows, None, 1.0, 0)[0]) < 1e-4


def in_transformers(base: Base) -> Any:
    if base.args.model_type == "gemma3_text":
        return transformers_base(base)
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()


def test_llama_cpp_has_the_logits_of_the_expert(exported):
    """With float32 weights and caches. Gemma's are less close, as without an adapter: ggml looks GELU up in a table of float16."""
    pytest.importorskip("llama_cpp")
    run, ids = exported.run, tokens_of(exported.run.base, 1, 40)
    allowed = 0.01 if run.base.args.model_type == "gemma3_text" else 1e-4
    for number in (0, 1, 2):
        adapter = exported.folder / f"expert_{number}.gguf" if number else None
        assert gap(llama_cpp_logits(exported.file, adapter, ids[0]), ours(run, ids, None, 1.0, number)[0][0]) < allowed


@contextmanager
def in_llama_cpp(base: Path, adapter: Path | None) -> Iterator[Any]:
    """A model in llama.cpp, with keys and values in float32."""
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(base), lora_path=str(adapter) if adapter else None, logits_all=True, n_ctx=64, n_threads=1, n_batch=64,
        type_k=f32, type_v=f32, verbose=False,
    )  # fmt: skip
    try:
        yield model
    finally:
        model.close()


def llama_cpp_logits(base: Path, adapter: Path | None, ids: np.ndarray) -> np.ndarray:
    """Return llama.cpp's logits [L, V] of token ids [L]."""
    with in_llama_cpp(base, adapter) as model:
        model.eval(ids.tolist())
        return np.array(model.scores[: len(ids)])


def llama_cpp_tokens(base: Path, adapter: Path | None, ids: np.ndarray, count: int) -> list[int]:
    """Return the token ids that llama.cpp writes greedily after token ids [L]."""
    with in_llama_cpp(base, adapter) as model:
        tokens = model.generate(ids.tolist(), temp=0.0, top_k=1, repeat_penalty=1.0)
        return [token for token, _ in zip(tokens, range(count), strict=False)]


@pytest.mark.real
@pytest.mark.parametrize("published", tool("real_bases").BASES, ids=lambda base: base.name)
def test_llama_cpp_writes_the_tokens_of_the_expert(published, tmp_path):
    """On a published model of 4 bits. llama.cpp rounds activations to 8 bits there, so its logits are as far off as those of the
    bare base are; its greedy tokens are the expert's."""
    pytest.importorskip("llama_cpp")
    folder = tool("real_bases").default_folder()
    if not (folder / published.name).is_dir():
        pytest.skip("python tools/dev/real_bases.py builds them")
    base, file = load_base(str(folder / published.name), "float32"), folder / published.file
    run = random_run(base, ranks=[4], projections=ALL)
    for factors in (factors for layer in run.model.experts[0].layers for factors in layer.values()):
        factors.lora_b *= 0.1
    adapter = export(run, tmp_path / "out") / "expert_1.gguf"
    text = "The capital of France is Paris, the capital of Italy is Rome, and the capital of Spain is"
    prompt = np.array([base.tokenizer.bos_token_id, *base.tokenizer.encode_text(text)])
    bare, expected = (ours(run, prompt[None], None, 1.0, number)[0][0] for number in (0, 1))
    error, found = (
        np.abs(llama_cpp_logits(file, path, prompt) - own).mean() for path, own in ((None, bare), (adapter, expected))
    )
    assert found < 1.3 * error < np.abs(expected - bare).mean()
    written = llama_cpp_tokens(file, adapter, prompt, 16)
    logits = ours(run, np.array([[*prompt, *written[:-1]]]), None, 1.0, 1)[0][0]
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == written


@pytest.mark.parametrize(("dtype", "kind", "error"), [("float16", 1, 2e-3), ("bfloat16", 32, 2e-2)])
def test_16_bits_round_the_factors(base, tmp_path, dtype, kind, error):
    run = random_run(base, ranks=[2])
    path = export(run, tmp_path / "out", dtype) / "expert_1.gguf"
    assert fields_of(path)["general.file_type"] == kind
    assert {entry.tensor_type.name for entry in gguf.GGUFReader(path).tensors} == {{1: "F16", 32: "BF16"}[kind]}
    found, expected = updates_of(path, base), weight_updates(run.model.experts[0])
    largest = max(np.abs(np.array(update)).max() for update in expected.values())
    assert 0 < max(gap(found[name], np.array(update)) for name, update in expected.items()) < error * largest


def test_factors_beyond_float16_are_refused(base, tmp_path):
    run = random_run(base, ranks=[2])
    run.model.experts[0].layers[0]["v_proj"].lora_b *= 1e6
    with pytest.raises(
        UserError, match=r"blk\.0\.attn_v\.weight\.lora_b has values beyond float16; choose --dtype bfl"
    ):
        export(run, tmp_path / "out", "float16")
    assert list(tmp_path.iterdir()) == []
    assert export(run, tmp_path / "out", "bfloat16").is_dir()


def test_a_disk_that_is_full_leaves_nothing(base, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(Failure, match=r"out: cannot be written \(No space left on device\); free some space"):
        export(random_run(base, ranks=[2]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_expert_of_the_upper_layers_has_no_pairs_below(base, tmp_path):
    path = export(random_run(base, ranks=[2], router_layer=4), tmp_path / "out") / "expert_1.gguf"
    assert {name.split(".")[1] for name in tensors_of(path)} == {"4", "5"}


def test_a_missing_package_is_named_before_anything_is_written(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"^GGUF files need the gguf package: pip install 'dylora-mlx\[gguf\]'$"):
        formats.export_gguf_lora(random_run(base, ranks=[2]), [1])


def test_a_base_that_rotates_neighbours_is_refused(tmp_path):
    base = load_base(str(write(tmp_path / "base", config_of("llama-neighbours"))), "float32")
    with pytest.raises(UserError, match=r"rotates neighbouring dimensions \(rope_traditional\).*--format merged"):
        formats.export_gguf_lora(random_run(base, ranks=[2]), [1])


def test_a_folder_tells_no_path_of_the_base(exported, tmp_path):
    manifest = read_manifest(exported.folder)
    assert manifest["base"]["name"] == "base.gguf"
    assert str(exported.file.parent) not in (exported.folder / MANIFEST).read_text() + model_card(manifest, None)
    local = load_base(str(write(tmp_path / "mine", config_of("qwen3"))), "float32")
    assert formats.export_gguf_lora(random_run(local, ranks=[2]), [1]).manifest["base"]["name"] == "mine"


def test_every_family_has_an_architecture():
    assert ARCHITECTURE_OF.keys() == FAMILIES.keys()
    assert set(ARCHITECTURE_OF.values()) == ARCHITECTURES.keys()
