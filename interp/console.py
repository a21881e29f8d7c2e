"""What every command shares: one-line errors and exit statuses, progress and tables on standard error, JSON on output."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from interp import InterpError


def run(app: Callable[..., Any]) -> int:
    """Run a Typer app; the exit status: 0 done, 1 a problem, 2 wrong usage, 130 interrupted."""
    # With another process on the cores, spinning threads make a forward pass ten times slower. Before torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    try:
        # Typer turns Ctrl-C into this status.
        status = int(app(standalone_mode=False) or 0)
        return (
            _tell("interrupted; what is written is kept, and the same command resumes", 130)
            if status == 130
            else status
        )
    except InterpError as error:
        if debug:
            raise
        return _tell(str(error), 1)
    except Exception as problem:
        error: Any = problem  # Typer's exceptions have no public base class
        # Typer's own usage errors know their message and status (2).
        if hasattr(error, "format_message"):
            if not error.format_message().strip():
                return 2  # a bare command: its help has been printed
            return _tell(_usage(error), getattr(error, "exit_code", 2))
        if debug:
            raise
        return _tell(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
                     " (unexpected; --debug shows where)", 1)  # fmt: skip


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context else ""
    return " ".join(error.format_message().split()) + hint


def _tell(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def calm() -> None:
    """Silence the libraries' bars and warnings: one command prints one bar, and its own notes."""
    import logging
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the Hub client sets its own logger when imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("huggingface_hub", "datasets", "fsspec", "transformers", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def calm_transformers() -> None:
    """The same for transformers, which has settings of its own (and takes seconds to import)."""
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


class Console:
    """Notes, progress and tables on standard error; one JSON object on standard output with `--json`."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        from rich.console import Console as Rich

        self.as_json, self.quiet, self.began = as_json, quiet, time.perf_counter()
        if quiet:
            os.environ["TQDM_DISABLE"] = "1"
        self.err = Rich(stderr=True, quiet=quiet, highlight=False)
        self.out = Rich(quiet=as_json, highlight=False)

    def notes(self, lines: Sequence[str]) -> None:
        """What was assumed, a line each."""
        for line in lines:
            self.err.print(f"[dim]note: {_plain(line)}[/dim]", soft_wrap=True)

    def say(self, text: str) -> None:
        """A line of the result."""
        self.out.print(_plain(text), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
        """A short table of the result."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 or not column else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(_plain, row))
        self.out.print(table)

    def json(self, value: dict[str, Any]) -> None:
        """The one object of `--json`."""
        if self.as_json:
            print(json.dumps(value, ensure_ascii=False, allow_nan=False))

    def envelope(self, command: str, data: str | None, model: str | None, **facts: Any) -> dict[str, Any]:
        """The keys that every command's JSON object has, filled in for one that makes no run."""
        from interp.artifacts import versions

        seconds = {"total": round(time.perf_counter() - self.began, 2)}
        common = {
            "command": command,
            "model": model,
            "data": data,
            "seed": None,
            "versions": versions(),
            "seconds": seconds,
        }
        return {**common, "run_dir": None, "figures": [], "assumptions": [], **facts}

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A function (stage, done, total) that draws one bar per stage with rate and time left."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.err) as bars:
            tasks: dict[str, Any] = {}
            lock = threading.Lock()  # workers report from threads of their own

            def update(stage: str, done: int, total: int) -> None:
                with lock:
                    show(stage, done, total)

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total, rate="")
                task = next(t for t in bars.tasks if t.id == tasks[stage])
                rate = f"{task.speed:,.0f}/s" if task.speed else ""
                bars.update(tasks[stage], completed=done, total=total, rate=rate)

            yield update


def _plain(text: Any) -> str:
    from rich.markup import escape

    return escape(str(text))
