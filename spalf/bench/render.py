"""A suite's page: tables, plots, and what made them; a function of the suite's file and its lines alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from spalf.bench.chart import Plot, Series, svg
from spalf.bench.jobs import axis_name
from spalf.bench.results import Line, latest
from spalf.bench.suite import Method, Suite
from spalf.bench.summary import HIGHER, LOWER, Row, against, current, rates, rows, swept
from spalf.record import write_whole

TITLES = {
    "l0": "L0",
    "fvu": "FVU",
    "ce_gap": "CE gap",
    "loss_recovered": "loss recovered",
    "kl": "KL",
    "dead": "dead",
    "silent": "silent",
    "mcc": "MCC",
    "f1": "F1",
    "uniqueness": "uniqueness",
    "absorption_full": "absorbed",
    "single": "of one token",
    "detected": "tokens detected",
}
PLOTTED = {
    "fvu": ("What is left unexplained", "FVU of raw activations"),
    "ce_gap": ("What the model loses", "cross-entropy gap, nats per token"),
    "mcc": ("Planted directions found", "MCC"),
    "f1": ("Planted features detected", "F1"),
}


ANCHORED = {
    "{}.cosine_mean": "cosine with the anchor",
    "{}.own_token": "nearest to its own anchor",
    "{}.fires": "fires",
    "{}.own_peak": "strongest on its token",
    "{}.own_next": "strongest before its token",
    "{}.own_f1": "F1 for its token",
    "{}.promotes_own_top": "promotes its token",
    "share_of_l0.{}": "share of L0",
}
"""Measures of a stratum with anchors, and what a table's column is called."""


def render(suite: Suite, lines: Sequence[Line], page: Path) -> None:
    """Write the suite's section of `page`, and its plots beside it; what else the page holds stays as it is."""
    plot = page.with_name(f"{page.stem}-{suite.name}.svg")
    held = current(suite, lines)
    section = "\n".join(_section(suite, lines, held, plot.name))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(plot, svg(_plots(rows(suite, held)), f"{suite.name}: error against L0"))
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    write_whole(page, replaced(text, suite.name, section))


def replaced(text: str, name: str, section: str) -> str:
    """`text` with the section of that name put in the place of its older self, or at the end."""
    begin, end = f"<!-- bench {name} -->\n", f"<!-- end of bench {name} -->\n"
    new = f"{begin}\n{section}\n{end}"
    first, last = text.find(begin), text.find(end)
    if first < 0 or last < first:
        return text + ("\n" if text and not text.endswith("\n\n") else "") + new
    return text[:first] + new + text[last + len(end) :]


def _section(suite: Suite, lines: Sequence[Line], held: Sequence[Line], plot: str) -> list[str]:
    every = rows(suite, held)
    out = [f"## Suite {suite.name}", ""]
    out += [suite.about.strip(), ""] if suite.about else []
    out += [f"![{suite.name}: error against L0]({plot})", "", *_results(every, suite.silent), ""]
    for part in (
        _comparison(every),
        _relative(every),
        _strata(every),
        _sweeps(suite, held),
        _agreements(suite, held),
        _failures(suite, lines),
    ):
        out += [*part, ""] if part else []
    return [*out, *_made(suite, held), ""]


def _results(every: Sequence[Row], silent: int) -> list[str]:
    """Means over seeds with their standard deviation."""
    names = [name for name in TITLES if any(row.mean(name) is not None for row in every)]
    if not every:
        return ["Nothing has been measured yet."]
    head = ["method", "setting", "rate", "seeds", *(TITLES[name] for name in names)]
    body = []
    for row in every:
        rate = "-" if row.lr is None else f"{row.lr:g}"
        setting = f"{axis_name(row.method.axis)} {row.setting:g}"
        body.append([row.method.title, setting, rate, str(len(row.seeds)), *(_value(row, name) for name in names)])
    said = "Means over seeds; behind +- the standard deviation over seeds."
    if "dead" in names:
        said += " Dead: fire on none of 65,536 held-out activations"
        said += f"; silent: on none of {silent:,} of the training documents." if "silent" in names else "."
    return [*_table(head, body), "", said]


def _value(row: Row, name: str) -> str:
    mean, spread = row.mean(name), row.spread(name)
    if mean is None:
        return "-"
    digits: Callable[[float], str] = (lambda v: f"{100 * v:.2f} %") if name in ("dead", "silent") else _digits
    return digits(mean) if spread is None else f"{digits(mean)} +- {digits(spread)}"


