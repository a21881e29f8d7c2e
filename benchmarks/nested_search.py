"""Nested grid search over cells: one decomposition a cell against scikit-learn doing the same search.

    python benchmarks/nested_search.py [--cells 4] [--threads 2]

Both search lambda and cell inside 5 outer x 4 inner prompt-grouped folds on the same scaled features of the shipped
set (run `make probe` first: it reads the recorded activations). Prints the ratio and how far predictions differ.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from threadpoolctl import threadpool_limits

from interp import chat, data, models, ridge
from interp.activations import record


def peers(cells: list[np.ndarray], y: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """scikit-learn: in each outer fold a GridSearchCV over lambda for every cell, the best cell predicts."""
    out = np.empty(len(y))
    for a in range(5):
        train, held = assignment != a, assignment == a
        inner = PredefinedSplit(assignment[train])
        searches = []
        for x in cells:
            search = GridSearchCV(Ridge(), {"alpha": ridge.LAMBDAS}, cv=inner, scoring=pooled_error)
            searches.append((search.fit(x[train], y[train]), x))
        best, x = max(searches, key=lambda pair: pair[0].best_score_)
        out[held] = best.predict(x[held])
    return out


def pooled_error(model, x, y) -> float:
    """Minus the summed squared error: its mean over inner folds ranks like the pooled error."""
    return -float(((model.predict(x) - y) ** 2).sum())


def ours(cells: list[torch.Tensor], y: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    folds, target = ridge.Folds.of(assignment), torch.from_numpy(y).float()[:, None]
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
        results = list(pool.map(lambda x: ridge.HatCell.of(x, folds).nested(target), cells))
    out = np.empty(len(y))
    for a in range(5):
        scores = torch.stack([r.inner_mse[a, :, 0] for r in results])
        cell, penalty = divmod(int(scores.argmin()), len(ridge.LAMBDAS))
        rows = folds.rows(a)
        out[rows] = results[cell].outer[penalty, rows, 0].double()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    subject, rated = models.load(), data.load()
    texts = zip(rated.rows["prompt"], rated.rows["completion"], strict=True)
    rows, _, _ = chat.Encoder(subject.tokenizer).encode_all([chat.messages_of(*t) for t in texts])
    found = record(subject, rows, surprise=True)
    layers = np.linspace(4, subject.n_layers - 4, options.cells).round().astype(int)
    raw = [found.cell(int(layer), "mean").float() for layer in layers]
    cells = [ridge.Scaler.of(x)(x) for x in raw]
    y, assignment = rated.labels(), data.folds(rated.groups)
    began = time.perf_counter()
    mine = ours(cells, y, assignment)
    middle = time.perf_counter()
    theirs = peers([c.double().numpy() for c in cells], y, assignment)
    done = time.perf_counter()
    print(
        f"{len(cells)} cells of {tuple(cells[0].shape)}, 5 x 4 folds, {len(ridge.LAMBDAS)} lambdas, {options.threads} threads"
    )
    print(
        f"ours {middle - began:.2f} s, scikit-learn {done - middle:.2f} s, ratio {(done - middle) / (middle - began):.1f} x"
    )
    print(f"predictions differ by a relative {np.linalg.norm(mine - theirs) / np.linalg.norm(theirs):.1e}")


if __name__ == "__main__":
    main()
