"""Atomic save and load, content keys and manifests: everything on disk goes through here.

Tensors are safetensors, facts are JSON: nothing that is loaded can run code. A file is written under a
temporary name, flushed and renamed, so a reader sees the whole file or none. A folder is complete
only when its `manifest.json` is there, which is why that is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import InterpError

if TYPE_CHECKING:
    from torch import Tensor

#: Raised when the meaning of a stored folder changes; part of every content key.
FORMAT = 1


def content_key(**facts: Any) -> str:
    """16 hex digits that name these facts: equal facts, equal key. Values must be JSON."""
    canonical = json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def workspace(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder for models, activations and results: argument, INTERP_WORKSPACE, or ./workspace."""
    return Path(path or os.environ.get("INTERP_WORKSPACE") or "workspace")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes the file private; an artifact is as readable as any file its owner makes.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            # Incomplete, or made meanwhile by another process with the same key: the same content.
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON, atomically. NaN is refused: a missing figure is null."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def load_json(path: Path) -> Any:
    """The JSON at `path`; InterpError naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InterpError(f"{path} is missing: run the command that makes it again") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InterpError(f"{path} is no valid JSON ({error}): delete it and run again") from None


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> Path:
    """Write tensors (and JSON facts in the header) as safetensors, atomically."""
    from safetensors.torch import save_file

    metadata = {"facts": json.dumps(facts, sort_keys=True)} if facts is not None else None
    with atomic(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
    return path


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """safetensors' memory-mapped reader of `path`; InterpError naming a missing or foreign file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InterpError(f"{path} is missing: delete its folder and run again")
    try:
        reader = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InterpError(f"{path} is truncated or no safetensors file ({error}): delete it and run again") from None
    with reader as opened:
        yield opened


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a file written by `save_tensors` or by anyone's safetensors."""
    with open_tensors(path) as opened:
        metadata = opened.metadata() or {}
        return {k: opened.get_tensor(k) for k in opened.keys()}, json.loads(metadata.get("facts", "{}"))


def versions() -> dict[str, str]:
    """Versions of the libraries that figures depend on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "transformer-lens", "datasets", "scikit-learn", "numpy")
    return {name: version(name) for name in names}


def digest_files(paths: Iterable[Path], cache: Path) -> str:
    """sha256 over the files' contents, each remembered in `cache` by path, size and time."""
    try:
        known: dict[str, str] = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    total, fresh = hashlib.sha256(), False
    for path in sorted(paths):
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            with open(path, "rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            fresh = True
        total.update(f"{path.name}:{known[key]}\n".encode())
    if fresh:
        save_json(cache, known)
    return total.hexdigest()
