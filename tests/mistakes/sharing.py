"""Mistakes with commands that import or export experts: fuse, convert-base, import-expert, import-run, restore, export, evaluate_cuda."""

from __future__ import annotations

import struct

import mlx.core as mx

from tests.mistakes.rows import (
    EXPERT,
    FINAL,
    Damage,
    Mistake,
    chain,
    dangling,
    delete,
    edit,
    edit_arrays,
    every,
    huge,
    mkdir,
    no_steps,
    setting,
    truncate,
    unfinished,
    utf16,
    write,
)  # fmt: skip

WEIGHTS, CONFIG, GATE = (
    "adapter/adapters.safetensors",
    "adapter/adapter_config.json",
    "mixture/adapter_model.safetensors",
)
IN, MIX = "run adapter --name new --text packaged/flask", "mixture --name new --runs ."
LARGE = chain(no_steps, edit_arrays(EXPERT, every(lambda a: a * 1e9)))
NAN = chain(no_steps, edit_arrays(EXPERT, every(lambda a: a * float("nan"))))


def adapted(module: str) -> Damage:
    """Add the factors of one more module to the adapter."""
    return edit_arrays(
        WEIGHTS,
        lambda arrays: arrays.update({f"{module}.lora_a": mx.ones((64, 2)), f"{module}.lora_b": mx.ones((2, 64))}),
    )


def metadata(name: str, architecture: str, *values: tuple[str, str]) -> Damage:
    """Write a GGUF file of text metadata, without tensors."""
    values = (("general.architecture", architecture), *values)
    pairs = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in values)
    return write(name, b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + pairs)


def text(value: str) -> bytes:
    """Return a string as GGUF stores it."""
    return struct.pack("<Q", len(value)) + value.encode()


