"""Evaluator `power_diagram`: the regions of a TopK code are those of a power diagram (arXiv 2505.11836).

With a site e_i of weight 2 b_i + ||e_i||^2 per feature, the power of a point is ||x - e_i||^2 - weight_i, which is
||x||^2 - 2 p_i, p_i = e_i'x + b_i: the K largest pre-activations are the K sites of least power. An encoder that reads
x - b_d has b_i - e_i'b_d in place of b_i. A threshold theta_i makes a feature active inside a ball, where its power is
below ||x||^2 - 2 theta_i.
Selection by |p| needs 2 F sites, +-e_i with weights +-2 b_i + ||e_i||^2: with F of them the identity fails.

Shape letters: B rows, D d_model, F features, K selected features per row.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor

from spalf import Autoencoder, Plan, TrainingState, White, evaluator, from_knob, untouched

CHUNK = 128
"""Points at a time: [128, F] distances are held."""
TIE = 1e-5
"""Float32 pre-activations closer than this share of ||x|| max ||e|| + max |b| are tied: rounding decides."""

EXAMPLES = {("evaluator", "power_diagram"): {"rows": 256}}


@frozen(kw_only=True, eq=False)
class Sites:
    """The power diagram of an encoder, float64: sites mu_FD and their weights."""

    mu_FD: Tensor
    weight_F: Tensor

    def power(self, x_BD: Tensor) -> Tensor:
        """||x - mu_i||^2 - weight_i [B, F], from differences: pre-activations are not made use of."""
        distance_BF = torch.cdist(x_BD, self.mu_FD, compute_mode="donot_use_mm_for_euclid_dist")
        return distance_BF.square() - self.weight_F

    def signed(self) -> Sites:
        """2 F sites +-mu with weights +-2 b + ||mu||^2: the diagram of a selection by |p|; site F + i is -mu_i."""
        square_F = self.mu_FD.square().sum(1)
        opposite_F = 2 * square_F - self.weight_F
        return Sites(mu_FD=torch.cat([self.mu_FD, -self.mu_FD]), weight_F=torch.cat([self.weight_F, opposite_F]))


def sites(sae: Autoencoder) -> Sites:
    """The sites of an autoencoder's encoder, in whitened space."""
    mu_FD = sae.W_enc_FD.detach().double()
    bias_F = sae.b_enc_F.detach().double()
    if sae.activator.pre_bias:
        bias_F = bias_F - mu_FD @ sae.b_dec_D.detach().double()
    return Sites(mu_FD=mu_FD, weight_F=2 * bias_F + mu_FD.square().sum(1))


def selected(value_BF: Tensor, k: int) -> Tensor:
    """Which k entries of a row are largest, bool [B, F]."""
    return torch.zeros_like(value_BF, dtype=torch.bool).scatter(1, value_BF.topk(k, dim=1).indices, True)


def gap(value_BF: Tensor, k: int) -> Tensor:
    """By how much the k-th largest entry of a row exceeds the next, [B]."""
    top_BK = value_BF.topk(k + 1, dim=1).values
    return top_BK[:, k - 1] - top_BK[:, k]


@evaluator("power_diagram")
class PowerDiagram:
    """Whether the K largest pre-activations are the K sites of least power, over `rows` held-out rows.

    K is the activation's own, or `k`. Shares of rows, or of entries, that are not tied; all in whitened space:
    topk: the encoder's own selection is that of the power diagram with F sites (1 by the theorem);
    gates: an entry is active where its power is below ||x||^2 - 2 threshold (and its site among the K, under TopK);
    signed: a selection by |p| is that of the same F sites (the control, near 0), signed_2F: that of 2 F sites (1).
    tied: rows left out of `topk`; identity_error: max |power - (||x||^2 - 2 p)| / max |power|.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    k: int = from_knob("L0_target", validator=gt(0))
    rows: int = field(default=1024, validator=gt(0))

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        sae = state.sae
        k = min(sae.activator.k or self.k, sae.width - 1)
        parts: list[dict[str, Tensor]] = []
        with untouched(state):
            white_ND = state.metric.white(state.stream.next(self.rows).x_BD)
            diagram = sites(sae)
            for x_BD in torch.split(white_ND, CHUNK):
                parts.append(_compare(sae, diagram, White(x_BD), k))
        both = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        free, signed_free = ~both["tied"], ~both["signed_tied"]
        open_ = both["gates_counted"].sum().clamp(min=1)
        return {
            "topk": _share(both["topk"], free),
            "gates": float(both["gates"].sum() / open_),
            "signed": _share(both["signed"], signed_free),
            "signed_2F": _share(both["signed_2F"], signed_free),
            "tied": float(both["tied"].double().mean()),
            "identity_error": float(both["error"].max() / both["size"].max()),
            "k": float(k),
        }


def _share(agrees_B: Tensor, counted_B: Tensor) -> float:
    """The share of counted rows that agree; 0 where none counts."""
    return float((agrees_B & counted_B).sum() / counted_B.sum().clamp(min=1))


def _compare(sae: Autoencoder, diagram: Sites, x_BD: White, k: int) -> dict[str, Tensor]:
    """Per row: what agrees, what is tied, and how far the identity is from exact."""
    code = sae.encode(x_BD, dense=True)
    assert code.index_BK is None, "encode(dense=True) lists every entry"
    pre_BF, point_BD = code.pre_BK.double(), x_BD.double()
    square_B1 = point_BD.square().sum(1, keepdim=True)
    power_BF = diagram.power(point_BD)
    least_BF = selected(-power_BF, k)
    length = diagram.mu_FD.norm(dim=1).max()
    tie_B = TIE * (square_B1[:, 0].sqrt() * length + sae.b_enc_F.detach().abs().max())
    threshold_F = sae.activator.threshold_F().detach().double()
    inside_BF = power_BF < square_B1 - 2 * threshold_F
    if sae.activator.k:
        inside_BF &= least_BF
    clear_BF = (pre_BF - threshold_F).abs() > tie_B[:, None]
    clear_BF &= (gap(pre_BF, k) > tie_B)[:, None] if sae.activator.k else True
    is_plain = not (sae.activator.owns_bias or sae.activator.signed)
    magnitude_BF = pre_BF.abs()
    both_BF = selected(-diagram.signed().power(point_BD), k)
    folded_BF = both_BF[:, : sae.width] | both_BF[:, sae.width :]
    by_size_BF = selected(magnitude_BF, k)
    return {
        "topk": (selected(pre_BF, k) == least_BF).all(1),
        "tied": gap(pre_BF, k) <= tie_B,
        "gates": (((code.gate_BK > 0) == inside_BF) & clear_BF).sum(1) * is_plain,
        "gates_counted": clear_BF.sum(1) * is_plain,
        "signed": (by_size_BF == least_BF).all(1),
        "signed_2F": (by_size_BF == folded_BF).all(1),
        "signed_tied": gap(magnitude_BF, k) <= tie_B,
        "error": (power_BF - (square_B1 - 2 * pre_BF)).abs().amax(1),
        "size": power_BF.abs().amax(1),
    }
