"""Where rated rows come from: files, folders, the Hub; and the published sets' own schemas.

Reading gives a `Table` of raw rows, each with its place (`file:line`), so that a bad row can be found
again. Nothing is judged here but whether a row can be read; `interp.columns` says what is in it.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp import InterpError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
EMBEDDED = "the embedded set needs no network: --data pocketfeedback"

#: Problems of a row that leave it out, counted, where nobody can mend the file: sets of the Hub ...
EMPTY_TEXT = frozenset({"empty prompt", "empty completion"})
#: ... and published sets whose gaps are known.
PUBLISHED_GAPS = frozenset({"no rating", "score out of scale", "malformed messages"})


@dataclass(frozen=True)
class Table:
    """Raw rows of one source, before their columns are known to be right."""

    name: str
    columns: tuple[str, ...]
    rows: Iterable[tuple[str, dict]]  # (place, row)
    tolerated: frozenset[str] = frozenset()  # problems that leave a row out instead of ending the run


def read_file(path: Path) -> Table:
    """Rows of a .jsonl, .jsonl.gz, .json, .csv or .parquet file. Raises InterpError naming file:line."""
    suffix = next((s for s in READERS if path.name.lower().endswith(s)), None)
    if suffix is None:
        raise InterpError(f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)}")
    rows = list(READERS[suffix](path))
    if not rows:
        raise InterpError(f"{path}: no rows in the file, expected one prompt, completion and score a row")
    return Table(str(path), tuple(dict.fromkeys(key for _, row in rows for key in row)), rows)


def _text(path: Path) -> str:
    """The file's text: UTF-8, with or without a byte order mark, gzip where the name ends so."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InterpError(f"{path}: cannot be read ({error}); make or fetch the file again") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InterpError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    # Not splitlines(): U+2028 and form feeds may stand inside a JSON string.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _object(_parse(line, path, number), f"{path}:{number}")


def _json_list(path: Path) -> Iterator[tuple[str, dict]]:
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)  # many sets name JSON lines .json
        return
    for number, row in enumerate(_parse(text, path, 1), 1):
        yield f"{path} row {number}", _object(row, f"{path} row {number}")


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise InterpError(f"{place}: malformed JSON ({error.msg}, column {error.colno}); mend the line") from error
    except (ValueError, RecursionError) as error:
        raise InterpError(f"{path}:{line}: JSON that cannot be read ({error}); mend the line") from error
    # Only an escape can bring a lone surrogate into text that was valid UTF-8.
    return _without_surrogates(value) if "\\ud" in text.lower() else value


def _without_surrogates(value: Any) -> Any:
    """Lone surrogates as U+FFFD: Arrow and tokenizers refuse them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(v) for v in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    return value


def _object(row: Any, place: str) -> dict:
    if not isinstance(row, dict):
        raise InterpError(f"{place}: a JSON {type(row).__name__}, expected an object with prompt, completion, score")
    return row


def _csv(path: Path) -> Iterator[tuple[str, dict]]:
    text = _text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the default refuses long completions
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, start = None, 1
    try:
        for fields in reader:
            place, start = f"{path}:{start}", reader.line_num + 1
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = [field.strip() for field in fields]
            elif len(fields) != len(header):
                raise InterpError(f"{place}: {len(fields)} fields, expected {len(header)} as in the header")
            else:
                yield place, {key: field for key, field in zip(header, fields, strict=True) if key}
    except csv.Error as error:
        raise InterpError(f"{path}:{start}: malformed CSV ({error}); check the quotes") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InterpError(f"{path}: cannot be read as Parquet ({reason}); make the file again") from error


def read_folder(path: Path, split: str | None) -> tuple[Table, list[str]]:
    """A folder of `save_to_disk`, or of data files that `datasets` recognises. Raises InterpError."""
    import datasets

    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # the loaders raise anything, from OSError to pyarrow's own
        raise InterpError(f"{path}: no dataset could be loaded from this folder ({_first_line(error)})") from error
    if split and not isinstance(loaded, dict):
        raise InterpError(f"{path}: the folder holds one set without splits, found split {split!r}; leave it out")
    return _table(loaded, str(path), split, frozenset())


def read_hub(name: str, split: str | None) -> tuple[Table, list[str]]:
    """A dataset of the Hub, rows with an empty text left out. Raises InterpError, also without network."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # hub, HTTP, cache and builder each have their own family of errors
        raise InterpError(
            f"{name}: could not be loaded from the Hub ({_first_line(error)}); "
            f"check the name, the split and the network; {EMBEDDED}"
        ) from error
    return _table(loaded, name, split, EMPTY_TEXT)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _table(loaded: Any, name: str, split: str | None, tolerated: frozenset[str]) -> tuple[Table, list[str]]:
    notes = []
    if isinstance(loaded, dict):
        splits = list(loaded)
        chosen = split or ("train" if "train" in splits else splits[0])
        if chosen not in splits:
            raise InterpError(f"{name}: no split {chosen!r}, it has {', '.join(splits)}; name one with --split")
        if split is None and len(splits) > 1:
            notes.append(f"{name}: split {chosen} of {', '.join(splits)}")
        loaded = loaded[chosen]
    if not len(loaded):
        raise InterpError(f"{name}: no rows, expected one prompt, completion and score a row")
    rows = ((f"{name} row {number}", row) for number, row in enumerate(loaded, 1))
    return Table(name, tuple(loaded.column_names), rows, tolerated), notes


