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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


#: Read once: the mask can be read only by setting it, for the whole process, and threads write files here.
UMASK = _umask()


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
        _settle(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Flush a file to disk; make it as readable as any file its owner makes (mkstemp's are private)."""
    with open(path, "rb") as written:
        os.fsync(written.fileno())
    os.chmod(path, 0o666 & ~UMASK)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~UMASK)
        for made in temporary.rglob("*"):
            if made.is_file():
                _settle(made)
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
        # A lone surrogate (half an emoji in somebody's data) becomes the JSON escape \udXXX, and reads back as it was.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
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
def open_tensors(path: Path, needs: str | None = None) -> Iterator[Any]:
    """safetensors' memory-mapped reader of `path`; InterpError naming a missing or foreign file.

    `needs` is the name of a tensor without which the file is not the one that was meant.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InterpError(f"{path} is missing: delete its folder and run again")
    try:
        reader = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InterpError(f"{path} is truncated or no safetensors file ({error}): delete it and run again") from None
    with reader as opened:
        if needs is not None and needs not in opened.keys():  # noqa: SIM118 - no dict: a reader has no __contains__
            raise InterpError(f"{path} holds no {needs!r}: delete it and run again")
        yield opened


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a file written by `save_tensors` or by anyone's safetensors."""
    with open_tensors(path) as opened:
        metadata = opened.metadata() or {}
        names = opened.keys()
        return {k: opened.get_tensor(k) for k in names}, json.loads(metadata.get("facts", "{}"))


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
