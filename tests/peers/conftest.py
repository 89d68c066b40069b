"""SAELens and dictionary_learning, run by their own interpreter; and our step from the same numbers.

Shape letters as in spalf/core/values.py.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from attrs import evolve, frozen
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn

from spalf import plugins
from spalf.assembly import toml
from spalf.assembly.compile import compile
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Batch, Raw
from spalf.engine.build import build, unopened
from spalf.engine.step import assess, dead_window

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = Path(__file__).with_name("reference")
PYTHON = ROOT / ".venv" / "peers" / "bin" / "python"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A directory that is filled once for all workers."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def fill(name: str, make: Callable[[Path], object]) -> Path:
        out = shared / name
        with FileLock(f"{out}.lock"):
            if not (shared / f"{name}.done").exists():
                out.mkdir()
                make(out)
                (shared / f"{name}.done").touch()
        return out

    return fill


@pytest.fixture(scope="session")
def run_peer(once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[..., Path]:
    """Run one of the reference scripts and return the directory that it wrote."""
    if not PYTHON.exists():
        pytest.skip("run make peers")

    def run(script: str, *arguments: Path) -> Path:
        def make(out: Path) -> None:
            # Not our own path: it is another environment.
            env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
            command = [str(PYTHON), str(REFERENCE / script), str(out), *map(str, arguments)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            assert done.returncode == 0, done.stderr

        return once(Path(script).stem, make)

    return run


@frozen(kw_only=True)
class Step:
    """One step of ours: the plan and state, the loss and its terms, gradients by our names, the code's z."""

    plan: Plan
    state: TrainingState
    loss: Tensor
    terms: Tensors
    grads: Tensors
    codes_BF: Tensor

    def advance(self) -> None:
        """What training does with these gradients."""
        self.state.learner.advance(self.state.clock)


NAMES: Mapping[str, str] = {
    "W_enc": "W_enc_FD",
    "W_dec": "W_dec_FD",
    "b_enc": "b_enc_F",
    "b_dec": "b_dec_D",
    "b_gate": "_activator.b_gate_F",
    "b_mag": "_activator.b_mag_F",
    "r_mag": "_activator.r_mag_F",
    "threshold": "_activator.log_threshold_F",
}
"""Names in the reference files -> parameters of ours."""


@pytest.fixture
def take_step() -> Callable[..., Step]:
    """A preset's objective and gradients at the reference's weights, on its batch, in float64."""

    def step(preset: str, sets: Sequence[str], reference: Tensors, *, at: int = 0, bandwidth: float = 0.0) -> Step:
        rows, d_model = reference["x"].shape
        given = (f"knobs.F={len(reference['weight.W_dec'])}", "knobs.L0_target=5", f"budget.batch={rows}")
        table = toml.read(preset, (*given, "budget.tokens=1_000_000", *sets))
        table |= {"name": "peer", "source": {"use": "synthetic", "d_model": d_model}, "evaluator": {}}
        plan = compile(table, plugins.load()[1])
        state = build(plan, torch.device("cpu"), unopened(plan.facts))
        pour(state, reference, bandwidth)
        state.silent_F = torch.where(reference["dead"], dead_window(plan) + 1, 0)
        state.clock = evolve(state.clock.next_phase("fit"), step=at)
        x_BD = Raw(reference["x"])
        seen = assess(plan, state, Batch(x_BD=x_BD), plan.terms, ())
        loss = seen.measures.objective()
        loss.backward()
        return Step(
            plan=plan,
            state=state,
            loss=loss.detach(),
            terms={name: value.detach() for name, value in seen.measures.terms.items()},
            grads={
                name: parameter.grad.clone()
                for name, parameter in state.sae.named_parameters()
                if parameter.grad is not None
            },
            codes_BF=seen.forward.code.dense().detach(),
        )

    return step


def pour(state: TrainingState, reference: Tensors, bandwidth: float) -> None:
    """The reference's weights, and float64 all through; thresholds are kept as logarithms here."""
    sae = state.sae
    assert isinstance(sae, nn.Module)
    sae.double()
    for key, value in reference.items():
        name = key.removeprefix("weight.")
        if name != key:
            state.learner.assign(NAMES[name], value.log() if name == "threshold" else value)
    if bandwidth:
        window_F = dict(sae.named_buffers())["_activator.bandwidth_F"]
        window_F.fill_(bandwidth)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest number of the reference."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture
def compare() -> Callable[[Step, Tensors, float], None]:
    """Asserts that codes, loss and every gradient of the reference are ours, within a relative difference."""

    def check(step: Step, reference: Tensors, close: float = 1e-9) -> None:
        found = {"loss": relative(step.loss, reference["loss"]), "codes": relative(step.codes_BF, reference["codes"])}
        for key, theirs in reference.items():
            name = key.removeprefix("grad.")
            if name != key:
                # By the chain rule, d / d log(theta) is theta times d / d theta.
                factor = reference["weight.threshold"] if name == "threshold" else 1.0
                found[name] = relative(step.grads[NAMES[name]], factor * theirs)
        # SAELens keeps thresholds, and hence their gradients, in float32 whatever the rest is in.
        bounds = {"threshold": max(close, 1e-6)}
        assert {name: size for name, size in found.items() if not size <= bounds.get(name, close)} == {}
        assert bool((step.codes_BF > 0).any())

    return check


@pytest.fixture
def load_reference() -> Callable[[Path, str], Tensors]:
    return lambda directory, name: load_file(directory / f"{name}.safetensors")
