"""The notebook and the page about changing features run, from first to last, on a dictionary that is trained here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from spalf import launch
from spalf.testing.whole import LANGUAGE, TOY

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTEBOOK = DOCS / "walkthrough.ipynb"
SETS = {**LANGUAGE, "name": '"quickstart"', "budget__tokens": "102400", "source__shuffle": "16384"}


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which runs/quickstart is a small dictionary of the embedded model; stopped, so not measured."""
    home = tmp_path_factory.mktemp("home")
    recipe = home / "small.toml"
    recipe.write_text('extends = "spalf"\n' + TOY)
    sets = [f"{key.replace('__', '.')}={value}" for key, value in SETS.items()]
    launch.run(recipe, sets=sets, out=home / "runs", device="cpu", stop_at=600)
    return home


@pytest.mark.slow
def test_the_notebook_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("SPALF_RUN", str(runs / "runs" / "quickstart"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = notebook()
    NotebookClient(book, timeout=200, resources={"metadata": {"path": str(DOCS)}}).execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    ends = [cell for cell in cells if not cell.source.lstrip().startswith("def ") or cell.source.endswith("patched")]
    assert [cell.source for cell in ends if not cell.outputs] == []
    noisy = [o for cell in cells for o in cell.outputs if o.output_type in {"error", "stream"}]
    assert noisy == [], "neither an error nor a warning"
    shown = [o["data"]["text/plain"] for cell in cells for o in cell.outputs]
    assert "18 tokens: KL 0 nats per position, loss +0 nats per token" in shown, "codes left alone change nothing"
    assert any(text.startswith("feature ") and "--- steered" in text for text in shown)
    assert any(re.match(r"feature \d+ fires in \d+ of \d+ contexts; set to 0", text) for text in shown)


@pytest.mark.slow
def test_the_pages_python_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "intervene.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(runs)
    space: dict[str, Any] = {}
    exec(compile(block, "intervene.md", "exec"), space)
    assert space["patched"].kl_T.shape == (len(space["patched"].tokens),)


def test_the_notebook_is_small_valid_and_was_run_from_the_top() -> None:
    book = notebook()
    nbformat.validate(book)
    assert os.path.getsize(NOTEBOOK) < 60_000
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [o for cell in cells for o in cell.outputs if o.output_type in {"error", "stream"}] == []
    assert "/tmp" not in NOTEBOOK.read_text(encoding="utf-8"), "nothing of the machine that ran it"
