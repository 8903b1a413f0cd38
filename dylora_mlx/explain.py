"""Explain a run's growth decisions: dylora explain RUN [SKILL] [--what-if growth.threshold=0.7]. No model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.config.yaml_files import read_config_file
from dylora_mlx.data.chat_template import describe_format
from dylora_mlx.data.rendering import SkillFormat
from dylora_mlx.errors import UserError
from dylora_mlx.growth.decide import decision_log
from dylora_mlx.reporting.page import DAMAGED
from dylora_mlx.reporting.sentences import sentence, server
from dylora_mlx.system.files import read_json
from dylora_mlx.system.run_format import check_format

EXAMPLES = """  dylora explain runs/quickstart                                      every decision of a run
  dylora explain runs/quickstart flask                                one of them, in full
  dylora explain runs/quickstart --what-if growth.threshold=0.6       what would have been decided
"""
console = Console(highlight=False, soft_wrap=True)


class ExplainOptions(NamedTuple):
    """The parsed command line."""

    run: Path
    skill: str | None
    """The skill whose decision is explained in full; None for an overview."""
    changes: list[str]
    """Options to decide again with, each as growth.name=value."""


def parse(argv: list[str]) -> ExplainOptions:
    """Parse the command line of explain. Raises UserError for a --what-if that is no option of growth with a value."""
    description = "Explain why a run created, reused, refined, merged or evicted its experts."
    parser = Parser("dylora explain", description, EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("skill", nargs="?", help="print this skill's decision in full")
    parser.add_argument(
        "--what-if", metavar="OPTION=VALUE", action="append", default=[],
        help="repeat the decisions with this growth option changed, from the run's stored library (may be repeated)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for change in options.what_if:
        if not change.startswith("growth.") or "=" not in change:
            raise UserError(f"--what-if {change}: give an option of growth and a value, as in growth.threshold=0.7")
    return ExplainOptions(options.run, options.skill, options.what_if)


def learned_forms(run: Path) -> dict[str, str]:
    """Return in words how each skill of a run was learned, by name; empty for a run that did not record it.

    The newest checkpoint's pool.json has it. One that is damaged counts as none: the decisions are worth printing without.
    """
    checkpoints = run / "checkpoints"
    steps = [path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    steps.sort(key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
    try:
        newest = next(path for path in (checkpoints / "final", *steps) if (path / "pool.json").is_file())
        chosen = read_config_file(run / "config.yaml").get("data", {}).get("chat_template")
        entries = read_json(newest / "pool.json")["library"]["entries"]
        forms = {entry["skill"]: SkillFormat.parse(entry.get("format", "")) for entry in entries}
    except (UserError, StopIteration, *DAMAGED):
        return {}
    chosen = chosen if isinstance(chosen, str) else None
    return {skill: describe_format(form, chosen) for skill, form in forms.items() if form is not None}


def print_forms(forms: dict[str, str]) -> None:
    """Print which skills were learned in which form, a line for each form."""
    for form in dict.fromkeys(forms.values()):
        skills = [skill for skill, other in forms.items() if other == form]
        print_line(f"Learned as {form}: {', '.join(skills)}.")


def print_overview(decisions: list[dict[str, Any]], forms: dict[str, str]) -> None:
    """Print all decisions as a table, then a sentence for each, then the forms that skills were learned in."""
    table = Table(title="decisions, in order of arrival", title_justify="left")
    for name in ("skill", "action", "expert", "similarity", "needed", "loss before", "after"):
        table.add_column(name, justify="left" if name in ("skill", "action") else "right", min_width=6)
    for decision in decisions:
        outcome = decision.get("outcome") or {}
        table.add_row(
            decision["skill"], _action_label(decision), str(decision["expert"]), _format_number(decision.get("score")),
            _format_number(_needed(decision)), _format_number(outcome.get("loss_before")), _format_number(outcome.get("loss")),
        )  # fmt: skip
    console.print(table)
    print_line(
        "Similarity is that of a skill's average document to the nearest skill known before (with growth.similarity median, the "
        "median over all of them); at 'needed' and above, a skill counts as known. Losses are on the skill's validation text, in "
        "nats a token.\n"
    )
    for decision in decisions:
        print_line(f"{decision['skill']} {sentence(decision)} ({decision['reason']}).")
    last = next((decision for decision in reversed(decisions) if decision.get("similarities")), {"similarities": {}})
    arrived = {decision["skill"] for decision in decisions}
    base = [name for name in last["similarities"] if name not in arrived]
    if base:
        print_line(f"\n{', '.join(base)}: what the base itself knew before the first skill came.")
    print_forms(forms)
    print_line("For one of them in full: dylora explain RUN SKILL")


def print_decision(decision: dict[str, Any], form: str | None) -> None:
    """Print one decision in full, and the form that the skill was learned in, if that was recorded."""
    console.print(f"{decision['skill']}: {_action_label(decision)}", style="bold", markup=False)
    print_line(f"{decision['skill']} {sentence(decision)}.")
    print_line(f"Reason: {decision['reason']}.")
    if form is not None:
        print_line(f"Its records were read as {form}.")
    if decision.get("similarities"):
        _print_similarities(decision)
    if decision.get("probe"):
        _print_probe(decision["probe"], decision)
    if decision.get("bandit"):
        _print_bandit(decision["bandit"])
    if decision.get("outcome"):
        _print_outcome(decision)
    if "seconds" in decision:
        print_line(f"Deciding took {decision['seconds']:.1f} s; seed {decision.get('seed', 0)}.")


def _needed(decision: dict[str, Any]) -> float | None:
    """Return the similarity from which a skill counts as known."""
    limits = decision.get("limits")
    return limits[1] if limits else decision.get("threshold")


def _print_similarities(decision: dict[str, Any]) -> None:
    """Print the similarity to every known skill, its interval and the threshold."""
    table = Table(title="similarity to what was known (1 is the same kind of text, 0 unrelated)")
    for name in ("skill", "similarity", ""):
        table.add_column(name, justify="right" if name == "similarity" else "left")
    top = max(decision["similarities"].values())
    for name, value in sorted(decision["similarities"].items(), key=lambda item: -item[1]):
        bar = "#" * max(0, round(30 * value))
        table.add_row(name, f"{value:.3f}", f"{bar}{' most similar' if value == top else ''}")
    console.print(table)
    low, high = decision["interval"]
    limits = decision.get("limits")
    if limits is None:
        relation = "which it reaches" if decision["score"] >= decision["threshold"] else "which it does not reach"
        needed = f"a known skill needs {decision['threshold']:.3f}, {relation}"
        doubt = "The threshold lies within that interval"
    else:
        needed = f"a skill is new below {limits[0]:.3f} and known from {limits[1]:.3f}"
        doubt = "It lies between the two"
    print_line(
        f"From {decision['samples']} of its documents ({decision['tokens']} training tokens) the similarity is "
        f"{decision['score']:.3f}, between {low:.3f} and {high:.3f} had other documents been drawn; {needed}."
    )
    if decision["undecided"]:
        print_line(f"{doubt}, so similarity alone cannot tell.")
    if decision.get("novel_documents") is not None:
        print_line(f"Taken one by one, {decision['novel_documents']:.0%} of its documents are unlike anything known.")


def _print_probe(probe: dict[str, Any], decision: dict[str, Any]) -> None:
    """Print the probe's losses by expert and the trial expert's gain."""
    table = Table(title="loss on its held-out text (nats a token: lower is better)")
    table.add_column("what")
    table.add_column("loss", justify="right")
    for expert_id, loss in sorted(probe["losses"].items(), key=lambda item: int(item[0])):
        table.add_row(server(int(expert_id)), f"{loss:.3f}")
    trial = probe.get("trial")
    if trial:
        table.add_row(f"a new expert after {trial['steps']} steps", f"{trial['loss']:.3f}")
    console.print(table)
    if trial:
        low, high = trial["interval"]
        print_line(
            f"The trial gains {trial['gain']:+.3f} nats over the best that exists, {low:+.3f} to {high:+.3f} over "
            f"{probe['documents']} documents."
        )


def _print_bandit(bandit: dict[str, Any]) -> None:
    """Print the trial that the decision adds to the bandit's history."""
    probability = "for certain" if bandit["propensity"] is None else f"with probability {bandit['propensity']:.2f}"
    rewards = ", ".join(f"{arm} {value:+.3f}" for arm, value in bandit["rewards"].items()) or "not known yet"
    print_line(
        f"Noted for the bandit: {bandit['action']} was chosen {probability}; rewards (nats a token, price included): {rewards}."
    )


