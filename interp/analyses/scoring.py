"""What rating does a fitted probe read in a text?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from interp import InterpError, chat
from interp import positions as pos
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
) -> ScoreResult:
    """Score `rows` (prompt, completion, optionally earlier `messages`) at the probe's layer and position."""
    conversations = [chat.messages_of(r["prompt"], r["completion"], r.get("messages")) for r in rows]
    encoded, kept, skipped = encoder.encode_all(conversations, min(max_length, subject.context))
    usable = [i for i, row in enumerate(encoded) if pos.has(row, (probe.position,))]
    if short := len(encoded) - len(usable):
        skipped[f"shorter than position {probe.position}"] += short
    encoded, kept = [encoded[i] for i in usable], [kept[i] for i in usable]
    if not encoded:
        raise InterpError(f"no text can be scored: {', '.join(f'{n} {reason}' for reason, n in skipped.items())}")
    ratings: list[float | None] = [None] * len(rows)
    # Scores are not asked for twice: what is recorded for them is not kept.
    with tempfile.TemporaryDirectory(prefix="score-") as folder:
        options = {"layers": [probe.layer], "positions": [probe.position], "site": probe.site, "workspace_dir": folder}
        found = record(subject, encoded, **options).cell(probe.layer, probe.position)
    for index, rating in zip(kept, probe.rating(found).tolist(), strict=True):
        ratings[index] = rating
    texts = [
        {"prompt": r["prompt"], "completion": r["completion"], "rating": x} for r, x in zip(rows, ratings, strict=True)
    ]
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


def as_fitted(encoder: Encoder, probe: Probe) -> Encoder:
    """The encoder with the system message and template that the probe was fitted with, unless others are given."""
    facts = probe.provenance
    system = facts.get("system") if encoder.system is None else encoder.system
    return replace(encoder, template=encoder.template or facts.get("template"), system=system)
