"""Show what would be learned: dylora data CONFIG|SOURCE [--option VALUE].

The data are read and tokenized as training does it. Of the base only the tokenizer is loaded.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from dylora_mlx.cli.options import DataOptions, parse_data
from dylora_mlx.cli.parser import run_command
from dylora_mlx.config import Config, Source
from dylora_mlx.errors import UserError

DOCS = 3
"""Documents that are shown of each skill and split by default."""
BAR = 40
"""Characters of the longest bar of a histogram."""
MAX_PART, HEAD, TAIL = 900, 600, 250
"""Characters of a part of a document that are shown whole; else those shown of its beginning and its end."""
MAX_SHOWN = 6000
"""Characters of a document that are shown, about; further parts are counted."""
LEARNED, CONTEXT = "green", "dim"
"""Styles of what is learned, and of what is not."""
MIXED = (
    "Some skills are chats and others are not: generate asks all of them as chats; ask the others with --raw or "
    "--expert NAME."
)
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Visible symbols of control characters: they would act on the terminal."""
CONTROLS |= dict.fromkeys(range(128, 160), 0xFFFD)


class Named(NamedTuple):
    """A source of a config and its part in a run."""

    source: Source
    role: str
    """Words after its name; empty for a skill of the stream."""


def sources_of(config: Config) -> list[Named]:
    """Return all sources of a config: what the base knows, the skills in order, and domains that are only evaluated."""
    base_skill = config.growth.base_skill
    return [
        *([Named(base_skill, "what the base knows already (growth.base_skill)")] if base_skill else []),
        *(Named(source, "") for source in config.skills),
        *(Named(source, "evaluated, never learned (domains)") for source in config.domains),
    ]


def command(argv: list[str]) -> int:
    options = parse_data(argv)
    # Imported after parsing: --help needs no MLX.
    from dylora_mlx.data import skills, stream
    from dylora_mlx.data.chat_template import resolve_template
    from dylora_mlx.model.base.load import load_tokenizer
    from dylora_mlx.system import console

    config, named = options.config, sources_of(options.config)
    for source, _ in named:
        skills.locate_source(source)
    with console.output_mode("json" if options.json else "text"):
        tokenizer = load_tokenizer(config.model.base, resolve_template(config.data.chat_template))
        kinds = []
        for source, role in named:
            tokenized = stream.read_tokenized(source, config.data, tokenizer, config.seed)
            if options.json:
                print_json(source.name, tokenized.splits, options, tokenizer)
                continue
            skill = stream.make_skill(source, tokenized, config.data, tokenizer)
            with console.console.capture() as captured:
                print_counts(skill, role, tokenized.splits, config, tokenizer)
                print_documents(tokenized.splits, config.data.max_seq_length, options, tokenizer)
                if not role:
                    print_asked(skill, tokenizer)
                    kinds.append(skill.format.kind)
            write(captured.get())
        if "chat" in kinds and set(kinds) != {"chat"}:
            write(MIXED)
    return 0


def write(text: str) -> None:
    """Write text and a line break to standard output, with ? for characters that its encoding lacks.

    Raises BrokenPipeError where a pipe was closed. Rich's console would raise SystemExit instead.
    """
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def print_json(name: str, splits: dict[str, Any], options: DataOptions, tokenizer: Any) -> None:
    """Print one JSON object for each document of the chosen splits."""
    from dylora_mlx.data import inspect

    for split in options.show or splits:
        for document in splits[split][: options.docs]:
            print(json.dumps(inspect.to_json(name, split, document, tokenizer)), flush=True)


