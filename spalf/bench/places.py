"""Where a queue's processes compute: one device, or every GPU that is visible, each with as many jobs at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from attrs import field, frozen


@frozen(kw_only=True)
class Place:
    """A device by the name that a process on it is told, and what its environment has beside the queue's own."""

    name: str
    device: str
    environment: Mapping[str, str] = field(factory=dict, hash=False)


def places(device: str, each: int = 1) -> tuple[Place, ...]:
    """`device` alone, where it is one; with "auto" every visible GPU, or else the processor.

    Of several GPUs a process sees its own alone, so that libraries that always take the first one take that. Where
    `each` of them work on one processor at once they share its cores, for threads of two processes hold each other
    up on the same ones (two jobs on two cores: 37 s with a thread each, not done after 200 s with two).
    """
    import torch

    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"  # by name: a peer knows no "auto"
    if device == "cpu":
        return (Place(name="cpu", device="cpu", environment=_threads(each)),)
    if device != "auto":
        return (Place(name=device, device=device),)
    count = torch.cuda.device_count()
    if count == 1:
        return (Place(name="cuda", device="cuda"),)
    known = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # CUDA reads ids up to the first that it does not know.
    ids = [word.strip() for word in known.split(",")][:count] if known else [str(i) for i in range(count)]
    return tuple(
        Place(name=f"cuda:{i}", device="cuda", environment={"CUDA_VISIBLE_DEVICES": one}) for i, one in enumerate(ids)
    )


def _threads(each: int) -> dict[str, str]:
    """A share of the cores for each, unless the number of threads has been chosen already."""
    if each == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // each))}


def free(all_places: Sequence[Place], taken: Sequence[Place], each: int) -> tuple[Place, int] | None:
    """The place with the fewest jobs and how many more it takes; None where all have `each`."""
    room = [(each - taken.count(place), place) for place in all_places]
    most, place = max(room, key=lambda pair: pair[0])
    return (place, most) if most > 0 else None


__all__ = ["Place", "free", "places"]
