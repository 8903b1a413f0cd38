"""Why a run grew as it did: dylora explain RUN [SKILL] [--what-if growth.threshold=0.7]. No model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.reporting.page import DAMAGED
from dylora_mlx.reporting.sentences import sentence, server

EXAMPLES = """  dylora explain runs/quickstart                                      every decision of a run
  dylora explain runs/quickstart flask                                one of them, in full
  dylora explain runs/quickstart --what-if growth.threshold=0.6       what would have been decided
"""
console = Console(highlight=False, soft_wrap=True)


class ExplainOptions(NamedTuple):
    """What the command line asks for: a run, one skill of it, and other options as section.name=value."""

    run: Path
    skill: str | None
    changes: list[str]


def parse(argv: list[str]) -> ExplainOptions:
    about = "Tell why a run created, reused, refined, merged or evicted its experts."
    made = Parser("dylora explain", about, EXAMPLES)
    made.add_argument("run", type=Path, help="run folder")
    made.add_argument("skill", nargs="?", help="tell this skill's decision in full")
    made.add_argument(
        "--what-if", metavar="OPTION=VALUE", action="append", default=[],
        help="decide again with this option of growth, from what the run remembers of its skills (may be repeated)",
    )  # fmt: skip
    found = made.parse_args(argv)
    for change in found.what_if:
        if not change.startswith("growth.") or "=" not in change:
            raise UserError(f"--what-if {change}: give an option of growth and a value, as in growth.threshold=0.7")
    return ExplainOptions(found.run, found.skill, found.what_if)


def print_overview(decisions: list[dict[str, Any]]) -> None:
    """All decisions as a table, then a sentence for each."""
    table = Table(title="decisions, in order of arrival", title_justify="left")
    for name in ("skill", "action", "expert", "similarity", "needed", "loss before", "after"):
        table.add_column(name, justify="left" if name in ("skill", "action") else "right", min_width=6)
    for found in decisions:
        outcome = found.get("outcome") or {}
        table.add_row(
            found["skill"], _outcome(found), str(found["expert"]), _number(found.get("score")),
            _number(found.get("threshold")), _number(outcome.get("loss_before")), _number(outcome.get("loss")),
        )  # fmt: skip
    console.print(table)
    say(
        "Similarity is the cosine between the average document of a skill and that of the nearest skill known before; at "
        "'needed' and above, a skill counts as known. Losses are on the skill's validation text, in nats a token.\n"
    )
    for found in decisions:
        say(f"{found['skill']} {sentence(found)} ({found['reason']}).")
    last = next((found for found in reversed(decisions) if found.get("similarities")), {"similarities": {}})
    own = {found["skill"] for found in decisions}
    base = [name for name in last["similarities"] if name not in own]
    if base:
        say(f"\n{', '.join(base)}: what the base itself knew before the first skill came.")
    say("For one of them in full: dylora explain RUN SKILL")


def print_decision(found: dict[str, Any]) -> None:
    """One decision in full."""
    console.print(f"{found['skill']}: {_outcome(found)}", style="bold", markup=False)
    say(f"{found['skill']} {sentence(found)}.")
    say(f"Reason: {found['reason']}.")
    if found.get("similarities"):
        _similarities(found)
    if found.get("probe"):
        _probe(found["probe"], found)
    if found.get("bandit"):
        _bandit(found["bandit"])
    if found.get("outcome"):
        _came_of_it(found)
    if "seconds" in found:
        say(f"Deciding took {found['seconds']:.1f} s; seed {found.get('seed', 0)}.")


def _similarities(found: dict[str, Any]) -> None:
    table = Table(title="similarity to what was known (cosine: 1 is the same kind of text, 0 unrelated)")
    for name in ("skill", "similarity", ""):
        table.add_column(name, justify="right" if name == "similarity" else "left")
    top = max(found["similarities"].values())
    for name, value in sorted(found["similarities"].items(), key=lambda item: -item[1]):
        bar = "#" * max(0, round(30 * value))
        table.add_row(name, f"{value:.3f}", f"{bar}{' most similar' if value == top else ''}")
    console.print(table)
    low, high = found["interval"]
    relation = "which it reaches" if found["score"] >= found["threshold"] else "which it does not reach"
    say(
        f"From {found['samples']} of its documents ({found['tokens']} training tokens) the similarity is "
        f"{found['score']:.3f}, between {low:.3f} and {high:.3f} had other documents been drawn; a known skill needs "
        f"{found['threshold']:.3f}, {relation}."
    )
    if found["undecided"]:
        say("The threshold lies within that interval, so similarity alone cannot tell.")
    if found.get("novel_documents") is not None:
        say(f"Taken one by one, {found['novel_documents']:.0%} of its documents are unlike anything known.")


def _probe(probe: dict[str, Any], found: dict[str, Any]) -> None:
    table = Table(title="loss on its held-out text (nats a token: lower is better)")
    table.add_column("what")
    table.add_column("loss", justify="right")
    for column, loss in sorted(probe["losses"].items(), key=lambda item: int(item[0])):
        table.add_row(server(int(column)), f"{loss:.3f}")
    trial = probe.get("trial")
    if trial:
        table.add_row(f"a new expert after {trial['steps']} steps", f"{trial['loss']:.3f}")
    console.print(table)
    if trial:
        low, high = trial["interval"]
        say(
            f"The trial gains {trial['gain']:+.3f} nats over the best that exists, {low:+.3f} to {high:+.3f} over "
            f"{probe['documents']} documents."
        )


def _bandit(bandit: dict[str, Any]) -> None:
    chance = "for certain" if bandit["propensity"] is None else f"with probability {bandit['propensity']:.2f}"
    rewards = ", ".join(f"{arm} {value:+.3f}" for arm, value in bandit["rewards"].items()) or "not known yet"
    say(
        f"Noted for the bandit: {bandit['action']} was chosen {chance}; rewards (nats a token, price included): {rewards}."
    )


def _came_of_it(found: dict[str, Any]) -> None:
    outcome = found["outcome"]
    say(
        f"Outcome: its validation loss went from {outcome['loss_before']:.3f} (base alone {outcome['loss_base']:.3f}) to "
        f"{outcome['loss']:.3f} in {outcome['steps']} steps with {outcome['parameters']} new parameters; no other domain "
        f"rose by more than {max(0.0, outcome['worst_other_rise']):.3f}."
    )
    if outcome.get("refined"):
        refined = outcome["refined"]
        verb = "kept" if refined["kept"] else "rolled back"
        say(f"The refinement was {verb}: {refined['reason']}.")


def what_if(run: Path, decisions: list[dict[str, Any]], changes: list[str]) -> None:
    """Decisions with other options, beside what was decided."""
    from dylora_mlx.run.what_if import resimulate_run  # MLX, to read the run's library

    played = resimulate_run(run, decisions, changes)
    arrivals = [found for found in decisions if found["action"] not in decision_log.NON_ARRIVAL_ACTIONS]
    table = Table(title=f"what if {', '.join(changes)}", title_justify="left")
    for name in ("skill", "was", "would be", "similarity", "needed"):
        table.add_column(name, justify="right" if name in ("similarity", "needed") else "left")
    for found, (again, unknown) in zip(arrivals, played, strict=True):
        was, now = f"{found['action']} -> {found['expert']}", f"{again.action} -> {again.expert}"
        table.add_row(
            found["skill"], was, f"{now}{' *' if unknown else ''}", _number(again.score), _number(again.threshold),
            style="bold" if was != now else "",
        )  # fmt: skip
    console.print(table)
    counts = [sum(action == "create" for action in actions) for actions in (
        [found["action"] for found in arrivals], [again.action for again, _ in played],
    )]  # fmt: skip
    say(f"{counts[0]} experts were created; it would be {counts[1]}.")
    for found, (again, _) in zip(arrivals, played, strict=True):
        if (found["action"], found["expert"]) != (again.action, again.expert):
            say(f"{found['skill']}: {again.reason}.")
    if any(unknown for _, unknown in played):
        say("* the policy would measure losses first, which this run did not: what similarity alone says is shown.")
    if any(found["action"] in ("merge", "evict") for found in decisions):
        say("Merging and evicting are left out: what they cost shows only in training.")


def say(text: str) -> None:
    console.print(text, markup=False)


def _outcome(found: dict[str, Any]) -> str:
    return f"{found['action']} (undone)" if found.get("kept") is False else found["action"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def command(argv: list[str]) -> int:
    asked = parse(argv)
    decisions = decision_log.read_decisions(asked.run)
    try:
        with console.capture() as told:  # all of it or nothing
            _tell(asked, decisions)
        sys.stdout.write(told.get())
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"{asked.run / decision_log.FILE_NAME}: not as a run writes it ({error!r:.100}); restore it from a copy"
        ) from error
    return 0


def _tell(asked: ExplainOptions, decisions: list[dict[str, Any]]) -> None:
    if asked.changes:
        what_if(asked.run, decisions, asked.changes)
    elif asked.skill is None:
        print_overview(decisions)
    else:
        chosen = [found for found in decisions if found["skill"] == asked.skill]
        if not chosen:
            names = ", ".join(dict.fromkeys(found["skill"] for found in decisions))
            raise UserError(f"{asked.skill}: no decision on this skill in {asked.run}, there are {names}")
        for found in chosen:
            print_decision(found)


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
