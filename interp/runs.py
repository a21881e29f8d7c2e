"""Finished runs: where they lie, how they are saved and read again, and which probe a command takes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from interp import InterpError
from interp.artifacts import atomic_folder, load_json, save_json, workspace
from interp.probes import Probe

if TYPE_CHECKING:
    from interp.analyses.grid import GridResult
    from interp.models import Subject

#: The probe that ships: the default run's choice on the embedded model (a test makes it again).
SHIPPED = Path(__file__).parent / "sets" / "smollm2-probe.safetensors"


def folder(command: str, model: str, data: str, key: str, workspace_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a run: readable, and unique by its content key."""
    names = [re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).name or name).strip("-") for name in (model, data)]
    return workspace(workspace_dir) / "runs" / f"{command}-{names[0]}-{names[1]}-{key[:8]}"


def save_grid(result: GridResult, path: Path) -> None:
    """Write result.json, rows.parquet and probe.safetensors; the folder appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_folder(path) as temporary:
        save_json(temporary / "result.json", result.facts)
        pq.write_table(pa.table(result.rows), temporary / "rows.parquet")
        result.probe.save(temporary / "probe.safetensors")
        save_json(temporary / "manifest.json", {"kind": "probe", **result.probe.provenance})


def load_grid(path: Path) -> GridResult | None:
    """The run saved in `path`, or None when there is none. InterpError when it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from interp.analyses.grid import GridResult

    if not (path / "manifest.json").is_file():
        return None
    try:
        rows = pq.read_table(path / "rows.parquet").to_pydict()
    except (OSError, pa.ArrowInvalid) as error:
        raise InterpError(f"{path / 'rows.parquet'} cannot be read ({error}): delete {path} and run again") from None
    return GridResult(load_json(path / "result.json"), rows, Probe.load(path / "probe.safetensors"))


def draw(result: GridResult, path: Path, command: str) -> list[Path]:
    """Draw every figure of a run into `path`, each a PNG with the JSON of what it shows."""
    from interp import figures
    from interp.analyses.grid_plot import plot

    written: list[Path] = []
    for name, chart in plot(result).items():
        written += figures.save(chart, path / name, {"command": command, "run": path.name})
    return written


def mismatch(probe: Probe, subject: Subject) -> list[str]:
    """What differs between where a probe was fitted and where it is used, in a line each."""
    facts = probe.provenance
    used = {"model": subject.name, "dtype": str(subject.dtype).removeprefix("torch.")}
    notes = [f"the probe was fitted with {k} {facts[k]}, not {v}" for k, v in used.items() if facts.get(k, v) != v]
    if facts.get("model_fingerprint") != subject.fingerprint and not notes:
        notes.append("the probe was fitted on other weights than these")
    return notes


def find_probe(
    subject: Subject, given: str | None = None, workspace_dir: str | os.PathLike[str] | None = None
) -> tuple[Probe, str]:
    """(probe, where it is from): the one given (a run's folder or a file), else the newest that fits, else the shipped.

    InterpError when the given one is missing or made on a model of another width, or when none fits.
    """
    if given is not None:
        path = Path(given)
        path = path / "probe.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise InterpError(f"there is no probe at {path}; give a run's folder or a probe.safetensors")
        probe = Probe.load(path)
        if len(probe.direction) != subject.d_model:
            width = f"{len(probe.direction)} wide, {subject.name} is {subject.d_model}"
            raise InterpError(f"{path} belongs to another model ({probe.provenance.get('model')}): {width}")
        return probe, str(path)
    fitted = (workspace(workspace_dir) / "runs").glob("probe-*/probe.safetensors")
    newest = sorted(fitted, key=lambda p: (p.stat().st_mtime, p), reverse=True)
    for path in [*newest, *([SHIPPED] if SHIPPED.is_file() else [])]:
        probe = Probe.load(path)
        if probe.provenance.get("model_fingerprint") == subject.fingerprint:
            return probe, "shipped with the project" if path == SHIPPED else str(path)
    raise InterpError(
        f"no probe was fitted on {subject.name} yet: run `python cli.py probe --model {subject.name}` first"
    )
