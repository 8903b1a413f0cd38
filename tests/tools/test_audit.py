"""What the package may never call, read from its source; and tools/dev/audit.py against made packages and a made service."""

from __future__ import annotations

import ast
import io
import json
import sys
import urllib.error
from pathlib import Path

import audit
import pytest
from yaml.constructor import FullConstructor, SafeConstructor

from dylora_mlx.system.files import SafeLoader

HOME = Path(__file__).parents[2]
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "pty.spawn"}
TRUE = {"shell", "trust_remote_code", "allow_pickle", "weights_only=False"}
ALLOWED = {("dylora_mlx/evaluation/guard.py", "exec"), ("dylora_mlx/evaluation/guard.py", "compile")}
"""The program that evaluate --allow-code-execution asks for, in its own fenced process."""


def dangers(text: str) -> set[str]:
    """What a source does that could run code from data."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            found.add(str(node.module))
        elif isinstance(node, ast.Call):
            name, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            found |= {name} & CALLS
            found |= {f"{word}={words[word]}" for word in TRUE & words.keys() if words[word] != "False"}
            if words.get("weights_only") == "False":
                found.add("weights_only=False")
            if name in ("yaml.load", "yaml.load_all") and "SafeLoader" not in ast.unparse(node):
                found.add(name)
            if name in ("yaml.unsafe_load", "yaml.full_load"):
                found.add(name)
    return found


@pytest.mark.parametrize("folder", ["dylora_mlx", "tools"])
def test_nothing_runs_code_from_data(folder):
    sources = sorted((HOME / folder).rglob("*.py"))
    assert len(sources) > 40
    found = {(p.relative_to(HOME).as_posix(), d) for p in sources for d in dangers(p.read_text(encoding="utf-8"))}
    assert found - ALLOWED == set()
    assert folder == "tools" or found == ALLOWED


def test_the_loader_of_yaml_makes_plain_values_only():
    """It is passed by name: what the name stands for."""
    assert issubclass(SafeLoader, SafeConstructor)
    assert not issubclass(SafeLoader, FullConstructor)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import dill.source", "eval('1')", "exec(x)", "os.system('ls')", "torch.load(p)",
        "subprocess.run(x, shell=True)", "load(p, trust_remote_code=True)", "load(p, trust_remote_code=found)",
        "np.load(p, allow_pickle=True)", "f(p, weights_only=False)", "yaml.load(t, yaml.Loader)", "yaml.unsafe_load(t)",
    ],
)  # fmt: skip
def test_a_danger_would_be_found(text):
    assert dangers(text)


@pytest.mark.parametrize("text", ["mx.eval(x)", "model.eval()", "np.load(p, allow_pickle=False)", "re.compile('a')"])
def test_what_only_looks_like_one(text):
    assert not dangers(text)


# The tool. Packages are folders of metadata.


def package(home: Path, name: str, version: str, *requires: str) -> None:
    folder = home / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    package(
        tmp_path, "dylora-mlx", "1.0", "first>=2,<3", "elsewhere; sys_platform == 'none'", "extra-one; extra == 'more'"
    )
    package(tmp_path, "first", "2.5+cpu", "second[fast]<1")
    package(tmp_path, "second", "0.9", "third>=1; extra == 'fast'", "fourth; extra == 'other'")
    package(tmp_path, "third", "1.0")
    return tmp_path


def service(monkeypatch, answer):
    asked = []

    def urlopen(request, timeout):
        asked.append(json.loads(request.data))
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(json.dumps(answer(asked[-1]["queries"])).encode())

    monkeypatch.setattr(audit.urllib.request, "urlopen", urlopen)
    return asked


def test_direct_and_indirect_ones_are_asked_for(packages, monkeypatch, capsys):
    asked = service(monkeypatch, lambda queries: {"results": [{} for _ in queries]})
    assert audit.main([]) == 0
    sent = {query["package"]["name"]: query["version"] for query in asked[0]["queries"]}
    assert sent == {"dylora-mlx": "1.0", "first": "2.5", "second": "0.9", "third": "1.0"}
    assert capsys.readouterr().out.splitlines() == [
        "4 packages are installed, all within their version bounds",
        "advisories: 0 known for the installed versions",
    ]


def test_an_advisory_fails(packages, monkeypatch, capsys):
    vulnerable = {"third": {"vulns": [{"id": "PYSEC-1"}, {"id": "GHSA-2"}]}}
    service(monkeypatch, lambda queries: {"results": [vulnerable.get(q["package"]["name"], {}) for q in queries]})
    assert audit.main([]) == 1
    assert "  third 1.0: https://osv.dev/PYSEC-1, https://osv.dev/GHSA-2" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "answer",
    [urllib.error.URLError("no route"), TimeoutError("timed out"), lambda queries: {"other": 1}, lambda queries: []],
)
def test_a_service_out_of_reach_is_told_and_fails_nothing(packages, monkeypatch, capsys, answer):
    service(monkeypatch, answer)
    assert audit.main([]) == 0
    assert "advisories: NOT CHECKED" in capsys.readouterr().out


def test_bounds(packages, capsys):
    package(packages, "extra-one", "1.0", "first>=3", "missing")
    assert audit.main(["--offline"]) == 0
    assert audit.main(["--offline", "--extras", "more"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "out of bounds: first 2.5+cpu: extra-one requires >=3" in out
    assert "out of bounds: missing: required by extra-one, but not installed" in out


def test_nothing_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert audit.main([]) == 2
    assert capsys.readouterr().err == "error: dylora-mlx is not installed; pip install . first\n"


def test_every_dependency_has_an_upper_bound():
    text = (HOME / "pyproject.toml").read_text(encoding="utf-8")
    listed = text[text.index("dependencies = [") : text.index("dev = [")]
    quoted = [line.split('"')[1] for line in listed.splitlines() if line.strip().startswith('"')]
    quoted += [part for line in listed.splitlines() if "= [" in line for part in line.split('"')[1::2]]
    assert len(quoted) > 15
    assert [requirement for requirement in quoted if "<" not in requirement] == []
