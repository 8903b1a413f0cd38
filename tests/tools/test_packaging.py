"""What a release consists of: archives, version, bounds of dependencies, workflows and issue forms that agree with each other."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dylora_mlx
from tests.exporting.mixtures import tool

if sys.version_info >= (3, 11):
    import tomllib
else:  # comes with pytest
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
check_package, check_release = tool("check_package"), tool("check_release")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TRACKED = [
    "README.md",
    ".ci/run",
    "configs/a.yaml",
    "dylora_mlx/__init__.py",
    "dylora_mlx/assets/base/model.safetensors",
]


def wheel(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in [*names, "dylora_mlx-0.1.0.dist-info/METADATA"]:
            archive.writestr(name, "")
    return path


def sdist(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in [*names, "PKG-INFO"]:
            archive.addfile(tarfile.TarInfo(f"dylora_mlx-0.1.0/{name}"), io.BytesIO())
    return path


def test_a_wheel_holds_the_package_and_its_configs(tmp_path):
    names = ["dylora_mlx/__init__.py", "dylora_mlx/configs/a.yaml", "dylora_mlx/assets/base/model.safetensors"]
    archive = check_package.read_wheel(wheel(tmp_path / "w.whl", names))
    assert check_package.differences(archive, check_package.in_wheel(TRACKED)) == []
    archive = check_package.read_wheel(wheel(tmp_path / "w.whl", [*names[:2], "tests/x.py"]))
    assert check_package.differences(archive, check_package.in_wheel(TRACKED)) == [
        "w.whl: dylora_mlx/assets/base/model.safetensors is missing",
        "w.whl: tests/x.py does not belong here",
    ]


def test_a_source_archive_holds_all_but_the_files_of_ci(tmp_path, monkeypatch):
    path = sdist(tmp_path / "s.tar.gz", [name for name in TRACKED if name != ".ci/run"])
    wanted = check_package.in_sdist(TRACKED)
    assert check_package.differences(check_package.read_sdist(path), wanted) == []
    path = sdist(tmp_path / "s.tar.gz", TRACKED)
    assert check_package.differences(check_package.read_sdist(path), wanted) == [
        "s.tar.gz: .ci/run does not belong here"
    ]
    monkeypatch.setattr(check_package, "MAX_BYTES", 10)
    assert "s.tar.gz: 0.0 MB, more than 1e-05" in check_package.differences(check_package.read_sdist(path), TRACKED)


def test_an_archive_is_not_written_over_other_files(tmp_path, capsys):
    (tmp_path / "kept").touch()
    assert check_package.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: exists already and is not an empty folder")


def test_a_release_has_one_version(tmp_path):
    (tmp_path / "dylora_mlx").mkdir()
    (tmp_path / "dylora_mlx/__init__.py").write_text('"""Text."""\n__version__ = "0.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0, 2026-03-01\n\n## 0.1.0, 2026-01-01\n")
    assert check_release.disagreements("v0.2.0", tmp_path) == []
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0, unreleased\n\n## 0.1.0, 2026-01-01\n")
    assert check_release.disagreements("v0.2.0", tmp_path) == ["CHANGELOG.md: 0.1.0, but the tag is v0.2.0"]
    assert [line.split(":")[0] for line in check_release.disagreements("0.2.0", tmp_path)] == list(check_release.PLACES)


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (dylora_mlx.__version__, PROJECT["license"])


def test_every_dependency_has_a_lower_and_an_upper_bound():
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines if "dylora-mlx" not in line]
    tools = {"ruff", "pyright", "pre-commit"}
    requirements = [Requirement(line) for line in [*PROJECT["dependencies"], *extras]]
    bounds = {r.name: {clause.operator for clause in r.specifier} for r in requirements if r.name not in tools}
    assert {name for name, operators in bounds.items() if operators != {">=", "<"}} == set()
    assert {"mlx", "mlx-lm", "transformers", "shtab", "pytest"} <= bounds.keys()


def supported() -> list[Version]:
    """Return the Python versions of the classifiers, in order."""
    found = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    return [Version(version) for version in found]


def test_pythons_are_the_same_everywhere():
    lowest, *_, newest = supported()
    assert PROJECT["requires-python"] == f">={lowest}"
    assert f"with Python {lowest} to {newest}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"({lowest} to {newest} are tested)" in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    jobs = workflow("ci")["jobs"]
    pythons = {Version(v) for job in ("test", "newest") for v in jobs[job]["strategy"]["matrix"]["python"]}
    assert set(supported()) <= pythons
    unsupported = pythons - set(supported())
    assert {f"'{version}'" for version in unsupported} == set(
        re.findall(r"'3\.\d+'", jobs["newest"]["continue-on-error"])
    )


def test_the_table_of_versions_has_the_bounds():
    """docs/compatibility.md has each dependency of the package and of its extras `gguf`, `export` and `harness`."""
    extras = PROJECT["optional-dependencies"]
    optional = [line for name in ("gguf", "export", "harness") for line in extras[name]]
    requirements = [Requirement(line) for line in [*PROJECT["dependencies"], *optional]]
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w-]+) \| (\S+ \| \S+) \| \d\S* \|$", page, re.M))
    bounds = {r.name: {clause.operator: clause.version for clause in r.specifier} for r in requirements}
    assert rows == {name: f"{each['>=']} | {each['<']}" for name, each in bounds.items()}
    assert f"| Python | {supported()[0]} | | {supported()[-1]} |" in page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github/workflows" / f"{name}.yml").read_text(encoding="utf-8"))


def test_workflows_run_tools_that_exist():
    sessions = set(
        re.findall(r"^@nox\.session(?:\(name=\"(\w+)\"\))?\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.M)
    )
    names = {explicit or function for explicit, function in sessions}
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}, "jobs ask for more where they need it"
        for line in re.findall(r"nox -s ([\w ]+)", text):
            assert set(line.split()) <= names, path
        for script in re.findall(r"(?:python|bash) ((?:.ci|tools|tests)/[\w./]+)", text):
            assert (ROOT / script).is_file(), f"{path}: {script}"


def test_issue_forms_ask_for_the_doctor():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    for name in ("bug", "result"):
        asked = {part["id"]: part for part in forms[name]["body"] if "id" in part}
        assert "dylora doctor --json" in asked["doctor"]["attributes"]["label"]
        assert asked["doctor"]["validations"] == {"required": True}
    assert forms["config"] == {"blank_issues_enabled": False}


@pytest.mark.parametrize("argv", [["v0.0.1"]])
def test_the_release_check_names_what_disagrees(argv):
    script = ROOT / "tools/dev/check_release.py"
    completed = subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True)
    assert completed.returncode == 1
    assert f"dylora_mlx/__init__.py: {dylora_mlx.__version__}, but the tag is v0.0.1" in completed.stdout
