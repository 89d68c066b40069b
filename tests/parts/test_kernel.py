"""Kernels: the kit's checks, which path serves which request, and what cannot run."""

import pytest
import torch

from spalf.core.values import Machine, White
from spalf.errors import RunError
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation import JumpReLU
from spalf.parts.kernel import Auto, Torch, TorchOps
from spalf.testing import conform
from spalf.testing.primal_kernel import checks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "check", [*conform(Torch), *conform(Auto), *checks(Torch(code="compact")), *checks(Torch(code="dense"))]
)
def test_conforms(check) -> None:
    check()


def encoded(ops: TorchOps, theta: float, dense: bool = False) -> bool:
    """Whether a code of 200 features at this threshold is a list."""
    sae = StratifiedAutoencoder(8, {"a": 200}, JumpReLU().build(200), Machine(device=CPU, ops=ops))
    torch.nn.init.normal_(sae.W_enc_FD, std=8**-0.5)
    sae.activator.log_threshold_F.data.fill_(torch.tensor(theta).log())  # type: ignore[attr-defined]
    return sae.encode(White(torch.randn(64, 8)), dense).index_BK is not None


@pytest.mark.parametrize(
    ("code", "theta", "dense", "is_list"),
    [
        ("auto", 2.5, False, True),
        ("auto", 0.1, False, False),  # a third of the entries: a dense product is faster
        ("auto", 2.5, True, False),
        ("dense", 2.5, False, False),
        ("compact", 0.1, False, True),
        ("compact", 0.1, True, False),
    ],
)
def test_which_code(code: str, theta: float, dense: bool, is_list: bool) -> None:
    assert encoded(TorchOps(code=code), theta, dense) == is_list


def test_bfloat16_needs_a_gpu() -> None:
    with pytest.raises(RunError, match=r"kernel\.compute.*float32"):
        Torch(compute="bfloat16").ops(CPU)


def test_auto_gives_every_reason() -> None:
    with pytest.raises(RunError, match=r"no backend can run on cpu: kernel\.compute"):
        Auto(compute="bfloat16").ops(CPU)


def test_auto_is_float32_on_a_cpu() -> None:
    ops = Auto().ops(CPU)
    assert isinstance(ops, TorchOps)
    assert (ops.name, ops.compute) == ("torch", "float32")


@pytest.mark.gpu
def test_auto_is_bfloat16_on_a_gpu() -> None:
    ops = Auto().ops(torch.device("cuda"))
    assert getattr(ops, "compute", "bfloat16") == "bfloat16"
