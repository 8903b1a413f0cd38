"""Check what is installed: within the bounds that are asked for, and without known advisories.

    python tools/dev/audit.py              all dependencies of dylora-mlx, the indirect ones too
    python tools/dev/audit.py --offline    the bounds alone

The advisories are those of OSV (https://osv.dev), which has the Python Packaging Advisory Database. What is sent there is names and
versions of packages. Exit code 1 for a version out of bounds or an advisory; a service that cannot be reached is told, and fails
nothing.
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
"""That the service may take to answer."""


class Found(NamedTuple):
    """Installed versions by name, and what is wrong with them, a line each."""

    versions: dict[str, str]
    wrong: list[str]


class UnreachableError(Exception):
    """The service did not answer as it should. The message is the reason."""


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def walk(name: str, extras: Iterable[str]) -> Found:
    """A package and everything that it asks for on this system, by the requirements that are installed with each.

    Raises LookupError if the package itself is not installed.
    """
    if installed(name) is None:
        raise LookupError(f"{name} is not installed; pip install . first")
    versions: dict[str, str] = {}
    wrong: dict[str, None] = {}
    waiting, seen = [(canonicalize_name(name), frozenset(extras))], set()
    while waiting:
        at = waiting.pop()
        found = installed(at[0])
        if at in seen or found is None:
            continue
        seen.add(at)
        versions[at[0]] = found.version
        for requirement in map(Requirement, found.requires or []):
            if not applies(requirement, at[1]):
                continue
            if problem := out_of_bounds(at[0], requirement):
                wrong[problem] = None
            waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return Found(dict(sorted(versions.items())), list(wrong))


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Whether something is asked for on this system, without extras or by one of these."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def out_of_bounds(by: str, requirement: Requirement) -> str:
    """What is wrong with the version that answers a requirement; empty if nothing is."""
    found = installed(requirement.name)
    if found is None:
        return f"{requirement.name}: {by} asks for it, and it is not installed"
    if requirement.specifier.contains(found.version, prereleases=True):
        return ""
    return f"{requirement.name} {found.version}: {by} asks for {requirement.specifier}"


def advisories(versions: dict[str, str]) -> dict[str, list[str]]:
    """Ids of the advisories of each package that has any. Raises UnreachableError."""
    names = list(versions)
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": versions[name].partition("+")[0]} for name in names
    ]
    asked = urllib.request.Request(
        SERVICE, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            results = json.load(answer)["results"]
        found = {n: [v["id"] for v in r.get("vulns", [])] for n, r in zip(names, results, strict=True)}
    except urllib.error.URLError as error:
        raise UnreachableError(str(error.reason)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreachableError(str(error) or type(error).__name__) from error
    return {name: ids for name, ids in found.items() if ids}


def main(argv: list[str] | None = None) -> int:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extras", nargs="*", default=[], metavar="NAME", help="of dylora-mlx, such as export")
    parser.add_argument("--offline", action="store_true", help="do not ask for advisories")
    options = parser.parse_args(argv)
    try:
        found = walk(ROOT, options.extras)
    except LookupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in found.wrong:
        print(f"out of bounds: {line}")
    if not found.wrong:
        print(f"{len(found.versions)} packages are installed within the bounds that are asked for")
    known: dict[str, list[str]] = {}
    if options.offline:
        print("advisories: not asked for")
    else:
        try:
            known = advisories(found.versions)
        except UnreachableError as error:
            print(f"advisories: NOT CHECKED, {SERVICE} cannot be reached ({error})")
        else:
            print(f"advisories: {sum(map(len, known.values()))} known for the versions that are installed")
    for name, ids in known.items():
        print(f"  {name} {found.versions[name]}: {', '.join(f'https://osv.dev/{i}' for i in ids)}")
    return 1 if found.wrong or known else 0


if __name__ == "__main__":
    sys.exit(main())
