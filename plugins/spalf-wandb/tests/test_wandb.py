"""The tracker with the real client: offline, against a server of our own, and against none at all."""

from __future__ import annotations

import gzip
import json
import logging
import threading
import time
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from spalf_wandb.tracker import Wandb
from wandb.proto import wandb_internal_pb2 as pb

import spalf
from spalf import hookimpl
from spalf.engine import evaluate

# Each test starts the client's own process once or more.
pytestmark = pytest.mark.slow

RECIPE = """
extends = "spalf"
name = "small"
seed = 1
phases = ["calibrate", "fit"]
strata = ["free"]
knobs = { F = 64, L0_target = 6, R2_target = 0.8, lr = 3e-3 }
budget = { tokens = 3_840, batch = 128 }
record = { log_every = 3, save_every = 10, keep = 9, track = ["wandb"] }
source = { use = "synthetic", d_model = 16, features = 32 }
phase.calibrate = { samples = 2048 }
phase.fit = { constraints = ["faithfulness", "orthogonality"], gate = { use = "exhausted" } }
constraint.orthogonality = { sample = 16 }
evaluator = { downstream_loss = false, sparsity_frontier = false, drift_fidelity = false }
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client that knows no account, no settings and no server of this machine; ended after the test."""
    for key, value in {
        "HOME": str(tmp_path / "home"),
        "WANDB_CONFIG_DIR": str(tmp_path / "home"),
        "WANDB_MODE": "offline",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_HTTP_TIMEOUT": "2",
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(key, value)
    for key in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(evaluate, "ROWS", 512)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def train(recipe: Path, **options: Any) -> Path:
    return spalf.run(recipe, out=recipe.parent / "runs", device="cpu", **options).directory


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]


def row(line: dict[str, Any]) -> dict[str, Any]:
    """A line as the client is told of it."""
    out: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}{key}".replace(".", "/") + "/", inner)
        elif value is not None:
            out[prefix.rstrip("/")] = value

    walk("", line)
    return out


# ------------------------------------------------------------------------------------------- what the client wrote
def records(file: Path) -> Iterator[pb.Record]:
    """The records of a .wandb file: protobufs in a log of 32 KiB blocks, each piece behind 4 + 2 + 1 bytes of head."""
    data, at, held = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in {1, 4}:  # whole, or the last piece
            record = pb.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def sessions(directory: Path) -> list[list[pb.Record]]:
    """The records of each session, oldest first. The client's process writes on for a moment: it is ended here."""
    wandb.teardown()
    found = sorted((directory / "trackers" / "wandb" / "wandb").glob("*run-*/*.wandb"))
    return [list(records(file)) for file in found]


def history(session: list[pb.Record]) -> dict[int, dict[str, Any]]:
    """Rows by step, without the client's own keys."""
    out = {}
    for record in session:
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            out[record.history.step.num] = {k: v for k, v in items.items() if not k.startswith("_")}
    return out


def said(session: list[pb.Record], kind: str) -> dict[str, Any]:
    """Config or summary, the last word on each key."""
    out = {}
    for record in session:
        part = record.run.config if kind == "config" and record.HasField("run") else getattr(record, kind)
        out.update({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in part.update})
    return out


def identity(session: list[pb.Record]) -> pb.RunRecord:
    return next(record.run for record in session if record.HasField("run"))


# ------------------------------------------------------------------------------------------------------- offline
def test_a_run_offline_is_all_there(recipe: Path) -> None:
    directory = train(recipe)
    [session] = sessions(directory)
    assert history(session) == {i: row(line) for i, line in enumerate(lines(directory))}
    filled = tomllib.loads((directory / "recipe.toml").read_text())
    config = said(session, "config")
    assert {key: config[key] for key in filled} == filled
    assert (config["rows"], config["total_steps"]) == ({"free": 64}, 30)
    summary = json.loads((directory / "summary.json").read_text())
    told = said(session, "summary")
    assert (told["outcome"], told["l0"], told["notes"]) == ("done", summary["l0"], summary["notes"])
    assert told["constraints"] == summary["constraints"]
    mine = identity(session)
    assert (mine.display_name, mine.project) == ("small", "spalf")
    assert json.loads((directory / "trackers" / "wandb" / "run.json").read_text()) == {
        "id": mine.run_id,
        "project": "spalf",
    }
    assert next(r.exit.exit_code for r in session if r.HasField("exit")) == 0


def test_training_is_drawn_over_its_steps(recipe: Path) -> None:
    [session] = sessions(train(recipe, stop_at=9))
    over = {r.metric.name: r.metric.step_metric for r in session if r.HasField("metric")}
    assert over["loss"] == over["constraints/faithfulness/lam"] == "step"
    assert "change" not in over, "calibration takes no step"


def test_a_resumed_run_is_the_same_run_and_tells_nothing_twice(recipe: Path) -> None:
    directory = train(recipe, stop_at=20)
    spalf.resume(directory, checkpoint="spalf_fit_step10", device="cpu", stop_at=25)
    first, second = sessions(directory)
    assert identity(first).run_id == identity(second).run_id
    one, two = history(first), history(second)
    place = next(i for i, line in enumerate(lines(directory)) if line["phase"] == "fit" and line["step"] == 12)
    assert min(two) == place, "an index is a line's place in metrics.jsonl, in every session"
    assert {**one, **two} == {i: row(line) for i, line in enumerate(lines(directory))}
    assert all(one[i] == two[i] for i in one.keys() & two.keys())


