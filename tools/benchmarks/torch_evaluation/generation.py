"""Compare the ways to generate greedily with an exported mixture: their tokens and their speed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PROMPT, PROMPTS, REPEATS = 32, 3, 3
"""Tokens per prompt, number of prompts, and timed repeats of each."""
CACHED, RECOMPUTED, PEFT = "the runtime", "the runtime, no caches", "PEFT's X-LoRA"

Generate = Callable[[Any], Any]
"""Returns token ids [1, L + N] for a prompt [1, L]."""


class Generated(NamedTuple):
    """Result of one way, as medians over prompts and repeats. Field names are keys of the JSON file."""

    same: int
    """Number of prompts with exactly the tokens of the runtime with key-value caches."""
    prompts: int
    """Number of prompts."""
    speed: float
    """New tokens per second."""
    longer: float
    """Time relative to the runtime with key-value caches."""


def compare(torch: Any, model: Any, folder: Path, texts: Sequence[np.ndarray], count: int) -> dict[str, Generated]:
    """Continue the beginnings of some texts by `count` tokens in every available way."""
    prompts = [torch.from_numpy(text[None, :PROMPT].astype(np.int64)).to(model.device) for text in texts[:PROMPTS]]
    ways = _generators(torch, model, folder, count)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    outputs: dict[str, list[Any]] = {}
    for way, generate in ways.items():  # also the warm-up
        outputs[way] = [generate(prompt) for prompt in prompts]
    for _ in range(REPEATS):
        for prompt in prompts:
            for way, generate in ways.items():  # in turns, so that a busy machine slows all of them
                seconds[way].append(_timed(torch, generate, prompt))
    times = {way: np.array(way_seconds) for way, way_seconds in seconds.items()}
    return {
        way: Generated(
            sum(torch.equal(one, other) for one, other in zip(outputs[way], outputs[CACHED], strict=True)),
            len(prompts),
            float(np.median(count / way_seconds)),
            float(np.median(way_seconds / times[CACHED])),
        )
        for way, way_seconds in times.items()
    }


def _generators(torch: Any, model: Any, folder: Path, count: int) -> dict[str, Generate]:
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
    """Load an X-LoRA folder in PEFT, as its card shows, with the base, device and dtype of the runtime's model."""
    from peft import PeftModel, XLoraConfig
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=model.dtype).to(model.device)
    # Use the runtime's scale, which is rounded through bfloat16; transformers does not round it in float32.
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
