"""The results of a suite: a directory's results*.jsonl, one line for each job that has ended, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spalf.errors import Problem, RecipeError
from spalf.record import plain

NAME = "results.jsonl"
Line = Mapping[str, Any]
"""key, suite, job, status ("done" or "error"), measures or error, seconds, time, machine, commit, versions."""


def read(directory: Path) -> list[Line]:
    """Every line of every results*.jsonl, by time; what is none of ours, such as a broken end, is left out."""
    found: list[Line] = []
    for file in sorted(directory.glob("results*.jsonl")):
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("job"), dict) and "key" in line:
                    found.append(line)
    return sorted(found, key=lambda line: str(line.get("time", "")))


def latest(lines: Iterable[Line]) -> dict[str, Line]:
    """The line that counts of each key: the newest that is done, else the newest."""
    out: dict[str, Line] = {}
    for line in lines:
        held = out.get(line["key"])
        if held is None or line["status"] == "done" or held["status"] != "done":
            out[line["key"]] = line
    return out


def append(directory: Path, line: Line) -> None:
    """Add a line and flush it to disk. A half line that something else left at the end is closed first."""
    text = json.dumps(plain(line), allow_nan=False, sort_keys=True) + "\n"
    with (directory / NAME).open("ab+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """The only queue in a directory. Raises RecipeError where another one is at work there."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = "another queue is at work in this directory"
            raise RecipeError([Problem(str(directory), message, "wait for it, or give another --out")]) from None
        yield


def machine(device: str) -> str:
    """What the numbers were made on, in words."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(torch.device(device if ":" in device else "cuda")))
    return f"CPU {platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit that runs, "+" behind it where files differ from it; "" outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return ""
