"""Compare optimizers, schedules and LoRA options: an expert is trained alone on each skill, as a run would train it.

    python tools/benchmarks/training_options.py --json options.json                 every variant, one seed
    python tools/benchmarks/training_options.py --only "adamw 0.01" "lion 0.001" --seeds 0 1 2

Every token is on the expert, so that the router has no part in the result. The learning rates of the optimizers are a grid,
because their best ones differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config import ATTENTION, MLP, Config
from dylora_mlx.config.load import config_from_files
from dylora_mlx.config.yaml_files import find_config
from dylora_mlx.data import stream
from dylora_mlx.data.stream import Skill
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder
from dylora_mlx.model.experts.lora import Expert
from dylora_mlx.model.kernels import numerics
from dylora_mlx.model.routing.router import forced_routing
from dylora_mlx.training.skill import solo
from dylora_mlx.training.step.domains import make_domains
from dylora_mlx.training.step.evaluate import evaluate

PROJECTIONS = (*ATTENTION, *MLP)
RATES = {
    "adamw": (3e-3, 1e-2, 3e-2),
    "adam": (1e-2,),
    "adafactor": (3e-3, 1e-2, 3e-2, 1e-1),
    "lion": (1e-3, 3e-3, 1e-2),
    "muon": (1e-2, 3e-2, 1e-1, 3e-1),
    "sgd": (0.1, 0.9, 1.0, 10.0, 30.0),
}
"""Learning rates by optimizer."""
OTHERS: dict[str, dict[str, str]] = {
    "lora_dropout 0.1": {"training.lora_dropout": "0.1"},
    "use_rslora": {"model.use_rslora": "true"},
    "loraplus_lr_ratio 4": {"training.loraplus_lr_ratio": "4"},
    "loraplus_lr_ratio 16": {"training.loraplus_lr_ratio": "16", "training.learning_rate": "3e-3"},
    "q_proj and v_proj": {"model.projections": "[q_proj, v_proj]"},
    "linear": {"training.lr_schedule": "linear"},
    "exponential_decay": {"training.lr_schedule": "exponential_decay"},
    "step_decay": {"training.lr_schedule": "step_decay", "training.lr_step_size": "10"},
    "constant": {"training.lr_schedule": "constant"},
}
"""Options by variant, with the default optimizer and rate where they name none."""


def variants() -> dict[str, dict[str, str]]:
    """Return the options of every variant by its name."""
    optimizers = {
        f"{name} {rate:g}": {"training.optimizer": name, "training.learning_rate": f"{rate}"}
        for name, rates in RATES.items()
        for rate in rates
    }
    return optimizers | OTHERS


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python tools/benchmarks/training_options.py", __doc__)
    add = parser.add_argument
    add("--config", default="quickstart", help="a YAML file, or the name of a shipped config")
    add("--skills", nargs="*", default=["requests", "sql"], help="names of the skills to learn")
    add("--seeds", nargs="*", type=int, default=[0], help="seeds of splits, initial weights and the order of batches")
    add(
        "--projections",
        nargs="+",
        choices=PROJECTIONS,
        default=PROJECTIONS,
        metavar="NAME",
        help="linear layers that carry the expert (default: all)",
    )
    add("--only", nargs="*", choices=list(variants()), help="the variants to measure (default: all)")
    add("--json", type=Path, help="write the results to this file, after every variant")
    return parser.parse_args(argv)


def train_alone(base: Base, config: Config, skill: Skill) -> dict[str, Any]:
    """Train an expert of the config's rank on a skill; return its test loss, the base's, and the seconds of a step."""
    options, compiled = config.model, not numerics.on_cpu()
    shapes = RoutedDecoder(base, options.projection_names, options.router_layer).shapes
    alpha = options.stored_alpha(options.rank, options.alpha)
    model = solo.solo_model(base, config, Expert(shapes, options.rank, alpha, mx.random.key(config.seed)))
    # The gate of the only expert does not depend on features, so zeros save the base pass.
    features = [np.zeros((each.positions, base.args.hidden_size), np.float16) for each in skill.train.segments]
    plan_steps = config.training.epochs * skill.train.num_tokens // config.data.max_seq_length
    steps = max(1, plan_steps // (config.training.batch_size * config.training.grad_accumulation_steps))
    started = time.perf_counter()
    steps = solo.train_solo(model, config, skill.train, features, steps, config.seed, compiled)
    seconds = (time.perf_counter() - started) / steps
    shape = (config.data.max_seq_length, config.training.batch_size, compiled)
    domain = make_domains({skill.name: skill.test}, *shape)[skill.name]
    losses = [evaluate(model, domain, forced_routing(), expert_id).loss for expert_id in (0, 1)]
    return {"skill": skill.name, "base": losses[0], "loss": losses[1], "steps": steps, "seconds_per_step": seconds}


def command(argv: list[str]) -> int:
    options = parse(argv)
    path, results = find_config(options.config), []
    for name, overrides in variants().items():
        if options.only and name not in options.only:
            continue
        for seed in options.seeds:
            projections = {"model.projections": f"[{', '.join(options.projections)}]"}
            config = config_from_files([path], projections | overrides | {"seed": str(seed)})
            base = load_base(config.model.base, config.model.dtype)
            for source in (each for each in config.skills if each.name in options.skills):
                skill = stream.prepare_skill(source, config.data, base.tokenizer, seed)
                results.append({"variant": name, "seed": seed, **train_alone(base, config, skill)})
        mine = [each for each in results if each["variant"] == name]
        gains = [each["base"] - each["loss"] for each in mine]
        print(f"{name:24} {np.mean([each['loss'] for each in mine]):.4f} {np.mean(gains):+.4f} nats gained", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
