"""Check this machine's packages, device, disk and logins, and print a remedy for every problem."""

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

EXAMPLES = """\
  dylora doctor
  dylora doctor --json | grep bad
"""
PACKAGES = ("dylora-mlx", "mlx", "mlx-lm", "numpy", "datasets", "transformers", "huggingface-hub")
OPTIONAL = {
    "torch": ("exports are not verified", "pip install torch peft"),
    "peft": ("exports are not verified", "pip install torch peft"),
    **{
        name: (f"no --log.to {name}", f"pip install 'dylora-mlx[{name}]'")
        for name in ("wandb", "tensorboard", "trackio", "swanlab")
    },
}
"""Packages that only some features need, the consequence of their absence, and the remedy."""
MIN_DISK, MIN_MEMORY = 5 << 30, 4 << 30
"""Bytes that suffice comfortably for a run on Gemma 3 270M."""


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    value: str
    state: Literal["good", "remark", "bad"] = "good"
    """bad stops something from working; a remark does not."""
    remedy: str = ""
    """Action to take; empty if there is nothing to do."""


def packages() -> list[Finding]:
    """Check the versions of the required and optional packages."""
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name, version(name)))
        except PackageNotFoundError:
            remedy = "pip install ." if name == "dylora-mlx" else f"pip install {name}"
            # From a source folder the package works without being installed.
            findings.append(Finding(name, "not installed", "remark" if name == "dylora-mlx" else "bad", remedy))
    for name, (consequence, remedy) in OPTIONAL.items():
        try:
            findings.append(Finding(name, version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, f"not installed: {consequence}", "remark", remedy))
    return findings


def machine() -> list[Finding]:
    """Check Python, the device, its memory, and on a CPU the BLAS library."""
    python = sys.version.split()[0]
    good = sys.version_info >= (3, 10)
    findings = [Finding("python", python, "good" if good else "bad", "" if good else "use Python 3.10 or newer")]
    findings.append(Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}"))
    if platform.system() == "Darwin" and platform.machine() != "arm64":
        findings[-1] = findings[-1]._replace(
            state="bad", remedy="MLX needs Apple silicon and a native Python, not one under Rosetta"
        )
    try:
        import mlx.core as mx
    except ImportError as error:
        return [
            *findings,
            Finding("MLX", str(error).splitlines()[0], "bad", "pip install --upgrade --force-reinstall mlx"),
        ]
    return findings + _device(mx)


def _device(mx: Any) -> list[Finding]:
    """Check the device that MLX uses, and its memory limits."""
    from dylora_mlx.model.base import device
    from dylora_mlx.model.kernels import numerics

    kind = "CPU" if numerics.on_cpu() else "Metal" if mx.metal.is_available() else "CUDA"
    info = mx.device_info()
    findings = [Finding("device", f"{kind}, {info.get('device_name', platform.processor() or platform.machine())}")]
    if kind == "CPU":
        blas_name = blas.describe()
        is_slow = "slow" in blas_name
        findings.append(Finding("BLAS", blas_name, "bad" if is_slow else "good", "pip install mkl" if is_slow else ""))
        if platform.system() == "Darwin":
            findings[0] = findings[0]._replace(
                state="bad", remedy="no Metal device: are you in a virtual machine or over ssh without one?"
            )
    memory = device.physical_memory()
    if memory is not None:
        is_low = memory < MIN_MEMORY
        findings.append(
            Finding("memory", _bytes(memory), "remark" if is_low else "good",
                    "use the embedded base, or lower data.max_seq_length and training.batch_size" if is_low else "")
        )  # fmt: skip
    limits = device.memory_limits(device.device_kind(), info, memory)
    wired = "not used on this device" if limits.wired is None else _bytes(limits.wired)
    findings.append(Finding("wired limit", wired))
    findings.append(Finding("cache limit", "MLX's own" if limits.cache is None else _bytes(limits.cache)))
    return findings


def places() -> list[Finding]:
    """Check the disk space for runs and the cache folder."""
    free = shutil.disk_usage(".").free
    low = free < MIN_DISK
    findings = [Finding("disk here", f"{_bytes(free)} free", "remark" if low else "good",
                     "free some, or put runs elsewhere with --runs" if low else "")]  # fmt: skip
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dylora_mlx"
    existing_folder = next(folder for folder in (cache, *cache.parents) if folder.exists())
    good = os.access(existing_folder, os.W_OK)
    return [*findings, Finding("cache folder", str(cache), "good" if good else "remark",
                            "" if good else "not writable: set XDG_CACHE_HOME to a folder that is")]  # fmt: skip


def accounts() -> list[Finding]:
    """Check logins by local files and variables alone: nothing is sent, and no token is shown."""
    from huggingface_hub import get_token

    hub = get_token() is not None
    findings = [Finding("hub login", "yes" if hub else "no", "good" if hub else "remark",
                     "" if hub else "for google/gemma-3-270m: accept its licence on its page, then hf auth login")]  # fmt: skip
    wandb = bool(os.environ.get("WANDB_API_KEY")) or _netrc("api.wandb.ai")
    return [*findings, Finding("W&B login", "yes" if wandb else "no", "good" if wandb else "remark",
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
    parser.add_argument("--json", action="store_true", help="print one JSON object per finding")
    options = parser.parse_args(argv)
    findings = [*packages(), *machine(), *places(), *accounts()]
    if options.json:
        for finding in findings:
            print(json.dumps(finding._asdict()))
    else:
        show(findings)
    return 1 if any(finding.state == "bad" for finding in findings) else 0


def show(findings: list[Finding]) -> None:
    """Print the findings as a table, then the remedies."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    marks = {"good": "[green]ok[/green]", "remark": "[yellow]--[/yellow]", "bad": "[red]!![/red]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.name, finding.value)
    console.print(table)
    for finding in findings:
        if finding.remedy:
            console.print(
                f"{finding.name}: {finding.remedy}", style="red" if finding.state == "bad" else "yellow", markup=False
            )
    if all(finding.state == "good" for finding in findings):
        console.print("no problems found")


def main(argv: list[str] | None = None) -> int:
    return run_command(command, argv)


if __name__ == "__main__":
    sys.exit(main())
