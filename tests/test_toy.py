"""The toy recipe on one thread of a CPU gives the same bits as ever: a refactor leaves them, new numbers say why.

`python tests/test_toy.py` writes tests/toy.sha256 anew, for the machine and the torch at hand.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from pathlib import Path

import pluggy
import pytest
import torch
from torch import Tensor

from spalf import hooks, launch
from spalf.core.state import TrainingState
from spalf.core.tree import flatten
from spalf.engine.run import Run
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, started

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "toy.sha256"


def digest(state: TrainingState) -> str:
    """sha256 over name, type, shape and bytes of every leaf, in name order."""
    out = hashlib.sha256()
    for name, leaf in sorted(flatten(state).items()):
        if isinstance(leaf, Tensor):
            content = leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            out.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}\n".encode() + content)
        else:
            out.update(f"{name} {type(leaf).__name__} {leaf!r}\n".encode())
    return out.hexdigest()


def cpu() -> str:
    """What decides which of its routines a linear algebra library takes: instructions and vendor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    vendor = next((one.split(":")[1].strip() for one in lines if one.startswith("vendor_id")), platform.processor())
    return f"{torch.backends.cpu.get_cpu_capability()} {vendor}"


def trained(directory: Path) -> TrainingState:
    """The state at the end of the toy recipe."""
    plan = launch.compile_recipe(ROOT / "recipes" / "toy.toml")
    manager = pluggy.PluginManager("spalf")
    manager.add_hookspecs(hooks)
    run = Run.start(plan, directory, device=CPU, hooks=manager.hook, recipe_text="")
    assert run.train() == "done"
    return run.state


def text(state: TrainingState) -> str:
    return f"sha256 {digest(state)}\ntorch {torch.__version__}\ncpu {cpu()}\n"


def test_the_toy_recipe_gives_the_same_bits(tmp_path: Path) -> None:
    recorded = dict(line.split(" ", 1) for line in FILE.read_text(encoding="utf-8").splitlines())
    here = {"torch": torch.__version__, "cpu": cpu()}
    other = [f"{name} is {now}, recorded for {recorded[name]}" for name, now in here.items() if recorded[name] != now]
    if other:
        pytest.skip("; ".join(other))
    found = digest(trained(tmp_path))
    remedy = "if that is meant, say why in the changelog and run `python tests/test_toy.py`"
    assert found == recorded["sha256"], f"the numbers of a run have changed: {remedy}"


@pytest.mark.parametrize("leaf", ["weight", "dtype", "scalar"])
def test_a_single_bit_is_seen(leaf: str) -> None:
    plan = toy_plan()
    one, other = started(plan, steps=1), started(plan, steps=1)
    assert digest(one) == digest(other)
    if leaf == "weight":
        other.sae.W_dec_FD.data[3, 5] = torch.nextafter(other.sae.W_dec_FD.data[3, 5], torch.tensor(2.0))
    elif leaf == "dtype":
        other.silent_F = other.silent_F.to(torch.int32)
    else:
        other.measured["gain"] += 1e-12
    assert digest(one) != digest(other)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(text(trained(Path(folder))), encoding="utf-8")
