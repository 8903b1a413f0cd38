"""The code blocks of the documentation work: commands parse, and run where possible; YAML loads; Python runs.

Every command of a bash block is parsed by its own parser. It is also run, in a folder with tiny versions of the files that the
pages mention (runs/quickstart, my.yaml and so on), unless one of the lists below exempts it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from dylora_mlx import train
from dylora_mlx.cli.options import parse_train
from dylora_mlx.config import yaml_files
from dylora_mlx.errors import UserError
from dylora_mlx.run.cost import calibrate
from tests.conftest import SMALL_BASE
from tests.docs import documents
from tests.docs.documents import ROOT, Block, Command, Program, call
from tests.gguf_files import write_gguf

FOREIGN = {
    r"(\. |python3 -m venv|pip |pytest)": "makes or changes an environment",
    r"(hf|wandb)\b": "needs an account",
    r"(tensorboard|trackio|swanlab)\b": "a program of its own",
    r"llm openai": "needs a server; tests/serving/test_other_client.py has it",
    r"(vllm|llama-cli|llama-server) ": "other engines; tests/exporting/test_gguf_lora.py has llama.cpp",
    r"(mkdir|cp) .*\.lmstudio/models": "writes into LM Studio's folder",
}
"""Foreign commands, which are neither parsed nor run: the reason, by a pattern of their beginning."""
PARSED_ONLY = {
    r"--log\.to": "needs a package that may be missing; tests/training/metrics/test_trackers.py has it",
    r"--log\.wandb": "needs an account, or starts W&B's own service; tests/training/metrics/test_wandb_log.py has it",
    r"--tasks arc_easy": "downloads its data; tests/evaluation/test_harness.py has it with files",
    r"HumanEval": "twenty completions of every expert; the line before it runs",
    r"mlx_lm.convert|gemma-3-\w+-(text|4bit)": "downloads a large model; tests/test_convert_base.py and tests/bases.py have it",
    r"dylora serve": "serves until it is stopped; tests/test_serve.py has it",
    r"mlx_lm\.chat": "chats until it is left; tests/test_fuse.py has it",
    r"mlx_lm\.server": "serves until it is stopped; tests/test_fuse.py has its model",
    r"dylora restore": "nothing was removed from these runs; tests/run/test_growth_runs.py has it",
    r"tests/stress/(crash_test|soak|fuzz|grow)|tools/dev/audit": "minutes, or a network; tests/stress, tests/tools/test_audit.py",
    r"tests/stress/parallel_delay|hosts\.json": "needs root, or other machines; tests/distributed/test_parallel.py has it",
    r"tools/benchmarks/((serving_)?benchmark|compare_methods|novelty_benchmark|rank_law)|ranks\.json": "minutes to hours; has own tests",
    r"tools/benchmarks/router_scale": "an hour; tests/tools/test_router_scale.py",
}
"""Commands that are parsed but not run: the reason, by a pattern of a part of them."""
EXPORT = r"--verify|tools/benchmarks/evaluate_cuda|--tasks quiz"
"""Pattern of commands that need torch and peft, or lm-eval, which run with -m export."""
READ_ONLY = {
    r"import sys, torch": "needs torch; tests/exporting/test_runtime.py has it",
    "lm_eval": "downloads its tasks",
    "import openai": "needs a server; tests/serving/test_openai.py has it",
}
"""Python blocks that are compiled but not run: the reason, by a pattern of a part of them."""
FILLED_IN = {"FORMAT": "runtime", "DIR": "exported"}
"""Replacements of placeholder words in commands. (ADAPTER, FOLDER and the files that pages mention exist in `home`.)"""
SHORTER = {"dylora init": ["--force", "--out", "proposed.yaml", "--model.base", str(SMALL_BASE)],
           "dylora_mlx.generate": ["--max-tokens", "4"], "generate": ["--max-tokens", "4"], "mlx_lm.generate": ["--max-tokens", "4"],
           "dylora_mlx.evaluate --problems": ["--limit", "1", "--max-tokens", "4"],
           "tools/benchmarks/evaluate_cuda.py": ["--data", "sql=sql.jsonl", "--limit", "2"]}  # fmt: skip
"""Arguments appended to commands that are run, by words that they contain."""
FAILING = {"dylora doctor": "may find a problem with this machine"}
"""Commands that may exit with 1."""

TINY = """
model: {{base: '{base}'}}
skills: [{{name: sql, source: '{data}/sql', limit: 6}}]
growth: {{base_skill: null, threshold: 1.0, split: false, min_samples: 4, min_tokens: 100, bootstrap: 50, dense_steps: 0, anneal_steps: 0}}
data: {{max_seq_length: 128}}
training: {{max_steps: 1, memory_tokens: 128, router_fit_steps: 2, keep_checkpoints: 1}}
"""
"""Content of my.yaml, and of the shipped configs while commands run."""
SKILLS = {"requests": "requests", "flask": "python", "sql": "sql", "scripts": "requests_more"}
"""Skills of the runs that pages mention, with the packaged skill whose text each of them uses here."""
CREATED_RUNS = {"untracked", "again"}
"""Runs that a block creates itself, before it uses them."""
BASH, PYTHON = documents.blocks("bash"), documents.blocks("python")


@pytest.fixture(scope="module")
def home(short_skills, tmp_path_factory) -> Path:
    """A folder with all files that the pages mention."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("my", *(path.stem for path in (ROOT / "configs").glob("*.yaml"))):
        (folder / f"{name}.yaml").write_text(TINY.format(data=short_skills, base=SMALL_BASE))
    skills = json.dumps(
        [{"name": n, "source": str(short_skills / packaged), "limit": 6} for n, packaged in SKILLS.items()]
    )
    train_args = ["--config", str(folder / "my.yaml"), "--skills", skills, "--growth.policy", "threshold"]
    assert train.main([*train_args, "--runs", str(folder / "runs"), "--name", "quickstart"]) == 0
    for name in ("notes", "more", "sql"):
        lines = (short_skills / "sql" / "train.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:8]))
    shutil.copy(folder / "notes.jsonl", folder / "tickets.jsonl")
    (folder / "notes").mkdir()
    for number, line in enumerate((short_skills / "sql" / "train.jsonl").read_text().splitlines()):
        (folder / "notes" / f"{number}.md").write_text(json.loads(line)["text"])
    (folder / "prompts.jsonl").write_text('{"prompt": "SELECT name"}\n')
    (folder / "prompt.txt").write_text("SELECT name\n")
    question = {"prompt": "Is 7 even?\nAnswer:", "completion": " no\n", "label": "no", "options": ["yes", "no"]}
    (folder / "quiz.jsonl").write_text("".join(json.dumps(question | {"id": n}) + "\n" for n in range(20)))
    (folder / "tasks").mkdir()
    (task,) = documents.blocks("yml")
    (folder / "tasks" / "quiz.yaml").write_text(task.text)
    (folder / "mbpp").mkdir()
    (folder / "mbpp" / "test.jsonl").write_text(
        '{"text": "one", "code": "a = 1", "test_list": ["assert a == 1"]}\n' * 2
    )
    for name in ("path/to/gemma-3-270m", "dylora_mlx/assets/base"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(SMALL_BASE)
    write_gguf(folder / "llama.gguf", "llama")
    shutil.copytree(folder / "runs/quickstart/checkpoints/final/experts/expert_1", folder / "ADAPTER")
    export = [str(folder / "runs" / "quickstart"), "--out", str(folder / "FOLDER"), "--format", "runtime"]
    assert call(Program("dylora_mlx.export", export)) == 0
    return folder


class Terminal(io.StringIO):
    """Standard input of a terminal with no input."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def place(home, tmp_path, monkeypatch):
    """A copy of `home` as the current folder, without its runs; `with_runs` adds those that a block needs."""
    shutil.copytree(home, tmp_path / "here", symlinks=True, ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "stdin", Terminal())
    return tmp_path / "here"


def with_runs(text: str, home: Path) -> None:
    """Copy the finished run to every run folder that a block mentions."""
    for name in {*re.findall(r"\bruns/([\w-]+)", text)} - CREATED_RUNS:
        shutil.copytree(home / "runs" / "quickstart", Path("runs") / name)


def program_of(command: Command) -> Program | None:
    """Return the program that a command starts; None for a foreign one. Raises ValueError if it is unknown and not in FOREIGN."""
    program = documents.program([FILLED_IN.get(word, word) for word in command.words])
    if program is None and not any(re.match(begin, str(command)) for begin in FOREIGN):
        raise ValueError(f"{command}: neither a known command nor in FOREIGN")
    return program


def parse_error(command: Command) -> str:
    """Return the parse error of a command in a line; empty if it parses."""
    output = io.StringIO()
    try:
        program = program_of(command)
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
            if program is not None:
                documents.parse(program)
    except (UserError, ValueError, ImportError, OSError) as error:
        return f"{command}: {error}"
    except SystemExit as exit_info:
        return f"{command}: {output.getvalue()}" if exit_info.code else ""
    return ""


def run(command: Command, number: int) -> int:
    """Run a command, shortened; return its exit code."""
    program = program_of(command)
    assert program is not None
    argv = list(program.argv)
    for words, extra in SHORTER.items():
        argv += extra if set(words.split()) <= {program.name, *command.words} else []
    if "--resume" in argv:  # remove the final checkpoint, so that there is something to resume
        shutil.rmtree(Path(argv[argv.index("--resume") + 1]) / "checkpoints" / "final")
    elif program.name == "dylora_mlx.train" and "--help" not in argv:
        argv += ["--runs", f"trained-{number}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml_files, "CONFIG_FOLDERS", [Path()])
        patch.setattr(calibrate, "SECONDS", 0.5)
        if command.piped:
            patch.setattr(sys, "stdin", io.StringIO(Path(command.piped).read_text(encoding="utf-8")))
        return call(program._replace(argv=argv))


def follow(block: Block, export: bool, capsys) -> int:
    """Run the commands of a block that can be run; return their number."""
    count = 0
    for number, command in enumerate(documents.commands(block.text)):
        left_out = [*PARSED_ONLY, *([] if export else [EXPORT])]
        if program_of(command) is None or any(re.search(part, str(command)) for part in left_out):
            continue
        code = run(command, number)
        allowed = {0, 1} if str(command) in FAILING else {0}
        assert code in allowed, f"{block}: {command}: exit {code}: {capsys.readouterr().err}"
        count += 1
    return count


@pytest.mark.parametrize("block", BASH, ids=str)
def test_commands(block, home, place, capsys):
    with_runs(block.text, home)
    assert not [error for command in documents.commands(block.text) if (error := parse_error(command))]
    follow(block, False, capsys)


@pytest.mark.export
@pytest.mark.parametrize("block", [block for block in BASH if re.search(EXPORT, block.text)], ids=str)
def test_commands_that_need_an_extra(block, home, place, capsys):
    with_runs(block.text, home)
    assert follow(block, True, capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("dylora fuse runs/my --expart sql --out x", "--expart"),
        ("dylora fuze runs/my", "no command 'fuze'"),
        ("dylora train --training.epoch 3", "training.epoch"),
        ("dylora plan my.yaml --growth.policy guess", "growth.policy"),
        ("python -m dylora_mlx.train --config nothing", "no such config file"),
        ("python -m dylora_mlx.generate runs/my --routing word", "--routing"),
        ("dylora export runs/my --out x --format gguf", "--format"),
        ("python tools/nothing.py", "nothing.py"),
        ("python -m dylora_mlx.nothing", "dylora_mlx.nothing"),
        ("mlx_lm.generate --modell x", "--modell"),
        ("make all", "neither a known command"),
    ],
)
def test_a_wrong_command_would_be_found(place, command, message):
    assert message in parse_error(documents.commands(command)[0])


@pytest.mark.parametrize("block", documents.blocks("yaml"), ids=str)
def test_yaml_blocks_are_configs(block, place):
    (place / "block.yaml").write_text(block.text)
    assert parse_train(["--config", "my.yaml", "--config", "block.yaml"]).config


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block, home, place, monkeypatch):
    with_runs(block.text, home)
    monkeypatch.setattr(yaml_files, "CONFIG_FOLDERS", [place])
    code = compile(textwrap.dedent(block.text), str(block), "exec")
    if not any(re.search(part, block.text) for part in READ_ONLY):
        exec(code, {"__name__": "__main__"})


def test_every_exception_is_needed():
    lines = [str(command) for block in BASH for command in documents.commands(block.text)]
    unused = [part for part in (*FOREIGN, *PARSED_ONLY, EXPORT) if not any(re.search(part, line) for line in lines)]
    unused += [part for part in READ_ONLY if not any(re.search(part, block.text) for block in PYTHON)]
    assert not unused
