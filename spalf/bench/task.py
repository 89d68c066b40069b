"""One piece of a suite's work in a process of its own: `python -m spalf.bench.task FILE`, a table of what to do.

The answer is a JSON file beside it, written whole: measures, or the reason why there are none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spalf.bench.trainers.leash import on_a_leash
from spalf.errors import SpalfError
from spalf.record import write_json

if TYPE_CHECKING:
    from spalf.core.recipe import Plan, Recipe
    from spalf.core.state import TrainingState

Table = Mapping[str, Any]


def main(path: str) -> int:
    """0 and the answer, or 1 and the reason, in the file that the table calls `answer`."""
    on_a_leash()
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        answer = KINDS[table["kind"]](table)
    except Exception as e:  # a job that fails is a line with its reason, and the queue goes on
        told = str(e) if isinstance(e, SpalfError) else f"{type(e).__name__}: {e}"
        write_json(Path(table["answer"]), {"error": " ".join(told.split())})
        if not isinstance(e, SpalfError):
            raise
        return 1
    write_json(Path(table["answer"]), answer)
    return 0


def train(table: Table) -> dict[str, Any]:
    """Train a recipe of ours, and measure it on held-out documents of the suite's own seed."""
    from spalf import launch, plugins
    from spalf.engine import evaluate
    from spalf.engine.run import Run

    start = time.perf_counter()
    manager, _ = plugins.load()
    device = launch.device_of(table["device"])
    plan = launch.compile_recipe(table["recipe"])
    text = launch.filled_text(table["recipe"])
    out = Path(table["out"])
    out.mkdir()
    run = Run.start(plan, out, device=device, hooks=manager.hook, recipe_text=text)
    run.train()
    trained = time.perf_counter()
    shared = launch.compile_recipe(table["base"]).recipe
    if plan.recipe.seed != table["held_out_seed"]:
        run.state.stream = shared.source.open(table["held_out_seed"], device)
    held = evaluate.constraints(plan, run.state)
    answer = _measured(table, plan, run.state, shared)
    answer["seconds"] = {"train": round(trained - start, 3), "measure": round(time.perf_counter() - trained, 3)}
    kept = ("violation", "filtered", "multiplier", "feasible")
    answer["constraints"] = {n: {k: c[k] for k in kept} for n, c in held.items()}
    return answer


def adopt(table: Table) -> dict[str, Any]:
    """Measure what a peer has saved."""
    from spalf import launch
    from spalf.bench.measure import adopted

    start = time.perf_counter()
    device, base = launch.device_of(table["device"]), Path(table["base"])
    shared = launch.compile_recipe(base).recipe
    stream = shared.source.open(table["held_out_seed"], device)
    plan, state = adopted(Path(table["saved"]), table["format"], base, stream, device, table["tokens"])
    answer = _measured(table, plan, state, shared)
    return answer | {"seconds": {"measure": round(time.perf_counter() - start, 3)}}


def _measured(table: Table, plan: Plan, state: TrainingState, shared: Recipe) -> dict[str, Any]:
    from spalf.bench.measure import in_training, measure
    from spalf.engine.checkpoint import versions

    decoder = Path(table["decoder"]) if table.get("decoder") else None
    measures = measure(plan, state, shared, decoder)
    if table.get("silent"):
        measures |= in_training(plan, state, table["silent"])
    return {"measures": measures, "versions": versions()}


def agree(table: Table) -> dict[str, Any]:
    """PW-MCC of two dictionaries."""
    from spalf.bench.measure import agreement
    from spalf.engine.checkpoint import versions

    start = time.perf_counter()
    first, second = (Path(path) for path in table["decoders"])
    measures = agreement((first, second), table["rows"])
    return {
        "measures": measures,
        "versions": versions(),
        "seconds": {"measure": round(time.perf_counter() - start, 3)},
    }


def harvest(table: Table) -> dict[str, Any]:
    """Write the base recipe's stream into a ring, until all of it is written or nobody reads any more."""
    from spalf import launch
    from spalf.bench.trainers import ring

    start, batches = time.perf_counter(), 0
    plan = launch.compile_recipe(table["base"])
    stream = plan.recipe.source.open(table["seed"], launch.device_of(table["device"]))
    ring_SBD = ring.opened(Path(table["ring"]), table["slots"], table["batch"], plan.facts.d_model)
    writer = ring.Writer(ring_SBD, [(ready, freed) for ready, freed in table["consumers"]])
    while batches < table["batches"] and writer.consumers:
        writer.put(stream.next(table["batch"]).x_BD)
        batches += 1
    return {"batches": batches, "seconds": {"harvest": round(time.perf_counter() - start, 3)}}


KINDS: Mapping[str, Callable[[Table], dict[str, Any]]] = {
    "train": train,
    "adopt": adopt,
    "agree": agree,
    "harvest": harvest,
}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
