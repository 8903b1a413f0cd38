"""Write the stored runs of one format: python tests/runs/make.py tests/runs/format-N.

Run this once for each format, with the version that introduces it, and commit the result. tests/run/test_format.py opens
the folders with every later version; a stored folder is never written again.

The base is a random Gemma 3 of two layers with one token for each byte. Two skills are learned on it: the finished run is
the result, the interrupted one is the same run as if its process had been killed after the fifth step.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import dylora_mlx

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.gemma3_text import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dylora_mlx.system.files import sha256

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": 32, "sliding_window_pattern": 2,
}  # fmt: skip
INTERRUPTED_AT = "step-000005"
CONFIG = """skills:
  - {name: letters, source: data/letters.jsonl}
  - {name: digits, source: data/digits.jsonl, rank: 4, alpha: 8}
model: {base: base}
growth: {policy: threshold, base_skill: null, dense_steps: 1, anneal_steps: 1, top_k: 2}
data: {max_seq_length: 64}
training: {max_steps: 4, steps_per_eval: 2, save_every: 1, memory_tokens: 128, keep_checkpoints: 20, learning_rate: 0.01}
log: {steps_per_report: 1}
"""


def write_base(folder: Path) -> None:
    """Write a random base with a byte-level tokenizer: <pad>, <eos>, <bos>, <unk>, then a token for each of 256 bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = {name: number for number, name in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    sizes = SIZES | {"vocab_size": len(vocabulary), "model_type": "gemma3_text"}
    rng = np.random.default_rng(0)

    def draw(name: str, value: mx.array) -> mx.array:
        scale = 0.1 if "norm" in name else 0.4 if "embed" in name else value.shape[-1] ** -0.5
        return mx.array(rng.normal(0, scale, value.shape).astype(np.float32)).astype(mx.bfloat16)

    model = Model(ModelArgs.from_dict(sizes))
    weights = dict(tree_flatten(tree_map_with_path(draw, model.parameters())))
    weights.pop("lm_head.weight", None)  # the head is tied to the embedding
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = sizes | {
        "architectures": ["Gemma3ForCausalLM"], "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 100000.0, "rope_local_base_freq": 10000.0,
        "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 512,
        "hidden_activation": "gelu_pytorch_tanh", "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def write_data(folder: Path) -> None:
    """Write texts of letters, of digits, and of signs (for a skill that is added later), each from six words."""
    folder.mkdir()
    for seed, (name, alphabet) in enumerate({"letters": "abcdefgh", "digits": "01234567", "signs": "+-*/<>=!"}.items()):
        rng = np.random.default_rng(seed)
        words = ["".join(rng.choice(list(alphabet), 4)) for _ in range(6)]
        texts = [" ".join(rng.choice(words, 8)) for _ in range(48)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train_run(home: Path) -> None:
    """Train the finished run and keep every checkpoint."""
    from dylora_mlx import train

    (home / "config.yaml").write_text(CONFIG)
    os.chdir(home)
    code = train.main(["--config", "config.yaml", "--runs", ".", "--name", "finished", "--quiet"])
    (home / "config.yaml").unlink()
    if code:
        raise SystemExit(code)


def interrupt(finished: Path, interrupted: Path) -> None:
    """Copy the run as if it was killed after writing `INTERRUPTED_AT`; keep only the final checkpoint of the finished one."""
    shutil.copytree(finished, interrupted)
    for name in ("report.html", "results.json", "samples.json"):
        (interrupted / name).unlink()
    (finished / "report.html").unlink()  # can be drawn again at any time
    for folder in sorted((interrupted / "checkpoints").iterdir()):
        if folder.name != INTERRUPTED_AT:
            shutil.rmtree(folder)
    for folder in (finished / "checkpoints").iterdir():
        if folder.name != "final":
            shutil.rmtree(folder)
    info = json.loads((interrupted / "run.json").read_text())
    (interrupted / "run.json").write_text(json.dumps(info | {"status": "running"}, indent=1) + "\n")


def use_relative_paths(home: Path) -> None:
    """Replace the paths of this machine, which a run keeps as absolute ones, by paths relative to `home`."""
    for path in sorted(home.rglob("*")):
        if path.suffix in (".json", ".jsonl", ".yaml") and (text := path.read_text()) != (
            changed := text.replace(f"{home}/", "")
        ):
            path.write_text(changed)
            for manifest in (
                parent / "MANIFEST.json" for parent in path.parents if (parent / "MANIFEST.json").is_file()
            ):
                content = json.loads(manifest.read_text())
                content["sha256"][path.relative_to(manifest.parent).as_posix()] = sha256(path)
                manifest.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_expected(home: Path) -> None:
    """Write the values that every later version must compute from the finished run: gates and one greedy continuation."""
    text = "abab 0101"
    run = dylora_mlx.load("finished")
    generated = run.generate(text, max_tokens=8, temperature=0.0)
    expected = {
        "text": text,
        "names": list(run.experts),
        "gates": run.route(text).gates.round(5).tolist(),
        "generated": generated.text,
    }
    (home / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    home = Path(sys.argv[1]).resolve()
    home.mkdir(parents=True)  # an existing one is never written again
    (home / "base").mkdir()
    write_base(home / "base")
    write_data(home / "data")
    train_run(home)
    interrupt(home / "finished", home / "interrupted")
    use_relative_paths(home)
    write_expected(home)


if __name__ == "__main__":
    main()
