"""The bank of control problems: planted optima are optima, and the comparison says what it has measured."""

import json
from pathlib import Path

import attrs
import pytest
import torch
from typer.testing import CliRunner

from spalf.bench import control
from spalf.bench.control_bank import bank
from spalf.bench.control_loop import Trace, follow
from spalf.bench.control_measures import measures, score
from spalf.bench.control_plants import Ball, Linear, Plant, Rate
from spalf.bench.control_sparse import Dictionary, Thresholds
from spalf.cli.app import app

BANK = {plant.name: plant for plant in bank()}
EYE = torch.eye(1, dtype=torch.float64)
SHORT = Linear(
    name="short",
    says="",
    steps=400,
    adam=False,
    noise=0.0,
    h_N=EYE[0] * 2,
    J_MN=EYE,
    lam_M=EYE[0] * 2,
    slack_M=EYE[0] * 0,
)

PLANTED = [p for p in BANK.values() if p.known and not isinstance(p, Thresholds)]


def optimum(plant: Plant) -> torch.Tensor:
    """x* of a planted problem, [1, 1, N]."""
    at = {Linear: 0.0, Ball: 1.0, Rate: -0.5, Thresholds: 0.0}
    return torch.full_like(plant.start_N(), at[type(plant)])[None, None]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda p: p.name)
def test_planted_multipliers_satisfy_kkt(plant: Plant) -> None:
    step = plant.steps - 1
    x = optimum(plant).requires_grad_()
    lam_M, g_CSM = plant.target_M(step), plant.exact(x, step)
    # every point of a rate problem once, so that its batch is exact
    batch = torch.arange(plant.points)[None] if isinstance(plant, Rate) else torch.zeros(1, x.shape[-1])
    f_CS, _ = plant.measure(x, batch, step)
    (grad,) = torch.autograd.grad((f_CS + (g_CSM * lam_M).sum(-1)).sum(), x)
    assert float(grad.abs().max()) < 1e-9
    assert float(g_CSM.detach().max()) < 1e-9
    assert float((g_CSM.detach() * lam_M).abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["error budget", "count budget"])
def test_closed_forms_of_sparse_codes(name: str) -> None:
    plant = BANK[name]
    assert isinstance(plant, Thresholds)
    # lam* from numerical derivatives of the objective and the violation along one threshold
    x = optimum(plant).requires_grad_()
    other = Thresholds(name="", says="", rate=not plant.rate)
    objective, violation = other.exact(x, 0)[..., 0] + 1.0, plant.exact(x, 0)[..., 0]
    df, dg = (torch.autograd.grad(v.sum(), x)[0] for v in (objective, violation))
    assert torch.allclose(-df / dg, plant.target_M(0).expand_as(df), rtol=1e-9)
    # and the samples have these means, within five standard errors of 16,000 rows
    batch = Thresholds(name="", says="", rows=8000).draw(2, torch.Generator().manual_seed(0))
    f_CS, g_CSM = plant.measure(optimum(plant).expand(1, 2, -1), batch, 0)
    assert float((f_CS - 1.0).abs().max()) < 0.05
    assert float(g_CSM.abs().max()) < 0.05


def test_surrogate_gradients_are_unbiased() -> None:
    plant = Thresholds(name="", says="", rows=20_000)
    x = optimum(plant).requires_grad_()
    f_CS, g_CSM = plant.measure(x, plant.draw(1, torch.Generator().manual_seed(0)), 0)
    (grad,) = torch.autograd.grad(g_CSM.sum(), x, retain_graph=True)
    (exact,) = torch.autograd.grad(plant.exact(x, 0).sum(), x)
    assert float(grad.sum() / exact.sum()) == pytest.approx(1.0, abs=0.05)
    (count,) = torch.autograd.grad(f_CS.sum(), x)
    assert float(-count.sum() / grad.sum()) == pytest.approx(float(plant.target_M(0)), rel=0.05)


def test_same_arguments_same_trace() -> None:
    laws = [control.made("pi", {"kp": 0.5, "ki": 0.4}), control.made("adrc_tracking", {})]
    one, other = (follow(SHORT, laws, 2) for _ in range(2))
    assert torch.equal(one.lam, other.lam)
    assert torch.equal(one.g, other.g)
    alone = follow(SHORT, laws[1:], 2)
    assert torch.equal(alone.lam[:, 0], one.lam[:, 1])


def test_measures_of_a_made_up_trace() -> None:
    lam = torch.full((40, 1, 2, 1), 2.0, dtype=torch.float64)
    lam[:10] = 3.0  # half of lam* too much for ten ticks
    lam[-1, 0, 0], lam[-1, 0, 1] = 2.1, 1.9
    g = torch.zeros_like(lam)
    g[0], g[-1] = 9.0, 0.03
    found = measures(SHORT, Trace(lam=lam, g=g, target_TM=torch.full((40, 1), 2.0, dtype=torch.float64)))
    assert {name: float(v) for name, v in found.items()} == pytest.approx(
        {
            "settling": 100.0,
            "overshoot": 0.5,
            "error": ((0.25 + 0.0009) / 40) ** 0.5,
            "noise": (0.02 / 13) ** 0.5 / 2.0,
            "end": 0.03,
        }
    )
    better = {name: v / 2 for name, v in found.items()}
    assert float(score(better)) < float(score(found))


def test_slack_of_an_inactive_constraint_is_no_error() -> None:
    plant = BANK["active and slack"]
    lam = plant.target_M(0).expand(30, 1, 2, 3)
    g = torch.tensor([0.0, 0.0, -0.4], dtype=torch.float64).expand(30, 1, 2, 3)
    found = measures(plant, Trace(lam=lam, g=g, target_TM=plant.target_M(0).expand(30, 3)))
    assert all(float(v) == 0.0 for v in found.values())


def test_comparison_of_three_laws_on_two_problems() -> None:
    plants = [SHORT, attrs.evolve(BANK["out of reach"], steps=1200)]
    grids = {"ascent": [{"rate": 0.1}, {"rate": 0.8}], "adrc": [{"delay": 50.0}], "adrc_tracking": [{}]}
    found = control.compare(plants, grids)
    held = {(r.law, r.chosen): r for r in found.summary if r.problem == "held back"}
    assert held["ascent", "tuned"].options == {"rate": 0.8}  # best on the scalar problem, which winds up here
    tracking, ascent = held["adrc_tracking", "shipped"], held["ascent", "tuned"]
    assert tracking.measures["overshoot"] < 0.3
    assert ascent.measures["overshoot"] > 10.0
    assert tracking.score < held["adrc", "shipped"].score
    best = next(r for r in found.summary if (r.law, r.chosen, r.problem) == ("ascent", "per problem", "all"))
    assert best.score <= min(r.score for r in found.summary if r.law == "ascent" and r.problem == "all") + 1e-12
    assert len(found.rows) == 2 * 4


def test_every_grid_is_made() -> None:
    for law in control.LAWS:
        for options in control.grid(law):
            assert control.made(law, options).init(2).lam_M.shape == (2,)


@pytest.mark.slow
def test_command_writes_a_line_per_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "bank", lambda: (SHORT, Dictionary(name="tiny", says="", steps=60)))
    out = tmp_path / "control.jsonl"
    result = CliRunner().invoke(app, ["bench", "control", "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert {row["law"] for row in rows} == set(control.LAWS)
    assert {row["problem"] for row in rows} == {"short", "tiny", "all", "held back"}
    assert "adrc_tracking, shipped" in result.stdout
