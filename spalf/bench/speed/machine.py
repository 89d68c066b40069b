"""What a figure needs beside it: the machine, the versions, the commit, the day."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def described(device: str, of_commit: str = "") -> dict[str, Any]:
    """Device, memory, threads and versions; `of_commit` where the tree has no git to ask."""
    is_cuda = torch.device(device).type == "cuda"
    out: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if is_cuda else _processor(),
        "kind": "cuda" if is_cuda else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "spalf": _version("spalf"),
        "commit": of_commit or commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if is_cuda:
        out["memory_mib"] = torch.cuda.get_device_properties(0).total_memory >> 20
    return out


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def _processor() -> str:
    """As the system names it; an architecture where it does not."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the tree that spalf runs from, with a + where the package differs from it; "-" without one."""
    package = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        differs = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return "-"
