"""Pretrain the embedded base: a small Gemma 3 text model on permissively licensed Python source.

    pip install torch==2.13.0 transformers tokenizers
    python tools/dev/pretrain_base.py --out base --minutes 90

The corpus is Python source that is already on the machine: the standard library and every installed package whose
metadata names a permissive licence. Tests and every file that mentions SQL, requests, Flask or Stripe are left out, so
that the packaged skills are new to the base. The output folder loads with `mlx_lm.load` and with
`transformers.AutoModelForCausalLM`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import re
import sysconfig
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

VOCABULARY, ROW = 4096, 512
SHAPE = {"hidden": 256, "intermediate": 640, "layers": 6, "pattern": 3, "heads": 4, "head_dim": 64}
"""Default architecture: that of the embedded base. Every `pattern`-th layer uses global attention."""
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
PAD, EOS, BOS = 0, 1, 2
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|0BSD)\b", re.I)
COPYLEFT = re.compile(r"GPL|Mozilla|MPL|EPL|proprietary", re.I)
LEFT_OUT = re.compile(r"\brequests\b|flask|stripe|sqlite|sqlalchemy|\bSELECT\b.*\bFROM\b|\bINSERT INTO\b", re.I)
SKIPPED_PATH = re.compile(
    r"(^|/)(tests?|testing|conftest.*|test_.*|idlelib|_vendor|__pycache__|site-packages)(/|$|\.py)"
)
GENERATED = {"plotly", "moto", "cfn-lint", "Pygments"}  # mostly tables or machine-written modules
PIECE_CHARS = 1600
CONFIG_FIELDS = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "query_pre_attn_scalar",
    "max_position_embeddings",
    "sliding_window",
    "layer_types",
    "rope_parameters",
    "rms_norm_eps",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "tie_word_embeddings",
    "hidden_activation",
    "attention_bias",
    "attention_dropout",
]
"""Architecture fields written to config.json. The other fields keep the defaults of transformers."""


def permissive_files(site_packages: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield (package, path) for Python sources whose package metadata names a permissive licence."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if not SKIPPED_PATH.search(path.relative_to(stdlib).as_posix()):
            yield "python standard library", path
    for dist in metadata.distributions(path=site_packages):
        meta: Any = dist.metadata
        classifiers = " ".join(c for c in meta.get_all("Classifier") or [] if c.startswith("License"))
        licence = " ".join([meta.get("License-Expression") or "", classifiers, (meta.get("License") or "")[:60]])
        if meta["Name"] in GENERATED or not PERMISSIVE.search(licence) or COPYLEFT.search(licence):
            continue
        for file in dist.files or []:
            if file.suffix == ".py" and not SKIPPED_PATH.search(file.as_posix()):
                yield f"{meta['Name']} ({' '.join(licence.split())[:60]})", Path(str(dist.locate_file(file)))


def pieces(source: str) -> Iterator[str]:
    """Cut a module into runs of whole top-level statements of at most about PIECE_CHARS characters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = ast.parse(source).body
    lines, start, end = source.splitlines(keepends=True), 0, 0

    def first_line(node: ast.stmt) -> int:
        decorators = getattr(node, "decorator_list", [])
        return min([node.lineno, *(d.lineno for d in decorators)]) - 1

    nodes: list[ast.stmt] = []
    for node in body:
        too_long = sum(map(len, lines[first_line(node) : node.end_lineno])) > PIECE_CHARS
        nodes += node.body if too_long and isinstance(node, ast.ClassDef) else [node]
    for node in nodes:
        begin = first_line(node)
        if end and sum(map(len, lines[start : node.end_lineno])) > PIECE_CHARS:
            yield "".join(lines[start:end])
            start = begin
        elif not end:
            start = begin
        end = node.end_lineno or begin + 1
    if end:
        yield "".join(lines[start:end])


def looks_like_code(text: str) -> bool:
    """Return whether a piece is worth training on: not a table, generated data or a very short stub."""
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return (
        120 <= len(text) <= 8000
        and text.isascii()
        and letters > 0.6 * len(text)
        and max(map(len, text.splitlines())) < 160
    )


