"""What rating does a fitted probe read in a text?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from interp import InterpError, chat
from interp.activations import record

if TYPE_CHECKING:
    from interp.chat import Encoder
    from interp.models import Subject
    from interp.probes import Probe


@dataclass(frozen=True)
class ScoreResult:
    """`facts["texts"]`: prompt, completion and rating (the probe's scale; None where a row could not be used)."""

    facts: dict[str, Any]
    notes: tuple[str, ...]

    def to_frame(self) -> Any:
        """One line per text (a pandas DataFrame)."""
        import pandas as pd

        return pd.DataFrame(self.facts["texts"])


def compute(
    subject: Subject,
    encoder: Encoder,
    probe: Probe,
    rows: Sequence[dict[str, Any]],
    *,
    max_length: int = 1024,
    workspace_dir: str | os.PathLike[str] | None = None,
) -> ScoreResult:
    """Score `rows` (prompt, completion, optionally earlier `messages`) at the probe's layer and position."""
    conversations = [chat.messages_of(r["prompt"], r["completion"], r.get("messages")) for r in rows]
    encoded, kept, skipped = encoder.encode_all(conversations, max_length)
    if not encoded:
        raise InterpError(f"no text can be scored: {', '.join(f'{n} {reason}' for reason, n in skipped.items())}")
    activations = record(
        subject, encoded, layers=[probe.layer], positions=[probe.position], site=probe.site, workspace_dir=workspace_dir
    )
    ratings: list[float | None] = [None] * len(rows)
    for index, rating in zip(kept, probe.rating(activations.cell(probe.layer, probe.position)).tolist(), strict=True):
        ratings[index] = rating
    texts = [{"prompt": r["prompt"], "completion": r["completion"], "rating": x} for r, x in zip(rows, ratings, strict=True)]
    facts = {
        "layer": probe.layer,
        "position": probe.position,
        "site": probe.site,
        "scale": list(probe.scale),
        "heldout_pearson": probe.provenance.get("heldout_pearson"),
        "skipped": dict(skipped),
        "texts": texts,
    }
    return ScoreResult(facts, tuple(f"{n} rows skipped: {reason}" for reason, n in skipped.items()))