def _digits(value: float) -> str:
    """Three figures behind the point, or what a small number needs."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def _comparison(every: Sequence[Row]) -> list[str]:
    """Ours over the best peer at equal L0."""
    names = [n for n in (*LOWER, *HIGHER) if any(against(row, every, n) for row in every if not row.method.peer)]
    body = []
    for row in every:
        if row.method.peer or not names:
            continue
        cells = [row.method.title, _digits(row.mean("l0") or 0.0)]
        for name in names:
            found = against(row, every, name)
            mark = "*" if found and found.is_extrapolated else ""
            cells.append(f"{found.ratio:.3f}{mark} ({found.peer})" if found else "-")
        body.append(cells)
    if not body:
        return []
    head = ["ours", "L0", *(f"{TITLES[n]} / best peer's" for n in names)]
    less = ", ".join(TITLES[n] for n in names if n in LOWER)
    more = ", ".join(TITLES[n] for n in names if n in HIGHER)
    told = [f"below 1 ours is better ({less})"] if less else []
    told += [f"above 1 ours is better ({more})"] if more else []
    note = (
        "Each against the peer that is best there, at our L0 on straight lines between the logarithms of its points; "
        f"{'; '.join(told)}. A star: up to 10 % beyond the peer's last point. A dash: no peer's curve reaches that L0."
    )
    return ["### Ours against the best tuned peer at equal L0", "", *_table(head, body), "", note]


def _relative(every: Sequence[Row]) -> list[str]:
    """In a suite without peers: each method over the first one at the same setting."""
    if not every or any(row.method.peer for row in every):
        return []
    first = {row.setting: row for row in every if row.method.name == every[0].method.name}
    names = [name for name in ("l0", *LOWER, *HIGHER) if every[0].mean(name)]
    body = []
    for row in every:
        held = first.get(row.setting)
        if held is not None and held is not row:
            ratios = [_ratio(row.mean(name), held.mean(name)) for name in names]
            body.append([row.method.title, f"{axis_name(row.method.axis)} {row.setting:g}", *ratios])
    if not body:
        return []
    title = every[0].method.title
    head = ["method", "setting", *(TITLES[name] for name in names)]
    return [f'### Each over "{title}" at the same setting', "", *_table(head, body)]


def _ratio(value: float | None, of: float | None) -> str:
    return "-" if value is None or not of else f"{value / of:.3f}"


def _sweeps(suite: Suite, held: Sequence[Line]) -> list[str]:
    """FVU and, of planted features, MCC at every rate that was tried, and the one that was taken."""
    chosen, body = rates(suite, held), []
    names = ["l0", "fvu", *(["mcc"] if any("mcc" in line["measures"] for line in held) else [])]
    for method in suite.methods:
        for line in sorted(swept(method, held), key=lambda one: (one["job"]["setting"], one["job"]["lr"])):
            job, measures = line["job"], line["measures"]
            cells = [method.title, f"{axis_name(method.axis)} {job['setting']:g}", f"{job['lr']:g}"]
            taken = "taken" if job["lr"] == chosen[method.name] else ""
            cells += [_digits(measures[name]) for name in names]
            body.append([*cells, f"{job['tokens']:,}", taken])
    if not body:
        return []
    heads = ["method", "setting", "rate", *(TITLES[n] for n in names), "activations", ""]
    return ["### Learning rates", "", *_table(heads, body)]


def _agreements(suite: Suite, held: Sequence[Line]) -> list[str]:
    body = []
    for method in suite.methods:
        own = [line for line in held if line["kind"] == "agreement" and line["job"]["method"] == method.name]
        for setting in sorted({line["job"]["setting"] for line in own}):
            found = [line["measures"] for line in own if line["job"]["setting"] == setting]
            # A stratum's rows are told apart where the dictionary has several.
            parts = ["", *sorted(n.removeprefix("pw_mcc") for n in found[0] if n.startswith("pw_mcc."))]
            for part in parts:
                names = (f"pw_mcc{part}", f"shared{part}", "pw_mcc_floor")
                cells = [_over(found, name) for name in names]
                rows_of = part.removeprefix(".") or "all"
                body.append([method.title, f"{axis_name(method.axis)} {setting:g}", rows_of, str(len(found)), *cells])
    if not body:
        return []
    head = ["method", "setting", "rows", "pairs of seeds", "PW-MCC", "shared above 0.7", "of random rows"]
    note = f"{suite.agreement.rows:,} rows of one dictionary are matched one to one to all rows of the other."
    return ["### The same features from another seed", "", *_table(head, body), "", note]


def _over(found: Sequence[Mapping[str, float]], name: str) -> str:
    """The mean of a measure over the lines that have it."""
    values = [measures[name] for measures in found if name in measures]
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _strata(every: Sequence[Row]) -> list[str]:
    """What is measured of anchored rows, a table of its own: dictionaries without them have no such number."""
    body = []
    for row in every:
        for name in sorted({n.partition(".")[0] for n in row.values if n.endswith(".cosine_mean")}):
            cells = [_value(row, measure.format(name)) for measure in ANCHORED]
            body.append([row.method.title, f"{axis_name(row.method.axis)} {row.setting:g}", name, *cells])
    if not body:
        return []
    head = ["method", "setting", "stratum", *ANCHORED.values()]
    return ["### Rows that are tied to a token", "", *_table(head, body)]


def _failures(suite: Suite, lines: Sequence[Line]) -> list[str]:
    mine = [line for line in lines if line.get("suite") == suite.name]
    failed = [line for line in latest(mine).values() if line["status"] == "error"]
    if not failed:
        return []
    told = sorted((line["job"]["name"], line["error"]) for line in failed)
    return ["### Failed", "", *(f"- {name}: {error}" for name, error in told)]


def _made(suite: Suite, held: Sequence[Line]) -> list[str]:
    """The command, the machines, dates, versions, and how the peers were run."""
    days = sorted({line["time"][:10] for line in held})
    when = "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    versions = {f"{n} {v}" for line in held for n, v in line["versions"].items() if n not in ("safetensors",)}
    hours = sum(line["seconds"]["total"] for line in held) / 3600
    out = ["### How it was made", "", "```", f"spalf bench quality {shlex.quote(_shown(suite.path))}", "```", ""]
    together = max((line.get("together", 1) for line in held), default=0)
    facts = {
        "Jobs": f"{len(held)}, {hours:.1f} hours in all, up to {together} at a time",
        "Machines": ", ".join(sorted({line["machine"] for line in held})),
        "Dates": when,
        "Commits": ", ".join(sorted({line["commit"] for line in held if line["commit"]})),
        "Versions": ", ".join(sorted(versions)),
    }
    out += [f"- {name}: {value}." for name, value in facts.items() if value]
    peers = [method for method in suite.methods if method.peer]
    return out + (_peers(suite, peers) if peers else [])


def _peers(suite: Suite, methods: Sequence[Method]) -> list[str]:
    """What of the peers is not their default."""
    shared = suite.peers
    cast = "bfloat16 autocast on CUDA as each library does it" if shared.autocast else "no autocast"
    told = [
        "- Peers: their own trainers' steps on the same stream; the scale of activations by each library's own "
        f"estimate from {shared.normalise} batches; the rate falls to 0 over the last {shared.decay:.0%} of the steps; "
        f"{cast}. Else their defaults, and:"
    ]
    for method in methods:
        options = ", ".join(f"{k} = {v}" for k, v in method.options.items()) or "nothing else"
        told.append(f"  - {method.title} (`{method.peer}`): {method.axis.key} from the setting; {options}.")
    return told


def _shown(path: Path) -> str:
    """A suite's path as a reader of a checkout would write it."""
    parts = path.resolve().parts
    return str(Path(*parts[parts.index("recipes") :])) if "recipes" in parts else path.name


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *(_line(cells) for cells in body)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plots(every: Sequence[Row]) -> list[Plot]:
    titles = list(dict.fromkeys(row.method.title for row in every))
    out = []
    for name, (title, label) in PLOTTED.items():
        series = []
        for one in titles:
            own = [row for row in every if row.method.title == one]
            points = tuple((row.mean("l0") or 0.0, row.mean(name) or 0.0) for row in own)
            points = tuple((x, y) for x, y in points if x > 0 and y > 0)
            series.append(Series(title=one, points=points, is_ours=not own[0].method.peer))
        out.append(Plot(title=title, y_label=label, series=tuple(s for s in series if s.points)))
    return out
