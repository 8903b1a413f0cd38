"""A project folder with a tiny base and data, from which runs are made within a second, and what tests read of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from dylora_mlx import train
from dylora_mlx.training.checkpoint import checkpoint

STORED = Path(__file__).parents[1] / "runs/format-1"
CONFIG = """skills:
  - {name: letters, source: data/letters.jsonl}
  - {name: digits, source: data/digits.jsonl, rank: 4, alpha: 8}
domains: [{name: other, source: data/signs.jsonl}]
model: {base: base}
growth: {policy: threshold, base_skill: null, dense_steps: 1, anneal_steps: 1, top_k: 2, split: false}
data: {max_seq_length: 64}
training: {max_steps: 4, steps_per_eval: 2, save_every: 1, memory_tokens: 128, keep_checkpoints: 20, replay_tokens: 256}
log: {steps_per_report: 1}
"""


SKILLS = 8
"""Number of skills of GROWING."""
GROWING = f"""skills: [{", ".join(f"{{name: s{n}, source: data/s{n}.jsonl}}" for n in range(1, SKILLS + 1))}]
model: {{base: base, projections: [q_proj, v_proj], rank: 4, alpha: 8, gather_threshold: 4.0}}
growth: {{policy: threshold, threshold: 1.0, base_skill: null, dense_steps: 1, anneal_steps: 1, top_k: 2, split: false,
  acceptance: always, bootstrap: 50, embedding_samples: 32}}
data: {{max_seq_length: 64}}
training: {{grad_accumulation_steps: 1, max_steps: 2, steps_per_eval: 2, save_every: 1, memory_tokens: 512, router_fit_steps: 2,
  keep_checkpoints: 40, replay_tokens: 256}}
log: {{steps_per_report: 1}}
"""


def write_skills(home: Path) -> None:
    """Write a file of texts for each skill, each from words of three letters of its own."""
    for number in range(SKILLS):
        rng = np.random.default_rng(number)
        alphabet = [chr(ord("a") + (3 * number + letter) % 26) for letter in range(3)]
        words = ["".join(rng.choice(alphabet, 4)) for _ in range(6)]
        texts = [" ".join(rng.choice(words, 8)) for _ in range(48)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (home / f"data/s{number + 1}.jsonl").write_text(lines)


def project(folder: Path, text: str = CONFIG) -> Path:
    """Make a project folder: a base, three files of data, and a config with relative paths."""
    for name in ("base", "data"):
        shutil.copytree(STORED / name, folder / name)
    (folder / "my.yaml").write_text(text)
    return folder


def trained(home: Path, name: str = "run") -> Path:
    """Train the project's config, from the current folder, into the folder `name` beside it."""
    argv = ["--config", str(home / "my.yaml"), "--runs", str(home.parent), "--name", name, "--quiet"]
    assert train.main(argv) == 0
    return home.parent / name


def interrupt(finished: Path, interrupted: Path, at: str = "step-000006") -> Path:
    """Copy a finished run as if its process had been killed after writing a checkpoint; with "" before the first one."""
    shutil.copytree(finished, interrupted)
    for name in ("results.json", "samples.json"):
        (interrupted / name).unlink()
    for folder in (interrupted / "checkpoints").iterdir():
        if folder.name == "final" or folder.name > at:
            shutil.rmtree(folder)
    info = json.loads((interrupted / "run.json").read_text())
    (interrupted / "run.json").write_text(json.dumps(info | {"status": "running"}))
    return interrupted


def arrays(run: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a run's final checkpoint by file and name."""
    final = run / "checkpoints/final"
    return {
        f"{path.relative_to(final)}:{name}": np.array(value.astype(mx.float32))
        for path in sorted(final.rglob("*.safetensors"))
        for name, value in mx.load(str(path)).items()
    }


def same_bits(one: Path, other: Path) -> bool:
    """Return whether two runs ended with the same tensors and the same losses."""
    ours, theirs = arrays(one), arrays(other)
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    return (
        ours.keys() == theirs.keys()
        and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        and results[0] == results[1]
    )


def edit_trainer(run: Path, **values: object) -> None:
    """Change trainer.json of every checkpoint of a run, with its hash in the manifest."""
    for folder in (run / "checkpoints").iterdir():
        content = checkpoint.read(folder)
        content["trainer.json"] |= values
        checkpoint.write(folder, content)


def digests(run: Path) -> dict[str, str]:
    """Return the digests in the final checkpoint of a run."""
    return json.loads((run / "checkpoints/final/trainer.json").read_text())["data_digests"]


def change_record(path: Path) -> None:
    """Change one text of a file of data, and keep its length."""
    lines = path.read_text().splitlines()
    record = json.loads(lines[7])
    lines[7] = json.dumps({"text": record["text"][::-1]})
    path.write_text("\n".join(lines) + "\n")
