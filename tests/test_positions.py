"""Positions: weights that sum to one over the tokens that a reader would point at."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from interp import InterpError, positions
from interp.capture import PositionSink
from interp.chat import Encoded, Encoder, messages_of
from interp.positions import POSITIONS, has, parse, resolve, tenth, weights

NAMED = ["prompt_end", "first", *(f"d{k}" for k in range(1, 11)), "last", "turn_end", "end", "mean"]


@st.composite
def rows(draw):
    """Any conversation: 1 to 30 tokens of prompt, 1 to 60 of completion, 0 to 4 after it."""
    start, n, after = draw(st.integers(1, 30)), draw(st.integers(1, 60)), draw(st.integers(0, 4))
    stop = start + n
    turn_end = draw(st.integers(stop, stop + after - 1)) if after else stop - 1
    return Encoded(tuple(range(stop + after)), start, stop, turn_end)


def pointed_at(name: str, row: Encoded) -> list[int]:
    """The tokens of a position, by DESIGN's words, in exact arithmetic and Python's own indexing."""
    inside = list(range(row.start, row.stop))
    n = len(inside)
    if name.startswith("d") and name != "end":
        k = int(name[1:])
        low = floor(Fraction(k - 1, 10) * n)
        return inside[low : max(low + 1, floor(Fraction(k, 10) * n))]
    whole = list(range(len(row.ids)))
    fixed = {
        "prompt_end": [row.start - 1],
        "first": inside[:1],
        "last": inside[-1:],
        "turn_end": [row.turn_end],
        "end": whole[-1:],
        "mean": inside,
    }
    return fixed[name] if name in fixed else [inside[int(name)]]


def by_hand(name: str, row: Encoded, width: int) -> np.ndarray:
    """Weights by a loop over tokens."""
    tokens = pointed_at(name, row)
    return np.array([1 / len(tokens) if t in tokens else 0.0 for t in range(width)])


def test_all_named_positions_are_there():
    """The registry is the contract of the command line, in the order of the grid's columns."""
    assert list(POSITIONS) == NAMED


@pytest.mark.parametrize("template", tiny.TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_chat_text_of_every_template_matches_a_loop(template, kind):
    """Completions of 1 to 40 words, in one padded batch: the weights, and what the tokens under them say."""
    tok = tiny.tokenizer(template, kind)
    words = (" ".join(tiny.CORPUS)).split()
    said = [" ".join(words[i : i + n]) for i, n in enumerate(range(1, 41))]
    encoded, _, skipped = Encoder(tok).encode_all(messages_of("Tell me.", text) for text in said)
    assert not skipped
    width = max(row.length for row in encoded) + 3
    names = (*POSITIONS, "0", "-1")
    found = weights(encoded, names, width)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    assert (found >= 0).all()
    for row, text, own in zip(encoded, said, found, strict=True):
        assert not own[:, row.length :].any()
        np.testing.assert_allclose(own, [by_hand(name, row, width) for name in names], rtol=1e-6)
        spoken = {name: tok.decode([row.ids[t] for t in own[i].nonzero()[0]]) for i, name in enumerate(names)}
        assert spoken["mean"].strip() == text
        assert spoken["turn_end"].strip() == tiny.END_OF_TURN[template]
        assert text.startswith(spoken["first"].strip())
        assert text.endswith(spoken["last"].strip())
        assert text.startswith(spoken["d1"].strip())
        assert text.endswith(spoken["d10"].strip())
        before = tok.decode(row.ids[: row.start])
        assert before.endswith(spoken["prompt_end"])
        assert tok.decode(row.ids).endswith(spoken["end"])


@given(st.lists(rows(), min_size=1, max_size=4), st.integers(0, 5))
def test_weights_of_any_row_match_a_loop(encoded, padding):
    """Whatever the spans; padding has weight zero."""
    width = max(row.length for row in encoded) + padding
    expected = [[by_hand(name, row, width) for name in POSITIONS] for row in encoded]
    found = weights(encoded, tuple(POSITIONS), width)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)


@given(rows())
def test_tenths_cover_the_completion(row):
    """From ten tokens up they cut it without hole or overlap; below, each is one token, and every token is in one."""
    ranges = [tenth(k, row) for k in range(1, 11)]
    tokens = [t for low, high in ranges for t in range(low, high)]
    inside = list(range(row.start, row.stop))
    assert sorted(set(tokens)) == inside
    assert tokens == sorted(tokens)
    assert len(tokens) == max(10, len(inside))
    # As even as whole tokens allow.
    assert max(high - low for low, high in ranges) - min(high - low for low, high in ranges) <= 1


@given(rows(), st.integers(-70, 70))
def test_integers_index_the_completion_as_python_does(row, index):
    """`5` is the sixth token, `-1` the last; beyond the completion there is an IndexError, and `has` says so."""
    inside = list(range(row.start, row.stop))
    try:
        expected = inside[index]
    except IndexError:
        assert not has(row, (str(index),))
        assert not has(row, ("mean", str(index)))
        with pytest.raises(IndexError):
            resolve(str(index))(row)
        return
    assert resolve(str(index))(row) == (expected, expected + 1)
    assert has(row, ("mean", str(index)))


@pytest.mark.parametrize("name", ["men", "", "d0", "d11", "1.5", "all", "mean last"])
def test_unknown_names_are_told_the_valid_ones(name):
    """All of them."""
    with pytest.raises(InterpError) as caught:
        resolve(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in POSITIONS)


def test_parse_reads_the_command_line():
    """`all`, or a list in the order given, without repeats."""
    assert parse("all") == parse(" all ") == tuple(NAMED)
    assert parse("last, mean,-1,5,last") == ("last", "mean", "-1", "5")
    for wrong in ("mean,medain", "", "mean,,last"):
        with pytest.raises(InterpError, match="choose from prompt_end"):
            parse(wrong)


@pytest.mark.parametrize("name", POSITIONS)
def test_every_position_meets_its_contract(name):
    """A half-open, non-empty range of the row's own tokens, for the shortest conversation there can be, too."""
    for row in (Encoded((7, 8), 1, 2, 1), Encoded(tuple(range(50)), 9, 40, 40)):
        low, high = POSITIONS[name](row)
        assert 0 <= low < high <= row.length


def test_shapes_are_checked_while_the_tests_run(monkeypatch):
    """The positive control of the whole suite's run-time checks: wrong shapes and types are caught, right ones pass."""
    row = Encoded((1, 2, 3), 1, 2, 2)
    sink = PositionSink([row], [0], ["last"], tiny.subject())
    with pytest.raises(TypeCheckError, match="sequence token d_model"):
        sink(0, torch.zeros(3, 32))
    with pytest.raises(TypeCheckError, match="width"):
        weights([row], ("last",), "3")
    assert weights([row], ("last",), 3).shape == (1, 1, 3)
    monkeypatch.setattr(np, "float32", np.float64)
    with pytest.raises(TypeCheckError, match="return value"):
        weights([row], ("last",), 3)
    assert positions.__loader__.__class__.__name__ == "CheckedLoader"
