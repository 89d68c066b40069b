"""The queue of a suite: what is not done yet is trained, some jobs at a time, and each that ends becomes a line."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from spalf.assembly import toml
from spalf.bench import results, tables
from spalf.bench.jobs import Due, Job, expand
from spalf.bench.places import Place, free, places
from spalf.bench.processes import Harvest, Process, alone_on_path, task, told_to_end
from spalf.bench.suite import Suite
from spalf.record import write_whole

ATTEMPTS = 2
"""A job that has failed so often is left, until its lines are taken out of the results."""
MARGIN = 1.15
"""How much longer than its like a job may take before it counts as too long for what is left of a visit."""
IMPORTED = 262_144
"""Activations, at most, that mean and scale of an imported dictionary are measured on: what ablation puts in."""
POLL = 0.05
FORMATS = {"saelens": "saelens", "dictionary_learning": "dictionary_learning"}


@frozen(kw_only=True)
class Visit:
    """How a queue is worked on this time."""

    out: Path
    only: str = "*"
    """Patterns of job names by commas; jobs of an earlier one come first."""
    jobs: int = 1
    """How many work at once on each device."""
    minutes: float = float("inf")
    peers: tuple[str, ...] = ()
    """The command of the peers' interpreter; without it their jobs are left."""
    device: str = "auto"


@frozen(kw_only=True)
class Outcome:
    """What came of a visit, by job name: done before or now, failed with its reason, left undone with its reason."""

    done: tuple[str, ...]
    failed: dict[str, str] = field(hash=False)
    left: dict[str, str] = field(hash=False)


@define(kw_only=True)
class _Running:
    job: Job
    place: Place
    process: Process
    directory: Path
    started: float
    harvest: Harvest | None = None  # while a peer trains
    told: dict[str, Any] = field(factory=dict)  # by the peer


