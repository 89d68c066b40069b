"""`spalf bench speed`: its figures, its page, its command, and a real step of ours at a small shape."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from spalf.bench import peer_steps
from spalf.bench.peer_steps.measure import Clock, Task, activations, attempt, threshold
from spalf.bench.speed import command, figures, floors, ours, page, peers, run, scaling, shares, tables
from spalf.bench.speed.ceilings import ceilings, rates
from spalf.bench.speed.ours import Variant
from spalf.bench.speed.scaling import Shape
from spalf.cli import app
from spalf.errors import RecipeError

SMALL = Task(d=16, width=64, l0=4, batch=32, device="cpu", steps=3, warmup=1)


def measured(name: str, ms: float, **rest: Any) -> dict[str, Any]:
    """A row as `measure` leaves it."""
    row = {"name": name, "library": name.split()[0], "version": "1", "note": "plain", "status": "ok", "clock": "events"}
    times = {"ms": ms, "ms_p10": ms, "ms_p90": ms, "ms_streaming": ms, "per_second": 4.096e6 / ms, "l0": 64.0}
    memory = {"peak_mib": 5000.0, "state_mib": 4000.0}
    loss = {"loss_first": 1.0, "loss_last": 0.5, "finite": True, "moved": True}
    return {**row, **times, **memory, **loss, **rest}


def document(*rows: dict[str, Any], kind: str = "cuda", **rest: Any) -> dict[str, Any]:
    machine = {"device": "Chip", "kind": kind, "torch": "2", "triton": "3", "python": "3", "threads": 1}
    machine |= {"spalf": "0", "commit": "abc", "date": "2026-01-01"}
    shape = {"shape": {"d": 2048, "F": 65_536, "l0": 64, "batch": 4096}, "recipe": "spalf", "rows": list(rows)}
    return {"machine": machine, "command": "spalf bench speed", "shapes": [{**shape, **rest}], "scaling": []}


class Fake:
    """A trainer that moves its parameter, or does what it is told instead."""

    version, note = "1.0", "fake"

    def __init__(self, fault: Exception | None = None, still: bool = False) -> None:
        self.weight, self.fault, self.still = torch.zeros(8), fault, still

    def step(self, x_BD: Tensor) -> Tensor:
        if self.fault is not None:
            raise self.fault
        self.weight += 0.0 if self.still else 1.0
        return x_BD.square().mean()

    def l0(self) -> float:
        return 4.0

    def parameters(self) -> list[Tensor]:
        return [self.weight]


# ------------------------------------------------------------------------------------------------------ measuring
def test_activations_are_the_same_for_everyone_and_never_constant() -> None:
    first, again = activations(SMALL), activations(SMALL)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(activations(SMALL, part=1)[0], first[0])
    large = torch.cat(activations(SMALL, rows=500))
    assert 0.8 < float(large.square().mean()) < 1.25


def test_parts_share_their_strong_directions() -> None:
    task = Task(d=256, width=1, l0=1, batch=400, device="cpu")
    top = [torch.linalg.svd(torch.cat(activations(task, part=p)), full_matrices=False).Vh[:32] for p in (0, 1)]
    other = torch.cat(activations(Task(d=256, width=1, l0=1, batch=400, device="cpu", seed=9)))
    foreign = torch.linalg.svd(other, full_matrices=False).Vh[:32]
    assert (top[0] @ top[1].T).square().sum() > 2 * (top[0] @ foreign.T).square().sum()


def test_a_threshold_gives_the_l0() -> None:
    pre_BF = torch.randn(50, 40)
    assert (pre_BF >= threshold(pre_BF, 3)).sum() == 150


def test_a_row_says_what_was_done() -> None:
    row = attempt(Fake, SMALL, activations(SMALL))
    assert row["status"] == "ok"
    assert (row["moved"], row["finite"], row["l0"], row["version"]) == (True, True, 4.0, "1.0")
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
    assert row["per_second"] == pytest.approx(1e3 * SMALL.batch / row["ms"])
    assert not attempt(lambda: Fake(still=True), SMALL, activations(SMALL))["moved"]


def test_the_collector_does_not_run_while_a_step_is_timed() -> None:
    was_on: list[bool] = []

    class Watched(Fake):
        def step(self, x_BD: Tensor) -> Tensor:
            was_on.append(gc.isenabled())
            return super().step(x_BD)

    attempt(Watched, SMALL, activations(SMALL))
    assert was_on == [True] * SMALL.warmup + [False] * 2 * SMALL.steps
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        (ImportError("no peer"), "missing", "not installed: no peer"),
        (torch.OutOfMemoryError("too large\nmore"), "memory", "out of memory: too large"),
        (ValueError("two\nlines"), "failed", "ValueError: two lines"),
    ],
)
def test_what_fails_is_a_row_with_a_reason(fault: Exception, status: str, reason: str) -> None:
    row = attempt(lambda: Fake(fault), SMALL, activations(SMALL))
    assert row == {"status": status, "reason": reason}


def test_a_step_of_ours_is_measured() -> None:
    row = ours.row(SMALL, Variant(kernel="torch"))
    assert row["status"] == "ok", row
    assert row["moved"]
    assert row["finite"]
    assert 1 < row["l0"] < 8
    assert "faithfulness, drift, orthogonality" in row["note"]


def test_a_backend_that_cannot_run_is_a_row() -> None:
    row = ours.row(SMALL, Variant(kernel="torch:code=other"))
    assert row["status"] == "failed"
    assert "kernel.code" in row["reason"]


def test_a_kernel_has_options() -> None:
    assert ours.kernel_sets("torch:code=dense:compute=float32") == (
        *("kernel.use=torch", "kernel.code=dense", "kernel.compute=float32"),
    )
    with pytest.raises(RecipeError, match='"dense" of "torch:dense" is no assignment'):
        ours.kernel_sets("torch:dense")


def test_the_pool_draws_what_it_does_not_hold() -> None:
    stream = ours.pool(SMALL)
    held = 10 * SMALL.batch
    first = stream.next(SMALL.batch).x_BD
    assert torch.equal(first, activations(SMALL)[0])
    large = stream.next(held + 7).x_BD
    assert large.shape == (held + 7, SMALL.d)
    assert not torch.equal(large[: SMALL.batch], first)
    assert stream.next(SMALL.batch).x_BD.shape == (SMALL.batch, SMALL.d)


def test_ceilings_have_rates_that_floors_take() -> None:
    rows = ceilings(SMALL, steps=2)
    assert all(row["ms"] > 0 for row in rows), rows
    found = floors.measured(dict(rates(rows)))
    assert found is not None
    assert found.cache >= found.memory


def test_a_clock_counts_what_was_done() -> None:
    def busy() -> None:
        sum(range(200_000))

    device, wall, process = Clock(cuda=False).time(busy)
    assert device == process
    assert wall >= 0.5 * process > 0


# ------------------------------------------------------------------------------------------------------ calculating
@pytest.mark.parametrize(("l0", "wanted"), [(64, (9.95, 5.87, 4.04)), (164, (9.95, 8.46, 4.35))])
def test_floors_of_an_h100(l0: int, wanted: tuple[float, ...]) -> None:
    task = Task(d=2048, width=65_536, l0=l0, batch=4096, device="cuda")
    found = floors.floors(task, floors.DATA_SHEETS["H100"])
    assert list(found.values()) == pytest.approx(wanted, abs=0.006)


def test_a_floor_grows_with_everything() -> None:
    def of(**change: int) -> list[float]:
        task = Task(**{"d": 512, "width": 8192, "l0": 64, "batch": 2048, **change}, device="cuda")
        return list(floors.floors(task, floors.DATA_SHEETS["H100"]).values())

    for change in ({"d": 1024}, {"width": 16_384}, {"batch": 4096}):
        assert all(more > less for more, less in zip(of(**change), of(), strict=True))
    assert of(l0=128)[1] > of()[1]
    assert of(l0=128)[0] == of()[0]


def test_floors_without_ceilings_are_those_of_a_known_chip() -> None:
    assert [r.name for r in floors.rates_for("NVIDIA H100 80GB HBM3", {})] == [floors.DATA_SHEETS["H100"].name]
    assert floors.rates_for("another", {}) == []


def test_the_grid_goes_along_axes_and_to_corners() -> None:
    base = Shape(d=2048, width=65_536, l0=64, batch=4096)
    points = scaling.grid(base, scaling.AXES)
    assert len(points) == len(set(points)) == 5 + 3 + 3 + 8
    assert base in points
    along = [p for p in points if (p.l0, p.batch) == (64, 4096)]
    assert [p.width for p in along] == list(scaling.WIDTHS)
    assert scaling.grid(base, ("l0",)) == [Shape(d=2048, width=65_536, l0=k, batch=4096) for k in scaling.L0S]


def test_ratios_are_not_in_our_favour() -> None:
    own = measured("spalf triton", 4.0, ms_streaming=5.0)
    peer = measured("sparsify TopK", 20.0, ms_streaming=15.0)
    assert figures.cost(own) == 5.0
    assert figures.ratio(peer, [own, peer]) == 3.0
    assert figures.cost(measured("spalf torch", 4.0, ms_streaming=9.0, clock="process")) == 4.0


def test_targets_are_judged() -> None:
    rows = [measured("spalf triton", 5.9), measured("SAELens JumpReLU", 42.0), measured("sparsify TopK", 20.0)]
    share = {"kernel": "triton", "rows": [{"name": "objective alone", "status": "ok", "share": 0.13, "ms": 5.0}]}
    waits = {"steps": 40, "places": {"spalf/x.py:3": 2}}
    found = figures.targets(document(*rows, share=share, waits=waits))
    assert [(t.what.split(" (")[0], t.met) for t in found] == [
        ("a step at L0 64", True),
        ("peak memory at L0 64", True),
        ("against SAELens JumpReLU", True),
        ("against the best peer", False),
        ("constraints, filters and controllers at L0 64", False),
        ("waits for the device at L0 64", False),
    ]


def test_targets_of_a_cpu() -> None:
    rows = [measured("spalf torch", 10.0, clock="process"), measured("sparsify TopK", 19.0, clock="process")]
    found = document(*rows, kind="cpu")
    found["start"] = {"help_s": 0.3, "first_step_s": 11.0, "recipe": "r.toml"}
    assert [t.met for t in figures.targets(found)] == [False, True, False]


def test_the_dense_path_counts_where_it_is_faster() -> None:
    found = document()
    shape = {"d": 1, "F": 2, "l0": 3, "batch": 4}
    for fused in (3.0, 5.0):
        found["scaling"].append(
            {
                "shape": shape,
                "rows": [measured("spalf triton", fused), measured("spalf_plain torch:code=dense", 4.0)],
                "floors": [],
            }
        )
    assert figures.targets(found)[-1].measured == "1 of 2"


def test_rounds_are_joined_by_their_median() -> None:
    rows = [measured("a", ms) for ms in (3.0, 1.0, 8.0)]
    joined = run.combined(rows)
    assert joined["ms"] == 3.0
    assert joined["rounds"] == [3.0, 1.0, 8.0]
    failed = {"name": "a", "status": "failed", "reason": "x"}
    assert run.combined([rows[0], failed]) is failed


def test_documents_of_one_machine_are_joined() -> None:
    first, second = document(measured("a", 1.0), measured("b", 2.0)), document(measured("b", 3.0), ceilings=[])
    [joined] = run.merged([first, second])
    assert {r["name"]: r["ms"] for r in joined["shapes"][0]["rows"]} == {"a": 1.0, "b": 3.0}
    assert joined["commands"] == ["spalf bench speed"] * 2
    other = document(measured("a", 1.0))
    for held, recipe, share in ((first, "plain", 0.1), (second, "whole", 0.2)):
        rows = [{"name": "objective alone", "status": "ok", "share": share, "ms": 5.0, "l0": 64.0}]
        held["shapes"][0].update(recipe=recipe, share={"kernel": "triton", "rows": rows})
    later = document()  # of a recipe that is there: what it has is added
    later["shapes"][0].update(recipe="plain", waits={"steps": 40, "places": {}})
    [joined] = run.merged([first, second, later])
    told = {t.what: t.measured for t in figures.targets(joined)}
    assert told["waits for the device at L0 64 (plain)"] == "0 in 40 steps"
    for recipe, share in (("plain", "10.0 %"), ("whole", "20.0 %")):
        assert told[f"constraints, filters and controllers at L0 64 ({recipe})"] == share
        assert f"What the constraints cost (`{recipe}`, `triton`)" in page.page([joined])
    other["machine"] = {**other["machine"], "commit": "def"}
    assert len(run.merged([first, other])) == 2


def test_the_rest_of_a_step_is_what_a_variant_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"all": 10.0, "without orthogonality": 9.5, "faithfulness alone": 9.25, "objective alone": 9.0}
    monkeypatch.setattr(ours, "row", lambda task, variant: measured(variant.name, times[variant.name]))
    found = {r["name"]: r["share"] for r in shares.shares(SMALL, Variant(kernel="torch"), rounds=2)}
    assert found["all"] == 0
    assert found["objective alone"] == pytest.approx(0.1)


def test_a_variant_alone_has_no_constraint() -> None:
    sets = shares.VARIANTS[shares.ALONE]
    plan = ours.planned(SMALL, Variant(kernel="torch", sets=sets), ours.pool(SMALL).facts)
    assert plan.constraints == ()
    assert plan.terms == ("error", "l0")


def test_a_cpu_has_no_device_to_wait_for() -> None:
    assert shares.waits(SMALL, Variant(kernel="torch"))["places"] is None


# ------------------------------------------------------------------------------------------------------ showing
def whole() -> dict[str, Any]:
    """A document with every part."""
    task = Task(d=2048, width=65_536, l0=64, batch=4096, device="cuda")
    broken = {"name": "SAELens TopK", "library": "SAELens", "status": "missing", "reason": "no | python"}
    found = document(
        measured("spalf triton", 5.0),
        measured("sparsify TopK", 20.0),
        measured("dictionary_learning TopK", 25.0),
        broken,
        ceilings=[{"name": "x", "ms": 1.0, "rate": 2.0, "unit": "TB/s"}, {"name": "y", "ms": None, "reason": "large"}],
        floors=floors.table(task, "H100", {}),
        share={"kernel": "triton", "rows": [{"name": "all", "status": "ok", "ms": 5.0, "share": 0.0, "l0": 64.0}]},
        waits={"steps": 40, "places": {}},
        profile={
            "status": "ok",
            "name": "spalf triton",
            "busy_ms": 4.0,
            "rows": [{"name": "gemm", "us": 1500.0, "calls": 1.0}, {"name": "small", "us": 2.0, "calls": 3.0}],
        },
    )
    point = {"shape": {"d": 2048, "F": 16_384, "l0": 64, "batch": 4096}, "floors": floors.table(task, "H100", {})}
    found["scaling"] = [{**point, "rows": [measured("spalf triton", 3.0), {**broken, "name": "spalf torch"}]}]
    found["start"] = {"help_s": 0.2, "help_processor_s": 0.1, "recipe": "r.toml", "reason": "no disk"}
    return found


def test_a_page_is_a_function_of_its_documents() -> None:
    text = page.page(run.merged([whole()]))
    assert text == page.page(run.merged([json.loads(json.dumps(whole()))]))
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    for shown in (
        "no \\| python",
        "**spalf triton**",
        "4.00",
        "large",
        "`gemm`",
        "1 shorter ones",
        "in 40 steps: none",
    ):
        assert shown in text, shown
    assert "| against the best peer (sparsify TopK) | >= 4x | 4.00x | met |" in text


def test_one_peer_is_not_the_best_of_them() -> None:
    found = document(measured("spalf triton", 5.0), measured("SAELens JumpReLU", 40.0))
    said = [target.what for target in figures.targets(found)]
    assert "against SAELens JumpReLU" in said
    assert not any("best peer" in what for what in said)


def test_the_page_in_the_documentation_is_that_of_its_figures() -> None:
    folder = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
    found = command.documents(sorted((folder / "speed").glob("*.json")))
    remarks = (folder / "speed" / "remarks.md").read_text(encoding="utf-8")
    assert (folder / "speed.md").read_text(encoding="utf-8") == page.page(found, remarks)


def test_remarks_stand_behind_the_head(tmp_path: Path) -> None:
    kept, said, out = tmp_path / "a.json", tmp_path / "said.md", tmp_path / "page.md"
    kept.write_text(json.dumps(whole()))
    said.write_text("A remark.\n\n")
    words = ["bench", "speed", "--from", str(kept), "--render", str(out), "--remarks", str(said)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert out.read_text().index("A remark.") < out.read_text().index("## Chip")
    assert CliRunner().invoke(app, [*words[:-1], str(tmp_path / "none.md")]).exit_code == 2


def test_what_limits_a_step_is_said() -> None:
    [table] = whole()["shapes"]
    assert figures.limits(table) == ""
    table["ceilings"] = [{"name": "encode product [B,d] x [d,F]", "ms": 1.5, "rate": 1.0, "unit": "TFLOP/s"}]
    assert "takes 1.50 (30 %), and 4.04 are the least floor (one pass" in figures.limits(table)


def test_every_table_is_rectangular() -> None:
    found = whole()
    [table] = found["shapes"]
    parts = [
        tables.steps(table["rows"]),
        tables.floors(table["floors"], None),
        tables.ceilings(table["ceilings"]),
        tables.shares(table["share"]["rows"]),
        tables.profile(table["profile"]["rows"]),
        tables.scaling(found["scaling"]),
        tables.start(found["start"]),
    ]
    for heads, rows in parts:
        assert rows
        assert {len(row) for row in rows} == {len(heads)}


def test_memory_that_nobody_measured_has_no_column() -> None:
    row = measured("spalf torch", 1.0)
    del row["peak_mib"], row["state_mib"]
    assert "peak MiB" not in tables.steps([row])[0]


# ------------------------------------------------------------------------------------------------------ asking
def test_files_are_read_and_a_page_is_written(tmp_path: Path) -> None:
    kept, out = tmp_path / "a.json", tmp_path / "page.md"
    kept.write_text(json.dumps(whole()))
    done = CliRunner().invoke(app, ["bench", "speed", "--from", str(kept), "--render", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_text() == page.page(run.merged([whole()]))
    assert "spalf triton" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "2048,64"], "is not d_model, features and active ones"),
        (["--shape", "16,64,64"], "asks for 64 active ones of 64 features"),
        (["--scaling", "width"], 'there is no axis "width"'),
        (["--kernels", "torch:dense"], "is no assignment"),
        (["--peers", "nowhere/python"], "nowhere/python does not exist"),
        (["--from", "nowhere.json"], "nowhere.json: No such file"),
        (["--json", "no/where/a.json"], "there is no such directory"),
        (["--device", "cuda:x"], "device"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", "speed", *words])
    assert done.exit_code == 2
    assert message in done.stderr


def test_shapes_come_from_a_recipe() -> None:
    [found] = command.shapes((), None, "recipes/quickstart.toml", cuda=False)
    assert found == command.CPU_SHAPE
    [given] = command.shapes(("8,32,2",), 16, "spalf", cuda=True)
    assert (given.d, given.width, given.l0, given.batch) == (8, 32, 2, 16)


@pytest.mark.slow
def test_a_small_table_from_end_to_end(tmp_path: Path) -> None:
    kept = tmp_path / "a.json"
    words = ["--shape", "16,64,4", "--batch", "32", "--steps", "2", "--no-peers", "--share", "--json", str(kept)]
    done = CliRunner().invoke(app, ["bench", "speed", *words])
    assert done.exit_code == 0, done.output
    [table] = json.loads(kept.read_text())["shapes"]
    assert [row["status"] for row in table["rows"]] == ["ok"]
    assert [row["status"] for row in table["share"]["rows"]] == ["ok"] * 4


# ------------------------------------------------------------------------------------------------------ peers
def test_a_missing_interpreter_is_a_row() -> None:
    row = peers.row("sparsify TopK", SMALL, None)
    assert row["status"] == "missing"
    assert "make peers" in row["reason"]


def wrapper(folder: Path, script: str) -> Path:
    out = folder / "python"
    out.write_text(f"#!/bin/sh\n{script}\n")
    out.chmod(0o755)
    return out


def test_a_process_that_ends_is_a_row_with_its_last_words(tmp_path: Path) -> None:
    row = peers.row("SAELens TopK", SMALL, wrapper(tmp_path, "echo first >&2; echo no torch here >&2; exit 3"))
    assert (row["name"], row["status"]) == ("SAELens TopK", "failed")
    assert row["reason"] == "its process ended with 3: no torch here"


def test_what_is_not_a_program_is_a_row(tmp_path: Path) -> None:
    empty = tmp_path / "python"
    empty.write_text("")
    assert peers.row("SAELens TopK", SMALL, empty)["status"] == "failed"


PYTHON = Path(__file__).resolve().parents[2] / peers.DEFAULT
# All in one process: to import these libraries takes a hundred times what their steps take.
ALL = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.append(sys.argv[1])
from peer_steps.__main__ import run
rows = {name: run(name, json.loads(sys.argv[2])) for name in json.loads(sys.argv[3])}
open(sys.argv[4], "w").write(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A row of every peer."""
    if not PYTHON.exists():
        pytest.skip("run make peers")
    out = tmp_path_factory.mktemp("peers") / "rows.json"
    words = [str(Path(peer_steps.__file__).parents[1]), json.dumps(asdict(SMALL)), json.dumps(peers.NAMES), str(out)]
    environment = {**peers._environment(PYTHON), "WANDB_MODE": "disabled"}
    call = [str(PYTHON), "-P", "-c", ALL, *words]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return rows