FUSE = [
    ("run --expert sql", "--out"),
    ("run --out made", "--expert --blend is required"),
    ("run --expert sql --blend sql=1 --out made", "not allowed with"),
    ("run --expert cobol --out made", "no expert 'cobol'"),
    ("run --expert 3 --out made", "no expert '3'"),
    ("run --expert '' --out made", "no expert ''"),
    ("run --blend sql --out made", "'sql' should be a name and a number"),
    ("run --blend '' --out made", "should be a name and a number"),
    ("run --blend sql=nan --out made", "'sql=nan' should be a name and a number"),
    ("run --blend sql=1e999 --out made", "'sql=1e999' should be a name and a number"),
    ("run --blend sql=1,sql=2 --out made", "'sql' is named twice"),
    ("run --blend sql=0 --out made", "weight"),
    ("run --blend sql=1,cobol=1 --out made", "no expert 'cobol'"),
    ("run --blend sql=0 --out made -q", "--blend: a blend needs a weight other than 0"),
    ("run --expert sql --out made -q --q-bits 7", "--q-bits: The requested number of bits 7 is not supported"),
    ("run --expert sql --out made -q --q-bits four", "--q-bits"),
    (
        "run --expert sql --out made -q --q-group-size 16",
        "--q-group-size: The requested group size 16 is not supported",
    ),
    ("run --expert sql --out made -q --q-group-size 0", "--q-group-size 0: mlx has no such quantisation"),
    ("run --expert sql --out made -q", ("down_proj is 160 wide", "use --q-group-size 32")),
    ("run --expert sql --out made --q-bits 4", "--q-bits is for a quantised model; add -q"),
    ("run --expert sql --out made --quant-predicate mixed_4_6", "--quant-predicate is for a quantised model; add -q"),
    ("run --expert sql --out made -q --q-bits 4 --quant-predicate mixed_4_6", "mixed_4_6 chooses the bits"),
    ("run --expert sql --out made -q --quant-predicate mixed", "--quant-predicate"),
    ("run --expert sql --out run", "run: exists already"),
    ("run --expert sql --out notes.jsonl", "notes.jsonl: exists already"),
    ("run --expert sql --out notes.jsonl/made", "notes.jsonl/made: "),
    ("run --expert sql --out ''", "--out"),
    ("nosuch --expert sql --out made", "nosuch: no run here"),
    ("mixture --expert sql --out made", "mixture: no run here"),
]
ADAPTER = [
    ("run adapter --name new", "--text"),
    ("run adapter --text packaged/flask", "--name"),
    ("nosuch adapter --name new --text packaged/flask", "nosuch: no run here"),
    ("notes.jsonl adapter --name new --text packaged/flask", "notes.jsonl: no run here"),
    ("run nosuch --name new --text packaged/flask", "nosuch: no such folder"),
    ("run notes.jsonl --name new --text packaged/flask", "notes.jsonl: no such folder"),
    ("run empty --name new --text packaged/flask", "adapter_config.json: missing"),
    ("run run --name new --text packaged/flask", "adapter_config.json: missing"),
    ("run mixture --name new --text packaged/flask", "use dylora import-run"),
    ("run OWNER/NAME --name new --text packaged/flask", "OWNER/NAME: no such folder here, and it cannot be downloaded"),
    ("run adapter --name sql --text packaged/flask", "--name sql: this run has a skill of that name"),
    ("run adapter --name python --text packaged/flask", "--name python: this run has a skill of that name"),
    ("run adapter --name ../new --text packaged/flask", "'../new' is not a name"),
    ("run adapter --name '' --text packaged/flask", "is not a name"),
    ("run adapter --name new --text ''", "--name or --text"),
    ("run adapter --name new --text nosuch.jsonl", "nosuch.jsonl: no such file"),
    ("run adapter --name new --text packaged/cobol", "packaged/cobol"),
    ("run adapter --name new --text empty.jsonl", "the file has no records"),
    ("run adapter --name new --text wide.jsonl", "not UTF-8"),
    ("run adapter --name new --text packaged/flask --preset chat", "--preset"),
    ("run adapter --name new --text packaged/flask --rank 4", "--rank"),
]
PEFT = '{"peft_type": "LORA", "r": 8, "lora_alpha": 8, %s}'
ADAPTERS = [
    (write(CONFIG, PEFT % '"use_dora": true'), ("DoRA (use_dora)", "merge it with PEFT (merge_and_unload")),
    (write(CONFIG, PEFT % '"velora_config": {"num_groups": 4}'), ("VeLoRA (velora_config)", "save_as_lora")),
    (
        write(CONFIG, PEFT % '"ensure_weight_tying": true'),
        ("ensure_weight_tying", "set it to false in adapter_config.json"),
    ),
    (
        write(CONFIG, PEFT % '"modules_to_save": ["lm_head"]'),
        ("modules saved whole", "train it without modules_to_save"),
    ),
    (delete(CONFIG), "adapter_config.json: missing"),
    (write(CONFIG, "{}"), "neither a PEFT nor an mlx-lm adapter"),
    (write(CONFIG, "[]"), "not a JSON object"),
    (truncate(CONFIG), "not a readable JSON file"),
    (utf16(CONFIG), "not a readable JSON file"),
    (mkdir(CONFIG), "not a readable JSON file"),
    (dangling(CONFIG), "adapter_config.json: missing"),
    (edit(CONFIG, setting(fine_tune_type="dora")), ("fine_tune_type dora", "fuse it (mlx_lm.fuse)")),
    (edit(CONFIG, setting(lora_parameters=[])), "lora_parameters are missing"),
    (edit(CONFIG, setting(lora_parameters={"scale": "2"})), "scale is '2'"),
    (edit(CONFIG, setting(lora_parameters={"scale": -2})), "scale is -2"),
    (edit(CONFIG, setting(model="google/gemma-3-1b-pt")), "--same-base"),
    (edit(CONFIG, setting(peft_type="IA3")), "a IA3 adapter"),
    (delete(WEIGHTS), "adapters.safetensors: missing"),
    (truncate(WEIGHTS), "not a whole safetensors file"),
    (write(WEIGHTS, ""), "not a whole safetensors file"),
    (huge(WEIGHTS), "not a whole safetensors file"),
    (mkdir(WEIGHTS), "adapters.safetensors: "),
    (edit_arrays(WEIGHTS, every(lambda a: a * float("inf"))), "is not a finite matrix"),
    (edit_arrays(WEIGHTS, every(lambda a: a[:-1])), "adapter"),
    (edit_arrays(WEIGHTS, lambda arrays: arrays.pop(next(iter(arrays)))), "has no lora_"),
    (
        edit_arrays(WEIGHTS, lambda arrays: arrays.update({"model.embed_tokens.lora_a": next(iter(arrays.values()))})),
        "embedding",
    ),
    (adapted("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"), ("lora_", "adapts the vision tower")),
    (
        adapted("multi_modal_projector.linear"),
        ("adapts the projector of images", "train the adapter on the text layers"),
    ),
    (
        adapted("language_model.model.layers.0.self_attn.q_proj"),
        "is a second adapter of 'model.layers.0.self_attn.q_proj'",
    ),
    (adapted("model.layers.0.self_attn.qkv_proj"), "no expert can be on self_attn.qkv_proj"),
    (adapted("model.layers.40.self_attn.q_proj"), "belongs to another base"),
    (unfinished, "this run has not finished"),
    (NAN, "not finite numbers"),
    (write("run/config.yaml", ""), "no options"),
    (chain(no_steps, truncate(f"{FINAL}/trainer.json")), "trainer.json: damaged"),
]
GGUF = [
    ("m.gguf", "m.gguf: not a GGUF file, it begins with other bytes", write("m.gguf", "version https://")),
    ("m.gguf", ("m.gguf: not a whole GGUF file", "download or copy it again"), write("m.gguf", "GGUF\3\0\0\0")),
    ("m.gguf", "m.gguf: a big-endian GGUF file", write("m.gguf", "GGUF\0\0\0\3")),
    ("m.gguf", "m.gguf: GGUF version 1", write("m.gguf", "GGUF\1\0\0\0")),
    ("m.gguf", "architecture 'gemma2', but a base must be one of gemma3, llama, qwen3", metadata("m.gguf", "gemma2")),
    ("m.gguf", "a projector of images (mmproj)", metadata("m.gguf", "clip")),
    ("m.gguf", "m.gguf: a LoRA adapter", metadata("m.gguf", "llama", ("general.type", "adapter"))),
    ("m.gguf", "m.gguf: holds no weights", metadata("m.gguf", "qwen3")),
    ("sha256-00ff", "sha256-00ff: holds no weights", metadata("sha256-00ff", "llama")),
    ("m-00002-of-00003.gguf", "one part of a split model", metadata("m-00002-of-00003.gguf", "llama")),
]
"""GGUF files that are no base: the arguments, the message, and how the file is written."""
MIXTURE = [
    ("mixture", "--name"),
    ("nosuch --name new", "nosuch: no such folder"),
    ("notes.jsonl --name new", "notes.jsonl: no such folder"),
    ("run --name new", "run"),
    ("adapter --name new", "adapter"),
    ("empty --name new", "empty"),
    ("OWNER/NAME --name new", "OWNER/NAME: no such folder here"),
    ("mixture --name a/b", "--name a/b: a plain folder name"),
    ("mixture --name ''", "a plain folder name"),
    ("mixture --name run --runs .", "run: exists already"),
    ("mixture --name new --runs notes.jsonl", "notes.jsonl/new: cannot be written"),
    (f"{MIX} --text sql", "--text sql: should be NAME=SOURCE"),
    (f"{MIX} --text =notes.jsonl", "should be NAME=SOURCE"),
    (f"{MIX} --base nosuch", "nosuch: no such folder"),
    (f"{MIX} --base run", "run: no config.json"),
    (f"{MIX} --base ''", "--base"),
]
MIXTURES = [
    (edit("mixture/dylora.json", setting(format=2)), ("format 2", "reads format 1")),
    (edit("mixture/dylora.json", setting(kind="experts")), "not a mixture"),
    (edit("mixture/dylora.json", setting(sha256=[])), "lists no files"),
    (edit("mixture/dylora.json", setting(sha256={"../run/run.json": "0"})), "leads out of the folder"),
    (edit("mixture/dylora.json", setting(sha256={"/etc/hostname": "0"})), "leads out of the folder"),
    (edit("mixture/dylora.json", setting(top_k="many")), "top_k"),
    (edit("mixture/dylora.json", setting(experts=[])), "experts are not as many"),
    (edit("mixture/dylora.json", lambda content: content["base"].update(fingerprint="1" * 64)), "another base"),
    (edit("mixture/dylora.json", setting(projections=["lm_head"])), "lm_head"),
    (edit("mixture/dylora.json", setting(projections=3)), "gives no valid run config"),
    (edit("mixture/dylora.json", setting(router_layer=77)), "router reads layer 77"),
    (edit("mixture/dylora.json", setting(splits=[1])), "does not describe a mixture"),
    (edit("mixture/dylora.json", setting(splits={"seed": "x"})), "does not describe a mixture"),
    (truncate("mixture/dylora.json"), "not a readable JSON file"),
    (edit("mixture/adapter_config.json", setting(xlora_depth=2)), "xlora_depth 2"),
    (truncate(GATE), "damaged or changed"),
    (delete(GATE), "missing from the export"),
    (dangling(GATE), "missing from the export"),
    (huge(GATE), "not a whole safetensors file"),
    (edit_arrays(GATE, every(lambda a: a * float("nan"))), "not a finite linear classifier"),
    (edit_arrays(GATE, every(lambda a: a[:1])), "not as many"),
    (edit_arrays("mixture/1/adapter_model.safetensors", every(lambda a: a * float("nan"))), "is not a finite matrix"),
    (delete("mixture/1"), "missing from the export"),
]
OUT = "run --out made"
RESTORE = [
    ("", "run"),
    ("nosuch", "nosuch: no run here"),
    ("run", "run: nothing was removed from this run"),
    ("run removed/001-evict", "missing or unreadable"),
    ("run checkpoints/final", "not an archive of removed experts"),
]
TIDY = [
    ("", "run"),
    ("nosuch", "nosuch: no run here"),
    ("mixture", "mixture: no run here"),
    ("run --epsilon x", "--epsilon"),
    ("run --epsilon -0.1", "--epsilon -0.1: not a number of nats from 0 on"),
    ("run --epsilon nan", "--epsilon nan: not a number of nats from 0 on"),
    ("run --dryrun", "unrecognized arguments: --dryrun"),
]
EXPORT = [
    ("run", "--out"),
    ("nosuch --out made", "nosuch: no run here"),
    ("mixture --out made", "mixture: no run here"),
    ("run --out run", "run: exists already"),
    ("run --out notes.jsonl", "notes.jsonl: exists already"),
    ("run --out notes.jsonl/made", "notes.jsonl/made: "),
    (f"{OUT} --format onnx", "--format"),
    (f"{OUT} --expert ''", "no expert ''"),
    (f"{OUT} --expert 0", "no expert '0'"),
    (f"{OUT} --format blend --weights sql=inf", "'sql=inf' should be a name and a number"),
    (f"{OUT} --format merged --expert sql --dtype int4", "--dtype"),
    (f"{OUT} --format gguf-lora --dtype q8_0", ("--dtype", "float16")),
    (f"{OUT} --format gguf-lora --expert 3", "no expert '3'"),
    (f"{OUT} --format gguf-lora --refit-router", "--refit-router is for --format xlora and runtime"),
    (f"{OUT} --format gguf-lora --dtype float16 --verify", "leave one of them out"),
    ("run --out run --format gguf-lora", "run: exists already"),
    ("run --out notes.jsonl/made --format gguf-lora", "notes.jsonl/made: "),
    (f"{OUT} --format xlora --top-k 1.5", "--top-k 1.5: a number of experts"),
    (f"{OUT} --dryrun", "unrecognized arguments: --dryrun"),
]
CUDA = [
    ("", "folder"),
    ("nosuch", "dylora_torch.py: missing"),
    ("notes.jsonl", "dylora_torch.py: missing"),
    ("run", "dylora_torch.py: missing"),
    ("mixture --limit 0", "--limit must be at least 1"),
    ("mixture --length -1", "--length must be at least 1"),
    ("mixture --batch x", "--batch"),
    ("mixture --generate -1", "--generate must be at least 0"),
    ("mixture --device gpu", "--device"),
    ("mixture --dtype int8", "--dtype"),
    ("mixture --data sql", "--data sql: should be NAME=SOURCE"),
    ("mixture --json run", "run: a folder"),
    ("mixture --json nosuch/found.json", "nosuch/found.json: "),
]
ROWS = [
    *(Mistake("fuse", argv, message) for argv, message in FUSE),
    Mistake("fuse", "run --expert sql --out made", "this run has not finished", unfinished),
    Mistake("convert-base", "./nosuch --out made", "./nosuch: no such folder"),
    Mistake("convert-base", "run --out made", "config.json: missing"),
    Mistake("convert-base", "embedded --out run", "run: exists already"),
    Mistake("convert-base", "embedded --out made", "only Gemma 3 with vision"),
    Mistake("convert-base", "embedded", "--out"),
    Mistake("convert-base", "embedded --out made --dtype float32", "--dtype: only for GGUF files"),
    Mistake("convert-base", "embedded --out made --dtype int8", ("--dtype", "float16")),
    Mistake("convert-base", "nosuch.gguf --out made", "nosuch.gguf: no such file"),
    Mistake("convert-base", "models/nosuch.gguf --out made", "models/nosuch.gguf: no such file"),
    Mistake("convert-base", "notes.jsonl --out made", "notes.jsonl: no such folder"),
    *(Mistake("convert-base", f"{argv} --out made", message, damage) for argv, message, damage in GGUF),
    *(Mistake("train", f"--model.base {argv}", message, damage) for argv, message, damage in GGUF[:5]),
    Mistake("fuse", "run --expert sql --out made", "not finite numbers", NAN),
    Mistake("fuse", "run --expert sql --out made", "damaged, its sha256", chain(no_steps, truncate(EXPERT))),
    *(Mistake("import-expert", argv, message) for argv, message in ADAPTER),
    *(Mistake("import-expert", IN, message, damage) for damage, message in ADAPTERS),
    Mistake("import-expert", IN, "another process works on this run", locked=True),
    *(Mistake("import-run", argv, message) for argv, message in MIXTURE),
    *(Mistake("import-run", MIX, message, damage) for damage, message in MIXTURES),
    *(Mistake("restore", argv, message) for argv, message in RESTORE),
    *(Mistake("tidy", argv, message) for argv, message in TIDY),
    Mistake("tidy", "run", "this run has not finished", unfinished),
    Mistake("tidy", "run", "another process works on this run", locked=True),
    *(Mistake("export", argv, message) for argv, message in EXPORT),
    Mistake("export", OUT, "this run has not finished", unfinished),
    Mistake("export", OUT, "not finite numbers", NAN),
    Mistake("export", f"{OUT} --format gguf-lora", "this run has not finished", unfinished),
    Mistake("export", f"{OUT} --format gguf-lora --dtype float16", "beyond float16; choose --dtype bfloat16", LARGE),
    Mistake("export", f"{OUT} --unfinished", "no checkpoint here", chain(unfinished, no_steps)),
    *(Mistake("tools/benchmarks/evaluate_cuda.py", argv, message) for argv, message in CUDA),
    Mistake("tools/benchmarks/evaluate_cuda.py", "mixture", "format 5", edit("mixture/dylora.json", setting(format=5))),
    Mistake("tools/benchmarks/evaluate_cuda.py", "mixture", "not readable as JSON", truncate("mixture/dylora.json")),
    Mistake("tools/benchmarks/evaluate_cuda.py", "mixture", "base_skill", edit("mixture/dylora.json", setting(base_skill={"nosuch": 1}))),
]  # fmt: skip