def _print_outcome(decision: dict[str, Any]) -> None:
    """Print the losses before and after training, and whether a refinement was kept."""
    outcome = decision["outcome"]
    print_line(
        f"Outcome: its validation loss went from {outcome['loss_before']:.3f} (base alone {outcome['loss_base']:.3f}) to "
        f"{outcome['loss']:.3f} in {outcome['steps']} steps with {outcome['parameters']} new parameters; no other domain "
        f"that was measured rose by more than {max(0.0, outcome['worst_other_rise']):.3f}."
    )
    for what, verdict in (("refinement", outcome.get("refined")), ("new expert", outcome.get("created"))):
        if verdict:
            print_line(f"The {what} was {'kept' if verdict['kept'] else 'undone'}: {verdict['reason']}.")


def what_if(run: Path, decisions: list[dict[str, Any]], changes: list[str]) -> None:
    """Print the decisions under other options next to the logged ones."""
    from dylora_mlx.run.what_if import resimulate_run  # imported here: it loads MLX, to read the run's library

    resimulated = resimulate_run(run, decisions, changes)
    arrivals = [decision for decision in decisions if decision["action"] not in decision_log.NON_ARRIVAL_ACTIONS]
    table = Table(title=f"what if {', '.join(changes)}", title_justify="left")
    for name in ("skill", "was", "would be", "similarity", "needed"):
        table.add_column(name, justify="right" if name in ("similarity", "needed") else "left")
    for decision, (new, unknown) in zip(arrivals, resimulated, strict=True):
        was, now = f"{decision['action']} -> {decision['expert']}", f"{new.action} -> {new.expert}"
        table.add_row(
            decision["skill"], was, f"{now}{' *' if unknown else ''}", _format_number(new.score),
            _format_number(_needed(new.to_json())),
            style="bold" if was != now else "",
        )  # fmt: skip
    console.print(table)
    counts = [sum(action == "create" for action in actions) for actions in (
        [decision["action"] for decision in arrivals], [new.action for new, _ in resimulated],
    )]  # fmt: skip
    print_line(f"{counts[0]} experts were created; it would be {counts[1]}.")
    for decision, (new, _) in zip(arrivals, resimulated, strict=True):
        if (decision["action"], decision["expert"]) != (new.action, new.expert):
            print_line(f"{decision['skill']}: {new.reason}.")
    if any(unknown for _, unknown in resimulated):
        print_line(
            "* the policy would measure losses first, which this run did not: the decision by similarity alone is shown."
        )
    if any(decision["action"] in ("merge", "evict") for decision in decisions):
        print_line("Merging and evicting are left out: what they cost shows only in training.")