def stepping(row: dict[str, Any]) -> None:
    assert row["status"] == "ok", row
    assert row["moved"]
    assert row["finite"]
    assert row["l0"] == pytest.approx(4, abs=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.NAMES)
def test_every_peer_steps(name: str, stepped: dict[str, dict[str, Any]]) -> None:
    stepping(stepped[name])


@pytest.mark.slow
def test_a_peer_steps_in_a_process_of_its_own() -> None:
    if not PYTHON.exists():
        pytest.skip("run make peers")
    row = peers.row("dictionary_learning TopK", SMALL, PYTHON)
    assert (row["name"], row["library"]) == ("dictionary_learning TopK", "dictionary_learning")
    stepping(row)


@pytest.mark.slow
def test_a_library_that_is_not_installed_is_a_row() -> None:
    row = peers.row("SAELens TopK", SMALL, Path(sys.executable))
    assert row["status"] == "missing", row
    assert "sae_lens" in row["reason"]


@pytest.mark.parametrize(
    ("name", "patterns", "is_wanted"),
    [
        ("spalf triton:moments=int8", "spalf*,SAELens TopK", True),
        ("SAELens TopK", "spalf*, saelens topk", True),
        ("SAELens TopK sparse", "spalf*,SAELens TopK", False),
        ("sparsify TopK", "*", True),
    ],
)
def test_rows_are_chosen_by_any_of_the_patterns(name: str, patterns: str, is_wanted: bool) -> None:
    assert run.wanted(name, patterns) is is_wanted
