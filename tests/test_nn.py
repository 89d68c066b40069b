"""The autoencoder: its rows, its arithmetic, where the feature axis is summed, and what trains."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from spalf.core.built import Activator, Ops
from spalf.core.mesh import Mesh
from spalf.core.values import Code, Machine, White
from spalf.kernels import reference
from spalf.nn import StratifiedAutoencoder

D, F = 5, 12


class Relu(nn.Module, Activator):
    """z = max(0, p - exp(log_threshold))."""

    def __init__(self) -> None:
        super().__init__()
        self.log_threshold_F = nn.Parameter(torch.full((F,), -2.0))
        self.register_buffer("seen_F", torch.zeros(F))

    def forward(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z_BK = (pre_BK - self.log_threshold_F.exp()).relu()
        return z_BK, (z_BK > 0).to(z_BK.dtype)


class Recorder:
    """The reference operations, and what was asked of them."""

    def __init__(self) -> None:
        self.dense: list[bool] = []

    def encode(self, white_BD: White, sae: StratifiedAutoencoder, dense: bool) -> Code:
        self.dense.append(dense)
        return reference.encode(white_BD, sae)

    def decode(self, code: Code, sae: StratifiedAutoencoder) -> White:
        return reference.decode(code, sae)


class TwoShards(Mesh):
    """A second shard that holds the same rows."""

    def sum(self, x: Tensor) -> Tensor:
        return 2 * x


def autoencoder(mesh: Mesh | None = None) -> StratifiedAutoencoder:
    machine = Machine(device=torch.device("cpu"), ops=cast(Ops, Recorder()), mesh=mesh or Mesh())
    sae = StratifiedAutoencoder(D, {"anchored": 4, "free": 8}, cast(Activator, Relu()), machine)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.5
    return sae


def test_shapes_and_names() -> None:
    sae = autoencoder()
    assert {name: tuple(p.shape) for name, p in sae.named_parameters()} == {
        "W_enc_FD": (F, D),
        "W_dec_FD": (F, D),
        "b_enc_F": (F,),
        "b_dec_D": (D,),
        "log_gain": (),
        "_activator.log_threshold_F": (F,),
    }
    assert {p.dtype for p in sae.parameters()} == {torch.float32}


def test_rows_are_consecutive_and_in_order() -> None:
    sae = autoencoder()
    assert dict(sae.rows) == {"anchored": slice(0, 4), "free": slice(4, 12)}
    assert list(sae.rows) == ["anchored", "free"]
    assert sae.width == F


def test_one_pass_by_hand() -> None:
    sae, y_BD = autoencoder(), torch.randn(7, D)
    code = sae.encode(White(y_BD))
    pre_BF = y_BD @ sae.W_enc_FD.T + sae.b_enc_F
    z_BF = (pre_BF - sae.activator.log_threshold_F.exp()).relu()  # type: ignore[attr-defined]
    torch.testing.assert_close(code.dense(), z_BF)
    torch.testing.assert_close(sae.decode(code), White(sae.log_gain.exp() * z_BF @ sae.W_dec_FD + sae.b_dec_D))


def test_only_the_features_are_summed_over_shards() -> None:
    """Gain and bias come after the sum: a shard that added its own would add them twice."""
    whole, sharded, y_BD = autoencoder(), autoencoder(TwoShards()), White(torch.randn(3, D))
    sharded.load_state_dict(whole.state_dict())
    once = whole.decode(whole.encode(y_BD)) - whole.b_dec_D
    twice = sharded.decode(sharded.encode(y_BD)) - sharded.b_dec_D
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("dense", [False, True])
def test_dense_is_passed_on(dense: bool) -> None:
    sae = autoencoder()
    sae.encode(White(torch.randn(2, D)), dense)
    assert cast(Recorder, sae.machine.ops).dense == [dense]


def test_every_parameter_learns() -> None:
    sae, y_BD = autoencoder(), White(torch.randn(64, D))
    (sae.decode(sae.encode(y_BD)) - y_BD).square().mean().backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_state_comes_back_with_the_activators_buffers() -> None:
    a, b, y_BD = autoencoder(), autoencoder(), White(torch.randn(3, D))
    assert "_activator.seen_F" in a.state_dict()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.decode(a.encode(y_BD)), b.decode(b.encode(y_BD)))


def test_a_new_one_is_all_zeros_and_gives_nothing() -> None:
    machine = Machine(device=torch.device("cpu"), ops=cast(Ops, Recorder()))
    sae = StratifiedAutoencoder(D, {"free": F}, cast(Activator, Relu()), machine)
    assert float(sae.decode(sae.encode(White(torch.randn(2, D)))).detach().abs().max()) == 0
    assert float(sae.log_gain.detach()) == 0
