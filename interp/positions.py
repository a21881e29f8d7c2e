"""POSITIONS: where in a conversation the residual stream is read, each a row of weights over its tokens.

"last" is one-hot, "mean" uniform over the completion. So capturing P positions of a layer is one
`[P, T] @ [T, d_model]` product inside the hook, whatever P is. Every row of weights sums to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from interp import InterpError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32

    from interp.chat import Encoded

#: A conversation's spans -> the half-open range of tokens that a position averages over uniformly.
Position = Callable[["Encoded"], tuple[int, int]]


def prompt_end(row: Encoded) -> tuple[int, int]:
    """The last token before the completion starts (E2)."""
    return row.start - 1, row.start


def tenth(k: int, row: Encoded) -> tuple[int, int]:
    """Tenth k of the completion, tokens floor((k-1)n/10) to max(that + 1, floor(kn/10)): never empty."""
    n = row.stop - row.start
    low = (k - 1) * n // 10
    return row.start + low, row.start + max(low + 1, k * n // 10)


def token(index: int, row: Encoded) -> tuple[int, int]:
    """Token `index` of the completion, counted from 0, negative from its end. IndexError if there is none."""
    n = row.stop - row.start
    if not -n <= index < n:
        raise IndexError(index)
    at = (row.start if index >= 0 else row.stop) + index
    return at, at + 1


def turn_end(row: Encoded) -> tuple[int, int]:
    """The template's end-of-turn token."""
    return row.turn_end, row.turn_end + 1


def end(row: Encoded) -> tuple[int, int]:
    """The last rendered token (the published study's position -1)."""
    return row.length - 1, row.length


def mean(row: Encoded) -> tuple[int, int]:
    """All tokens of the completion."""
    return row.start, row.stop


def resolve(name: str) -> Position:
    """The position of this name, or of an integer (`5`: sixth completion token, `-1`: last)."""
    if name in POSITIONS:
        return POSITIONS[name]
    try:
        return partial(token, int(name))
    except ValueError:
        raise InterpError(
            f"position {name!r} is unknown; choose from {', '.join(POSITIONS)}, an integer, or `all`"
        ) from None


def parse(text: str) -> tuple[str, ...]:
    """`all`, or names and integers separated by commas, checked; without repeats, in the order given."""
    names = tuple(POSITIONS) if text.strip() == "all" else tuple(dict.fromkeys(n.strip() for n in text.split(",")))
    for name in names:
        resolve(name)
    return names


def has(row: Encoded, names: Sequence[str]) -> bool:
    """Whether this row has every one of these positions (an integer may lie beyond its completion)."""
    try:
        for name in names:
            resolve(name)(row)
    except IndexError:
        return False
    return True


def weights(rows: Sequence[Encoded], names: Sequence[str], width: int) -> Float32[np.ndarray, "row position token"]:
    """Weights over `width` tokens for every row and position; each sums to 1, padding has weight 0."""
    import numpy as np

    out = np.zeros((len(rows), len(names), width), np.float32)
    chosen = [resolve(name) for name in names]
    for i, row in enumerate(rows):
        for j, position in enumerate(chosen):
            low, high = position(row)
            out[i, j, low:high] = 1.0 / (high - low)
    return out


POSITIONS: dict[str, Position] = {
    "prompt_end": prompt_end,
    "first": partial(token, 0),
    **{f"d{k}": partial(tenth, k) for k in range(1, 11)},
    "last": partial(token, -1),
    "turn_end": turn_end,
    "end": end,
    "mean": mean,
}
