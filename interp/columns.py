"""Which column is what: raw rows of any source -> rows of a rated set, each checked."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from interp import InterpError
from interp.sets.make import prompt_id
from interp.sources import Table

if TYPE_CHECKING:
    import datasets

#: The columns a set may be mapped to, and the names under which others publish them.
ALIASES = {
    "messages": ("messages",),
    "prompt": ("prompt", "instruction", "question", "input", "query", "user"),
    "completion": ("completion", "response", "output", "answer", "text", "assistant"),
    "score": (
        "score",
        "rating",
        "overall_score",
        "overall",
        "label_score",
        "reward",
        "overall_rating",
        "grade",
    ),
}
#: The usual scales, tried in this order when none is given.
USUAL_SCALES = ((0.0, 1.0), (1.0, 5.0), (1.0, 10.0))
OPTION = "--columns prompt=...,completion=...,score=..."
NEEDED = "needed are prompt, completion and score (or messages and score)"
MISSING_RATINGS = {"", "n/a", "na", "nan", "none", "null"}


class Unusable(Exception):
    """A row that cannot be used: the reason it is counted under, and what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def unify(
    table: Table, columns: Mapping[str, str], scale: tuple[float, float] | None, scored: bool = True
) -> tuple[list[dict], dict[str, int], list[str]]:
    """(rows, skipped, notes): rows with prompt_id, prompt, completion, score, messages, and the rest.

    `columns` maps our names to the source's (dotted for nested ones); what it leaves out is found by
    `ALIASES`. A score outside `scale`, where one is given, is a problem like a missing one.
    With `scored` False a score is neither needed nor read. Raises InterpError for missing columns, and for a
    row whose problem the table does not tolerate.
    """
    names, notes = _resolve(table, columns, scored)
    used = {*ALIASES, "prompt_id", *names.values()}
    extra = [c for c in table.columns if c not in used]
    lost = [c for c in table.columns if c in ALIASES and c not in names.values()]
    if lost:
        notes.append(f"left out of {table.name}: its own {', '.join(lost)} (other columns took the name)")
    rows, skipped = [], Counter()
    for place, row in table.rows:
        try:
            rows.append(_unified(row, names, scale, scored) | {c: row.get(c) for c in extra})
        except Unusable as problem:
            if problem.reason not in table.tolerated:
                raise InterpError(f"{place}: {problem}") from None
            skipped[problem.reason] += 1
    if not rows:
        raise InterpError(f"{table.name}: no usable row; left out: {dict(skipped)}")
    return rows, dict(skipped), notes


def _resolve(table: Table, columns: Mapping[str, str], scored: bool) -> tuple[dict[str, str], list[str]]:
    """Our column names -> the source's, and a note about those that were recognised by an alias."""
    known = {c.lower(): c for c in reversed(table.columns)}
    names: dict[str, str] = {}
    for field, aliases in ALIASES.items():
        if field in columns:
            if columns[field] not in table.columns and columns[field].split(".")[0] not in table.columns:
                raise InterpError(_missing(table, f"no column {columns[field]!r}"))
            names[field] = columns[field]
            continue
        # Beside a conversation an `answer` or `text` is more likely a reference than the completion.
        aliases = (field,) if "messages" in names and field != "score" else aliases
        found = next((known[a] for a in aliases if a in known and known[a] not in columns.values()), None)
        # The caller's own prompt and completion make an unasked-for conversation superfluous.
        if found and not (field == "messages" and {"prompt", "completion"} <= set(columns)):
            names[field] = found
    both = ("prompt", "completion") if "messages" not in names else ()
    missing = [field for field in (*both, *(["score"] if scored else [])) if field not in names]
    if missing:
        raise InterpError(_missing(table, f"no column for {', '.join(missing)}"))
    guessed = [f"{f} = {c}" for f, c in names.items() if c != f and f not in columns]
    return names, [f"columns of {table.name}: {', '.join(guessed)}"] if guessed else []


def _missing(table: Table, what: str) -> str:
    has = ", ".join(table.columns) or "none"
    return f"{table.name}: {what}; it has {has}; {NEEDED}; name them with {OPTION}"


