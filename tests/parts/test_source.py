"""Every shipped source passes its slot's conformance checks."""

from collections.abc import Callable

import pytest

from spalf.core.slots import label
from spalf.parts.source import Activations, Difference, Huggingface, Synthetic, TransformerLens
from spalf.testing import conform

SHIPPED = (Activations, Difference, Huggingface, Synthetic, TransformerLens)
CASES = [(label(cls).use, check) for cls in SHIPPED for check in conform(cls)]


@pytest.mark.parametrize("check", [c for _, c in CASES], ids=[f"{use}-{c.__name__}" for use, c in CASES])
def test_conforms(check: Callable[[], None]) -> None:
    check()
