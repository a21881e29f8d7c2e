"""record(): one pass over a set of conversations -> Activations[layer, position, row, d_model] on disk.

Rows are planned into shards (prompts of similar length with all their completions), each shard is one job
written as one safetensors file, and the folder is complete when its manifest is there. The plan is written
first and used again on resume, so a kill loses the shards in flight and the result has the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from interp import InterpError
from interp import positions as pos
from interp.artifacts import FORMAT, content_key, load_json, open_tensors, save_json, save_tensors, versions, workspace
from interp.capture import (
    SITES,
    PositionSink,
    Surprise,
    TokenSink,
    hook_name,
    keeps_keys,
    private_copy,
    prompt_groups,
    residual_hooks,
    run_bridge,
    run_shared,
)

if TYPE_CHECKING:
    from torch import Tensor

    from interp.chat import Encoded
    from interp.models import Subject

#: Padded tokens of one forward call. On a processor small batches stay in its caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384, "mps": 4096}
#: Largest shard in bytes; together with the batch it bounds memory whatever the number of rows.
SHARD_BYTES = 128 << 20
#: `record(positions=TOKENS)` keeps every token instead of positions.
TOKENS = "tokens"

Shard = dict[str, Any]  # {"name": str, "rows": [int], "batches": [[index into rows]]}


@dataclass(frozen=True)
class Activations:
    """A complete recording on disk, read by memory map.

    `layers`, `positions` and `site` say what is there; `rows` is the number of conversations.
    """

    folder: Path
    site: str
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    rows: int
    d_model: int
    n_layers: int
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: Path) -> Activations:
        """The recording in `folder`. InterpError when it is missing or incomplete."""
        path = folder / "manifest.json"
        facts = load_json(path)
        try:
            return cls(
                folder,
                facts["site"],
                tuple(facts["layers"]),
                tuple(facts["positions"]),
                facts["rows"],
                facts["d_model"],
                facts["n_layers"],
                tuple(facts["shards"]),
            )
        except (KeyError, TypeError) as error:
            raise InterpError(f"{path} is no recording's manifest ({error}): delete its folder and run again") from None

    def hook_name(self, layer: int) -> str:
        return hook_name(self.site, layer, self.n_layers)

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"shard-{shard['name']}.safetensors"

    def _key(self, layer: int) -> str:
        if layer not in self.layers:
            raise InterpError(f"layer {layer} is not in {self.folder}; it holds {', '.join(map(str, self.layers))}")
        return f"layer.{layer}"

    def cells(self, layer: int, names: Sequence[str]) -> Iterator[tuple[str, Float[Tensor, "row d_model"]]]:
        """(position, values) of one layer for each of `names`, rows in the set's order.

        InterpError for a layer or position that was not recorded.
        """
        import torch

        key = self._key(layer)
        if missing := [n for n in names if n not in self.positions or n == TOKENS]:
            raise InterpError(f"position {missing[0]!r} is not in {self.folder}; it holds {', '.join(self.positions)}")
        with ExitStack() as stack:
            readers = [(s["rows"], stack.enter_context(open_tensors(self._path(s), key))) for s in self.shards]
            slices = [(rows, reader.get_slice(key)) for rows, reader in readers]
            for name in names:
                index = self.positions.index(name)
                out: Tensor | None = None
                for rows, view in slices:
                    part = view[index]
                    out = torch.empty(self.rows, self.d_model, dtype=part.dtype) if out is None else out
                    out[rows] = part
                assert out is not None
                yield name, out

    def cell(self, layer: int, position: str) -> Float[Tensor, "row d_model"]:
        """Values of one layer and position."""
        return next(self.cells(layer, (position,)))[1]

    def tokens(self, layer: int, row: int) -> Float[Tensor, "token d_model"]:
        """Every token of one row (of a recording with `positions="tokens"`)."""
        key = self._key(layer)
        for shard in self.shards:
            if row in shard["rows"]:
                at = shard["rows"].index(row)
                with open_tensors(self._path(shard), "offsets") as opened:
                    low, high = opened.get_tensor("offsets")[at : at + 2].tolist()
                    return opened.get_slice(key)[low:high]
        raise InterpError(f"row {row} is not in {self.folder}; it holds rows 0 to {self.rows - 1}")

    @cached_property
    def surprise(self) -> Float[np.ndarray, "row 3"]:
        """Mean, minimum and last-token log-probability of each completion, in nats."""
        out = np.empty((self.rows, 3))
        for shard in self.shards:
            with open_tensors(self._path(shard), "surprise") as opened:
                out[shard["rows"]] = opened.get_tensor("surprise").numpy()
        return out


def make_plan(rows: Sequence[Encoded], batch_tokens: int, shard_rows: int, whole: bool = False) -> list[Shard]:
    """Shards of whole prompts, in order of prompt length, each with its batches of completions.

    `whole`: a batch's forward call reads prompts too, not the completions alone.
    """
    groups = sorted(prompt_groups(rows).items(), key=lambda item: (len(item[0]), item[1]))
    shards: list[list[int]] = []
    prompts = 0
    for prompt, members in groups:
        for low in range(0, len(members), shard_rows):
            part = members[low : low + shard_rows]
            full = (prompts + 1) * len(prompt) > batch_tokens or (shards and len(shards[-1]) + len(part) > shard_rows)
            if full or not shards:
                shards.append([])
                prompts = 0
            shards[-1] += part
            prompts += 1
    return [_shard(f"{i:05d}", s, rows, batch_tokens, whole) for i, s in enumerate(shards)]


def _shard(name: str, members: list[int], rows: Sequence[Encoded], batch_tokens: int, whole: bool) -> Shard:
    cost = [rows[m].length - (0 if whole else rows[m].start) for m in members]
    batches: list[list[int]] = []
    for i in sorted(range(len(members)), key=lambda i: (cost[i], i)):
        if not batches or (len(batches[-1]) + 1) * cost[i] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return {"name": name, "rows": members, "batches": batches, "batch_tokens": batch_tokens, "whole": whole}


def split(shard: Shard, rows: Sequence[Encoded]) -> list[Shard]:
    """Two shards of half the rows and half the batch, after memory ran out. InterpError for a single row."""
    members, half = shard["rows"], len(shard["rows"]) // 2
    if not half:
        raise InterpError(f"row {members[0]} does not fit in memory: lower --max-length or take another device")
    budget = max(1, shard["batch_tokens"] // 2)
    return [
        _shard(f"{shard['name']}{mark}", part, rows, budget, shard.get("whole", False))
        for mark, part in (("a", members[:half]), ("b", members[half:]))
    ]


@dataclass(frozen=True)
class Recording:
    """What is to be recorded, and where: the settings that every shard job shares."""

    subject: Subject
    rows: Sequence[Encoded]
    site: str
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    surprise: bool
    folder: Path

    def path(self, shard: Shard) -> Path:
        return self.folder / f"shard-{shard['name']}.safetensors"

    def fits(self, shard: Shard, subject: Subject) -> bool:
        """Write a shard; False when memory ran out, with all that the attempt held let go."""
        try:
            self.write(shard, subject)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            return False
        return True

    def write(self, shard: Shard, subject: Subject) -> None:
        """Run one shard through the model and write its file."""
        rows = [self.rows[i] for i in shard["rows"]]
        if self.positions == (TOKENS,):
            sink: PositionSink | TokenSink = TokenSink(rows, self.layers, subject)
        else:
            sink = PositionSink(rows, self.layers, self.positions, subject)
        surprise = Surprise(rows, subject) if self.surprise else None
        self._run(subject, rows, shard["batches"], sink, surprise)
        values = sink.values.to("cpu", subject.dtype)
        tensors = {f"layer.{layer}": values[i] for i, layer in enumerate(self.layers)}
        if surprise:
            tensors["surprise"] = surprise.values
        if isinstance(sink, TokenSink):
            import torch

            tensors["offsets"] = torch.from_numpy(sink.offsets)
        save_tensors(self.path(shard), tensors, {"rows": shard["rows"]})

    def _run(
        self,
        subject: Subject,
        rows: Sequence[Encoded],
        batches: Sequence[Sequence[int]],
        sink: PositionSink | TokenSink,
        surprise: Surprise | None,
    ) -> None:
        import torch

        with torch.inference_mode():
            if self.site == "resid":
                with residual_hooks(subject, self.layers, sink):
                    run_shared(subject, rows, batches, sink.begin, surprise)
            else:
                names = {hook_name(self.site, layer, subject.n_layers): layer for layer in self.layers}
                run_bridge(subject, rows, batches, names, sink)
                if surprise:
                    run_shared(subject, rows, batches, None, surprise)


def _out_of_memory(error: Exception) -> bool:
    """Torch has a class of its own for this on CUDA only; a processor and mps raise a RuntimeError that says so."""
    import torch

    told = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(t in str(error).lower() for t in told)


def record(
    subject: Subject,
    rows: Sequence[Encoded],
    *,
    positions: Sequence[str] | str = tuple(pos.POSITIONS),
    layers: Sequence[int] | None = None,
    site: str = "resid",
    surprise: bool = False,
    batch_tokens: int | None = None,
    workspace_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Activations:
    """Record `layers` x `positions` of every row in one pass, or read the recording that is there.

    `positions="tokens"` keeps every token. `surprise` adds the completions' log-probabilities from the same
    pass. `workers` jobs run side by side (default: a processor's cores, else one). `progress(done, total)`
    counts tokens. An interrupted recording resumes; the bytes are those of an uninterrupted one.
    InterpError for a layer, position or site that does not exist, or a row without one of the positions.
    """
    if not rows:
        raise InterpError("there are no rows to record: every row was skipped, or the set is empty")
    names = _check_positions(positions, rows)
    chosen = check_layers(layers, subject, site)
    base = workspace(workspace_dir) / "activations" / _key(subject, rows, site)
    if (found := _recorded(base, chosen, names, surprise)) is not None:
        return found
    folder = base / content_key(layers=chosen, positions=names, surprise=surprise)
    job = Recording(subject, rows, site, chosen, names, surprise, folder)
    plan = _load_plan(job, batch_tokens or BATCH_TOKENS.get(subject.device.type, 4096))
    _run_plan(job, plan, workers or _default_workers(subject), progress)
    shards = load_json(folder / "plan.json")
    facts = {
        "format": FORMAT,
        "key": f"{base.name}/{folder.name}",
        "site": site,
        "layers": chosen,
        "positions": names,
        "surprise": surprise,
        "rows": len(rows),
        "d_model": subject.d_model,
        "n_layers": subject.n_layers,
        "model": subject.name,
        "fingerprint": subject.fingerprint,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "versions": versions(),
        "shards": shards,
    }
    save_json(folder / "manifest.json", facts)
    return Activations.open(folder)


def _check_positions(positions: Sequence[str] | str, rows: Sequence[Encoded]) -> tuple[str, ...]:
    if positions == TOKENS:
        return (TOKENS,)
    names = pos.parse(positions if isinstance(positions, str) else ",".join(positions))
    if short := [i for i, row in enumerate(rows) if not pos.has(row, names)]:
        raise InterpError(
            f"row {short[0]} and {len(short) - 1} more are too short for positions {', '.join(names)}; leave them out"
        )
    return names


def check_layers(layers: Sequence[int] | None, subject: Subject, site: str) -> tuple[int, ...]:
    """The layers to read: all of the site's, or those given, checked."""
    if site not in SITES:
        raise InterpError(f"site {site!r} is unknown; choose from {', '.join(SITES)}")
    if layers is not None and not len(layers):
        raise InterpError("no layer is asked for; give numbers, or None for all")
    count = subject.n_layers + (site == "resid")
    for layer in layers or ():
        if not 0 <= layer < count:
            raise InterpError(f"layer {layer} does not exist: {subject.name} has layers 0 to {count - 1} at {site}")
    return tuple(range(count)) if layers is None else tuple(sorted(set(layers)))


def parse_layers(text: str, subject: Subject, site: str = "resid") -> tuple[int, ...] | None:
    """`all` (None), `last`, or numbers and ranges: `0,8,16-24`. InterpError names the layers there are."""
    if text.strip() == "all":
        return None
    count = subject.n_layers + (site == "resid")
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            first = count - 1 if low == "last" else int(low)
            found += range(first, int(high) + 1) if dash else [first]
        except ValueError:
            found = []
        if not found:
            raise InterpError(
                f"--layer {text!r} is not understood; use `all`, `last`, or 0 to {count - 1} as in 0,8,16-24"
            )
    return check_layers(found, subject, site)


def _key(subject: Subject, rows: Sequence[Encoded], site: str) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array([row.start, row.stop, row.turn_end, row.length, *row.ids], np.int64).tobytes())
    facts = {"dtype": str(subject.dtype), "device": subject.device.type, "rows": digest.hexdigest()}
    return content_key(model=subject.fingerprint, site=site, **facts)