def print_line(text: str) -> None:
    console.print(text, markup=False)


def _action_label(decision: dict[str, Any]) -> str:
    """Return the decision's action, marked if it was rolled back."""
    return f"{decision['action']} (undone)" if decision.get("kept") is False else decision["action"]


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def command(argv: list[str]) -> int:
    options = parse(argv)
    check_format(options.run)
    decisions = decision_log.read_decisions(options.run)
    try:
        with console.capture() as output:  # print everything or, if a record is damaged, only the error
            _print_explanation(options, decisions)
        sys.stdout.write(output.get())
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"{options.run / decision_log.FILE_NAME}: not as a run writes it ({error!r:.100}); restore it from a copy"
        ) from error
    return 0


def _print_explanation(options: ExplainOptions, decisions: list[dict[str, Any]]) -> None:
    """Print the answer to the command line. Raises UserError for a skill without a decision."""
    if options.changes:
        what_if(options.run, decisions, options.changes)
    elif options.skill is None:
        print_overview(decisions, learned_forms(options.run))
    else:
        chosen = [decision for decision in decisions if decision["skill"] == options.skill]
        if not chosen:
            names = ", ".join(dict.fromkeys(decision["skill"] for decision in decisions))
            raise UserError(f"{options.skill}: no decision on this skill in {options.run}, there are {names}")
        for decision in chosen:
            print_decision(decision, learned_forms(options.run).get(decision["skill"]))


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
