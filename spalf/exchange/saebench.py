"""A dictionary as SAEBench expects one: attributes of its BaseSAE, without importing it.

Shape letters: F features, D d_model; here, as there, the encoder is [D, F].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor, nn

from spalf.errors import ExchangeError
from spalf.exchange.dictionary import Dictionary
from spalf.exchange.formats import read
from spalf.exchange.saelens import ARCHITECTURES


@define(kw_only=True, slots=False)
class Config:
    """What SAEBench reads of a dictionary's `cfg`; it adds attributes of its own, `metadata` among them."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    architecture: str
    context_size: int | None = None
    hook_head_index: int | None = None
    prepend_bos: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = False
    dataset_path: str = ""
    training_tokens: int = -100_000
    model_from_pretrained_kwargs: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {name: value for name, value in vars(self).items() if name != "metadata"}


class SAEBenchDictionary(nn.Module):
    """Any dictionary of spalf with the interface of SAEBench's BaseSAE, unit decoder rows included.

    Parameters: W_enc [D, F], W_dec [F, D], b_enc [F], b_dec [D]. For a selection by order (k > 0) the unit rows make
    codes longer; `scale_F` undoes that before the order is asked for. `step_F` refines codes where it is not None.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    threshold_F: Tensor
    scale_F: Tensor
    step_F: Tensor | None

    def __init__(self, dictionary: Dictionary, *, training_tokens: int = -100_000) -> None:
        """Raises ExchangeError where the dictionary's file names no model or no block, which SAEBench needs."""
        super().__init__()
        about = dictionary.about
        if not about.model or about.layer is None:
            raise ExchangeError(
                f'SAEBench needs a model and a block; this dictionary has model "{about.model}" and hook "{about.hook}"'
            )
        plain = _thresholded(dictionary.recentred(False))
        length_F = plain.W_dec_FD.norm(dim=1)
        length_F = torch.where(length_F > 0, length_F, 1.0)
        self.W_enc = _parameter(plain.W_enc_FD.T * length_F)
        self.W_dec = _parameter(plain.W_dec_FD / length_F[:, None])
        self.b_enc = _parameter(plain.b_enc_F * length_F)
        self.b_dec = _parameter(plain.b_dec_D)
        assert plain.threshold_F is not None
        self.register_buffer("threshold_F", (plain.threshold_F * length_F).float())
        self.register_buffer("scale_F", length_F.float())
        # Codes and rows both have a length to give up.
        step_F = None if plain.step_F is None else (plain.step_F * length_F.square()).float()
        self.register_buffer("step_F", step_F)
        self.k = plain.k
        self.cfg = Config(
            model_name=about.model,
            d_in=plain.d_model,
            d_sae=plain.width,
            hook_layer=about.layer,
            hook_name=about.hook,
            architecture=ARCHITECTURES[dictionary.activation],
            context_size=about.context or None,
            prepend_bos=about.bos,
            dataset_path=about.dataset,
            training_tokens=training_tokens,
        )

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., F] of raw activations [..., D]."""
        pre = x.to(self.dtype) @ self.W_enc + self.b_enc
        z = pre.relu() * (pre > self.threshold_F)
        if self.step_F is not None:
            pull = (x.to(self.dtype) - self.decode(z)) @ self.W_dec.T
            return (z + self.step_F * pull).relu() * (z > 0)
        if not self.k:
            return z
        chosen = (pre / self.scale_F).topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(z).scatter(-1, chosen, z.gather(-1, chosen))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Raw activations [..., D] of codes."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions [..., D]."""
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> SAEBenchDictionary:
        """As for a module; `cfg` follows, as SAEBench reads both."""
        super().to(*args, **kwargs)
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        return self

    def normalize_decoder(self) -> None:
        """Nothing to do: the rows have unit norm."""


def load(path: str | Path, *, format: str = "safetensors", training_tokens: int = -100_000) -> SAEBenchDictionary:
    """What `spalf export` wrote in `format`, for SAEBench's `run_eval_single_sae` and its kin.

    Raises ExchangeError where the folder cannot be read, or names no model or block.
    """
    return SAEBenchDictionary(read(path, format), training_tokens=training_tokens)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.float().contiguous(), requires_grad=False)


def _thresholded(plain: Dictionary) -> Dictionary:
    """A gate as a threshold on the magnitude, and no threshold as zeros: one formula for all."""
    if plain.activation == "gated":
        b_gate_F, slope_F = plain.gate()[0], plain.gate()[1].exp()
        return evolve(
            plain,
            W_enc_FD=plain.W_enc_FD * slope_F[:, None],
            threshold_F=(plain.b_enc_F - slope_F * b_gate_F).clamp(min=0),
        )
    return plain if plain.threshold_F is not None else evolve(plain, threshold_F=torch.zeros_like(plain.b_enc_F))
