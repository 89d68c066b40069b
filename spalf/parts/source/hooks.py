"""Names of a TransformerLens 4 bridge's hooks, so that a misspelt one is refused before any weight is loaded.

Architectures name the inner parts of a block in many ways; the grammar fixes what all share. A name that it lets
through and that a model lacks is refused when the source is opened.
"""

from __future__ import annotations

import difflib
import re

from spalf.errors import SourceError

_MODULE = ("hook_in", "hook_out")
_NORM = (*_MODULE, "hook_normalized", "hook_scale")
_ROOT = {"embed": _MODULE, "pos_embed": _MODULE, "embed_ln": _NORM, "ln_final": _NORM}
_ON_BLOCK = (
    *(*_MODULE, "hook_resid_pre", "hook_resid_mid", "hook_resid_mid2", "hook_resid_post", "hook_attn_in"),
    *("hook_attn_out", "hook_mlp_in", "hook_mlp_out", "hook_q_input", "hook_k_input", "hook_v_input"),
    *("hook_linear_attn_in", "hook_linear_attn_out", "hook_mixer_in", "hook_mixer_out"),
    *("hook_time_mix_in", "hook_time_mix_out", "hook_channel_mix_in", "hook_channel_mix_out", "hook_recurrence_out"),
)
_ATTENTION = (
    *(*_MODULE, "hook_attn_in", "hook_hidden_states", "hook_q", "hook_k", "hook_v", "hook_z", "hook_result"),
    *("hook_q_input", "hook_k_input", "hook_v_input", "hook_rot_q", "hook_rot_k"),
)
_MLP = (*_MODULE, "hook_pre", "hook_pre_linear", "hook_post")
_NORMS = ("ln1", "ln2", "ln3", "ln1_post", "ln2_post", "ln3_post")
_PARTS = {"attn": _ATTENTION, "mlp": _MLP, **dict.fromkeys(_NORMS, _NORM)}
_INNER = {
    "attn": {"q": _MODULE, "k": _MODULE, "v": _MODULE, "o": _MODULE, "qkv": _MODULE},
    "mlp": {"in": _MODULE, "gate": _MODULE, "out": _MODULE},
}
# Inside these, and inside parts that only some architectures have, any module may be named: experts, latents, filters.
_ANY_INNER = re.compile(
    r"(attn|mlp|cross_attn|linear_attn|mixer|self_attn|shared_mlp)(\.\w+)+\.hook_\w+|\w*norm\w*\.hook_\w+"
)
_RARE_PART = re.compile(r"(cross_attn|linear_attn|mixer|self_attn|shared_mlp)\.hook_\w+")


def _of_block() -> list[str]:
    names = list(_ON_BLOCK)
    names += [f"{part}.{hook}" for part, hooks in _PARTS.items() for hook in hooks]
    return names + [f"{p}.{m}.{h}" for p, inner in _INNER.items() for m, hooks in inner.items() for h in hooks]


def check_hook(name: str) -> None:
    """Raises SourceError, which suggests the nearest names, where no bridge has a hook of this name.

    Hooks without one row per token are refused too: attention patterns, rotary angles; and `unembed`, behind all.
    """
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    if block is None:
        known = ["hook_embed", "hook_pos_embed", *(f"{m}.{h}" for m, hooks in _ROOT.items() for h in hooks)]
        if name in known:
            return
        known += [f"blocks.0.{n}" for n in _ON_BLOCK]
    else:
        prefix, rest = block.groups()
        if rest in (names := _of_block()) or _ANY_INNER.fullmatch(rest) or _RARE_PART.fullmatch(rest):
            return
        known = [prefix + n for n in names]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    raise SourceError(f'source.hook: a bridge has no hook "{name}" with a row per token (nearest: {", ".join(near)})')
