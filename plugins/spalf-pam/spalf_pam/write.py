"""Putting a solved decoder into an autoencoder without changing what it computes.

A solution says only what z w + b is. Lengths of rows are a convention: they are folded into the encoder, so that
decoder rows stay on the unit sphere and one gain carries the scale.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from spalf import Activator, Learner
from spalf_pam.solver import Decoder

LOG_THRESHOLD = "log_threshold_F"
"""Name of the parameter in which an activator of the JumpReLU kind keeps its thresholds."""
BANDWIDTH = "bandwidth_F"
"""Name of the buffer that scales with them."""


def can_fold(activator: Activator) -> bool:
    """Whether scaling a feature's pre-activation and threshold by c > 0 scales its z by c and moves no gate.

    So it is where thresholds alone decide, row by row (ReLU, JumpReLU). It is not where entries are compared with each
    other (TopK, BatchTopK), nor where the activator holds numbers that this module does not know how to scale.
    """
    if activator.k or activator.owns_bias or activator.affine_F() is not None:
        return False
    held = set(cast(nn.Module, activator).state_dict())
    return held <= {LOG_THRESHOLD, BANDWIDTH} and (LOG_THRESHOLD in held or not bool(activator.threshold_F().any()))


def balance(decoder_F: Tensor, encoder_F: Tensor, live_F: Tensor) -> tuple[Tensor, Tensor]:
    """(c_F, length): codes scaled by c leave every decoder row `length` long, and encoder rows 1 long on average.

    `decoder_F`, `encoder_F` are the lengths as they are; the average is geometric, over live features with both rows. A
    feature without a decoder row has c = 1. The encoder's scale decides what one step of the optimizer does to it. Left
    to itself it falls: a penalty on codes shrinks them, and every solve of the decoder makes up for that.
    """
    has_F = decoder_F > 0
    counted_F = live_F & has_F & (encoder_F > 0)
    both_F = (decoder_F * encoder_F)[counted_F if bool(counted_F.any()) else has_F]
    length = both_F.log().mean().exp() if bool((both_F > 0).all() and len(both_F)) else decoder_F.new_ones(())
    return torch.where(has_F, decoder_F / length, 1.0), length


@torch.no_grad()
def write_(learner: Learner, decoder: Decoder) -> Tensor:
    """Write a solution into `learner`'s autoencoder; returns c_F [F] float64, by which its codes are scaled henceforth.

    Where `can_fold`, decoder rows become unit rows, `balance` settles the gain, and encoder rows, biases and thresholds
    take up the lengths: z w is the same. Elsewhere (c = 1) the lengths stay in the rows, over the gain as it was. Under
    an activator that subtracts the decoder's bias, b_enc takes up its change.
    """
    sae = learner.sae
    if sae.activator.pre_bias:
        moved_D = decoder.b_D.to(sae.b_dec_D) - sae.b_dec_D
        learner.assign("b_enc_F", sae.b_enc_F + sae.W_enc_FD @ moved_D)
    learner.assign("b_dec_D", decoder.b_D)
    gain = sae.log_gain.double().exp()
    # A dead feature keeps the row that it had, which is without the gain.
    total_FD = torch.where(decoder.live_F[:, None], decoder.w_FD, gain * decoder.w_FD)
    length_F = total_FD.norm(dim=1)
    if not can_fold(sae.activator):
        learner.assign("W_dec_FD", total_FD / gain)
        return torch.ones_like(length_F)
    c_F, new_gain = balance(length_F, sae.W_enc_FD.double().norm(dim=1), decoder.live_F)
    learner.assign("W_dec_FD", total_FD / torch.where(length_F > 0, length_F, 1.0)[:, None])
    learner.assign("log_gain", new_gain.log())
    _scale_encoder(learner, c_F)
    return c_F


def _scale_encoder(learner: Learner, c_F: Tensor) -> None:
    sae = learner.sae
    learner.assign("W_enc_FD", sae.W_enc_FD * c_F[:, None])
    learner.assign("b_enc_F", sae.b_enc_F * c_F)
    for name, parameter in sae.named_parameters():
        if name.rsplit(".", 1)[-1] == LOG_THRESHOLD:
            learner.assign(name, parameter + c_F.log())
    bandwidth_F = getattr(sae.activator, BANDWIDTH, None)
    if isinstance(bandwidth_F, Tensor):
        bandwidth_F.mul_(c_F.to(bandwidth_F))
