"""The model card of an export (README.md): description, test losses, training data, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dylora_mlx.exporting.torch_models import RUNTIME
from dylora_mlx.reporting.records import evaluated
from dylora_mlx.system.files import is_number

LICENCES = {"google/gemma": "gemma"}
"""Licence field by prefix of the base's hub id. For any other base the user fills it in."""
LIBRARY = {
    "experts": "peft",
    "gguf-lora": "gguf",
    "xlora": "peft",
    "blend": "peft",
    "runtime": "transformers",
    "merged": "transformers",
}
"""The hub's library_name by export format."""
LOADING = {
    "experts": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "FOLDER/{first}")""",
    "gguf-lora": """from llama_cpp import Llama

model = Llama("BASE.gguf", lora_path="FOLDER/{first}.gguf")""",
    "blend": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "FOLDER")""",
    "merged": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")""",
    "quantised": """from mlx_lm import generate, load

model, tokenizer = load("FOLDER")
print(generate(model, tokenizer, prompt="..."))""",
    "runtime": """import sys, torch
sys.path.insert(0, "FOLDER")
import dylora_torch

model, tokenizer = dylora_torch.load("FOLDER", device="cuda", dtype=torch.bfloat16)""",
}
"""Python code that loads an export, by format; xlora uses that of runtime, a quantised full model that of mlx-lm."""
GGUF = """
or with llama.cpp's own programs, one expert or all of them:

```bash
llama-cli -m BASE.gguf --lora FOLDER/{first}.gguf -p "..."
llama-server -m BASE.gguf {every} --lora-init-without-apply
```

BASE.gguf is the base (`{base}`) as a GGUF file, in any quantisation. The server applies none of the experts until a request chooses:
`"lora": [{{"id": 0, "scale": 1.0}}]`, where 0 is the first of the list.
"""
XLORA = """
To score text with PEFT alone (its X-LoRA generates slowly and without a key-value cache; give full paths, PEFT resolves
relative ones against the working directory, and never call `save_pretrained` or `merge_and_unload` on the result):

```python
from peft import PeftModel, XLoraConfig
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
base.config.use_cache = False
config = XLoraConfig.from_pretrained("FOLDER")
config.adapters = {{str(i): f"FOLDER/{{i}}" for i in range({expert_ids})}}
model = PeftModel.from_pretrained(base, "FOLDER", config=config)
```
"""


