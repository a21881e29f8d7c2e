"""Out-of-fold r by layer at one position, on a rated file of one's own.

    python benchmarks/rated_file.py FILE.jsonl.gz [--position last] [--words 260] [--rows 1200] [--tokens 600]

Rows whose prompt and completion together have fewer than --words words, in the file's order, shuffled by
`random.seed(0)`, the first --rows of them, at most --tokens tokens. Every layer's own r, lambda chosen inside.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from interp import chat, data, models, probes, stats
from interp.activations import record


def read(path: str, words: int, rows: int) -> list[dict]:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    short = [r for r in found if len((r["prompt"] + " " + r["completion"]).split()) < words]
    random.seed(0)
    random.shuffle(short)
    return short[:rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--position", default="last")
    parser.add_argument("--words", type=int, default=260)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--tokens", type=int, default=600)
    options = parser.parse_args()
    rows = read(options.file, options.words, options.rows)
    subject = models.load()
    conversations = [chat.messages_of(r["prompt"], r["completion"]) for r in rows]
    encoded, kept, skipped = chat.Encoder(subject.tokenizer).encode_all(conversations, options.tokens)
    scores = np.array([float(rows[i]["score"]) for i in kept])
    groups = np.unique([rows[i]["prompt_id"] for i in kept], return_inverse=True)[1]
    found = record(subject, encoded, positions=(options.position,))
    assignment = data.folds(groups)
    y = (scores - 1) / 9 * 2 - 1
    grid, _, _ = probes.sweep(found, y[:, None], assignment, layers=found.layers, positions=(options.position,))
    best = int(np.argmax(grid.pearson[:, 0]))
    print(f"{len(kept)} rows, {len(set(groups))} prompts, skipped {dict(skipped)}")
    print("r by layer: " + " ".join(f"{r:.2f}" for r in grid.pearson[:, 0]))
    print(f"best layer {grid.layers[best]}: r {grid.pearson[best, 0]:.3f}")
    length = np.log([len(rows[i]["completion"]) for i in kept])
    print(f"log length alone: r {stats.pearson(scores, length):.3f}")


if __name__ == "__main__":
    main()