def _unified(row: dict, names: Mapping[str, str], scale: tuple[float, float] | None, scored: bool) -> dict:
    value = {field: _pick(row, path) for field, path in names.items()}
    completion, history = value.get("completion"), value.get("messages")
    if history is None and isinstance(value.get("prompt"), list):
        history = value["prompt"]  # TRL's conversational form: prompt and completion are lists of turns
    if history is None:
        prompt = _words(value.get("prompt"), "prompt")
        identity, messages = prompt, None
        completion = _words(completion, "completion")
    else:
        messages, completion = _split_turns(_turns(history), completion)
        prompt = next((m["content"] for m in reversed(messages) if m["role"] == "user"), None)
        prompt = _words(prompt, "prompt")
        alone = len(messages) == 1  # then it is the same prompt as one given without roles
        identity = prompt if alone else "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    score = _number(value.get("score")) if scored else None
    if scale and score is not None and not scale[0] <= score <= scale[1]:
        raise Unusable("score out of scale", f"score {score:g}, expected {scale[0]:g} to {scale[1]:g} (--scale)")
    text = {"prompt_id": prompt_id(identity), "prompt": prompt, "completion": completion, "score": score}
    return text | ({} if messages is None else {"messages": messages})


def _pick(row: Any, path: str) -> Any:
    if path in row:
        return row[path]
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _turns(value: Any) -> list[dict]:
    try:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in value]
    except (TypeError, KeyError):
        raise Unusable("malformed messages", "messages that are no list of {role, content}") from None
    if not turns or not all(isinstance(v, str) for turn in turns for v in turn.values()):
        raise Unusable("malformed messages", "messages without a turn, or with a role or content that is no text")
    return turns


def _split_turns(turns: list[dict], completion: Any) -> tuple[list[dict], str]:
    """Turns before the completion, and the completion: the given one or the last turn's content."""
    own = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
    text = _words(own if completion is None else completion, "completion")
    if own is not None and own != text:
        raise Unusable("malformed messages", "the last assistant turn and the completion differ")
    return (turns if own is None else turns[:-1]), text


def _words(value: Any, what: str) -> str:
    if isinstance(value, list):
        value = _turns(value)[-1]["content"]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable(f"empty {what}", f"empty {what}, expected text")
    if not isinstance(value, str):
        raise Unusable(f"{what} is no text", f"a {what} of type {type(value).__name__}, expected text")
    return value


def _number(value: Any) -> float:
    if value is None or str(value).strip().lower() in MISSING_RATINGS:
        raise Unusable("no rating", f"score {value!r}, expected a number")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable("score is no number", f"score {str(value)[:40]!r}, expected a finite number")
    return number


def to_dataset(rows: list[dict]) -> tuple["datasets.Dataset", list[str]]:
    """Rows as a Dataset; columns whose values have no common type are kept as JSON text, and noted."""
    import datasets
    import pyarrow

    table, notes = {}, []
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
            values = [json.dumps(value, default=str) for value in values]
            notes.append(f"column {name}: values of several types, kept as JSON text")
        table[name] = values
    return datasets.Dataset.from_dict(table), notes


def guess_scale(
    scores: Iterable[float], published: tuple[float, float] | None = None
) -> tuple[tuple[float, float], str]:
    """(scale, remark): the published one if all scores fit, else 0:1, 1:5 or 1:10, else the range seen."""
    scores = list(scores)
    low, high = min(scores), max(scores)
    usual = [s for s in ((published,) if published else ()) + USUAL_SCALES if s[0] <= low and high <= s[1]]
    # A set of nothing but 1s says nothing for 0:1.
    scale = next((s for s in usual if s != (0.0, 1.0) or low < 1), (low, high))
    if low == high == scale[0] == scale[1]:
        raise InterpError(f"all scores are {low:g}, which tells no scale; give one with --scale LOW:HIGH")
    return scale, f"taken to be {scale[0]:g}:{scale[1]:g} (scores {low:g} to {high:g}); --scale sets another"


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=question,score=marks.overall` -> a mapping of our column names to the source's."""
    columns: dict[str, str] = {}
    for piece in filter(None, (p.strip() for p in text.split(","))):
        ours, equals, theirs = (p.strip() for p in piece.partition("="))
        if not (ours and equals and theirs):
            raise InterpError(f"--columns: found {piece!r}, expected name=column, as in score=rating")
        if ours in columns:
            raise InterpError(f"--columns: {ours} is given twice, expected once")
        columns[ours] = theirs
    check_columns(columns)
    return columns


def check_columns(columns: Mapping[str, str]) -> None:
    unknown = [name for name in columns if name not in ALIASES]
    if unknown:
        raise InterpError(f"--columns: unknown {', '.join(unknown)}, expected {', '.join(ALIASES)}")


def parse_scale(text: str) -> tuple[float, float]:
    """`1:10` -> (1.0, 10.0)."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise InterpError(f"--scale: found {text!r}, expected LOW:HIGH, as in 1:10") from None
    check_scale((low, high))
    return low, high


def check_scale(scale: tuple[float, float]) -> None:
    if not (all(map(math.isfinite, scale)) and scale[0] < scale[1]):
        raise InterpError(f"scale {scale[0]:g}:{scale[1]:g}, expected two numbers, the lower first, as in 1:10")