class Queue:
    """One visit to a suite's queue. `tell` gets a line of text for every job that starts or ends."""

    def __init__(self, suite: Suite, sets: Sequence[str], visit: Visit, tell: Callable[[str], None]) -> None:
        self._suite, self._visit, self._tell = suite, visit, tell
        self._base = tables.base_of(suite, sets)
        self._started = time.monotonic()
        self._work, self._rows = visit.out / "work", visit.out / "dictionaries"
        self._running: list[_Running] = []
        self._lines = results.read(visit.out)
        self._due = self._expanded()
        self._machine, self._commit = results.machine(visit.device), results.commit()
        self._places = places(visit.device, visit.jobs)

    def run(self) -> Outcome:
        """Work until nothing is left to start, or the minutes are over. A directory has one queue at a time."""
        with results.alone(self._visit.out):
            shutil.rmtree(self._work, ignore_errors=True)  # of a visit that was killed
            self._path = alone_on_path(self._work / "path")
            self._recipe = self._work / "base.toml"
            write_whole(self._recipe, toml.write({**self._base.table, "name": "base"}))
            try:
                with told_to_end():
                    while self._step():
                        time.sleep(POLL)
            finally:
                for one in self._running:
                    one.process.kill()
                    if one.harvest is not None:
                        one.harvest.kill()
                shutil.rmtree(self._work, ignore_errors=True)
        return self._outcome()

    def _step(self) -> bool:
        """Take in what has ended and start what fits; False where nothing is left to do or no time."""
        for one in list(self._running):
            self._look(one)
        if time.monotonic() - self._started >= 60 * self._visit.minutes:
            for one in self._running:
                self._tell(f"cut: {one.job.name}")
            return False
        self._start()
        return bool(self._running)

    # ------------------------------------------------------------------------------------------------ what to do
    def _expanded(self) -> Due:
        return expand(self._suite, self._base, results.latest(self._lines))

    def _reason(self, job: Job) -> str:
        """Why a job is not to be started now; "" where it is."""
        if self._asked_for(job) is None:
            return "not asked for"
        failures = [line for line in self._lines if line["key"] == job.key and line["status"] == "error"]
        if len(failures) >= ATTEMPTS:
            return "failed"
        if job.kind == "peer" and not self._visit.peers:
            return "needs the peers' interpreter (--peers)"
        if job.kind == "agreement" and not all(self._rows_of(key).exists() for key in job.work["of"]):
            return "needs both dictionaries in this directory"
        left = 60 * self._visit.minutes - (time.monotonic() - self._started)
        if self._seconds(job) * MARGIN > left or left <= 0:
            return "does not fit into what is left of the minutes"
        return ""

    def _asked_for(self, job: Job) -> int | None:
        """Which pattern is the first that its name matches; None where none does."""
        patterns = self._visit.only.split(",")
        return next((i for i, pattern in enumerate(patterns) if fnmatchcase(job.name, pattern.strip())), None)

    def _pending(self) -> list[Job]:
        held = {one.job.key for one in self._running}
        done = {key for key, line in results.latest(self._lines).items() if line["status"] == "done"}
        return [job for job in self._due.jobs if job.key not in held | done]

    def _seconds(self, job: Job) -> float:
        """What jobs like it took on this machine, by their activations; 0 where none has ended yet."""
        tokens = job.about["tokens"]
        known = [line for line in self._lines if line["status"] == "done" and line.get("machine") == self._machine]
        known = [line for line in known if line["kind"] == job.kind]
        own = [line for line in known if line["job"]["method"] == job.about["method"]]
        return max((line["seconds"]["total"] * tokens / line["job"]["tokens"] for line in own or known), default=0.0)

    # --------------------------------------------------------------------------------------------------- starting
    def _start(self) -> None:
        pending = sorted(
            (job for job in self._pending() if not self._reason(job)), key=lambda job: self._asked_for(job) or 0
        )
        while pending:
            found = free(self._places, [one.place for one in self._running], self._visit.jobs)
            if found is None:
                return
            place, room = found
            job = pending.pop(0)
            if job.kind == "peer":
                others = [other for other in pending if other.kind == "peer" and other.stream == job.stream][: room - 1]
                pending = [other for other in pending if other not in others]
                self._start_peers([job, *others], place)
            else:
                self._begin(job, place, self._own(job, place))

    def _own(self, job: Job, place: Place) -> Process:
        """A recipe of ours, or the agreement of two dictionaries."""
        directory = self._directory(job)
        if job.kind == "agreement":
            decoders = [str(self._rows_of(key)) for key in job.work["of"]]
            return task({"kind": "agree", "decoders": decoders, "rows": job.work["rows"]}, directory, place.environment)
        write_whole(directory / "recipe.toml", toml.write(job.work))
        table = {"kind": "train", "recipe": str(directory / "recipe.toml"), "out": str(directory / "run")}
        return task({**table, **self._common(job, place)}, directory, place.environment)

    def _start_peers(self, jobs: Sequence[Job], place: Place) -> None:
        """Peers of one stream on one device, fed from one harvest."""
        first = jobs[0].work
        harvest = Harvest(self._work / f"harvest-{jobs[0].key}", first["batch"], first["d_model"], place.environment)
        for job in jobs:
            directory = self._directory(job)
            (directory / "saved").mkdir()
            device = {"device": place.device, "out": str(directory / "saved")}
            process = harvest.worker(self._visit.peers, {**job.work, **device}, directory, self._path)
            self._begin(job, place, process, harvest)
        batches = max(job.work["normalise"] + job.work["steps"] for job in jobs)
        harvest.start(self._recipe, first["seed"], batches, place.device)

    def _begin(self, job: Job, place: Place, process: Process, harvest: Harvest | None = None) -> None:
        self._running.append(
            _Running(
                job=job,
                place=place,
                process=process,
                directory=self._directory(job),
                started=time.monotonic(),
                harvest=harvest,
            )
        )
        where = f" on {place.name}" if len(self._places) > 1 else ""
        self._tell(f"start: {job.name}{where}")

    def _common(self, job: Job, place: Place) -> dict[str, Any]:
        """What a task that measures is told."""
        wanted = job.about["share"] == 1.0 and job.about["setting"] in self._suite.agreement.at
        return {
            "base": str(self._recipe),
            "held_out_seed": self._suite.held_out_seed,
            "device": place.device,
            "silent": self._suite.silent,
            "decoder": str(self._rows_of(job.key)) if wanted else None,
        }

    def _directory(self, job: Job) -> Path:
        directory = self._work / job.key
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _rows_of(self, key: str) -> Path:
        return self._rows / f"{key}.safetensors"

    # ------------------------------------------------------------------------------------------------------ ending
    def _look(self, one: _Running) -> None:
        """Where a process has ended: a peer is imported and measured next, everything else becomes a line."""
        code = one.process.ended()
        if code is None:
            return
        if one.harvest is None:
            self._finish(one, one.process.answer())
            return
        said = "" if code == 0 else one.harvest.failed() or one.process.last_words()
        one.harvest.left()
        one.harvest = None
        if code != 0:
            self._finish(one, {"error": said})
            return
        one.told = json.loads((one.directory / "saved" / "told.json").read_text(encoding="utf-8"))
        (one.directory / "saved" / "told.json").unlink()
        samples = getattr(self._base.plan.recipe.phase.get("calibrate"), "samples", IMPORTED)
        table = {
            "kind": "adopt",
            "saved": str(one.directory / "saved"),
            "format": FORMATS[one.job.work["library"]],
            "tokens": min(IMPORTED, samples),
        }
        one.process = task({**table, **self._common(one.job, one.place)}, one.directory, one.place.environment)

    def _finish(self, one: _Running, answer: dict[str, Any]) -> None:
        """The line of a job that has ended; its files go."""
        self._running.remove(one)
        total = round(time.monotonic() - one.started, 3)
        trained = {"train": one.told["seconds"]} if one.told else {}
        line: dict[str, Any] = {
            "key": one.job.key,
            "suite": self._suite.name,
            "kind": one.job.kind,
            "job": {**one.job.about, "name": one.job.name},
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self._machine,
            "together": [other.place for other in (*self._running, one)].count(one.place),
            "commit": self._commit,
            "seconds": {**trained, **answer.pop("seconds", {}), "total": total},
            "versions": {**answer.pop("versions", {}), **one.told.get("versions", {})},
        }
        if "error" in answer:
            line |= {"status": "error", "error": answer["error"]}
            self._tell(f"failed: {one.job.name}: {answer['error']}")
        else:
            line |= {"status": "done", **answer}
            self._tell(f"done: {one.job.name} ({total:.0f} s)")
        results.append(self._visit.out, line)
        self._lines.append(line)
        shutil.rmtree(one.directory, ignore_errors=True)
        if self._due.waiting:
            self._due = self._expanded()

    def _outcome(self) -> Outcome:
        latest = results.latest(self._lines)
        done, failed, left = [], {}, dict.fromkeys(self._due.waiting, "waits for its choice of a rate")
        for job in self._due.jobs:
            line = latest.get(job.key)
            if line is not None and line["status"] == "done":
                done.append(job.name)
            elif line is not None and self._asked_for(job) is not None:
                failed[job.name] = str(line["error"])
            else:
                left[job.name] = self._reason(job) or "was cut"
        return Outcome(done=tuple(done), failed=failed, left=left)


__all__ = ["Outcome", "Queue", "Visit"]
