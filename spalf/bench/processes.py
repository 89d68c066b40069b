"""Processes of a suite: ours, a peer's, and a harvest that feeds several peers. All end with whoever starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import spalf
from spalf.record import write_json

ANSWER, LOG, ORDER = "answer.json", "log.txt", "order.json"
START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from spalf.bench.trainers.worker import main; sys.exit(main(sys.argv[1]))"
)
"""What a peer's interpreter runs: it finds spalf's worker, and nothing else of what spalf is installed beside."""
RING_BYTES = 2**28


class Process:
    """One child with its log in `directory`; what it leaves there is read when it has ended."""

    def __init__(
        self, command: Sequence[str], directory: Path, environment: Mapping[str, str], fds: Sequence[int] = ()
    ) -> None:
        self._directory = directory
        with (directory / LOG).open("ab") as log:
            self._child = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,  # held open until we end: the child ends with it
                stdout=log,
                stderr=log,
                env=dict(environment),
                pass_fds=tuple(fds),
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """The exit code, or None while it runs."""
        code = self._child.poll()
        if code is not None and self._child.stdin is not None:
            self._child.stdin.close()
        return code

    def kill(self) -> None:
        """End it with all that it has started, and wait for that."""
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self.ended()

    def answer(self) -> dict[str, Any]:
        """What it has answered; where that is nothing, an error with the last line of its log."""
        with suppress(OSError, ValueError):
            held = json.loads((self._directory / ANSWER).read_text(encoding="utf-8"))
            if isinstance(held, dict):
                return held
        return {"error": self.last_words()}

    def last_words(self) -> str:
        """The last line of the log, or how it ended."""
        text = (self._directory / LOG).read_text(encoding="utf-8", errors="replace")
        said = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
        code = self._child.poll()
        if code is not None and code < 0:
            return f"ended by signal {-code}" + (f" after: {said[-1][-300:]}" if said else "")
        return said[-1][-600:] if said else f"ended with exit code {code} and said nothing"


def task(table: Mapping[str, Any], directory: Path, environment: Mapping[str, str], fds: Sequence[int] = ()) -> Process:
    """Start `spalf.bench.task` on a table, in `directory`, with `environment` beside our own."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{table['kind']}.json"
    write_json(file, {**table, "answer": str(directory / ANSWER)})
    return Process([sys.executable, "-m", "spalf.bench.task", str(file)], directory, {**os.environ, **environment}, fds)


def worker(
    python: Sequence[str],
    order: Mapping[str, Any],
    directory: Path,
    path: Path,
    environment: Mapping[str, str],
    fds: Sequence[int],
) -> Process:
    """Start a peer on an order, by the command `python`; `path` is a directory made by `alone_on_path`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / ORDER, order)
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    base = {k: v for k, v in os.environ.items() if k not in own} | {"WANDB_MODE": "disabled"}
    command = [*python, "-c", START, str(path), str(directory / ORDER)]
    return Process(command, directory, {**base, **environment}, fds)


def alone_on_path(directory: Path) -> Path:
    """A directory that holds this package and nothing beside it, for another environment's sys.path."""
    directory.mkdir(parents=True, exist_ok=True)
    link, target = directory / "spalf", Path(spalf.__file__).resolve().parent
    if not (link.is_symlink() and link.resolve() == target):
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)
    return directory


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Harvest:
    """One pass over a stream, and the pipes and the ring of the workers that read it."""

    def __init__(self, directory: Path, batch: int, d_model: int, environment: Mapping[str, str]) -> None:
        self.members = 0
        self._directory, self._batch, self._environment = directory, batch, environment
        self._slots = max(2, min(64, RING_BYTES // (4 * batch * d_model)))
        self._bytes = self._slots * 4 * batch * d_model
        self._ring = os.memfd_create("spalf-ring")  # shared memory that goes with its last user
        os.ftruncate(self._ring, self._bytes)
        self._pipes: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self._process: Process | None = None

    def worker(self, python: Sequence[str], order: Mapping[str, Any], directory: Path, path: Path) -> Process:
        """Start one more worker on this stream; `start` then begins it for all."""
        ready, freed = os.pipe(), os.pipe()
        self._pipes.append((ready, freed))
        fds = (self._ring, ready[0], freed[1])
        told = {"ring": f"/proc/self/fd/{self._ring}", "slots": self._slots, "ready": ready[0], "freed": freed[1]}
        self.members += 1
        return worker(python, {**order, **told}, directory, path, self._environment, fds)

    def start(self, base: Path, seed: int, batches: int, device: str) -> None:
        """Begin; from here on only the two sides hold the pipes, so that each learns of the other's end."""
        consumers = [(ready[1], freed[0]) for ready, freed in self._pipes]
        table = {
            "kind": "harvest",
            "base": str(base),
            "seed": seed,
            "batch": self._batch,
            "batches": batches,
            "device": device,
            "ring": f"/proc/self/fd/{self._ring}",
            "slots": self._slots,
            "consumers": consumers,
        }
        held = [self._ring, *(fd for pair in consumers for fd in pair)]
        self._process = task(table, self._directory, self._environment, held)
        for fd in (self._ring, *(fd for ready, freed in self._pipes for fd in (*ready, *freed))):
            os.close(fd)

    def failed(self) -> str:
        """Why the stream has ended early; "" where it has not."""
        if self._process is None or not self._process.ended():
            return ""
        return str(self._process.answer().get("error", ""))

    def left(self) -> None:
        """One member has ended; with the last one the harvest ends too."""
        self.members -= 1
        if self.members == 0:
            self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
