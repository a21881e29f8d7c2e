"""How results are printed: short tables of a command's JSON object, then the paths written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.console import Console


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where it does not exist."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(bounds: list[float] | None, digits: int = 2) -> str:
    return "" if bounds is None else f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def estimate(facts: dict[str, Any], name: str, digits: int = 2) -> str:
    """`0.52 [0.47, 0.57]`."""
    return f"{number(facts[name], digits)} {interval(facts.get(f'{name}_ci'), digits)}".rstrip()


def show_probe(out: Console, facts: dict[str, Any]) -> None:
    """Headline, baselines, nulls, the finding, the paths."""
    held, null = facts["heldout"], facts["null"]
    skipped = "".join(f", {count} skipped ({reason})" for reason, count in facts["skipped"].items())
    out.say(
        f"{facts['model']} on {facts['data']}: {facts['rows']} rows, {facts['prompts']} prompts{skipped}; "
        f"{len(facts['layers'])} layers x {len(facts['positions'])} positions at {facts['site']}"
    )
    columns = ("out of fold", "r [95%]", "within-prompt accuracy", "MAE", "slope")
    rows = [("probe", held)]
    rows += [(name.replace("_", " "), found) for name, found in facts["baselines"].items()]
    rows += [(name.replace("_", " "), found) for name, found in facts.get("controls", {}).items()]
    lines = [
        (name, estimate(f, "pearson"), estimate(f, "within_prompt_accuracy"), number(f["mae"]), number(f["slope"]))
        for name, f in rows
    ]
    out.table(columns, lines)
    out.say(_grid_line(facts))
    gain = facts["within_prompt_gain"]
    spread = ", ".join(number(r) for r in held["fold_seed_spread"]["pearson"])
    offered = "" if held["fold_seed_spread"]["layers"] == facts["layers"] else " (every 4th layer on offer)"
    p = [
        f"corrected p {number(null['corrected_p'], 4)} (within prompts {number(null['within_corrected_p'], 4)}; {null['draws']} draws)"
    ]
    if null["nested_p"] is not None:
        p.append(f"nested p {number(null['nested_p'], 3)} ({null['nested_draws']} draws)")
    added = facts["added_value"]
    sign = "+" if (added["pearson"] or 0) >= 0 else ""
    out.say(f"the probe adds to the stack of baselines: r {sign}{estimate(added, 'pearson', 3)}")
    if gain["baseline"]:
        out.say(f"within prompts, over {gain['baseline']} trained for it: accuracy {estimate(gain, 'accuracy', 3)}")
    out.say(f"nulls: {', '.join(p)}; three fold seeds{offered} r {spread}")
    out.say(
        f"control task (random rating per prompt, folds of rows): r {number(null['control_pearson'])}, "
        f"the ratings there {number(null['rating_pearson_row_folds'])}"
    )
    out.say("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in facts["seconds"].items()))
    out.say("")
    out.say(facts["finding"])
    out.say("")
    for name in ("run_dir", "figures"):
        paths = facts[name] if isinstance(facts[name], list) else [facts[name]]
        out.say(f"{name.replace('_', ' ')}: {' '.join(p for p in paths if not p.endswith('.json'))}")


def _grid_line(facts: dict[str, Any]) -> str:
    best = facts["best"]
    cells = [(r, layer, position) for layer, row in zip(facts["layers"], facts["grid"]["pearson"], strict=True)
             for position, r in zip(facts["positions"], row, strict=True) if r is not None]  # fmt: skip
    if not cells:
        return "no cell's prediction varies"
    r, layer, position = max(cells)
    return (
        f"best single cell: r {r:.2f} at layer {layer}, {position}; chosen on all rows: "
        f"layer {best['layer']}, {best['position']}, lambda {best['lambda']:.0f}"
    )


def show_data(out: Console, facts: dict[str, Any]) -> None:
    """A set's counts and distributions."""
    per_prompt = ", ".join(f"{size} ({count} prompts)" for size, count in facts["completions_per_prompt"].items())
    low, high = facts["scale"]
    score = facts["score"]
    lines = [
        ("rows", str(facts["rows"])),
        ("prompts", str(facts["prompts"])),
        ("completions per prompt", per_prompt),
        (f"rating, {low:g} to {high:g}", f"mean {number(score['mean'])}, sd {number(score['sd'])}"),
        ("sd of the prompts' means", number(score["sd_prompt_means"])),
        *[(name, _quantiles(facts[name])) for name in ("words", "characters")],
        ("rank correlation of length and rating", number(facts["length_rating_spearman"])),
        ("duplicates", str(facts["duplicates"])),
        ("skipped rows", ", ".join(f"{n} {reason}" for reason, n in facts["skipped"].items()) or "none"),
    ]
    out.table(("set", facts["data"]), lines)
    _bars(out, "rating (rounded)", facts["ratings"])
    for name, counts in facts["counts"].items():
        _bars(out, name, counts)


def _quantiles(values: dict[str, float]) -> str:
    return f"{values['min']:.0f} to {values['max']:.0f}, median {values['median']:.0f}"


def _bars(out: Console, name: str, counts: dict[str, int]) -> None:
    top = max(counts.values(), default=1)
    out.table((name, "rows", ""), [(key, str(n), "█" * round(24 * n / top)) for key, n in counts.items()])


def show_scores(out: Console, facts: dict[str, Any]) -> None:
    """Each text with its rating."""
    low, high = facts["scale"]
    rows = []
    for item in facts["texts"]:
        text = " ".join(item["completion"].split())
        bar = ""
        if item["rating"] is not None:
            share = min(max((item["rating"] - low) / (high - low), 0), 1)
            bar = "█" * round(16 * share)
        rows.append((text[:60] + ("…" if len(text) > 60 else ""), number(item["rating"]), bar))
    r = number(facts["heldout_pearson"])
    probe = f"completion (probe at layer {facts['layer']}, {facts['position']}; held-out r {r})"
    out.table((probe, f"rating {low:g}-{high:g}", ""), rows)
