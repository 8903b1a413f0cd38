"""Greedy generation in every way that an exported mixture has: the tokens of each, and the time it takes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PROMPT, PROMPTS, REPEATS = 32, 3, 3
"""Tokens of a prompt; how many are continued; how often each is timed."""
CACHED, RECOMPUTED, PEFT = "the runtime", "the runtime, no caches", "PEFT's X-LoRA"

Generate = Callable[[Any], Any]
"""Token ids [1, L + N] of a prompt [1, L]."""


class Generated(NamedTuple):
    """same: how many of the prompts go on with the very tokens of the runtime with caches; speed: new tokens a second;
    longer: how many times as long as the runtime with caches. Medians over prompts and repeats."""

    same: int
    prompts: int
    speed: float
    longer: float


def compare(torch: Any, model: Any, folder: Path, texts: Sequence[np.ndarray], count: int) -> dict[str, Generated]:
    """Continue the beginnings of some texts by `count` tokens in every way there is."""
    prompts = [torch.from_numpy(text[None, :PROMPT].astype(np.int64)).to(model.device) for text in texts[:PROMPTS]]
    ways = _ways(torch, model, folder, count)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    made: dict[str, list[Any]] = {}
    for way, generate in ways.items():  # also what is allocated the first time
        made[way] = [generate(prompt) for prompt in prompts]
    for _ in range(REPEATS):
        for prompt in prompts:
            for way, generate in ways.items():  # in turn: a busy machine is busy for all of them
                seconds[way].append(_timed(torch, generate, prompt))
    times = {way: np.array(taken) for way, taken in seconds.items()}
    return {
        way: Generated(
            sum(torch.equal(one, other) for one, other in zip(made[way], made[CACHED], strict=True)),
            len(prompts),
            float(np.median(count / taken)),
            float(np.median(taken / times[CACHED])),
        )
        for way, taken in times.items()
    }


def _ways(torch: Any, model: Any, folder: Path, count: int) -> dict[str, Generate]:
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}

    def by(generator: Any, **more: Any) -> Generate:
        def generate(prompt: Any) -> Any:
            with torch.no_grad():
                return generator.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options, **more)

        return generate

    ways = {CACHED: by(model), RECOMPUTED: by(model, use_cache=False)}
    if (folder / "adapter_config.json").is_file() and importlib.util.find_spec("peft"):
        ways[PEFT] = by(_in_peft(model, folder))
    return ways


def _in_peft(model: Any, folder: Path) -> Any:
    """An X-LoRA folder, loaded as its card says, on the base, device and type of the runtime's model."""
    from peft import PeftModel, XLoraConfig
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=model.dtype).to(model.device)
    # As the runtime has it; transformers in float32 would not round this scale through bfloat16.
    base.get_input_embeddings().embed_scale.fill_(model.get_input_embeddings().embed_scale)
    base.config.use_cache = False
    config: Any = XLoraConfig.from_pretrained(str(folder))
    config.adapters = {
        str(expert_id): str((folder / str(expert_id)).resolve()) for expert_id in range(len(model.names))
    }
    return PeftModel.from_pretrained(base, str(folder), config=config).to(model.device).eval()


def _timed(torch: Any, generate: Generate, prompt: Any) -> float:
    started = _now(torch, prompt)
    generate(prompt)
    return _now(torch, prompt) - started


def _now(torch: Any, prompt: Any) -> float:
    if prompt.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