def test_a_replaced_run_is_another_run(recipe: Path) -> None:
    before = identity(sessions(train(recipe, stop_at=3))[0]).run_id
    [session] = sessions(train(recipe, stop_at=3, force=True))
    assert identity(session).run_id != before


def test_the_environment_names_the_project(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "dictionaries")
    directory = train(recipe, stop_at=3)
    monkeypatch.delenv("WANDB_PROJECT")
    spalf.resume(directory, device="cpu", stop_at=6)
    assert {identity(s).project for s in sessions(directory)} == {"dictionaries"}


def test_a_run_that_fails_is_told_as_failed(recipe: Path) -> None:
    class Pulled:
        @hookimpl
        def spalf_stepped(self, reading: Any) -> None:
            if reading.step == 5:
                raise OSError("the plug was pulled")

    with pytest.raises(OSError, match="plug"):
        train(recipe, observers=[Pulled()])
    [session] = sessions(recipe.parent / "runs" / "small")
    assert said(session, "summary")["notes"] == ["OSError: the plug was pulled"]
    assert next(r.exit.exit_code for r in session if r.HasField("exit")) == 1


def test_disabled_writes_nothing_of_the_client_s(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert sessions(train(recipe, stop_at=3)) == []


def test_a_run_that_is_open_already_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    with wandb.init(dir=tmp_path, settings=wandb.Settings(console="off", silent=True)) as theirs:
        directory = train(recipe, stop_at=6)
        assert theirs.step == 0
        assert dict(theirs.config) == {}
    assert identity(sessions(directory)[0]).run_id != theirs.id


# ---------------------------------------------------------------------------------------------------- the network
class Server(ThreadingHTTPServer):
    """As much of a server as the client asks for; it keeps what it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.rows: dict[int, dict[str, Any]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((name, given))
        project = {"id": "p", "name": "spalf", "entity": {"id": "e", "name": "me"}}
        run = {"id": "r", "name": given.get("name"), "displayName": "small", "config": "{}", "project": project}
        if name == "Viewer":
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "UpsertBucket":
            return {"upsertBucket": {"inserted": True, "bucket": {**run, "sweepName": None, "historyLineCount": 0}}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if name == "RunResumeStatus" and self.rows:
            last = json.dumps([json.dumps({"_step": max(self.rows)})])
            counts = {"historyLineCount": len(self.rows), "logLineCount": 0, "eventsLineCount": 0}
            tails = {"historyTail": last, "eventsTail": "[]", "summaryMetrics": "{}", "wandbConfig": "{}", "tags": []}
            return {"model": {**project, "bucket": {**run, **counts, **tails}}}
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        out: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            out = {"data": self.server.answer(asked["operationName"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            for text in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                row = json.loads(text)
                self.server.rows[row["_step"]] = {k: v for k, v in row.items() if not k.startswith("_")}
        answer = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST
    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal belongs to pytest."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that the client is logged in to."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def test_a_server_gets_every_line(recipe: Path, server: Server) -> None:
    directory = train(recipe, stop_at=9)
    assert server.rows == {i: row(line) for i, line in enumerate(lines(directory))}
    config = json.loads(next(given["config"] for name, given in server.asked if name == "UpsertBucket"))
    assert config["knobs"]["value"] == tomllib.loads((directory / "recipe.toml").read_text())["knobs"]
    told = json.loads((directory / "trackers" / "wandb" / "run.json").read_text())
    assert (told["project"], told["entity"]) == ("spalf", "me")


def test_a_server_is_told_nothing_twice(recipe: Path, server: Server) -> None:
    directory = train(recipe, stop_at=15)
    held = dict(server.rows)
    spalf.resume(directory, checkpoint="spalf_fit_step10", device="cpu", stop_at=21)
    assert server.rows == {i: row(line) for i, line in enumerate(lines(directory))}
    assert held.items() <= server.rows.items()
    assert len({given["name"] for name, given in server.asked if name == "UpsertBucket" and given["name"]}) == 1


def test_a_server_that_dies_stops_no_run(recipe: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")

    class Cut:
        @hookimpl
        def spalf_stepped(self, reading: Any) -> None:
            if reading.step == 5:
                server.shutdown()
                server.server_close()

    began = time.monotonic()
    directory = train(recipe, observers=[Cut()])
    assert json.loads((directory / "summary.json").read_text())["outcome"] == "done"
    assert lines(directory)[-1]["step"] == 30
    assert time.monotonic() - began < 60
    [session] = sessions(directory)
    assert history(session)[0] == row(lines(directory)[0]), "what was not sent is on disk, for wandb sync"


@pytest.mark.parametrize(("key", "why"), [("0" * 40, "Failed to authenticate"), ("", "nobody is logged in")])
def test_without_a_server_or_a_login_a_run_is_kept_offline(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, key: str, why: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    wandb.teardown()
    with caplog.at_level(logging.WARNING, "spalf"):
        directory = train(recipe, stop_at=9)
    [message] = [r.getMessage() for r in caplog.records if r.name == "spalf"]
    assert why in message
    assert "kept offline" in message
    [session] = sessions(directory)
    assert history(session) == {i: row(line) for i, line in enumerate(lines(directory))}


def test_offered_by_name_and_writes_nothing_before_a_run(recipe: Path, tmp_path: Path) -> None:
    from spalf_wandb import spalf_trackers

    assert isinstance(spalf_trackers()["wandb"](spalf.compile_recipe(recipe), tmp_path / "x"), Wandb)
    assert not (tmp_path / "x").exists()
