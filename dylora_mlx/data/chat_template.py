"""The chat template that `data.chat_template` names: one that ships with the package, a file, or its text."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.config.paths import is_template_text
from dylora_mlx.data import rendering
from dylora_mlx.data.rendering import BUILTIN_TEMPLATES, FormatKind, SkillFormat
from dylora_mlx.errors import UserError

OPTION = "data.chat_template"
KINDS: dict[FormatKind, str] = {"plain": "plain text", "prompt": "prompts and completions", "chat": "chats"}
"""Kinds of records in words."""


def resolve_template(value: str | None) -> str | None:
    """Return the Jinja text that a value of data.chat_template stands for; None for None, the base's own template.

    A name of a built-in template counts before a file of that name. Raises UserError for a file that is missing or
    unreadable, and for text that is no Jinja template.
    """
    if value is None:
        return None
    if value in BUILTIN_TEMPLATES:
        return rendering.builtin_template(value)
    if is_template_text(value):
        _check(value, OPTION)
        return value
    path = Path(value).expanduser()
    text = _read(path)
    if not is_template_text(text):
        raise UserError(f"{path}: no chat template, there is neither {{% nor {{{{ in it ({OPTION})")
    _check(text, str(path))
    return text


def stored_template(value: str | None) -> str | None:
    """Return what a run's config keeps for a value of data.chat_template: the text in place of a file, names as they are."""
    return value if value in BUILTIN_TEMPLATES else resolve_template(value)


def describe_format(form: SkillFormat, chosen: str | None) -> str:
    """Return in words how a skill was learned.

    Args:
        form: the form of its records.
        chosen: the run's data.chat_template.
    """
    if form.kind != "chat":
        return KINDS[form.kind]
    for name in BUILTIN_TEMPLATES:
        if form.template == rendering.template_hash(rendering.builtin_template(name)):
            return f"{KINDS[form.kind]} in the {name} template that comes with the package"
    if chosen is not None and form.template == rendering.template_hash(chosen):
        return f"{KINDS[form.kind]} in the template of {OPTION}"
    return f"{KINDS[form.kind]} in the base's own template"


def _read(path: Path) -> str:
    choices = f"{OPTION} is {', '.join(BUILTIN_TEMPLATES)}, a file, or the text of a template"
    short_path = str(path) if len(str(path)) <= 200 else f"{str(path)[:197]}..."
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8; convert the file ({OPTION})") from error
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{short_path}: no such file; {choices}") from error
    except OSError as error:
        raise UserError(f"{short_path}: cannot be read ({error.strerror}); {choices}") from error


def _check(text: str, place: str) -> None:
    """Raise UserError if a text is no valid Jinja template. Nothing of it is run."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks the assistant's text. transformers has such an extension, but not in public."""

        tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    try:
        environment.compile(text)
    except TemplateSyntaxError as error:
        reason = " ".join(str(error.message).split())[:200]
        raise UserError(f"{place}, line {error.lineno}: not a Jinja template ({reason})") from error
    except (RecursionError, ValueError, OverflowError, SyntaxError, MemoryError) as error:
        raise UserError(f"{place}: not a Jinja template ({type(error).__name__})") from error
