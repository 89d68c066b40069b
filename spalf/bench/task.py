"""One piece of a suite's work in a process of its own: `python -m spalf.bench.task FILE`, a table of what to do.

The answer is a JSON file beside it, written whole: measures, or the reason why there are none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spalf.bench.trainers.leash import on_a_leash
from spalf.errors import SpalfError
from spalf.record import write_json

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
    """Train a recipe of ours and measure it."""
    from spalf import launch

    start = time.perf_counter()
    result = launch.run(table["recipe"], out=table["out"], device=table["device"])
    trained = time.perf_counter()
    answer = _measured(table, result.directory)
    answer["seconds"] = {"train": round(trained - start, 3), "measure": round(time.perf_counter() - trained, 3)}
    held = result.summary.get("constraints") or {}
    answer["constraints"] = {n: {k: c[k] for k in ("violation", "multiplier", "feasible")} for n, c in held.items()}
    answer["feasible"] = result.summary.get("feasible")
    return answer


def adopt(table: Table) -> dict[str, Any]:
    """Import what a peer has saved, and measure it."""
    from spalf.exchange.verbs import import_dictionary

    start = time.perf_counter()
    out = Path(table["out"]) / "imported"
    # None of the preset's own evaluators: what measures is the suite's.
    sets = [f"evaluator.{name}=false" for name in ("downstream_loss", "sparsity_frontier")]
    import_dictionary(
        table["saved"],
        out,
        format=table["format"],
        recipe=table["base"],
        sets=sets,
        tokens=table["tokens"],
        device=table["device"],
    )
    return _measured(table, out) | {"seconds": {"measure": round(time.perf_counter() - start, 3)}}


def _measured(table: Table, run: Path) -> dict[str, Any]:
    from spalf.bench.measure import measure
    from spalf.engine.checkpoint import versions

    decoder = Path(table["decoder"]) if table.get("decoder") else None
    measures = measure(run, Path(table["base"]), table["held_out_seed"], table["device"], decoder)
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