def model_card(manifest: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    """Return the model card of an export: Markdown with the hub's YAML metadata in front.

    Args:
        manifest: the export's manifest.
        results: results.json of a finished run; None leaves the table of test losses out.
    """
    kind, base = manifest["kind"], manifest["base"]["name"]
    quantized = "quantization" in manifest
    parts = [_fields(kind, base, "mlx" if quantized else LIBRARY[kind]), f"# {_title(manifest)}\n", _about(manifest)]
    if results:
        parts.append(_loss_table(results))
    parts.append(_data(manifest["sources"]))
    parts.append(_loading(manifest))
    return "\n".join(parts)


def _fields(kind: str, base: str, library: str) -> str:
    local = Path(base).is_dir() or base.startswith("/") or "/" not in base
    licence = next((name for start, name in LICENCES.items() if base.startswith(start)), "other")
    fields: dict[str, Any] = {"library_name": library, "license": licence, "pipeline_tag": "text-generation"}
    if licence == "other":
        fields["license_name"] = "see-the-base-and-the-data"
    if not local:
        fields |= {"base_model": base, "base_model_relation": "merge" if kind == "merged" else "adapter"}
    fields["tags"] = ["lora", "mixture-of-experts", "continual-learning", "mlx", "dylora_mlx"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _title(manifest: Mapping[str, Any]) -> str:
    kinds = {
        "experts": "LoRA experts",
        "gguf-lora": "LoRA experts as GGUF files",
        "xlora": "A mixture of LoRA experts (X-LoRA)",
        "runtime": "A mixture of LoRA experts",
        "blend": "A blend of LoRA experts",
        "merged": "A model with an expert folded in",
    }
    return kinds[manifest["kind"]]


def _about(manifest: Mapping[str, Any]) -> str:
    lines = [f"Base: `{_plain(manifest['base']['name'])}`. Made with dylora_mlx {manifest['dylora_mlx']}."]
    if "top_k" in manifest:
        count, top_k = len(manifest["experts"]), manifest["top_k"]
        routing = "all experts" if top_k is None else f"the {top_k} likeliest of {count} experts"
        router_input = (
            "the base's final states"
            if manifest["router_layer"] == "final"
            else f"the input of layer {manifest['router_layer']}"
        )
        share = manifest.get("document_mean_weight", 0.0)
        router_input += f", {share:.0%} of them {_mean_so_far(manifest)}" if share else ""
        lines.append(
            f"Every token is routed to {routing} by a linear gate over {router_input}; `base` stands for no adapter."
        )
    if manifest["kind"] in ("experts", "gguf-lora"):
        lines.append(
            "Each adapter is one expert, applied to every token. The router, which mixes the experts token by token, is not in "
            "this folder."
        )
    if "weights" in manifest:
        lines.append("Weights: " + ", ".join(f"{_plain(name)} {w:g}" for name, w in manifest["weights"].items()) + ".")
    if "expert" in manifest:
        lines.append(f"Folded in: `{_plain(manifest['expert'])}`.")
    if quantization := manifest.get("quantization"):
        bits = f"recipe {quantization['recipe']}" if "recipe" in quantization else f"{quantization['bits']} bits"
        lines.append(f"Quantised by mlx-lm: {bits}, in groups of {quantization['group_size']}.")
    table = []
    if manifest.get("experts"):
        table = ["", "| expert | skills | rank | alpha |", "| --- | --- | --- | --- |"]
        for expert in manifest["experts"]:
            skills = ", ".join(map(_plain, expert["skills"])) or "-"
            table.append(f"| {_plain(expert['name'])} | {skills} | {expert['rank']} | {expert['alpha']:g} |")
    return "\n".join(lines + table) + "\n"


def _loss_table(results: Mapping[str, Any]) -> str:
    lines = [
        "## Test losses, nats a token\n",
        "| text | base | mixture | its own expert | documents |",
        "| --- | --- | --- | --- | --- |",
    ]
    measured = results.get("test")
    for name, by_kind in measured.items() if isinstance(measured, dict) else ():
        entry = by_kind if isinstance(by_kind, dict) else {}
        losses = [entry.get(kind) for kind in ("base", "mixture", "own_expert")]
        values = " | ".join(f"{loss:.3f}" if is_number(loss) else "-" for loss in losses)
        lines.append(f"| {_plain(name)} | {values} | {evaluated(entry)} |")
    return "\n".join(lines) + "\n"


def _data(sources: Sequence[Mapping[str, Any]]) -> str:
    lines = ["## Training data\n"]
    lines += [f"- {_plain(source['name'])}: `{_plain(source['source'])}`" for source in sources]
    return "\n".join(
        [*lines, "\nThe licences of this data apply to the trained weights; add them here before you share this.\n"]
    )


def _loading(manifest: Mapping[str, Any]) -> str:
    kind, base = manifest["kind"], json.dumps(_plain(manifest["base"]["name"]))
    code = LOADING["quantised" if "quantization" in manifest else "runtime" if kind == "xlora" else kind]
    first = f"expert_{manifest['expert_ids'][0]}" if manifest.get("expert_ids") else ""
    text = "## How to load it\n\n```python\n" + code.replace("{base}", base).replace("{first}", first) + "\n```\n"
    if kind == "gguf-lora":
        every = " ".join(f"--lora FOLDER/expert_{expert_id}.gguf" for expert_id in manifest["expert_ids"])
        text += GGUF.format(first=first, every=every, base=_plain(manifest["base"]["name"]))
    if kind in ("xlora", "runtime"):
        text += (
            f"\n`{RUNTIME.name}` in this folder needs only torch, transformers and safetensors. It loads a transformers model, "
            "which `generate`, pipelines and lm-evaluation-harness (`HFLM(pretrained=model)`) can use.\n"
        )
    if kind == "xlora":
        text += XLORA.format(base=base, expert_ids=len(manifest["experts"]))
    return text


def _mean_so_far(manifest: Mapping[str, Any]) -> str:
    """Describe the mean over the text so far that the router reads."""
    decay = manifest.get("document_mean_decay", 1.0)
    return "their mean over the text so far" + ("" if decay == 1 else f" (each token counts {decay:g} of the next one)")


def _plain(text: Any) -> str:
    """Remove the characters that Markdown or HTML would interpret; replace unprintable ones by a space."""
    return "".join(" " if not c.isprintable() else "" if c in "\\`|<>" else c for c in str(text))
