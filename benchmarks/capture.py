"""Capture of every layer x position, shards written, against the bare forward pass of the same batches.

    python benchmarks/capture.py [--rows 160] [--pairs 5]

Alternates the two in one process, same dtype and workers, and prints the median ratio. The bare pass is the same
plan of batches (prompts once, completions from their cache) without hooks, without weights, without writing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from interp import activations, chat, data, models
from interp.capture import private_copy, run_shared


def bare(subject, rows, plan, workers: int) -> float:
    """Seconds of the forward passes alone."""

    local = threading.local()

    def start() -> None:
        torch.set_num_threads(1)
        local.subject = private_copy(subject)

    def work(shard) -> None:
        with torch.inference_mode():
            run_shared(local.subject, [rows[i] for i in shard["rows"]], shard["batches"])

    began = time.perf_counter()
    with ThreadPoolExecutor(workers, initializer=start) as pool:
        list(pool.map(work, plan))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    subject = models.load()
    rated = data.load(rows=options.rows)
    conversations = [
        chat.messages_of(p, c) for p, c in zip(rated.rows["prompt"], rated.rows["completion"], strict=True)
    ]
    rows, _, _ = chat.Encoder(subject.tokenizer).encode_all(conversations)
    workers = torch.get_num_threads()
    ratios = []
    folder = Path(tempfile.mkdtemp())
    try:
        for pair in range(options.pairs + 1):
            began = time.perf_counter()
            found = activations.record(subject, rows, workspace_dir=folder / str(pair))
            captured = time.perf_counter() - began
            plain = bare(subject, rows, found.shards, workers)
            shutil.rmtree(folder / str(pair))
            print(
                f"captured {captured:.2f} s, bare {plain:.2f} s, ratio {captured / plain:.3f}"
                + " (warm-up)" * (pair == 0)
            )
            if pair:
                ratios.append(captured / plain)
    finally:
        shutil.rmtree(folder)
    print(f"{len(rows)} rows, {sum(r.length for r in rows)} tokens, {subject.dtype}, {workers} workers")
    print(
        f"capture / bare forward: median {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
