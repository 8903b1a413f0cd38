"""Imports between parts of the package point downwards. Parsed from the source, including function-level and type-checking imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dylora_mlx"
ORDER = [
    ("errors",),
    ("system",),
    ("assets", "config", "distributed"),
    ("",),  # the package's own __init__
    ("cli", "data", "model"),
    ("growth",),
    ("adapters", "reporting"),
    ("training",),
    ("run",),
    ("exporting",),
    ("generation",),
    ("evaluation", "importing", "serving"),
    (
        "train",
        "add",
        "generate",
        "serve",
        "doctor",
        "evaluate",
        "show_data",
        "plan",
        "estimate",
        "explain",
        "report",
        "export",
        "fuse",
        "prune",
        "pack",
        "restore",
        "tidy",
        "convert_base",
        "import_expert",
        "import_run",
        "completion",
        "init",
    ),
    ("api",),
    ("__main__",),
]
"""Layers, lowest first. A part may import itself and parts of lower layers, but no other part of its own layer."""
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}


def modules(folder: Path) -> dict[str, Path]:
    """Return the file of every module, by dotted name below the package ("" for its __init__)."""
    paths = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def imports(folder: Path) -> dict[str, set[str]]:
    """Return the modules of the package that each module imports."""
    paths, name = modules(folder), folder.name
    graph: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not module:  # the package's __init__ imports its public names under TYPE_CHECKING only, which never runs
            tree.body = [node for node in tree.body if ast.unparse(node).partition(":")[0] != "if TYPE_CHECKING"]
        for node in ast.walk(tree):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: use absolute imports"
                imported = (f"{node.module}.{alias.name}" for alias in node.names)
                targets = [t if t.removeprefix(f"{name}.") in paths else str(node.module) for t in imported]
            for target in targets:
                if target == name or target.startswith(f"{name}."):
                    graph[module].add(target.removeprefix(name).removeprefix("."))
    return graph


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports that do not point downwards."""
    violations = []
    for module, targets in graph.items():
        importing_part = module.split(".")[0]
        for target in sorted(targets):
            part = target.split(".")[0]
            if part != importing_part and RANK[part] >= RANK[importing_part]:
                violations.append(f"{module or '__init__'} imports {target}")
    return violations


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of an import cycle; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if loop := visit(target, [*path, module]):
                return loop
        done.add(module)
        return []

    return next((loop for module in graph if (loop := visit(module, []))), [])


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return imports(PACKAGE)


def test_every_part_has_a_layer(graph):
    assert {module.split(".")[0] for module in graph} <= RANK.keys(), "add the new part to ORDER"
    assert {
        "data.stream",
        "model.decoder.decoder",
        "growth.pool",
        "adapters.mlx_lm",
        "training.step.step",
        "run.loop",
    } <= graph.keys()


def test_imports_exist(graph):
    assert not {t for targets in graph.values() for t in targets} - graph.keys()


def test_imports_point_down(graph):
    assert upward(graph) == []


def test_no_cycle(graph):
    assert cycle(graph) == []


def test_data_and_model_do_not_import_each_other(graph):
    for part, other in (("data", "model"), ("model", "data")):
        reachable, pending = set(), [m for m in graph if m.split(".")[0] == part]
        while pending:
            module = pending.pop()
            reachable.add(module)
            pending += graph[module] - reachable
        assert not [m for m in reachable if m.split(".")[0] == other]


@pytest.mark.parametrize(
    ("sources", "wrong", "looped"),
    [
        ({"config": "", "data/a": "from dylora_mlx.config import X"}, [], False),
        ({"data/a": "import dylora_mlx.model.b", "model/b": ""}, ["data.a imports model.b"], False),
        ({"config": "def f():\n    from dylora_mlx import cli", "cli": ""}, ["config imports cli"], False),
        ({"model/a": "from dylora_mlx.model import b", "model/b": "from dylora_mlx.model.a import X"}, [], True),
        ({"growth/a": "from dylora_mlx.training.b import c", "training/b": ""}, ["growth.a imports training.b"], False),
    ],
)
def test_the_checks_themselves(tmp_path, sources, wrong, looped):
    folder = tmp_path / "dylora_mlx"
    for name, text in {"__init__": "", **sources}.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    graph = imports(folder)
    assert upward(graph) == wrong
    assert bool(cycle(graph)) == looped


def test_files_are_short_enough_to_read():
    """dylora_torch.py is one file on purpose: it is copied into exports and runs alone."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name for path, lines in lengths.items() if lines > 400} == {"dylora_torch.py"}