def collect(site_packages: list[str], package_cap: int, seed: int) -> tuple[list[str], dict[str, int]]:
    """Return shuffled, deduplicated pieces and the characters taken from each package (at most `package_cap`)."""
    files: dict[str, list[Path]] = {}
    for package, path in permissive_files(site_packages):
        files.setdefault(package, []).append(path)
    rng, seen, texts, chars_by_package = random.Random(seed), set(), [], {}
    for package, paths in sorted(files.items()):
        rng.shuffle(paths)
        size = 0
        for path in paths:
            if size >= package_cap:
                break
            try:
                source = path.read_text(encoding="utf-8")
                new_pieces = [] if LEFT_OUT.search(source) else [p for p in pieces(source) if looks_like_code(p)]
            except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
                continue
            for piece in new_pieces:
                digest = hashlib.sha1(re.sub(r"\s+", " ", piece).encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    texts.append(piece)
                    size += len(piece)
        chars_by_package[package] = size
    rng.shuffle(texts)
    return texts, chars_by_package


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of VOCABULARY tokens and save it to a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.save_pretrained(out)
    return fast


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents, each ended by EOS, into rows of ROW + 1 tokens in order.

    Returns tokens and document numbers, both int32 [rows, ROW + 1]. The incomplete last row is dropped.
    """
    tokens, documents = [], []
    for number, ids in enumerate(tokenizer(texts)["input_ids"]):
        tokens += [*ids, EOS]
        documents += [number] * (len(ids) + 1)
    rows = len(tokens) // (ROW + 1)
    shape = (rows, ROW + 1)
    return (np.array(a[: rows * (ROW + 1)], dtype=np.int32).reshape(shape) for a in (tokens, documents))  # type: ignore


def gemma_config(o: argparse.Namespace) -> Gemma3TextConfig:
    """Return the model config of the options; every `pattern`-th layer uses global attention."""
    return Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=o.hidden,
        intermediate_size=o.intermediate,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=1,
        head_dim=o.head_dim,
        query_pre_attn_scalar=o.head_dim,
        max_position_embeddings=2048,
        sliding_window=128,
        layer_types=["sliding_attention" if (i + 1) % o.pattern else "full_attention" for i in range(o.layers)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 100_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        tie_word_embeddings=True,
    )


def masks(documents: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """Return boolean attention masks [B, 1, L, L] by layer type.

    Both are causal and within one document; the sliding one is also limited to the window.
    """
    position = torch.arange(documents.shape[1], device=documents.device)
    distance = position[:, None] - position[None, :]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    full = same & (distance >= 0)
    return {"full_attention": full, "sliding_attention": full & (distance < window)}


def run(model: Gemma3ForCausalLM, tokens: torch.Tensor, documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean loss over targets inside a document, final-norm states [B, L, D])."""
    inputs, targets = tokens[:, :-1].long(), tokens[:, 1:].long()
    same_document = documents[:, 1:] == documents[:, :-1]
    window = model.config.sliding_window
    assert window is not None, "gemma_config sets a window"
    attn_masks = masks(documents[:, :-1], window)
    states = model.model(input_ids=inputs, attention_mask=attn_masks, use_cache=False).last_hidden_state
    logits = model.lm_head(states)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.masked_fill(~same_document, -100).flatten()
    )
    return loss, states


