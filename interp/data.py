"""Rated completions: named sets, files, folders and the Hub; ratings, labels and prompt-grouped folds.

    rated = load("pocketfeedback")
    rated.labels()          # [row] in [-1, 1]
    folds(rated.groups)     # [row] fold of each row, prompts never split

Everything that is chosen for the caller is said in `RatedSet.notes`; every row left out is counted in
`RatedSet.skipped`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from interp import InterpError, sources
from interp.columns import (
    check_columns,
    check_scale,
    guess_scale,
    parse_columns,
    parse_scale,
    to_dataset,
    unify,
)
from interp.rated import (
    RatedSet,
    balance,
    duplicates,
    folds,
    label_check,
    mend_labels,
    roles,
    rounded,
    summary,
    take,
    winner_loser,
)

__all__ = [
    "DATASETS",
    "RatedSet",
    "Source",
    "balance",
    "duplicates",
    "folds",
    "label_check",
    "load",
    "load_texts",
    "mend_labels",
    "parse_columns",
    "parse_scale",
    "roles",
    "rounded",
    "summary",
    "take",
    "winner_loser",
]


@dataclass(frozen=True)
class Source:
    """A set that is known by name."""

    description: str
    licence: str
    scale: tuple[float, float]
    hub: str | None = None  # None: it ships with the package
    split: str | None = None
    flatten: Callable[[dict], Iterator[dict]] | None = None  # a published row -> rated rows
    schema: frozenset[str] = frozenset()  # columns by which a copy of the set is recognised
    fix_labels: bool = False
    note: str | None = None  # what its users should know


def load(
    source: str | Path = "pocketfeedback",
    *,
    columns: Mapping[str, str] | None = None,
    scale: tuple[float, float] | None = None,
    rows: int | None = None,
    seed: int = 0,
    balance: bool = False,
    split: str | None = None,
    fix_labels: bool | None = None,
) -> RatedSet:
    """A rated set by name (`DATASETS`), file, folder or Hub id.

    `columns` maps prompt, completion, score or messages to the source's names; `scale` is (lowest,
    highest) rating, else the named set's, else guessed and noted. `rows` keeps whole prompts, drawn
    by `seed`, until that many rows are reached; with `balance` the rows are single ones, equally many
    of every rating. `fix_labels` lowers the ratings that `label_check` finds (default: for
    ultrafeedback). Raises InterpError, naming file:line, for whatever cannot be read or used.
    """
    columns = dict(columns or {})
    check_columns(columns)
    if scale is not None:
        check_scale(scale)
    table, known, notes = _open(str(source), columns, split)
    # A published scale belongs to the published score, and a copy of a set may have been rescaled.
    published = known.scale if known and "score" not in columns else None
    given = scale or (published if table.name in DATASETS else None)
    if scale is not None:
        table = replace(table, tolerated=table.tolerated - {"score out of scale"})
    found, skipped, remarks = unify(table, columns, given)
    if given is None:
        given, remark = guess_scale([row["score"] for row in found], published)
        remarks.append(f"scale of {table.name}: {remark}")
    dataset, converted = to_dataset(found)
    low, high = given
    rated = RatedSet(table.name, dataset, (float(low), float(high)), skipped, (*notes, *remarks, *converted))
    mends = bool(published and known and known.fix_labels) if fix_labels is None else fix_labels
    return _narrow(mend_labels(rated, mends), rows, seed, balance)


def load_texts(source: str | Path, *, columns: Mapping[str, str] | None = None) -> list[dict]:
    """Conversations that need no rating: prompt_id, prompt, completion (and messages) of each row of a source.

    Raises InterpError like `load`.
    """
    columns = dict(columns or {})
    check_columns(columns)
    table, _, _ = _open(str(source), columns, None)
    return unify(table, columns, None, scored=False)[0]


def _open(source: str, columns: Mapping[str, str], split: str | None) -> tuple[sources.Table, Source | None, list[str]]:
    """The source's table (a published schema flattened), what is known about it, and notes."""
    by_hub = {known.hub: name for name, known in DATASETS.items() if known.hub}
    name = by_hub.get(source, source)
    known, path, notes = DATASETS.get(name), Path(source).expanduser(), []
    if known and known.hub is None:
        _no_split(split, name)
        return replace(_shipped(name), name=name), known, notes
    if known and known.hub:
        table, notes = sources.read_hub(known.hub, split or known.split)
        table = replace(table, name=name)
    elif path.is_dir():
        table, notes = sources.read_folder(path, split)
    elif path.is_file():
        _no_split(split, source)
        table = sources.read_file(path)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not source.lower().endswith(sources.SUFFIXES):
        table, notes = sources.read_hub(source, split)
    else:
        names = ", ".join(DATASETS)
        raise InterpError(f"{source}: no such file or folder, expected a path, a Hub id (owner/name) or one of {names}")
    if known is None and not columns:
        name, known = next(
            ((n, s) for n, s in DATASETS.items() if s.schema and s.schema <= set(table.columns)), ("", None)
        )
        notes += [f"{table.name}: read as rows of {name}, whose columns it has"] if known else []
    if known is None or known.flatten is None:
        return table, known, notes
    return sources.flattened(table, known.flatten), known, [*notes, *([known.note] if known.note else [])]


def _shipped(name: str) -> sources.Table:
    with resources.as_file(resources.files("interp.sets") / f"{name}.jsonl") as path:
        if not path.is_file():
            raise InterpError(f"{name}: {path.name} is not in this installation; install the project again")
        return sources.read_file(path)


def _no_split(split: str | None, name: str) -> None:
    if split:
        raise InterpError(f"{name}: split {split!r} asked for, but only folders and Hub sets have splits; leave it out")


def _narrow(rated: RatedSet, rows: int | None, seed: int, balanced: bool) -> RatedSet:
    if rows is not None and rows < 1:
        raise InterpError(f"--rows: found {rows}, expected 1 or more")
    if rows is not None and rows > len(rated):
        note = f"{rows} rows asked for, {rated.name} has {len(rated)}: all are used"
        rated = replace(rated, notes=(*rated.notes, note))
    if balanced:
        return balance(rated, seed, rows)
    return rated if rows is None or rows >= len(rated) else take(rated, rows, seed)


DATASETS = {
    "pocketfeedback": Source("the shipped set: prompts with four rated completions", "MIT", (1, 10)),
    "ultrafeedback": Source(
        "UltraFeedback: 64k prompts, four completions each, rated by GPT-4",
        "MIT",
        (1, 10),
        hub="openbmb/UltraFeedback",
        split="train",
        flatten=sources.flatten_ultrafeedback,
        schema=frozenset({"instruction", "completions"}),
        fix_labels=True,
    ),
    "ultrafeedback-binarized": Source(
        "UltraFeedback binarized: the best-rated and another completion of each prompt",
        "MIT",
        (1, 10),
        hub="HuggingFaceH4/ultrafeedback_binarized",
        split="train_prefs",
        flatten=sources.flatten_pairs,
        schema=frozenset({"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}),
        note="pairs carry no aspects, so completions wrongly rated 10 cannot be found (see label_check)",
    ),
    "helpsteer2": Source(
        "HelpSteer2: human ratings, (mean of helpfulness, correctness, coherence) / 4 * 9 + 1",
        "CC-BY-4.0",
        (1, 10),
        hub="nvidia/HelpSteer2",
        split="train",
        flatten=sources.flatten_helpsteer2,
        schema=frozenset({"prompt", "response", "helpfulness", "correctness", "coherence"}),
    ),
}
