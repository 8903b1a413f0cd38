"""dylora tidy: an expert whose skills another serves as well is removed, one that is needed stays, and the run can be put back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dylora_mlx import add, explain, restore, tidy, train
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.growth.decide.decision_log import read_decisions
from dylora_mlx.reporting.history import build_history
from dylora_mlx.reporting.records import read_records
from dylora_mlx.run import loop, run_folder
from dylora_mlx.run import tidy as run_tidy
from dylora_mlx.system import console
from dylora_mlx.training.budget import parameters
from dylora_mlx.training.checkpoint import checkpoint
from tests.run.homes import project, trained

CONFIG = """skills:
  - {name: first, source: data/first.jsonl}
  - {name: other, source: data/other.jsonl}
  - {name: again, source: data/again.jsonl}
model: {base: base, projections: [q_proj, v_proj], rank: 4, alpha: 8, gather_threshold: 4.0}
growth: {policy: threshold, threshold: 1.0, base_skill: null, dense_steps: 1, anneal_steps: 1, top_k: 2, split: false,
  acceptance: always, bootstrap: 100, embedding_samples: 32}
data: {max_seq_length: 64}
training: {grad_accumulation_steps: 1, epochs: 8, max_steps: 30, learning_rate: 0.02, steps_per_eval: 15, memory_tokens: 512,
  keep_checkpoints: 2}
