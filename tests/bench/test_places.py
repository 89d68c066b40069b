"""Where a queue's jobs go."""

from __future__ import annotations

import pytest
import torch

from spalf.bench.places import Place, free, places


def test_a_named_device_is_the_only_place() -> None:
    assert places("cuda:1") == (Place(name="cuda:1", device="cuda:1"),)


def test_without_a_gpu_the_processor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert places("auto") == (Place(name="cpu", device="cpu"),)


def test_jobs_beside_each_other_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave a number of threads that somebody has chosen as it is."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    told = {each: dict(places("cpu", each)[0].environment) for each in (1, 2, 3, 9)}
    assert told == {1: {}, 2: {"OMP_NUM_THREADS": "4"}, 3: {"OMP_NUM_THREADS": "2"}, 9: {"OMP_NUM_THREADS": "1"}}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert places("cpu", 2)[0].environment == {}


@pytest.mark.parametrize(
    ("visible", "ids"), [("", ["0", "1", "2"]), ("4, GPU-7,2", ["4", "GPU-7", "2"]), ("0,1,2,-1,3", ["0", "1", "2"])]
)
def test_several_gpus_are_a_place_each_and_a_process_sees_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str, ids: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = places("auto")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in found] == ids
    assert [place.device for place in found] == ["cuda"] * 3
    assert len({place.name for place in found}) == 3


def test_the_emptiest_place_comes_first() -> None:
    a, b = Place(name="a", device="cuda"), Place(name="b", device="cuda")
    assert free([a, b], [], 2) == (a, 2)
    assert free([a, b], [a], 2) == (b, 2)
    assert free([a, b], [a, b, b], 2) == (a, 1)
    assert free([a, b], [a, b, a, b], 2) is None