def flatten_ultrafeedback(row: dict) -> Iterator[dict]:
    """openbmb/UltraFeedback: up to four completions a row, rated overall and by aspect ("4", "N/A")."""
    for one in row["completions"] or []:
        marks = one.get("annotations") or {}
        aspects = {
            name: _aspect((marks.get(name) or {}).get("Rating"))
            for name in ("instruction_following", "truthfulness", "honesty", "helpfulness")
        }
        kept = {"model": one.get("model"), "source": row.get("source"), "aspects": aspects}
        rated = {"completion": one["response"], "score": one.get("overall_score")}
        yield {"prompt": row["instruction"], **rated, **kept}


def _aspect(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None  # "N/A" is how the set says that an aspect does not apply


def flatten_pairs(row: dict) -> Iterator[dict]:
    """HuggingFaceH4/ultrafeedback_binarized: both sides of a pair, each with its score."""
    for side in ("chosen", "rejected"):
        yield {"prompt": row["prompt"], "completion": row[side], "score": row[f"score_{side}"], "side": side}


def flatten_helpsteer2(row: dict) -> Iterator[dict]:
    """nvidia/HelpSteer2: marks of 0 to 4; score = (mean of the first three) / 4 * 9 + 1."""
    marks = [row[name] for name in ("helpfulness", "correctness", "coherence")]
    score = None if None in marks else sum(marks) / 3 / 4 * 9 + 1
    # Several turns come as one text, marked "\n<extra_id_1>Assistant\n" and "\n<extra_id_1>User\n".
    pieces = re.split(r"\n?<extra_id_1>(User|Assistant)\n", row["prompt"] or "")
    turns = zip(["User", *pieces[1::2]], pieces[::2], strict=True)
    messages = [{"role": role.lower(), "content": text} for role, text in turns]
    rest = {k: v for k, v in row.items() if k not in ("prompt", "response")}
    yield {"messages": messages, "completion": row["response"], "score": score, **rest}


def flattened(table: Table, flatten: Callable[[dict], Iterator[dict]]) -> Table:
    """The table with each row replaced by what `flatten` makes of it."""
    rows = []
    for place, row in table.rows:
        try:
            rows += [(place, one) for one in flatten(row)]
        except (TypeError, KeyError, AttributeError) as error:
            raise InterpError(f"{place}: not of the published schema ({_first_line(error)})") from error
    if not rows:
        raise InterpError(f"{table.name}: no completions in any row, expected the published schema")
    return Table(table.name, tuple(rows[0][1]), rows, table.tolerated | PUBLISHED_GAPS)


READERS = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
