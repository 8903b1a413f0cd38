"""Export the experts of a run as PEFT LoRA adapters for PyTorch.

    python tools/export_peft.py runs/quickstart --expert all --out quickstart-peft
    python tools/export_peft.py runs/quickstart --expert sql --out sql-peft --verify

Each expert becomes a folder that `peft.PeftModel.from_pretrained(base, folder)` loads. With --verify (needs torch,
transformers and peft: pip install 'dylora-mlx[export]') every exported adapter's float32 logits on real text are
compared with MLX's; a difference above 1e-3 fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from dylora_mlx import assets, cli
from dylora_mlx.data import stream
from dylora_mlx.errors import UserError
from dylora_mlx.export import peft
from dylora_mlx.model.attention import packed_masks
from dylora_mlx.model.router import Routing
from dylora_mlx.runs import Opened, open_run

TOLERANCE = 1e-3


def chosen_columns(run: Opened, wanted: str) -> dict[str, int]:
    """{folder name: gate column} for 'all', an expert's number (expert_2 or 2) or its skill's name."""
    experts = {record.skill: column for column, record in enumerate(run.pool.records, 1)}
    if not experts:
        raise UserError("this run has no expert to export")
    if wanted == "all":
        return {f"expert_{column}": column for column in experts.values()}
    number = wanted.removeprefix("expert_")
    column = int(number) if number.isdigit() else experts.get(wanted, 0)
    if column not in experts.values():
        raise UserError(f"--expert {wanted}: there are all, {', '.join(f'{c} ({s})' for s, c in experts.items())}")
    return {f"expert_{column}": column}


def export(run: Opened, columns: dict[str, int], out: Path) -> None:
    """Write one adapter folder for each column, all or nothing."""
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or choose another --out")
    base = str(assets.BASE) if run.base.name == "embedded" else run.base.name
    beside = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for name, column in columns.items():
            expert, folder = run.model.experts[column - 1], beside / name
            folder.mkdir(parents=True)
            mx.save_safetensors(
                str(folder / "adapter_model.safetensors"), peft.weights(expert), metadata={"format": "pt"}
            )
            text = json.dumps(peft.config(expert, base), indent=2, sort_keys=True)
            (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        beside.rename(out)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error


def texts(run: Opened, limit: int) -> list[np.ndarray]:
    """Token ids of real documents: the test split of each of the run's skills, cut to 128 tokens."""
    found = []
    for source in run.config.skills:
        skill = stream.prepare(source, run.config.data, run.base.tokenizer, run.config.seed)
        found += [piece.tokens[:128] for piece in skill.test.pieces[:limit]]
    return found


def mlx_logits(run: Opened, tokens: np.ndarray, column: int) -> np.ndarray:
    """Float32 logits [L, V] with every token sent to one expert."""
    inputs = mx.array(tokens[None])
    columns = len(run.model.experts) + 1
    gates = mx.broadcast_to(mx.arange(columns) == column, (*inputs.shape, columns)).astype(mx.float32)
    where = packed_masks(mx.ones(inputs.shape, mx.int32), run.model.window)
    out = run.model(inputs, where, Routing(None, mx.array(1.0)), gates=gates)
    return np.array(run.model.logits(out.hidden)[0].astype(mx.float32))


def verify(run: Opened, columns: dict[str, int], out: Path) -> bool:
    """Compare every exported adapter with MLX on real text; print the largest difference of each."""
    try:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError(
            f"--verify needs torch, transformers and peft ({error}): pip install 'dylora-mlx[export]'"
        ) from error
    disable_progress_bar()
    documents, good = texts(run, 4), True
    for name, column in columns.items():
        torch_base = AutoModelForCausalLM.from_pretrained(run.base.folder, dtype=torch.float32)
        # mlx-lm rounds the embedding's scale through bfloat16, as Gemma was trained; transformers in float32 does not.
        scale = torch.tensor(run.base.args.hidden_size**0.5, dtype=torch.bfloat16).float()
        embedding: Any = torch_base.get_input_embeddings()
        embedding.embed_scale.fill_(scale)
        model = PeftModel.from_pretrained(torch_base, str(out / name)).eval()
        worst, gain = 0.0, 0.0
        for tokens in documents:
            ids = torch.from_numpy(tokens[None].astype(np.int64))
            with torch.no_grad():
                theirs = model(input_ids=ids).logits[0].float().numpy()
                with model.disable_adapter():
                    bare = model(input_ids=ids).logits[0].float().numpy()
            worst = max(worst, float(np.abs(mlx_logits(run, tokens, column) - theirs).max()))
            gain = max(gain, float(np.abs(theirs - bare).max()))
        passed = worst <= TOLERANCE and gain > 10 * TOLERANCE
        good &= passed
        print(
            f"{name}: largest logit difference {worst:.2e} over {len(documents)} documents "
            f"(the adapter itself moves logits by up to {gain:.2f}): {'ok' if passed else 'FAILED'}"
        )
    return good


def command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="export_peft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--expert", default="all", help="all, an expert's number, or the skill it was made for")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--verify", action="store_true", help="compare with transformers and peft afterwards")
    options = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run = open_run(options.run, "float32" if options.verify else "auto")
    columns = chosen_columns(run, options.expert)
    export(run, columns, options.out)
    print(f"{len(columns)} adapter{'s' * (len(columns) != 1)} in {options.out}: {', '.join(columns)}")
    if options.verify and not verify(run, columns, options.out):
        print(f"error: {options.out} does not reproduce the run's logits within {TOLERANCE}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(command))
