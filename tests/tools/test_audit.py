"""The package calls nothing that runs code from data; tools/dev/audit.py on synthetic packages and a stub service."""

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
"""The sandboxed process that runs programs for evaluate --allow-code-execution."""


def dangers(text: str) -> set[str]:
    """Return the names in a source that could run code from data."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            names.add(str(node.module))
        elif isinstance(node, ast.Call):
            function, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            names |= {function} & CALLS
            names |= {
                f"{keyword}={keywords[keyword]}" for keyword in TRUE & keywords.keys() if keywords[keyword] != "False"
            }
            if keywords.get("weights_only") == "False":
                names.add("weights_only=False")
            if function in ("yaml.load", "yaml.load_all") and "SafeLoader" not in ast.unparse(node):
                names.add(function)
            if function in ("yaml.unsafe_load", "yaml.full_load"):
                names.add(function)
    return names


@pytest.mark.parametrize("folder", ["dylora_mlx", "tools"])
def test_nothing_runs_code_from_data(folder):
    sources = sorted((HOME / folder).rglob("*.py"))
    assert len(sources) > 40
    calls = {(p.relative_to(HOME).as_posix(), d) for p in sources for d in dangers(p.read_text(encoding="utf-8"))}
    assert calls - ALLOWED == set()
    assert folder == "tools" or calls == ALLOWED


def test_the_yaml_loader_creates_only_plain_values():
    """The check above accepts SafeLoader by name, so this test checks the class of that name."""
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
def test_dangerous_code_is_detected(text):
    assert dangers(text)


@pytest.mark.parametrize("text", ["mx.eval(x)", "model.eval()", "np.load(p, allow_pickle=False)", "re.compile('a')"])
def test_harmless_code_is_not_reported(text):
    assert not dangers(text)


# tools/dev/audit.py. Packages are folders of metadata.


def write_package(home: Path, name: str, version: str, *requires: str) -> None:
    folder = home / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    write_package(
        tmp_path, "dylora-mlx", "1.0", "first>=2,<3", "elsewhere; sys_platform == 'none'", "extra-one; extra == 'more'"
    )
    write_package(tmp_path, "first", "2.5+cpu", "second[fast]<1")
    write_package(tmp_path, "second", "0.9", "third>=1; extra == 'fast'", "fourth; extra == 'other'")
    write_package(tmp_path, "third", "1.0")
    return tmp_path


def stub_service(monkeypatch, answer):
    requests = []

    def urlopen(request, timeout):
        requests.append(json.loads(request.data))
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(json.dumps(answer(requests[-1]["queries"])).encode())

    monkeypatch.setattr(audit.urllib.request, "urlopen", urlopen)
    return requests


def test_direct_and_indirect_dependencies_are_queried(packages, monkeypatch, capsys):
    requests = stub_service(monkeypatch, lambda queries: {"results": [{} for _ in queries]})
    assert audit.main([]) == 0
    sent = {query["package"]["name"]: query["version"] for query in requests[0]["queries"]}
    assert sent == {"dylora-mlx": "1.0", "first": "2.5", "second": "0.9", "third": "1.0"}
    assert capsys.readouterr().out.splitlines() == [
        "4 packages are installed, all within their version bounds",
        "advisories: 0 known for the installed versions",
    ]


def test_an_advisory_fails(packages, monkeypatch, capsys):
    vulnerable = {"third": {"vulns": [{"id": "PYSEC-1"}, {"id": "GHSA-2"}]}}
    stub_service(monkeypatch, lambda queries: {"results": [vulnerable.get(q["package"]["name"], {}) for q in queries]})
    assert audit.main([]) == 1
    assert "  third 1.0: https://osv.dev/PYSEC-1, https://osv.dev/GHSA-2" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "answer",
    [urllib.error.URLError("no route"), TimeoutError("timed out"), lambda queries: {"other": 1}, lambda queries: []],
)
def test_an_unreachable_service_is_reported_without_failure(packages, monkeypatch, capsys, answer):
    stub_service(monkeypatch, answer)
    assert audit.main([]) == 0
    assert "advisories: NOT CHECKED" in capsys.readouterr().out


def test_dependencies_out_of_bounds_fail(packages, capsys):
    write_package(packages, "extra-one", "1.0", "first>=3", "missing")
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
    assert [requirement for requirement in quoted if "<" not in requirement and "dylora-mlx[" not in requirement] == []