log: {steps_per_report: 1}
"""


def write_texts(path: Path, letters: str, seed: int) -> None:
    """Write texts of six words of these letters, which depend on the letters alone, and one word of the seed's."""
    words = ["".join(np.random.default_rng([3, n]).choice(list(letters), 4)) for n in range(6)]
    rng = np.random.default_rng(seed)
    words.append("".join(rng.choice(list("uvw"), 4)))
    texts = [" ".join(rng.choice(words, 8)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A project whose first and third skill are texts of the same words."""
    folder = project(tmp_path_factory.mktemp("tidy") / "home", CONFIG)
    for name, letters, seed in (("first", "abc", 1), ("other", "xyz", 2), ("again", "abc", 3), ("more", "mno", 4)):
        write_texts(folder / f"data/{name}.jsonl", letters, seed)
    return folder


@pytest.fixture(scope="module")
def grown(home) -> Path:
    """The run, which gave each skill an expert."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return trained(home)


@pytest.fixture
def run(grown, home, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.setattr(console.console, "_width", 200)  # no cell of the table is folded
    return Path(shutil.copytree(grown, tmp_path / "run"))


def content(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_dry_run_names_what_would_go_and_changes_nothing(run, capsys):
    before = content(run)
    assert tidy.main([str(run), "--dry-run", "--epsilon", "0.1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "would go" in out
    assert "1 of 3 experts would be removed: " in out
    assert content(run) == before


def test_the_redundant_expert_goes_and_its_skills_are_served(run, capsys):
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    opened = run_folder.open_run(run)
    assert [record.skill for record in opened.pool.records] in (["first", "other"], ["other", "again"])
    owners = opened.library.experts_of
    assert owners["first"] == owners["again"] != owners["other"]
    assert len(opened.model.router.rows) == 3
    size = opened.pool.expert_parameters(4)
    assert f"1 of 3 experts removed: {size} of {3 * size} adapter parameters saved" in out
    removal = read_decisions(run)[-1]
    assert (removal["action"], removal["kept"], removal["saved"]) == ("evict", True, size)
    assert removal["worst_rise"] <= 0.1
    assert "as another serves its skills" in removal["reason"]
    trainer = json.loads((run / "checkpoints/final/trainer.json").read_text())
    assert trainer["decision_lines"] == len(read_decisions(run))
    # Once more: nothing is left to remove, and nothing is written.
    before = content(run)
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 0
    assert "0 of 2 experts removed" in " ".join(capsys.readouterr().out.split())
    assert content(run) == before


def test_it_can_be_put_back_and_goes_on_learning(run, capsys):
    before = checkpoint.read(run / "checkpoints/final")
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 0
    (archive,) = (run / "removed").iterdir()
    backup = run / f"checkpoints/before-tidy-{archive.name[:3]}"
    assert checkpoint.read(backup).keys() == before.keys()
    assert add.main([str(run), "data/more.jsonl", "--name", "more", "--quiet"]) == 0
    assert restore.main([str(run), f"removed/{archive.name}"]) == 0
    assert checkpoint.read(backup).keys() == before.keys()
    opened = run_folder.open_run(run)
    assert len(opened.pool) == 4
    assert len(set(opened.library.experts_of.values())) == 4
    restored = read_decisions(run)[-1]
    assert (restored["action"], restored["expert"], restored["reason"]) == (
        "restore", 4, f"restored from removed/{archive.name}",
    )  # fmt: skip
    history = build_history(read_records(run))
    assert [history.label(number) for number in history.expert_ids] == [
        "base", *(f"{number} {record.skill}" for number, record in zip(history.expert_ids[1:], opened.pool.records, strict=True)),
    ]  # fmt: skip
    served = {skill: history.experts[number - 1].name for skill, number in history.serving.items()}
    assert served == {s: opened.pool.records[e - 1].skill for s, e in opened.library.experts_of.items()}
    assert explain.main([str(run)]) == 0
    assert (
        f"{restored['skill']} was put back as expert 4 (restored from removed/{archive.name})."
        in capsys.readouterr().out
    )


def test_a_run_that_is_stopped_after_a_restore_keeps_its_ledger(run, monkeypatch):
    """Stopped before the added skill was decided on: the run resumes from the checkpoint that add wrote first."""
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 0
    (archive,) = (run / "removed").iterdir()
    assert restore.main([str(run), f"removed/{archive.name}"]) == 0

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "measure_arrival", killed)
        assert add.main([str(run), "data/more.jsonl", "--name", "more", "--quiet"]) == 130
    assert train.main(["--resume", str(run), "--quiet"]) == 0
    assert [line["action"] for line in read_decisions(run)] == [
        "create",
        "create",
        "create",
        "evict",
        "restore",
        "create",
    ]


def test_what_is_needed_stays(run, capsys):
    before = content(run)
    assert tidy.main([str(run), "--epsilon", "0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "0 of 3 experts removed" in out
    assert content(run) == before


def test_a_removal_that_harms_the_mixture_is_undone(run, capsys, monkeypatch):
    """The forced losses promise that nothing is lost; the mixture's say otherwise."""
    before, evict = content(run), parameters._try_removal

    def harmful(training_run, action, experts, losses, change, why):
        better = {name: each._replace(loss=each.loss - 1.0) for name, each in losses.items()}
        return evict(training_run, action, experts, better, change, why)

    monkeypatch.setattr(parameters, "_try_removal", harmful)
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "not evicted, all is as it was" in " ".join(out.split())
    assert "harm" in out[out.index("what it costs") :]
    assert content(run) == before


def test_removals_are_compared_with_the_losses_before_the_first(run, capsys):
    """Every expert goes, the last one with all skills; the rise that is told of it is that of all removals together."""
    before, _ = run_folder.reopen_finished(run)
    losses = {name: each.loss for name, each in before.evaluate().items()}
    assert tidy.main([str(run), "--epsilon", "100"]) == 0
    assert "3 of 3 experts removed" in " ".join(capsys.readouterr().out.split())
    last = read_decisions(run)[-1]
    assert set(last["details"]["heirs"]) == {"first", "other", "again"}
    base = checkpoint.read(run / "checkpoints/final")["matrix/row_0.json"]
    assert last["worst_rise"] == pytest.approx(max(base[name] - loss for name, loss in losses.items()), abs=1e-5)
    opened = run_folder.open_run(run)
    assert len(opened.pool) == 0
    assert set(opened.library.experts_of.values()) == {0}
    # The last row of the matrix is of the mixture as it is now, so that a skill added later is not blamed for the removals.
    row = checkpoint.read(run / "checkpoints/final")["matrix/row_3.json"]
    assert row == pytest.approx(base, abs=1e-5)
    assert add.main([str(run), "data/more.jsonl", "--name", "more", "--quiet"]) == 0
    assert read_decisions(run)[-1]["outcome"]["worst_other_rise"] < 0.5
    assert tidy.main([str(run), "--epsilon", "0"]) == 0
    assert "0 of 1 experts removed" in " ".join(capsys.readouterr().out.split())


def test_an_expert_that_serves_no_skill_is_tried(run, capsys):
    """A merged expert serves none once those that were merged into it are restored."""
    final = run / "checkpoints/final"
    content = checkpoint.read(final)
    for entry in content["pool.json"]["library"]["entries"]:
        entry["expert"] = {2: 1}.get(entry["expert"], entry["expert"])
    checkpoint.write(final, content)
    assert tidy.main([str(run), "--dry-run", "--epsilon", "100"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "other none base +0.0000 +0.0000" in out
    assert "3 of 3 experts would be removed" in out


@pytest.mark.parametrize("fails", ["checkpoint", "ledger", "archive"])
def test_a_failed_write_leaves_the_run_as_it_was(run, capsys, monkeypatch, fails):
    before = content(run)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    if fails == "checkpoint":
        write = checkpoint.write
        monkeypatch.setattr(
            checkpoint, "write", lambda folder, *a: (full if folder.name == "final" else write)(folder, *a)
        )
    elif fails == "ledger":
        monkeypatch.setattr(decision_log, "atomic_write", full)
    else:
        monkeypatch.setattr(run_tidy, "atomic_folder", full)
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert content(run) == before
    assert run_folder.open_run(run).checkpoint.name == "final"


def test_an_interruption_leaves_the_run_as_it_was(run, monkeypatch):
    before, copy = content(run), run_tidy.copy_folder

    def interrupted(*arguments):
        copy(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_tidy, "copy_folder", interrupted)
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 130
    assert content(run) == before


def test_what_a_killed_process_left_is_no_obstacle(run, capsys):
    """Killed between the two renames of the final checkpoint, when archives and backup were there; then once more from the start."""
    reference = content(run)
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 0
    wanted = content(run)
    final, (archive,) = run / "checkpoints/final", (run / "removed").iterdir()
    shutil.rmtree(final)
    (run / f"checkpoints/before-tidy-{archive.name[:3]}").rename(run / "checkpoints/.final.old")
    shutil.copytree(run / "checkpoints/.final.old", run / "checkpoints/.final.partial")
    (run / "decisions.jsonl").write_bytes(reference["decisions.jsonl"])
    (run / "removed/.007-evict.partial").mkdir()
    (run / "removed/.007-evict.partial/removed.json").write_text("{")
    capsys.readouterr()
    assert restore.main([str(run)]) == 0
    assert f"removed/{archive.name}: " in capsys.readouterr().out
    assert tidy.main([str(run), "--epsilon", "0.1"]) == 0
    shutil.rmtree(run / "removed/.007-evict.partial")
    after = content(run)
    assert after.keys() == wanted.keys()
    assert [name for name in after if after[name] != wanted[name]] == ["decisions.jsonl"], "for the seconds it took"
