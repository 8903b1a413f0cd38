"""The catalog of options: names, types, defaults and help texts, read from the dataclasses that declare them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeGuard, get_args, get_origin, get_type_hints

import yaml

from dylora_mlx.config import Source

RENAMED = {
    "data.pack_window": "data.packing_window",
    "data.row_length": "data.max_seq_length",
    "growth.final_top_k": "growth.top_k",
    "growth.floor": "growth.min_gate",
    "growth.replay": "growth.replay_fraction",
    "growth.start": "growth.expert_init",
    "growth.top2_steps": "growth.anneal_steps",
    "growth.warmup_steps": "growth.dense_steps",
    "log.every": "log.steps_per_report",
    "log.project": "log.project_name",
    "model.composition": "model.mixing",
    "model.context": "model.document_mean_weight",
    "model.lookup_ratio": "model.gather_threshold",
    "model.tap": "model.router_layer",
    "training.accumulation": "training.grad_accumulation_steps",
    "training.balance": "training.load_balance_coef",
    "training.batch_rows": "training.batch_size",
    "training.capacity": "training.capacity_factor",
    "training.checkpoint_every": "training.save_every",
    "training.clip_norm": "training.max_grad_norm",
    "training.distillation": "training.distillation_coef",
    "training.entropy": "training.entropy_coef",
    "training.eval_every": "training.steps_per_eval",
    "training.final_fraction": "training.lr_min_fraction",
    "training.rehearsal": "training.rehearsal_coef",
    "training.replay": "training.replay_coef",
    "training.warmup_fraction": "training.lr_warmup_fraction",
    "training.z_loss": "training.z_loss_coef",
}
"""Current full name of every option that had another name before 0.1.0, by its old full name."""
REMOVED = {
    "growth.ridge_start": "every fit of the router starts from its closed-form rows",
    "growth.false_alarm": "growth.false_new and growth.false_known set the limits of every run without a growth.threshold",
}
"""Options that are gone, by full name, and why. A stored run may still have them."""
RENAMED_OF_SOURCE = {"completion_only": "mask_prompt"}
"""Current name of every renamed field of Source, by its old name."""


def renamed(name: str, kind: type) -> str | None:
    """Return the current full name of a renamed option, or None if `name` never was an option's old name.

    Args:
        name: old full name, as in training.eval_every.
        kind: the dataclass that declares it: Config, one of its sections, or Source.
    """
    if kind is Source:
        section, _, last = name.rpartition(".")
        new = RENAMED_OF_SOURCE.get(last)
        return new and (f"{section}.{new}" if section else new)
    return RENAMED.get(name)


class Option(NamedTuple):
    """One option of a config or source."""

    name: str
    """Full name as on the command line, such as growth.rank.max."""
    type: Any
    default: str | None
    """Default as YAML text; None if the option is required."""
    help: str


class Section(NamedTuple):
    """Options that form one mapping in a YAML file."""

    prefix: str
    """Prefix of their full names, such as `growth.rank.`; empty for the outermost section."""
    type: type
    options: tuple[Option, ...]


@cache
def sections(kind: type, prefix: str = "") -> tuple[Section, ...]:
    """Return the sections of a dataclass: itself first, then the nested ones, depth first.

    Entries of lists (skills, domains) are not expanded.
    """
    hints, docstrings = get_type_hints(kind), field_docstrings(kind)
    plain_fields = (entry for entry in fields(kind) if not is_section(hints[entry.name]))
    options = tuple(
        Option(prefix + e.name, hints[e.name], default_text(e), docstrings.get(e.name, "")) for e in plain_fields
    )
    return (Section(prefix, kind, options), *_nested_sections(hints, prefix))


def _nested_sections(hints: dict[str, Any], prefix: str) -> Iterator[Section]:
    for name, hint in hints.items():
        if is_section(hint):
            yield from sections(hint, f"{prefix}{name}.")


def is_section(hint: Any) -> TypeGuard[type]:
    """Return whether a field of this type is a nested section rather than a single option."""
    return isinstance(hint, type) and is_dataclass(hint)


@cache
def field_docstrings(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, by field name; empty if the source code is unavailable."""
    try:
        class_node = ast.parse(inspect.getsource(kind)).body[0]
    except OSError:
        return {}
    assert isinstance(class_node, ast.ClassDef)
    docstrings = {}
    for entry, next_node in zip(class_node.body, class_node.body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and isinstance(next_node, ast.Expr):
            assert isinstance(next_node.value, ast.Constant)
            docstrings[entry.target.id] = " ".join(str(next_node.value.value).split())
    return docstrings


def type_name(hint: Any) -> str:
    """Return a type in words: `int or null`, `one of a, b`."""
    if get_origin(hint) is Literal:
        values = [str(value) for value in get_args(hint)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(type_name(part) for part in get_args(hint))
    return "null" if hint is type(None) else "source" if hint is Source else hint.__name__


def default_text(entry: Field) -> str | None:
    """Return a field's default as YAML text, or None for a required field."""
    if entry.default is MISSING and entry.default_factory is MISSING:
        return None
    value = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if isinstance(value, Source):
        value = {e.name: field_value for e in fields(Source) if (field_value := getattr(value, e.name)) != e.default}
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip().removesuffix("...").strip()
