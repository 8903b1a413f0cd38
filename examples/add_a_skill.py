"""Teach a finished run one more skill, and check that the earlier ones are as they were.

python examples/own_skills.py && python examples/add_a_skill.py
"""

from __future__ import annotations

import dylora_mlx


def main() -> None:
    run = dylora_mlx.load("runs/own-skills")
    before = {name: loss["mixture"] for name, loss in run.results["test"].items()}

    # A JSONL file, a folder of text files, or a data set on the hub; this one ships with the package.
    run = run.add_skill("packaged/sql", name="sql", limit=48)

    print(f"\n{run.folder} has experts for {', '.join(run.experts)}")
    for name, loss in run.results["test"].items():
        change = f"{loss['mixture'] - before[name]:+.3f} since before" if name in before else "new"
        print(f"{name:12} {loss['mixture']:.3f}  {change}")
    print(f"the run as it was: {run.folder}/checkpoints/before-sql")


if __name__ == "__main__":
    main()