def print_counts(skill: Any, role: str, splits: dict[str, Any], config: Config, tokenizer: Any) -> None:
    """Print the counts of a skill: splits, form, files, remarks, and a histogram of lengths."""
    from dylora_mlx.data import counts as counting
    from dylora_mlx.data import inspect
    from dylora_mlx.system import console

    counts = counting.summarize(skill, config.data, tokenizer)
    console.info(f"{skill.name}{f': {role}' if role else ''}", style="bold")
    console.info(f"  source: {skill.source.source}")
    others = counting.in_other_forms(counts)
    console.info(f"  form: {counts.form}{f'; {others}' if others else ''}")
    if skill.info.files:
        files = ", ".join(f"{count:,} {ending}" for ending, count in skill.info.files.items())
        left_out = f"; left out: {skill.info.reasons()}" if skill.info.left_out else ""
        console.info(f"  files: {files}{left_out}")
    origins: dict[str, list[str]] = {}
    for name, split in counts.splits.items():
        origins.setdefault(split.origin, []).append(name)
    places = (f"{origin} ({', '.join(names)})" for origin, names in origins.items())
    console.info(f"  from: {'; '.join(places)}")
    table = Table()
    for column in ("split", "records", "docs", "tokens", "learned", "masked", "cut", "windows"):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=True)
    for name, split in counts.splits.items():
        numbers = (split.records, split.documents, split.tokens, split.learned, split.tokens - split.learned, split.cut)
        table.add_row(name, *(f"{number:,}" for number in (*numbers, split.windows)))
    console.render(table)
    for remark in counting.remarks(counts):
        console.info(f"  {remark}", style="yellow")
    if refusal := _refusal(skill, config):
        console.info(f"  train would refuse it: {refusal}", style="red")
    console.info("  documents by length in tokens")
    bins = inspect.histogram(
        [inspect.length(document) for of_split in splits.values() for document in of_split], counts.max_seq_length
    )
    longest, width = max(length_bin.documents for length_bin in bins), len(f"{bins[-1].high:,}")
    gap = False
    for low, high, count in bins:
        if count:
            bar, cut = "█" * max(1, round(BAR * count / longest)), " (cut)" if low > counts.max_seq_length else ""
            console.info(f"  {low:>{width},} to {high:>{width},}  {bar} {count:,}{cut}")
        elif not gap:
            console.info(f"  {'...':>{width}}")
        gap = not count


def _refusal(skill: Any, config: Config) -> str:
    """Return why training would refuse a skill's data; empty if it would not."""
    from dylora_mlx.run.build import check_enough_data

    try:
        if skill.source not in config.domains:
            check_enough_data(skill, config)
    except UserError as error:
        return str(error)
    return ""


def print_documents(splits: dict[str, Any], max_seq_length: int, options: DataOptions, tokenizer: Any) -> None:
    """Print the first documents of the chosen splits, what is learned in colour and the rest dimmed.

    Without colours, what is learned stands between « and ».
    """
    from dylora_mlx.data import inspect
    from dylora_mlx.system import console

    marked = console.console.no_color or console.console.color_system is None
    number_shown = DOCS if options.docs is None else options.docs
    if not number_shown:
        return
    if marked:
        console.info("  learned: between « and »")
    else:
        console.render(Text("  ").append("learned", LEARNED).append(", ").append("not learned", CONTEXT))
    for split in options.show or ["train"]:
        for number, document in enumerate(splits[split][:number_shown], 1):
            count, learned = inspect.length(document), int(document.loss_mask.sum())
            windows = f", cut into {-(-count // max_seq_length)} windows" if count > max_seq_length else ""
            heading = f"{split}, document {number} of {len(splits[split]):,}"
            console.info(f"  {heading}: {count:,} tokens, {learned:,} learned{windows}", style="bold")
            console.render(document_text(inspect.parts(document, tokenizer), marked))


def document_text(parts: list[Any], marked: bool) -> Text:
    """Return a document's parts as text for a terminal, indented. marked: put « and » around what is learned."""
    text, num_shown = Text("  "), 0
    for number, part in enumerate(parts):
        if num_shown > MAX_SHOWN:
            rest = sum(len(other.text) for other in parts[number:])
            text.append(f" … {rest:,} more characters in {len(parts) - number} parts", "italic")
            break
        content = visible(shortened(part.text))
        num_shown += len(content)
        text.append(f"«{content}»" if marked and part.learned else content, LEARNED if part.learned else CONTEXT)
    return text


def shortened(text: str) -> str:
    """Return a long text without its middle."""
    if len(text) <= MAX_PART:
        return text
    return f"{text[:HEAD]} … {len(text) - HEAD - TAIL:,} characters … {text[-TAIL:]}"


def visible(text: str) -> str:
    """Return a text with symbols for control characters, its further lines indented."""
    return text.translate(CONTROLS).replace("\n", "\n  ")


def print_asked(skill: Any, tokenizer: Any) -> None:
    """Print the text that generate sends for a prompt to a skill's expert."""
    from dylora_mlx.data import inspect
    from dylora_mlx.run.prompt_format import PromptFormat
    from dylora_mlx.system import console

    try:
        ids = PromptFormat(skill.format).ids("TEXT", tokenizer)
    except UserError as error:
        console.info(f"  generate cannot ask in this form: {error}", style="red")
        return
    prompt_text = inspect.decode(ids.tolist(), tokenizer).translate(CONTROLS).replace("\n", "⏎")
    console.info(f"  generate --prompt TEXT asks: {prompt_text}")


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
