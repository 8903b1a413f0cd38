"""Tasks of development: `pip install nox`, then `nox -s NAME`, or `nox` for tests and checks.

Each session makes a virtual environment of its own. In one that is prepared already, `nox --no-venv -s NAME` installs nothing.
"""

from __future__ import annotations

import glob
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["test", "lint", "docs"]
nox.options.reuse_existing_virtualenvs = True
TORCH = "torch==2.13.0"


def install(session: nox.Session, *packages: str) -> None:
    """Install packages, unless the session runs in the caller's own environment."""
    if session.virtualenv.venv_backend != "none":
        session.install(*packages)


@nox.session
def test(session: nox.Session) -> None:
    """The default suite, some minutes. Arguments after -- go to pytest."""
    install(session, "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, style, types."""
    install(session, "-e", ".[test]", "ruff", "pyright", TORCH, "peft", "plotly", "mkdocs")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("pyright", "dylora_mlx", "tools")


@nox.session
def docs(session: nox.Session) -> None:
    """Links lead somewhere, and docs/reference.md is what the code says. `-- --write` writes it anew."""
    install(session, "-e", ".[test]")
    session.run("python", "tools/dev/check_links.py")
    session.run("python", "tools/dev/write_reference.py", *([] if "--write" in session.posargs else ["--check"]))


@nox.session
def site(session: nox.Session) -> None:
    """The documentation as a site, in site/, without a warning: pages, links and anchors exist."""
    install(session, ".[docs]")
    session.run("python", "tools/docs/release_history.py", "--check")
    session.run("mkdocs", "build", "--strict", "--site-dir", "site", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def package(session: nox.Session) -> None:
    """The wheel and the source archive hold what they need and no more. `-- --out dist` keeps them."""
    install(session, "build", "twine")
    folder = session.posargs[1] if session.posargs[:1] == ["--out"] else str(Path(session.create_tmp()) / "dist")
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "tools/dev/check_package.py", "--out", folder)
    session.run("twine", "check", "--strict", *glob.glob(f"{folder}/*"))


@nox.session(name="install")
def install_wheel(session: nox.Session) -> None:
    """The wheel alone, outside the repository: pipx, uvx, and a first run, export and fuse."""
    install(session, "build", "pipx", "uv")
    place = Path(session.create_tmp()).resolve() / "outside"
    shutil.rmtree(place, ignore_errors=True)
    session.run("python", "tools/dev/check_package.py", "--out", str(place / "dist"))
    wheel = str(next((place / "dist").glob("*.whl")))
    env = {"PIPX_HOME": str(place / "pipx"), "PIPX_BIN_DIR": str(place / "bin"), "HF_HUB_OFFLINE": "1"}
    session.chdir(place)
    session.run("pipx", "install", wheel, env=env)
    dylora = str(place / "bin" / "dylora")
    session.run("uvx", "--from", wheel, "dylora-mlx", "--version", env=env)
    for folder, files in {"notes": "docs/*.md", "scripts": "tools/dev/*.py"}.items():
        (place / folder).mkdir()
        for file in Path(__file__).parent.glob(files):
            shutil.copy(file, place / folder)
    for arguments in (
        ["--version"], ["doctor"], ["train", "--training.max_steps", "2"],
        ["generate", "runs/quickstart", "--prompt", "import flask", "--max-tokens", "4"],
        ["export", "runs/quickstart", "--out", "peft"],
        ["fuse", "runs/quickstart", "--expert", "sql", "--out", "sql-model"],
        ["init", "notes", "scripts"], ["data", "my.yaml", "--docs", "0"],
    ):  # fmt: skip
        session.run(
            dylora, *arguments, env=env, external=True, success_codes=[0, 1] if arguments == ["doctor"] else [0]
        )


@nox.session
def audit(session: nox.Session) -> None:
    """Installed versions are within pyproject.toml's bounds, and no advisory is known for them."""
    install(session, "-e", ".[test]")
    session.run("python", "tools/dev/audit.py", "--extras", "test")


@nox.session
def export(session: nox.Session) -> None:
    """Exports against PyTorch and PEFT, on logits; tasks of lm-evaluation-harness."""
    install(session, "-e", ".[test,harness]", TORCH, "peft", "plotly")
    session.run("pytest", "-m", "export", *session.posargs)


@nox.session
def stress(session: nox.Session) -> None:
    """Runs that are killed end with the same bits: five kills, and a pool that grows to 40 skills. `-- all`: every slow test."""
    install(session, "-e", ".[test]")
    which = (
        []
        if "all" in session.posargs
        else ["tests/stress/test_crash.py", "tests/stress/test_grow.py", "-k", "five_kills or forty"]
    )
    session.run("pytest", "-n", "0", "-m", "slow", *which)


@nox.session
def bench(session: nox.Session) -> None:
    """Speed and memory of a step against mlx-lm's trainer, three minutes on the embedded base."""
    install(session, "-e", ".")
    session.run("python", "tools/benchmarks/benchmark.py", *(session.posargs or ["--size", "embedded"]))
