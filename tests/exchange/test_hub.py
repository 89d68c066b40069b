"""Uploads, by the real client, to a server of our own; and the card that goes along."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from spalf import launch
from spalf.exchange import hub
from spalf.exchange.verbs import about_run


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload asks for; `says` is its status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.says = 200
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early is no error; others are written to stderr, as they are without this."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        lines = [json.loads(line) for line in body.splitlines() if line]
        self.server.asked.append((self.path, lines[0] if lines else {}))
        out: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            name = f"{lines[0].get('organization', '')}/{lines[0]['name']}"
            out = {"url": f"http://{self.headers['host']}/{name}"}
        elif "/preupload/" in self.path:
            out = {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]}
        elif "/commit/" in self.path:
            found = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files.update({f["path"]: base64.b64decode(f["content"]) for f in found})
            out = {
                "commitUrl": f"http://{self.headers['host']}/u/name/commit/0",
                "commitOid": "0" * 40,
                "success": True,
            }
        self._send(out)

    def do_GET(self) -> None:
        self._send({})

    def _send(self, out: dict[str, Any]) -> None:
        said = json.dumps(out if self.server.says == 200 else {"error": "you may not"}).encode()
        self.send_response(self.server.says)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def pushed(run: Path, out: Path, endpoint: str, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`spalf export ... --push u/name`, in a process of its own: the client reads its settings at import."""
    settings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none", **env}
    command = [sys.executable, "-m", "spalf", "export", str(run), str(out), "--to", "saelens", "--push", "u/name"]
    return subprocess.run([*command, *options], env=settings, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dictionary_and_its_card_arrive(run: Path, tmp_path: Path, server: Hub) -> None:
    done = pushed(run, tmp_path / "out", f"http://127.0.0.1:{server.server_port}", "--private")
    assert done.returncode == 0, done.stderr
    assert "pushed to u/name" in done.stderr
    created = dict(server.asked)["/api/repos/create"]
    assert created == {"name": "name", "organization": "u", "visibility": "private"}
    assert set(server.files) == {"README.md", "planted/cfg.json", "planted/sae_weights.safetensors"}
    for name, sent in server.files.items():
        assert (tmp_path / "out" / Path(name).name).read_bytes() == sent
    # One commit: a repository never holds half a dictionary.
    assert sum("/commit/" in path for path, _ in server.asked) == 1


@pytest.mark.slow
@pytest.mark.parametrize("why", ["refused", "unreachable", "offline"])
def test_an_upload_that_fails_is_one_sentence(why: str, run: Path, tmp_path: Path, server: Hub) -> None:
    server.says = 403
    port = 9 if why == "unreachable" else server.server_port
    done = pushed(run, tmp_path / "out", f"http://127.0.0.1:{port}", HF_HUB_OFFLINE="1" if why == "offline" else "0")
    assert done.returncode == 2
    assert done.stderr.startswith("spalf: --push u/name: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "cfg.json").is_file()


SUMMARY = {
    "l0": 12.25,
    "r2_raw": 0.75,
    "ce_clean": 2.5,
    "kl": None,
    "constraints": {"faithfulness": {"feasible": True, "violation": -0.02, "multiplier": 1.5, "budget": 0.25}},
    "notes": ["a sentence"],
}


@pytest.mark.parametrize("to", hub.LOADING)
def test_a_card_says_what_was_asked_and_what_was_measured(to: str, run: Path) -> None:
    at, plan, state = launch.closed(run)
    about = about_run(at, plan, state, SUMMARY)
    text = hub.card(plan, about, SUMMARY, 'name = "run"', hub.Upload(repo="u/name", folder="planted"), to)
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == hub.LOADING[to][0]
    for line in (
        "| L0_target | 4 |",
        "| L0: active features per activation | 12.25 |",
        "| cross-entropy of the model, nats | 2.5 |",
        "| faithfulness | yes | -2.0% | 1.5 | 0.25 |",
        "- a sentence",
        'name = "run"',
    ):
        assert line in text.splitlines(), line
    assert "KL" not in text
    loading = text.split("```python")[1].split("```")[0]
    assert "u/name" in loading
    assert "planted" in loading
    assert compile(loading, "card", "exec")


def test_a_card_without_a_summary_says_so(run: Path) -> None:
    at, plan, state = launch.closed(run)
    text = hub.card(plan, about_run(at, plan, state, {}), {}, "", hub.Upload(repo="u/n", folder="f"), "saelens")
    assert "Nothing: the run left no summary." in text
    assert "## Constraints" not in text
