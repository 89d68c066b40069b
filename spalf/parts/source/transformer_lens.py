"""`transformer_lens`: any hook of a TransformerLens 4 bridge. Slower than `huggingface`: its attention is eager."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spalf.core.protocols import Stream
from spalf.core.slots import source
from spalf.core.values import Facts
from spalf.errors import SourceError
from spalf.parts.source import checkpoint
from spalf.parts.source.hooks import check_hook
from spalf.parts.source.language import LanguageStream
from spalf.parts.source.options import LanguageOptions

# Hooks on the residual stream, or on what is added to it: as wide as the model.
RESIDUAL = frozenset(
    {"hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_in", "hook_out"}
    | {"hook_attn_in", "hook_attn_out", "hook_mlp_in", "hook_mlp_out"}
)


class BridgeModel:
    """A bridge around a transformers model, hooked at one name. Heads [S, T, H, D_head] are flattened to one axis."""

    def __init__(self, model: nn.Module, tokenizer: Any, hook: str, name: str, device: torch.device) -> None:
        from transformer_lens import TransformerBridge

        dtype = next(model.parameters()).dtype
        self._bridge: Any = TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=tokenizer, device=str(device), dtype=dtype
        )
        self._bridge.requires_grad_(False)  # parameters arrive with gradients on
        self._bridge.eval()
        self._hook = hook
        block = re.match(r"blocks\.(\d+)\.", hook)
        # stop_at_layer = N runs blocks 0 to N - 1 only, and a hook of block N would then never be called.
        self._stop = int(block.group(1)) + 1 if block else None

    def activations(self, tokens_ST: Tensor, real_ST: Tensor | None) -> Tensor:
        """[S, T, D] at the hook. Raises SourceError where the hook is unknown or never called."""
        found: list[Tensor] = []

        def take(x: Tensor, hook: Any) -> None:
            found.append(x.flatten(2))

        with torch.inference_mode():
            self._run(tokens_ST, real_ST, take, stop_at_layer=self._stop)
        if not found:
            raise SourceError(f'hook "{self._hook}" exists and was never called by this model (choose another)')
        return found[0]

    def logits(self, tokens_ST: Tensor, real_ST: Tensor | None, patch: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[S, T, V]; gradients flow through what `patch` brings in."""

        def replace(x: Tensor, hook: Any) -> Tensor:
            assert patch is not None
            return patch(x.flatten(2)).view_as(x)

        return self._run(tokens_ST, real_ST, replace if patch is not None else None)

    def _run(self, tokens_ST: Tensor, real_ST: Tensor | None, act: Any, **options: Any) -> Tensor:
        if real_ST is not None:
            options["attention_mask"] = real_ST.long()
        try:
            out: Tensor = self._bridge.run_with_hooks(
                tokens_ST, fwd_hooks=[(self._hook, act)] if act is not None else [], **options
            )
        except KeyError as e:
            near = [n for n in self._bridge.hook_dict if n.rsplit(".", 1)[-1] == self._hook.rsplit(".", 1)[-1]]
            known = ", ".join((near or list(self._bridge.hook_dict))[:8])
            raise SourceError(f'the model has no hook "{self._hook}" (some that it has: {known})') from e
        return out

    def unembedding(self) -> Tensor:
        """[V, D]."""
        weight_DV: Tensor = self._bridge.W_U
        return weight_DV.T


@source("transformer_lens")
class TransformerLens(LanguageOptions):
    """Activations at any hook of a TransformerLens bridge (raw weights, nothing folded), over text."""

    hook: str
    """Canonical or alias, such as "blocks.6.hook_resid_post" or "blocks.6.mlp.hook_out"."""

    def facts(self) -> Facts:
        """From config.json or as stated; a hook off the residual stream needs d_model stated. Raises SourceError."""
        costs = self.costs()
        check_hook(self.hook)
        block = re.match(r"blocks\.(\d+)\.", self.hook)
        layers = int(block.group(1)) + 1 if block else costs.n_layers
        if costs.n_layers and layers > costs.n_layers:
            raise SourceError(
                f'source.hook = "{self.hook}", but model "{self.model}" has blocks 0 to {costs.n_layers - 1}'
            )
        width = self.d_model
        if self.hook.rsplit(".", 1)[-1] in RESIDUAL and (self.hook.count(".") == 2 or not block):
            checkpoint.same("d_model", self.d_model, costs.d_model)
            width = costs.d_model
        if not width:
            raise SourceError(f'the width at hook "{self.hook}" is not in the config (state source.d_model)')
        return self.base_facts(costs, hook=self.hook, width=width, layers=layers)

    def open(self, seed: int, device: torch.device) -> Stream:
        """Reads a context of both splits, loads the model and tries the hook on two tokens. Raises SourceError."""
        facts, vocabulary = self.prepare(self.facts, seed)
        with self.reading(vocabulary, seed):
            loaded = checkpoint.load_model(self.model, self.revision, self.torch_dtype(), device)
        model = BridgeModel(loaded, vocabulary.tokenizer, self.hook, self.model, device)
        probe_ST = torch.full((1, 2), vocabulary.end_of_text, device=device)
        width = model.activations(probe_ST, None).shape[-1]
        checkpoint.same("d_model", facts.d_model, width)
        return LanguageStream(self, facts, model, vocabulary, seed=seed, device=device)
