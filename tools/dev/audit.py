"""Check that installed dependencies satisfy their version bounds and have no known security advisories.

    python tools/dev/audit.py              all dependencies of dylora-mlx, the indirect ones too
    python tools/dev/audit.py --offline    version bounds only

Advisories come from OSV (https://osv.dev), which includes the Python Packaging Advisory Database. Only package names and versions are
sent to it. The exit code is 1 if a version is out of bounds or has an advisory, and 2 if dylora-mlx is not installed. An unreachable
service is reported, but does not fail the check.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "dylora-mlx"
SERVICE = "https://api.osv.dev/v1/querybatch"
SECONDS = 20.0
"""Timeout of the request to the service."""


class Dependencies(NamedTuple):
    """The installed dependencies of a package."""

    versions: dict[str, str]
    """Installed version by canonical package name, sorted."""
    problems: list[str]
    """One line per requirement that is missing or out of bounds."""


class UnreachableError(Exception):
    """The service cannot be reached or its response is not valid. The message is the reason."""


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def walk(name: str, extras: Iterable[str]) -> Dependencies:
    """Return a package and its direct and indirect dependencies on this system.

    Requirements are read from the metadata of each installed package. Raises LookupError if the package itself is not
    installed.
    """
    if installed(name) is None:
        raise LookupError(f"{name} is not installed; pip install . first")
    versions: dict[str, str] = {}
    problems: dict[str, None] = {}
    pending, seen = [(canonicalize_name(name), frozenset(extras))], set()
    while pending:
        node = pending.pop()
        dist = installed(node[0])
        if node in seen or dist is None:
            continue
        seen.add(node)
        versions[node[0]] = dist.version
        for requirement in map(Requirement, dist.requires or []):
            if not applies(requirement, node[1]):
                continue
            if problem := out_of_bounds(node[0], requirement):
                problems[problem] = None
            pending.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return Dependencies(dict(sorted(versions.items())), list(problems))


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement applies on this system, unconditionally or through one of these extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def out_of_bounds(parent: str, requirement: Requirement) -> str:
    """Return one line about a requirement that is missing or out of bounds; empty if it is satisfied."""
    dist = installed(requirement.name)
    if dist is None:
        return f"{requirement.name}: required by {parent}, but not installed"
    if requirement.specifier.contains(dist.version, prereleases=True):
        return ""
    return f"{requirement.name} {dist.version}: {parent} requires {requirement.specifier}"


def advisories(versions: dict[str, str]) -> dict[str, list[str]]:
    """Return the advisory ids of each package that has any. Raises UnreachableError."""
    names = list(versions)
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": versions[name].partition("+")[0]} for name in names
    ]
    request = urllib.request.Request(
        SERVICE, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            results = json.load(response)["results"]
        ids_by_package = {n: [v["id"] for v in r.get("vulns", [])] for n, r in zip(names, results, strict=True)}
    except urllib.error.URLError as error:
        raise UnreachableError(str(error.reason)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreachableError(str(error) or type(error).__name__) from error
    return {name: ids for name, ids in ids_by_package.items() if ids}


def main(argv: list[str] | None = None) -> int:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--extras", nargs="*", default=[], metavar="NAME", help="extras of dylora-mlx, for example export"
    )
    parser.add_argument("--offline", action="store_true", help="do not query advisories")
    options = parser.parse_args(argv)
    try:
        dependencies = walk(ROOT, options.extras)
    except LookupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in dependencies.problems:
        print(f"out of bounds: {line}")
    if not dependencies.problems:
        print(f"{len(dependencies.versions)} packages are installed, all within their version bounds")
    vulnerable: dict[str, list[str]] = {}
    if options.offline:
        print("advisories: not checked")
    else:
        try:
            vulnerable = advisories(dependencies.versions)
        except UnreachableError as error:
            print(f"advisories: NOT CHECKED, {SERVICE} cannot be reached ({error})")
        else:
            print(f"advisories: {sum(map(len, vulnerable.values()))} known for the installed versions")
    for name, ids in vulnerable.items():
        print(f"  {name} {dependencies.versions[name]}: {', '.join(f'https://osv.dev/{i}' for i in ids)}")
    return 1 if dependencies.problems or vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
