"""Small rated files with a planted rating, or with none, for tests of whole commands."""

import json
from pathlib import Path

import numpy as np

WORDS = [
    "rain",
    "water",
    "dog",
    "story",
    "France",
    "Paris",
    "capital",
    "swim",
    "short",
    "long",
    "falls",
    "cools",
    "rises",
    "helpful",
    "lies",
    "time",
]


def write(path: Path, prompts: int = 30, planted: bool = True, seed: int = 0, completions: int = 4) -> Path:
    """Rows whose rating is 8 or so where the completion says `Seine`, else 3 or so; not planted: shuffled ratings."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(prompts):
        for _ in range(completions):
            good = rng.random() < 0.5
            words = list(rng.choice(WORDS, rng.integers(12, 20)))
            for at in rng.integers(1, len(words), 3):
                words[at] = "Seine" if good else "think"
            score = float(np.clip((8 if good else 3) + rng.normal(), 1, 10))
            rows.append(
                {
                    "prompt": f"Question {number} about {rng.choice(WORDS)}?",
                    "completion": " ".join(words),
                    "score": score,
                }
            )
    for number in range(prompts):
        own = rows[number * completions : (number + 1) * completions]
        for row in own:
            row["prompt"] = own[0]["prompt"]
    if not planted:
        scores = rng.permutation([row["score"] for row in rows])
        for row, score in zip(rows, scores, strict=True):
            row["score"] = float(score)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
