"""dylora doctor: what this machine has, what is wrong with it, and the line that mends it."""

from __future__ import annotations

import json
import netrc
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from dylora_mlx.cli.parser import Parser, run_command
from dylora_mlx.system import blas

EXAMPLES = """
  dylora doctor
  dylora doctor --json | grep bad
"""
PACKAGES = ("dylora-mlx", "mlx", "mlx-lm", "numpy", "datasets", "transformers", "huggingface-hub", "wandb")
OPTIONAL = {"torch": "exports are not verified", "peft": "exports are not verified"}
"""Packages that are needed for a part only, and what goes without them."""
MIN_DISK, MIN_MEMORY = 5 << 30, 4 << 30
"""Bytes that a run on Gemma 3 270M is comfortable with."""


class Finding(NamedTuple):
    """One thing looked at: good, a remark, or bad; and what to do about it."""

    name: str
    value: str
    state: Literal["good", "remark", "bad"] = "good"
    remedy: str = ""


def packages() -> list[Finding]:
    found = []
    for name in PACKAGES:
        try:
            found.append(Finding(name, version(name)))
        except PackageNotFoundError:
            remedy = "pip install ." if name == "dylora-mlx" else f"pip install {name}"
            # From a source folder the package works without being installed.
            found.append(Finding(name, "not installed", "remark" if name == "dylora-mlx" else "bad", remedy))
    for name, lost in OPTIONAL.items():
        try:
            found.append(Finding(name, version(name)))
        except PackageNotFoundError:
            found.append(Finding(name, f"not installed: {lost}", "remark", "pip install torch peft"))
    return found


def machine() -> list[Finding]:
    """Python, the device, its memory, the BLAS that serves a CPU."""
    python = sys.version.split()[0]
    good = sys.version_info >= (3, 10)
    found = [Finding("python", python, "good" if good else "bad", "" if good else "use Python 3.10 or newer")]
    found.append(Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}"))
    if platform.system() == "Darwin" and platform.machine() != "arm64":
        found[-1] = found[-1]._replace(
            state="bad", remedy="MLX needs Apple silicon and a native Python, not one under Rosetta"
        )
    try:
        import mlx.core as mx
    except ImportError as error:
        return [
            *found,
            Finding("MLX", str(error).splitlines()[0], "bad", "pip install --upgrade --force-reinstall mlx"),
        ]
    return found + _device(mx)


def _device(mx: Any) -> list[Finding]:
    from dylora_mlx.model.base import device
    from dylora_mlx.model.kernels import numerics

    kind = "CPU" if numerics.on_cpu() else "Metal" if mx.metal.is_available() else "CUDA"
    info = mx.device_info()
    found = [Finding("device", f"{kind}, {info.get('device_name', platform.processor() or platform.machine())}")]
    if kind == "CPU":
        served = blas.describe()
        slow = "slow" in served
        found.append(Finding("BLAS", served, "bad" if slow else "good", "pip install mkl" if slow else ""))
        if platform.system() == "Darwin":
            found[0] = found[0]._replace(
                state="bad", remedy="no Metal device: are you in a virtual machine or over ssh without one?"
            )
    memory = device.physical_memory()
    if memory is not None:
        little = memory < MIN_MEMORY
        found.append(
            Finding("memory", _bytes(memory), "remark" if little else "good",
                    "use the embedded base, or lower data.max_seq_length and training.batch_size" if little else "")
        )  # fmt: skip
    limits = device.memory_limits(device.device_kind(), info, memory)
    wired = "not used on this device" if limits.wired is None else _bytes(limits.wired)
    found.append(Finding("wired limit", wired))
    found.append(Finding("cache limit", "MLX's own" if limits.cache is None else _bytes(limits.cache)))
    return found


def places() -> list[Finding]:
    """Disk space for runs, and the cache folder."""
    free = shutil.disk_usage(".").free
    low = free < MIN_DISK
    found = [Finding("disk here", f"{_bytes(free)} free", "remark" if low else "good",
                     "free some, or put runs elsewhere with --runs" if low else "")]  # fmt: skip
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dylora_mlx"
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    good = os.access(place, os.W_OK)
    return [*found, Finding("cache folder", str(cache), "good" if good else "remark",
                            "" if good else "not writable: set XDG_CACHE_HOME to a folder that is")]  # fmt: skip


def accounts() -> list[Finding]:
    """Logins, by what lies on this machine: nothing is sent, and no token is shown."""
    from huggingface_hub import get_token

    hub = get_token() is not None
    found = [Finding("hub login", "yes" if hub else "no", "good" if hub else "remark",
                     "" if hub else "for google/gemma-3-270m: accept its licence on its page, then hf auth login")]  # fmt: skip
    wandb = bool(os.environ.get("WANDB_API_KEY")) or _netrc("api.wandb.ai")
    return [*found, Finding("W&B login", "yes" if wandb else "no", "good" if wandb else "remark",
                            "" if wandb else "only for --log.wandb online: wandb login")]  # fmt: skip


def _netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def command(argv: list[str]) -> int:
    parser = Parser("dylora doctor", __doc__, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print one JSON object a finding")
    options = parser.parse_args(argv)
    found = [*packages(), *machine(), *places(), *accounts()]
    if options.json:
        for finding in found:
            print(json.dumps(finding._asdict()))
    else:
        show(found)
    return 1 if any(finding.state == "bad" for finding in found) else 0


def show(found: list[Finding]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    marks = {"good": "[green]ok[/green]", "remark": "[yellow]--[/yellow]", "bad": "[red]!![/red]"}
    for finding in found:
        table.add_row(marks[finding.state], finding.name, finding.value)
    console.print(table)
    for finding in found:
        if finding.remedy:
            console.print(
                f"{finding.name}: {finding.remedy}", style="red" if finding.state == "bad" else "yellow", markup=False
            )
    if all(finding.state == "good" for finding in found):
        console.print("nothing to mend")


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
