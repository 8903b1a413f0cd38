"""Targets of the config and of what else a command line names."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import yaml

from dylora_mlx.cli.options import parse_train
from dylora_mlx.config import Config, Source, yaml_files
from dylora_mlx.config.load import load_config, to_yaml
from fuzzing.target import Made, target

SMALL = Config(skills=[Source(name="sql", source="packaged/sql")])
WRITTEN = """
# comments, anchors and flow style, as people write configs
skills:
  - &first {name: requests, source: packaged/requests, limit: 40}
  - {<<: *first, name: sql, source: packaged/sql, rank: 4, alpha: 4.0, prompt: "{a}", completion: "{b}"}
domains: [{name: other, source: OWNER/NAME, messages: chat}]
growth: {base_skill: {name: python, source: packaged/python}, policy: probe, freeze_first: [q_proj], rank: {max: 8}}
model: {projections: [q_proj, v_proj], router_layer: 3, dtype: float32}
training: {max_steps: 4, early_stop_domain: current, learning_rate: 1e-3}
"""


@target("config", "yaml", 1)
def config(place: Path) -> Made:
    """A config's YAML by --config: parsed, checked, and written back as a run keeps it (cli, config)."""
    path = place / "my.yaml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        made = parse_train(["--config", str(path)])
        assert made.config is not None
        path.write_text(to_yaml(made.config), encoding="utf-8")
        assert load_config(path) == made.config, "a run that is resumed has another config"

    shipped = [
        path.read_bytes() for path in sorted(next(f for f in yaml_files.CONFIG_FOLDERS if f.is_dir()).glob("*.yaml"))
    ]
    return [WRITTEN.encode(), to_yaml(SMALL).encode(), *shipped], run


@target("config-text", "yaml", 1)
def config_text(place: Path) -> Made:
    """The first look at a config's YAML, before its options are known (cli)."""
    path = place / "my.yaml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        yaml_files.read_config_file(path)

    return [WRITTEN.encode(), yaml.safe_dump(asdict(SMALL)).encode()], run


@target("config-options", "json", 2)
def config_options(place: Path) -> Made:
    """Option values as Python has them, past the parser: what the sections check of themselves (config)."""
    sections = {name: type(getattr(SMALL, name)) for name in ("data", "model", "training", "log")}

    def run(data: bytes) -> None:
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            return
        for name, section in sections.items():
            options = tree.get(name) if isinstance(tree, dict) else None
            if isinstance(options, dict):
                made = _typed(section, options)
                assert made is None or isinstance(made, section)

    return [json.dumps(asdict(SMALL)).encode()], run


def _typed(section: type, options: dict) -> object:
    """A section of the options whose types are right, as they are when the parser lets them through; None where it
    refuses a value."""
    default = section()
    kept = {
        name: value
        for name, value in options.items()
        if isinstance(name, str) and hasattr(default, name) and type(value) is type(getattr(default, name))
    }
    if any(isinstance(value, list) and not all(isinstance(item, str) for item in value) for value in kept.values()):
        return None
    try:
        return section(**kept)
    except ValueError:
        return None
