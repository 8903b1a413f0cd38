"""Fixtures shared by the whole suite. The embedded base is loaded once per session."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# One BLAS thread: on a busy machine, synchronizing two threads costs more than these small matrix products.
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# isort: split
import dylora_mlx  # noqa: F401  (loads the BLAS before MLX)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from dylora_mlx import assets, train
from dylora_mlx.config import Config, Source
from dylora_mlx.growth.pool import ExpertRecord, Pool
from dylora_mlx.model.base.load import Base, load_base
from dylora_mlx.model.decoder.decoder import RoutedDecoder


def _write_few() -> Path:
    """Write packaged skills, shortened to 32 training documents and two per evaluation split, to a folder that lasts for the session."""
    folder = Path(tempfile.mkdtemp(prefix="dylora-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for skill in ("python", "requests", "requests_more", "sql"):
        (folder / skill).mkdir()
        for split, count in {"train": 32, "validation": 2, "test": 2}.items():
            lines = (assets.SKILLS / skill / f"{split}.jsonl").read_text().splitlines()[:count]
            short = [json.dumps({"text": json.loads(line)["text"][:150]}) for line in lines]
            (folder / skill / f"{split}.jsonl").write_text("\n".join(short) + "\n")
    return folder


def _write_small_base() -> Path:
    """Copy tests/base, with the tokenizer of the embedded base, to a folder that lasts for the session."""
    folder = Path(tempfile.mkdtemp(prefix="dylora-base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in (*(Path(__file__).parent / "base").iterdir(), *assets.BASE.glob("tokenizer*.json")):
        shutil.copy(file, folder / file.name)
    return folder


FEW = _write_few()
SMALL_BASE = _write_small_base()
# The router reads single tokens (document_mean_weight 0): this run is exported to all formats, and X-LoRA supports no other.
SMALL = f"""
skills:
  - {{name: requests, source: {FEW}/requests, limit: 40}}
  - {{name: sql, source: {FEW}/sql, limit: 40, rank: 4, alpha: 4}}
  - {{name: requests_more, source: {FEW}/requests_more, limit: 40}}
growth: {{base_skill: {{name: python, source: {FEW}/python, limit: 40}}, dense_steps: 1, anneal_steps: 1, top_k: 1,
  threshold: 0.88, epsilon: 0.1}}
model: {{document_mean_weight: 0.0}}
data: {{max_seq_length: 256}}
training: {{max_steps: 4, steps_per_eval: 2, save_every: 2, memory_tokens: 512, keep_checkpoints: 20}}
log: {{steps_per_report: 1}}
"""


LONG = ("run/", "test_", "docs", "distributed", "model", "generation", "tools", "serving", "training")
"""Beginnings of the paths below tests/ whose modules take longest, in order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest: pytest-xdist gives a module to one process, and none should work alone at the end."""
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(here).as_posix()
        return next((number for number, begin in enumerate(LONG) if name.startswith(begin)), len(LONG))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of garbage collections, which would go through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory) -> Iterator[None]:
    """Give the session its own cache folder, so that tests never touch the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def base() -> Base:
    """The embedded base. It is frozen, so tests may share it."""
    return load_base("embedded", "float32")


SIZES = {"train": 36, "validation": 4, "test": 2}
"""Number of documents of each split in `short_skills`."""


@pytest.fixture(scope="session")
def short_skills(tmp_path_factory) -> Path:
    """A folder of skills made of the beginnings of packaged documents, for training that must be quick."""
    folder = tmp_path_factory.mktemp("data")
    for skill in ("python", "requests", "requests_more", "sql", "stripe"):
        (folder / skill).mkdir()
        for split, count in SIZES.items():
            lines = (assets.SKILLS / skill / f"{split}.jsonl").read_text().splitlines()[:count]
            short = [json.dumps({"text": json.loads(line)["text"][:150]}) for line in lines]
            (folder / skill / f"{split}.jsonl").write_text("\n".join(short) + "\n")
    return folder


@pytest.fixture
def make_pool(base):
    """A function that builds a pool with experts of the given ranks. Unless `filled` is False, B and gate rows are random, not zero."""

    def make(ranks=(), router_layer="final", projections=("q_proj", "v_proj"), seed=0, filled=True) -> Pool:
        pool = Pool(RoutedDecoder(base, list(projections), router_layer))
        keys = mx.random.split(mx.random.key(seed), 64)
        for number, rank in enumerate(ranks):
            pool.add(ExpertRecord(f"skill_{number}", rank, 2.0 * rank, 0), keys[number])
        if filled:
            rng = np.random.default_rng(seed)
            for expert in pool.model.experts:
                for modules in expert.layers:
                    for factors in modules.values():
                        factors.lora_b = mx.array(rng.normal(0, 0.05, factors.lora_b.shape).astype(np.float32))
            for row in pool.model.router.rows:
                row.weight = mx.array(rng.normal(0, 0.05, row.weight.shape).astype(np.float32))
        return pool

    return make


@pytest.fixture
def config() -> Config:
    """The default config with one skill."""
    return Config(skills=[Source(name="requests", source="packaged/requests")])


def start(folder: Path, text: str = SMALL, *options: str, base: str | Path = SMALL_BASE) -> list[str]:
    """Write a config to the folder and return the arguments of a quick run with it, on the small base."""
    (folder / "small.yaml").write_text(text)
    return ["--config", str(folder / "small.yaml"), "--runs", str(folder), "--model.base", str(base), *options]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A finished run of three skills."""
    folder = tmp_path_factory.mktemp("finished")
    assert train.main(start(folder)) == 0
    return folder / "small"