def _recorded(base: Path, layers: tuple[int, ...], names: tuple[str, ...], surprise: bool) -> Activations | None:
    """A complete recording under `base` that holds all that is asked for, or None."""
    for manifest in sorted(base.glob("*/manifest.json")):
        facts = load_json(manifest)
        enough = set(layers) <= set(facts["layers"]) and set(names) <= set(facts["positions"])
        if enough and (facts["surprise"] or not surprise):
            return Activations.open(manifest.parent)
    return None


def _load_plan(job: Recording, batch_tokens: int) -> list[Shard]:
    path = job.folder / "plan.json"
    if path.is_file():
        for left in job.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        return load_json(path)
    subject = job.subject
    per_row = len(job.layers) * subject.d_model * 4
    per_row *= max(r.length for r in job.rows) if job.positions == (TOKENS,) else len(job.positions)
    free = shutil.disk_usage(job.folder if job.folder.is_dir() else _existing(job.folder)).free
    needed = per_row * len(job.rows) * subject.dtype.itemsize // 4
    if needed > free:
        raise InterpError(
            f"the recording needs {needed / 1e9:.1f} GB and {job.folder.parent} has {free / 1e9:.1f} GB free;"
            " ask for fewer rows, layers or positions, or another --workspace"
        )
    plan = make_plan(
        job.rows, batch_tokens, max(1, SHARD_BYTES // per_row), whole=job.site != "resid" or not keeps_keys(subject)
    )
    save_json(path, plan)
    return plan


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(p for p in path.absolute().parents if p.is_dir())


def _default_workers(subject: Subject) -> int:
    """One job per core of a processor: a job's small matrices gain little from a second thread."""
    import torch

    return max(1, min(8, torch.get_num_threads())) if subject.device.type == "cpu" else 1


def _run_plan(job: Recording, plan: list[Shard], workers: int, progress: Callable[[int, int], None] | None) -> None:
    """Write every shard of the plan that is not there yet; halve a shard for which memory runs out."""
    import torch

    total, done, lock, local = sum(row.length for row in job.rows), 0, threading.Lock(), threading.local()
    bridge = job.site != "resid"
    cores = torch.get_num_threads()
    workers = 1 if bridge else min(workers, len(plan))
    threads = max(1, cores // workers)

    def start() -> None:
        torch.set_num_threads(threads)
        # Hooks live on modules: every worker has its own modules over the shared weights.
        local.subject = job.subject if bridge else private_copy(job.subject)

    def work(shard: Shard) -> None:
        nonlocal done
        if not (job.path(shard).is_file() or job.fits(shard, local.subject)):
            halves = split(shard, job.rows)
            with lock:
                at = next(i for i, s in enumerate(plan) if s["name"] == shard["name"])
                plan[at : at + 1] = halves
                save_json(job.folder / "plan.json", plan)
            for half in halves:
                work(half)
            return
        with lock:
            done += sum(job.rows[i].length for i in shard["rows"])
            if progress:
                progress(done, total)

    pool = ThreadPoolExecutor(workers, initializer=start)
    try:
        for future in [pool.submit(work, shard) for shard in list(plan)]:
            future.result()
    finally:
        # On an interrupt the jobs that have not begun are dropped; what is written stays and is resumed.
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # a worker's setting is inherited by every thread that comes later
