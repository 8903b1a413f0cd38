"""What options there are: names, types, defaults and explanations, read from the dataclasses that declare them."""

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
"""Options that had another name before 0.1.0, by that name."""
RENAMED_OF_SOURCE = {"completion_only": "mask_prompt"}


def renamed(name: str, kind: type) -> str | None:
    """What an option is called now, by its earlier full name; None for a name that never was one.

    kind: the dataclass that the last part of the name is looked for in.
    """
    if kind is Source:
        section, _, last = name.rpartition(".")
        new = RENAMED_OF_SOURCE.get(last)
        return new and (f"{section}.{new}" if section else new)
    return RENAMED.get(name)


class Option(NamedTuple):
    """One option. name: as on a command line, such as growth.rank.max; default: as YAML has it, None if it must be given."""

    name: str
    type: Any
    default: str | None
    help: str


class Section(NamedTuple):
    """Options that stand together in a YAML file. prefix: of their names, such as `growth.rank.`, empty for the outermost."""

    prefix: str
    type: type
    options: tuple[Option, ...]


@cache
def sections(kind: type, prefix: str = "") -> tuple[Section, ...]:
    """A dataclass's sections, itself first, those within it after it. Entries of its lists are not looked into."""
    hints, said = get_type_hints(kind), field_docstrings(kind)
    plain = (entry for entry in fields(kind) if not is_section(hints[entry.name]))
    own = tuple(Option(prefix + e.name, hints[e.name], default_text(e), said.get(e.name, "")) for e in plain)
    return (Section(prefix, kind, own), *_nested_sections(hints, prefix))


def _nested_sections(hints: dict[str, Any], prefix: str) -> Iterator[Section]:
    for name, hint in hints.items():
        if is_section(hint):
            yield from sections(hint, f"{prefix}{name}.")


def is_section(hint: Any) -> TypeGuard[type]:
    """Whether a field of this type is a section of its own, not one option."""
    return isinstance(hint, type) and is_dataclass(hint)


@cache
def field_docstrings(kind: type) -> dict[str, str]:
    """What a dataclass says under each of its fields; empty where its source is not at hand."""
    try:
        made = ast.parse(inspect.getsource(kind)).body[0]
    except OSError:
        return {}
    assert isinstance(made, ast.ClassDef)
    found = {}
    for entry, after in zip(made.body, made.body[1:], strict=False):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            found[entry.target.id] = " ".join(str(after.value.value).split())
    return found


def type_name(hint: Any) -> str:
    """A type in words: `int or null`, `one of a, b`."""
    if get_origin(hint) is Literal:
        values = [str(value) for value in get_args(hint)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(type_name(part) for part in get_args(hint))
    return "null" if hint is type(None) else "source" if hint is Source else hint.__name__


def default_text(entry: Field) -> str | None:
    """A field's default as YAML has it, None for one that must be given."""
    if entry.default is MISSING and entry.default_factory is MISSING:
        return None
    value = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if isinstance(value, Source):
        value = {e.name: of for e in fields(Source) if (of := getattr(value, e.name)) != e.default}
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False).strip().removesuffix("...").strip()
