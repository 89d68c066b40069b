"""Sending a written dictionary to the Hugging Face hub, with a model card made from its run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from spalf.core.recipe import Plan
from spalf.engine.export import publish, text_file
from spalf.errors import ExchangeError
from spalf.exchange.dictionary import About

LOADING: Mapping[str, tuple[str, str]] = {
    "saelens": (
        "saelens",
        'from sae_lens import SAE\n\nsae = SAE.from_pretrained(release="{repo}", sae_id="{folder}")',
    ),
    "dictionary_learning": (
        "dictionary_learning",
        "from huggingface_hub import snapshot_download\n"
        "from dictionary_learning.utils import load_dictionary\n\n"
        'path = snapshot_download("{repo}")\n'
        'dictionary, config = load_dictionary(f"{{path}}/{folder}", device="cpu")',
    ),
    "safetensors": (
        "spalf",
        "from huggingface_hub import snapshot_download\n"
        "from spalf.exchange.formats import read\n\n"
        'dictionary = read(snapshot_download("{repo}") + "/{folder}", "safetensors")\n'
        "# x_hat = dictionary.decode(dictionary.encode(x)); config.json has the formula",
    ),
}
"""Per format: the library's tag on the hub, and how to load it from there."""


@frozen(kw_only=True)
class Upload:
    """Where a dictionary goes: `folder` of the repository `repo` (user/name)."""

    repo: str
    folder: str


def folder_of(about: About) -> str:
    """One folder per hook, so that a repository may hold many; SAELens wants one in any case."""
    return about.hook or "dictionary"


def push(directory: Path, upload: Upload, card: str, *, private: bool = False) -> str:
    """Upload a written dictionary and its card, and return the address. The token is that of `hf auth login`.

    Raises ExchangeError where the hub cannot be reached or says no.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    publish(directory, {"README.md": text_file(card)})
    api = HfApi()
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    places = {p: p.name if p.name == "README.md" else f"{upload.folder}/{p.name}" for p in files}
    try:
        api.create_repo(upload.repo, exist_ok=True, private=private)
        api.create_commit(
            upload.repo,
            operations=[CommitOperationAdd(path_in_repo=place, path_or_fileobj=p) for p, place in places.items()],
            commit_message=f"Upload {upload.folder}",
        )
    except OfflineModeIsEnabled as e:
        raise ExchangeError(f"--push {upload.repo}: the hub is switched off (unset HF_HUB_OFFLINE)") from e
    except Exception as e:  # which HTTP library the client has, and hence what it raises, differs between versions
        raise ExchangeError(f"--push {upload.repo}: {_line(e)} (check the name, the network, hf auth whoami)") from e
    return f"{api.endpoint}/{upload.repo}"


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def card(plan: Plan, about: About, summary: Mapping[str, Any], recipe: str, upload: Upload, to: str) -> str:
    """README.md of a repository: what it is, how to load it, what was asked for, what was measured, the recipe."""
    library, loading = LOADING[to]
    head = ["---", f"library_name: {library}", "tags: [sparse-autoencoder, interpretability, spalf]"]
    if "/" in about.model:
        head.append(f"base_model: {about.model}")
    sections = [
        "\n".join([*head, "---"]),
        f"# {plan.recipe.name}",
        f"A sparse autoencoder of {plan.knobs.F} features on `{about.hook or 'activations'}`"
        f"{f' of `{about.model}`' if about.model else ''}, width {plan.facts.d_model}, trained with spalf. "
        "It takes and gives raw activations: whitening and scales are folded into its weights.",
        f"```python\n{loading.format(repo=upload.repo, folder=upload.folder)}\n```",
        "## Asked for\n\n" + "\n".join(_rows(("knob", "value"), _knobs(plan))),
        "## Measured on held-out data\n\n" + "\n".join(_measured(summary)),
    ]
    constraints = summary.get("constraints") or {}
    if constraints:
        sections.append("## Constraints\n\n" + "\n".join(_constraints(constraints)))
    notes = [f"- {note}" for note in summary.get("notes") or ()]
    if notes:
        sections.append("## Notes\n\n" + "\n".join(notes))
    sections.append(f"## Recipe\n\n```toml\n{recipe.strip()}\n```")
    return "\n\n".join(sections) + "\n"


def _knobs(plan: Plan) -> Iterator[tuple[str, str]]:
    knobs = plan.knobs
    yield from (("F", f"{knobs.F}"), ("L0_target", f"{knobs.L0_target}"), ("R2_target", f"{knobs.R2_target:g}"))
    yield from (("lr", f"{knobs.lr:g}"), ("activations trained on", f"{plan.recipe.budget.tokens:,}"))


MEASURED: Mapping[str, str] = {
    "l0": "L0: active features per activation",
    "r2_raw": "R2, raw activations",
    "r2_whitened": "R2, whitened activations",
    "dead_fraction": "share of dead features",
    "ce_clean": "cross-entropy of the model, nats",
    "ce_patched": "the same through the dictionary",
    "ce_mean_ablated": "the same with the mean activation",
    "loss_recovered": "loss recovered",
    "kl": "KL of the patched model, nats",
}


def _measured(summary: Mapping[str, Any]) -> Iterator[str]:
    found = [(name, summary[key]) for key, name in MEASURED.items() if isinstance(summary.get(key), int | float)]
    if not found:
        yield "Nothing: the run left no summary."
        return
    yield from _rows(("measure", "value"), ((name, f"{value:.4g}") for name, value in found))


def _constraints(held: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "| constraint | met | violation | multiplier | budget |"
    yield "|---|---|---|---|---|"
    for name, c in held.items():
        met = "yes" if c.get("feasible") else "no"
        yield f"| {name} | {met} | {c['violation']:+.1%} | {c['multiplier']:.3g} | {c['budget']:.4g} |"


def _rows(head: tuple[str, str], rows: Any) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows)
