"""Labelled pairs to measure on: planted shifts in few dimensions, and what the embedded model makes of sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spalf import Facts, Pairs, write_pairs

CONCEPTS = ("one", "two", "three")


def planted(groups: int = 80, d_model: int = 24, noise: float = 0.05, seed: int = 0) -> Pairs:
    """Mirrored pairs whose difference is a sum of planted orthogonal shifts of length 1, and noise."""
    draw = torch.Generator().manual_seed(seed)
    shifts_CD = torch.linalg.qr(torch.randn(d_model, len(CONCEPTS), generator=draw)).Q.T
    label_GC = torch.randint(-1, 2, (groups, len(CONCEPTS)), generator=draw)
    label_GC[label_GC.abs().sum(1) == 0, 0] = 1
    # Ends that know their concepts: off and on differ by the shift, so that a probe can tell them apart.
    before_GC = torch.where(label_GC == 0, torch.randint(0, 2, label_GC.shape, generator=draw), (label_GC < 0).long())
    content_GD = 0.1 * torch.randn(groups, d_model, generator=draw)
    a_GD = content_GD + before_GC.float() @ shifts_CD
    b_GD = a_GD + label_GC.float() @ shifts_CD + noise * torch.randn(groups, d_model, generator=draw)
    ids_G = torch.arange(groups)
    return Pairs(
        a_ND=torch.cat([a_GD, b_GD]),
        b_ND=torch.cat([b_GD, a_GD]),
        labels_NC=torch.cat([label_GC, -label_GC]).to(torch.int8),
        concepts=CONCEPTS,
        sentence_a_N=torch.cat([ids_G, groups + ids_G]),
        sentence_b_N=torch.cat([groups + ids_G, ids_G]),
        facts=Facts(d_model=d_model, hook="planted", model="none"),
    )


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Planted pairs in 24 dimensions, written."""
    return write_pairs(tmp_path_factory.mktemp("planted") / "pairs", planted())
