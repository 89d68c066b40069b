"""The README's figures are those of the files that the benchmark pages are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spalf.bench import results
from spalf.bench.render import render
from spalf.bench.suite import read
from spalf.bench.summary import Row, against, current, rows

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/benchmarks"


def block(name: str) -> list[list[str]]:
    """The body of README's table between two markers, by cells."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def speed() -> dict[str, dict[str, Any]]:
    held = json.loads((PAGES / "speed/h100-3-peers.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in held["shapes"][0]["rows"]}


def test_the_refined_step_is_that_of_its_file() -> None:
    held = json.loads((PAGES / "speed/h100-0b-refined.json").read_text(encoding="utf-8"))
    row = next(r for r in held["shapes"][0]["rows"] if r["name"] == "spalf triton:moments=bfloat16")
    assert f"takes {row['ms']:.2f} ms in another run" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_came_after_the_table_of_steps() -> None:
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    held = json.loads((PAGES / "speed/h100-0a-plain.json").read_text(encoding="utf-8"))
    row = {r["name"]: r for r in held["shapes"][0]["rows"]}
    mine, theirs = row["spalf_plain triton:moments=int8"], row["SAELens JumpReLU"]
    times = min(theirs["ms"], theirs["ms_streaming"]) / max(mine["ms"], mine["ms_streaming"])
    assert f"takes {mine['ms']:.2f} ms with moments in 8 bits, {times:.2f} times as fast as SAELens' JumpReLU" in said
    held = json.loads((PAGES / "harvest/h100-neox_27m_plain_compiled.json").read_text(encoding="utf-8"))
    both = next(r["activations_per_s"] for r in held["rows"] if r["kind"] == "both")
    least = min(r["ours_to_theirs"] for r in held["saelens"]["rows"])
    assert f"{both / 1e6:.2f} M activations a second, {least:.1f} times as many as SAELens' own runner" in said


def test_speed() -> None:
    measured = speed()
    kinds = {"": "", ", moments in bfloat16": ":moments=bfloat16", ", moments in 8 bits": ":moments=int8"}
    names = {f"spalf_plain{said}": f"spalf_plain triton{option}" for said, option in kinds.items()}
    ours = measured["spalf_plain triton:moments=bfloat16"]
    assert max(ours["ms"], ours["ms_streaming"]) == ours["ms"]
    assert len(block("speed")) == 7
    for name, ms, ratio in block("speed"):
        row = measured[names.get(name, name)]
        assert ms == f"{row['ms']:.2f}", name
        if ratio:
            # Theirs is the faster of its two times, as on the page.
            assert ratio == f"{min(row['ms'], row['ms_streaming']) / ours['ms']:.1f}x", name
        else:
            assert name in names


HARVESTS = {
    "27 M parameters, hook 3, d 512, F 16,384; `spalf`, 33cf77a": "h100-neox_27m.json",
    "and `source.compiled = true`, 33cf77a": "h100-neox_27m_compiled.json",
    "the same, 7cc57f1": "h100-neox_27m_500.json",
    "and `source.compiled = true`": "h100-neox_27m_500_compiled.json",
    "the same model; `spalf_plain`, eff1fac": "h100-neox_27m_plain.json",
    "and `source.compiled = true`, 10ab231": "h100-neox_27m_plain_compiled.json",
    "Pythia-1.4b's shape, random weights, hook 6, F 65,536; `spalf`, 33cf77a": "h100-pythia_1.4b_random.json",
    "the same shape; `spalf_plain`, eff1fac": "h100-pythia_1.4b_random_plain.json",
    "`spalf_plain`, `source.compiled = true`, 10ab231": "h100-pythia_1.4b_random_plain_compiled.json",
}


def test_harvests_are_those_of_their_files() -> None:
    lines = (PAGES / "speed.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| model | harvest alone"))
    told = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        told[name] = cells
    assert set(told) == set(HARVESTS)
    for name, file in HARVESTS.items():
        held = json.loads((PAGES / "harvest" / file).read_text(encoding="utf-8"))
        alone, steps, both = (row["activations_per_s"] / 1e6 for row in held["rows"])
        wanted = [_three(alone), _three(steps), _three(both)]
        # Both cannot be faster than one half: then the half was timed while its lists still grew.
        is_settled = both < min(alone, steps)
        wanted += (
            [f"{both / min(alone, steps):.2f}", f"{both / alone + both / steps:.2f}"] if is_settled else ["-", "-"]
        )
        theirs = [row["activations_per_s"] / 1e6 for row in held.get("saelens", {"rows": []})["rows"]]
        wanted += [f"{max(theirs):.3f}", f"{both / max(theirs):.1f}x"] if theirs else ["-", "-"]
        assert told[name] == wanted, name


def _three(millions: float) -> str:
    """Three digits that count: 7.15, 0.641."""
    return f"{millions:.2f}" if millions >= 1 else f"{millions:.3f}"


def test_quality() -> None:
    suite = read(ROOT / "recipes/bench/neox_27m.toml")
    every = rows(suite, current(suite, results.read(PAGES / "quality/neox_27m")))
    ours = [row for name in ("fit", "full") for row in every if row.method.name == name]
    told = block("quality")
    assert len(told) == len(ours) == 8
    for cells, row in zip(told, ours, strict=True):
        fvu, gap, kl = (against(row, every, measure) for measure in ("fvu", "ce_gap", "kl"))
        assert fvu is not None
        assert gap is not None
        assert kl is not None
        means = {name: row.mean(name) for name in ("l0", "fvu", "ce_gap", "kl")}
        assert None not in means.values()
        wanted = [{"fit": "the first", "full": "all"}[row.method.name], f"{row.setting:.3f}"]
        wanted += [f"{1 - means['fvu']:.3f}", f"{means['l0']:.1f}"]  # type: ignore[operator]
        wanted += [f"{means['fvu']:.3f}", f"{fvu.ratio:.2f}", f"{means['ce_gap']:.3f}", f"{gap.ratio:.2f}"]
        wanted += [f"{means['kl']:.3f}", f"{kl.ratio:.2f}"]
        assert cells == wanted
    gaps, kls = ([row.spread(n) / row.mean(n) for row in ours] for n in ("ce_gap", "kl"))  # type: ignore[operator]
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    least, most = 100 * min(gaps), 100 * max(gaps)
    assert f"from seed to seed by {least:.1f} to {most:.0f} % in the rows above, most in the last" in said
    assert gaps[-1] == max(gaps)
    assert f"(KL: {100 * max(kls):.1f} % at most;" in said


def test_a_second_model() -> None:
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    suite = read(ROOT / "recipes/bench/embedded.toml")
    every = rows(suite, current(suite, results.read(PAGES / "quality/embedded")))
    ours = [row for row in every if row.method.name == "fit"]
    fvu, gap = (ratios(ours, every, name) for name in ("fvu", "ce_gap"))
    assert len(fvu) == len(gap) == 3
    assert f"{min(fvu):.2f} to {max(fvu):.2f} of the best peer's FVU" in said
    assert f"and {min(gap):.2f} to {max(gap):.2f} of its CE gap" in said


def test_planted_features() -> None:
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    suite = read(ROOT / "recipes/bench/synthetic.toml")
    every = rows(suite, current(suite, results.read(PAGES / "quality/synthetic")))
    found = {(row.method.name, row.setting): row for row in every}
    mine, raw, topk, whitened = (
        means([found[name, k] for k in (15, 25, 35, 45)], "mcc")
        for name in ("then_raw", "ours", "topk_saelens", "whitened_saelens")
    )
    assert "MCC {:.3f}, {:.3f}, {:.3f} and {:.3f} at L0 15, 25, 35 and 45".format(*mine) in said
    assert "(SAELens' TopK: {:.3f}, {:.3f}, {:.3f} and {:.3f};".format(*topk) in said
    assert "whitened activations: {:.3f}, {:.3f}, {:.3f} and {:.3f})".format(*whitened) in said
    assert [a > b for a, b in zip(raw, topk, strict=True)] == [False, False, False, True]
    ours = [row for row in every if row.method.name == "then_raw"]
    assert min(ratios(ours, every, "mcc")) > 1
    assert "with an F1 of {:.3f}, {:.3f}, {:.3f} and {:.3f}, ".format(*means(ours, "f1")) in said
    assert "{:.2f}, {:.2f}, {:.2f} and {:.2f} times the best peer's".format(*ratios(ours, every, "f1")) in said
    suite = read(ROOT / "recipes/bench/anisotropic.toml")
    every = rows(suite, current(suite, results.read(PAGES / "quality/anisotropic")))
    ours = [row for row in every if row.method.name == "reweighed"]
    assert "MCC is {:.3f}, {:.3f} and {:.3f} at L0 15, 25 and 35".format(*means(ours, "mcc")) in said
    assert "{:.2f}, {:.2f} and {:.2f} times the best peer's".format(*ratios(ours, every, "mcc")) in said
    assert "and F1 {:.2f}, {:.2f} and {:.2f} times".format(*ratios(ours, every, "f1")) in said


def means(some: list[Row], measure: str) -> list[float]:
    found = [row.mean(measure) for row in some]
    assert None not in found
    return [one for one in found if one is not None]


def ratios(ours: list[Row], every: list[Row], measure: str) -> list[float]:
    found = [against(row, every, measure) for row in ours]
    assert None not in found
    return [one.ratio for one in found if one is not None]


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("neox_27m", "quality.md"),
        ("ladder", "quality.md"),
        ("sensitivity", "quality.md"),
        ("sensitivity_embedded", "quality.md"),
        ("synthetic_small", "quality.md"),
        ("synthetic", "quality.md"),
        ("embedded", "quality.md"),
        ("anisotropic", "quality.md"),
        ("anisotropic_small", "quality.md"),
        ("anchors_27m", "2026-11-22-anchors.md"),
    ],
)
def test_pages_are_made_of_their_lines(name: str, page: str, tmp_path: Path) -> None:
    suite = read(ROOT / f"recipes/bench/{name}.toml")
    render(suite, results.read(PAGES / "quality" / name), tmp_path / page)
    made, kept = ((path / page).read_text(encoding="utf-8") for path in (tmp_path, PAGES))
    assert made.strip() in kept, f"render docs/benchmarks/{page} anew, as it says itself"
