"""Small dictionaries of every form, and a run to export. Shape letters as in spalf/core/values.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spalf import launch
from spalf.exchange.dictionary import About, Dictionary

D, F = 6, 20
ABOUT = About(model="toy/model", hook="blocks.3.hook_resid_post", context=64, bos=True, dataset="toy/text")


@pytest.fixture
def make() -> Callable[..., Dictionary]:
    """A random dictionary: `make("gated", centred=True)`; decoder rows have no particular length.

    "refined" is a jumprelu with steps of both signs.
    """

    def made(activation: Any, *, centred: bool = False, seed: int = 0, about: About = ABOUT) -> Dictionary:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        extra: dict[str, Any] = {
            "relu": dict[str, Any](),
            "jumprelu": {"threshold_F": normal(F).abs()},
            "refined": {"threshold_F": normal(F).abs(), "step_F": 0.02 * normal(F)},
            "topk": {"k": 4},
            "gated": {"b_gate_F": normal(F), "r_mag_F": 0.5 * normal(F)},
        }[activation]
        return Dictionary(
            activation="jumprelu" if activation == "refined" else activation,
            W_enc_FD=normal(F, D),
            W_dec_FD=normal(F, D),
            b_enc_F=normal(F),
            b_dec_D=normal(D),
            centred=centred,
            about=about,
            **extra,
        )

    return made


@pytest.fixture
def x_BD() -> Tensor:
    return torch.randn(64, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.3


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JumpReLU of a few steps on a synthetic source, whitened."""
    return trained(tmp_path_factory, "name=run")


@pytest.fixture(scope="session")
def refined_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with refined codes; a few steps at this rate leave steps of some hundredths."""
    return trained(tmp_path_factory, "name=refined", "activation.refine=true")


def trained(tmp_path_factory: pytest.TempPathFactory, *own: str) -> Path:
    sets = (
        *own,
        "whitener=soft_zca",
        "source={use='synthetic', d_model=12, features=24}",
        "knobs={F=32, L0_target=4, lr=3e-3}",
        "budget={tokens=12800, batch=128}",
        "phase.calibrate.samples=1024",
        "evaluator.downstream_loss=false",
        "term.l0.warmup=0",
    )
    out = tmp_path_factory.mktemp("runs")
    return launch.run("jumprelu", sets=sets, out=out, device="cpu", stop_at=5).directory
