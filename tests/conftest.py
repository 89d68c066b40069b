"""What every test stands on: no network, one thread, one seed, and an interpreter for Triton where there is no GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

HAS_CUDA = torch.cuda.is_available()
# Triton reads this once, when it is imported (which `import torch` does not do yet): set later, `tl.sum` fails.
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read by huggingface_hub and wandb, once, when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

# The same examples on every machine and every day; first calls into torch are slow, so no deadline.
settings.register_profile("spalf", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("spalf")
set_hypothesis_home_dir(Path(__file__).parents[1] / ".pytest_cache" / "hypothesis")  # not at the top level


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none."""
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in one order: with several threads the last bits depend on the machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Each test starts from one seed, and leaves the dtype and the grad mode as it found them."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    changed = [
        what
        for what, is_changed in (
            ("the default dtype", torch.get_default_dtype() != dtype),
            ("the grad mode", not torch.is_grad_enabled()),
        )
        if is_changed
    ]
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)
    if changed:
        pytest.fail(f"the test left behind a change of {' and '.join(changed)}")


@pytest.fixture
def device() -> torch.device:
    """The fastest device there is."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(scope="module")
def few_rows() -> Iterator[None]:
    """What a run measures at its end, on few rows."""
    from spalf.engine import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "ROWS", 512)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy recipe as a file, for tests that start where a user starts."""
    from spalf.testing.whole import TOY

    path = tmp_path_factory.mktemp("recipes") / "toy.toml"
    path.write_text('extends = "spalf"\n' + TOY)
    return path