class Muon(torch.optim.Optimizer):
    """Muon optimizer: momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), in float32.

    torch's own Muon runs the iterations in bfloat16. On a CPU without bfloat16 units that takes longer than the forward and
    backward passes together.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                tall = update.shape[0] > update.shape[1]
                x = update.T if tall else update
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # This scale matches the RMS of AdamW's updates (Liu et al. 2025, section 2.2).
                p.add_(x.T if tall else x, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def optimizers(model: Gemma3ForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the embedding and the norms."""
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(blocks, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def validate(model: Gemma3ForCausalLM, rows: np.ndarray, documents: np.ndarray, device: str) -> float:
    """Return the loss on held-out pieces, nats per token."""
    model.eval()
    losses = []
    for i in range(0, len(rows), 8):
        loss, _ = run(model, *(torch.from_numpy(a[i : i + 8]).to(device) for a in (rows, documents)))
        losses.append(loss.item())
    model.train()
    return float(np.mean(losses))


def export(
    model: Gemma3ForCausalLM, out: Path, loss: float, seen: int, options: argparse.Namespace, chars_by_package: dict
) -> None:
    """Write the model folder: bfloat16 weights, config.json and the model card.

    Both mlx-lm and transformers can read the config.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in model.config.to_dict().items() if name in CONFIG_FIELDS}
    # mlx-lm reads these names and ignores layer_types and rope_parameters.
    config |= {"architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": options.pattern, "dtype": "bfloat16"}
    config |= {"rope_theta": 100_000.0, "rope_local_base_freq": 10_000.0}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"tokens_seen": seen, "validation_loss": round(loss, 4), "parameters": parameters}
    sources = "\n".join(f"- {name}: {size / 1e6:.2f} M characters" for name, size in sorted(chars_by_package.items()))
    defaults = {"tokenizer": None, **SHAPE}
    extra_options = "".join(
        f" --{name} {setting}" for name in defaults if (setting := getattr(options, name)) != defaults[name]
    )
    (out / "README.md").write_text(CARD.format(**facts, sources=sources, o=options, extra_options=extra_options))


CARD = """---
license: apache-2.0
library_name: mlx
tags: [gemma3_text, python, code]
---
# The embedded base

A Gemma 3 text model of {parameters:,} parameters (hidden {o.hidden}, {o.layers} layers, one in {o.pattern} of them
global, window 128, {o.heads} query heads and one key-value head of {o.head_dim}, tied 4,096-token byte-level BPE),
trained from random weights.
It exists so that the whole of dylora_mlx can be tried, tested and measured without a download or an account.
It is not useful as an assistant.

| | |
| --- | --- |
| tokens seen | {tokens_seen:,} |
| validation loss (nats per token, held-out pieces) | {validation_loss} |
| rows | 512 tokens, document masks, {o.batch} rows a step |
| optimizer | Muon (blocks) and AdamW (embedding, norms), warm-up, constant, linear decay |
| seed | {o.seed} |

**Repeat it**: `python tools/dev/pretrain_base.py --out base --minutes {o.minutes:g} --seed {o.seed}{extra_options}` (or
`--tokens {tokens_seen}`). The corpus is read off the machine, so another machine's packages give slightly other numbers.

**Data.** Python source under permissive licences, cut into whole top-level statements, deduplicated, at most
{o.package_cap:,} characters a package. Left out: tests, and every file that mentions requests, Flask, Stripe or SQL.

## Sources
{sources}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=90, help="training time; the schedule follows it")
    parser.add_argument("--tokens", type=float, default=1e12, help="stop after this many tokens instead")
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens a step")
    parser.add_argument("--package_cap", type=int, default=1_500_000, help="characters taken from one package at most")
    parser.add_argument("--site_packages", nargs="*", default=[sysconfig.get_path("purelib")], help="folders to search")
    parser.add_argument("--muon_lr", type=float, default=5e-3)
    parser.add_argument("--adam_lr", type=float, default=4e-3)
    parser.add_argument("--save_minutes", type=float, default=15, help="write the folder this often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to use, instead of training one")
    for name, size in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"of the model; {size} is the embedded base's")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    torch.manual_seed(options.seed)

    texts, chars_by_package = collect(options.site_packages, options.package_cap, options.seed)
    print(
        f"{len(texts):,} pieces, {sum(chars_by_package.values()) / 1e6:.1f} M characters from {len(chars_by_package)} packages",
        flush=True,
    )
    held_out, texts = texts[:96], texts[96:]
    if options.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_tokenizer(texts[:8_000], options.out)
    rows, documents = pack(texts, tokenizer)
    val_rows, val_documents = pack(held_out, tokenizer)
    model = Gemma3ForCausalLM(gemma_config(options))
    torch.nn.Module.to(model, device)  # in place; transformers' own `to` loses its type
    print(f"{rows.size:,} tokens, {sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)

    optims = optimizers(model, options.muon_lr, options.adam_lr)
    peak_lrs = [group["lr"] for opt in optims for group in opt.param_groups]
    rng, start, saved, seen, step = np.random.default_rng(options.seed), time.time(), time.time(), 0, 0
    queue: list[int] = []
    while (progress := max((time.time() - start) / 60 / options.minutes, seen / options.tokens)) < 1:
        if len(queue) < options.batch:
            queue += list(rng.permutation(len(rows)))
        batch, queue = queue[: options.batch], queue[options.batch :]
        factor = min((step + 1) / 100, 1.0, max((1 - progress) / 0.35, 0.01))
        for lr, group in zip(peak_lrs, (g for opt in optims for g in opt.param_groups), strict=True):
            group["lr"] = lr * factor
        loss, _ = run(model, torch.from_numpy(rows[batch]).to(device), torch.from_numpy(documents[batch]).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optims:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen, step = seen + rows[batch].size, step + 1
        if step % 20 == 0:
            rate = seen / (time.time() - start)
            print(
                f"step {step} loss {loss.item():.3f} tokens {seen:,} {rate:.0f}/s progress {progress:.3f}", flush=True
            )
        if time.time() - saved > options.save_minutes * 60:
            loss, saved = validate(model, val_rows, val_documents, device), time.time()
            export(model, options.out, loss, seen, options, chars_by_package)
            print(f"step {step} validation {loss:.4f} -> {options.out}", flush=True)
    loss = validate(model, val_rows, val_documents, device)
    export(model, options.out, loss, seen, options, chars_by_package)
    print(f"done: {seen:,} tokens, validation {loss:.4f} -> {options.out}", flush=True)


if __name__ == "__main__":
    main()
