"""Fuzz targets for config files and option values."""

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
from fuzzing.target import Harness, target

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
def config(work_dir: Path) -> Harness:
    """A config's YAML by --config: parsed, checked, and written back as in a run folder (cli/options, config/load)."""
    path = work_dir / "my.yaml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        parsed = parse_train(["--config", str(path)])
        assert parsed.config is not None
        path.write_text(to_yaml(parsed.config), encoding="utf-8")
        assert load_config(path) == parsed.config, "a run that is resumed has another config"

    shipped = [
        path.read_bytes() for path in sorted(next(f for f in yaml_files.CONFIG_FOLDERS if f.is_dir()).glob("*.yaml"))
    ]
    return [WRITTEN.encode(), to_yaml(SMALL).encode(), *shipped], run


@target("config-text", "yaml", 1)
def config_text(work_dir: Path) -> Harness:
    """The first parse of a config's YAML, before its options are known (config/yaml_files)."""
    path = work_dir / "my.yaml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        yaml_files.read_config_file(path)

    return [WRITTEN.encode(), yaml.safe_dump(asdict(SMALL)).encode()], run


@target("config-options", "json", 2)
def config_options(work_dir: Path) -> Harness:
    """Option values as Python objects, without the parser: the checks of the sections (config)."""
    sections = {name: type(getattr(SMALL, name)) for name in ("data", "model", "training", "log")}

    def run(data: bytes) -> None:
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            return
        for name, section in sections.items():
            options = tree.get(name) if isinstance(tree, dict) else None
            if isinstance(options, dict):
                built = _build_section(section, options)
                assert built is None or isinstance(built, section)

    return [json.dumps(asdict(SMALL)).encode()], run


def _build_section(section: type, options: dict) -> object:
    """Return a section built from the options whose types the parser would accept; None if the section rejects a value."""
    default = section()
    typed_options = {
        name: value
        for name, value in options.items()
        if isinstance(name, str) and hasattr(default, name) and type(value) is type(getattr(default, name))
    }
    if any(
        isinstance(value, list) and not all(isinstance(item, str) for item in value) for value in typed_options.values()
    ):
        return None
    try:
        return section(**typed_options)
    except ValueError:
        return None
