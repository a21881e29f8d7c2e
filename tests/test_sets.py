"""The shipped set keeps its rules, and is what its own script makes of blueprint, writing and grades."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from interp import data
from interp.sets import make

ROWS = [
    json.loads(line)
    for line in (Path(make.__file__).parent / "pocketfeedback.jsonl").read_text(encoding="utf-8").splitlines()
]
SCORES = np.array([row["score"] for row in ROWS])
LENGTHS = np.array([len(row["completion"]) for row in ROWS])
PROMPTS = np.unique([row["prompt_id"] for row in ROWS], return_inverse=True)[1]


def within(values: np.ndarray) -> np.ndarray:
    return values - (np.bincount(PROMPTS, values) / np.bincount(PROMPTS))[PROMPTS]


def icc(ratings: np.ndarray) -> float:
    """ICC(2,1): two-way random effects, absolute agreement, single rater (Shrout & Fleiss 1979)."""
    n, k = ratings.shape
    rows, columns, grand = ratings.mean(1), ratings.mean(0), ratings.mean()
    between = k * ((rows - grand) ** 2).sum() / (n - 1)
    raters = n * ((columns - grand) ** 2).sum() / (k - 1)
    error = ((ratings - rows[:, None] - columns + grand) ** 2).sum() / ((n - 1) * (k - 1))
    return (between - error) / (between + (k - 1) * error + k * (raters - error) / n)


def test_every_prompt_has_four_completions_and_an_id_of_its_text():
    """240 prompts x 4, ids and parts recomputed from the text."""
    assert len(ROWS) == 960
    assert set(Counter(PROMPTS).values()) == {4}
    for row in ROWS:
        assert row["prompt_id"] == make.prompt_id(row["prompt"])
        assert row["part"] == make.part(row["prompt_id"])


def test_rows_follow_the_blueprint():
    """Topic, flaw, voice, band and twins are those that the seeded blueprint drew."""
    drawn = {f"{p['key']}-{s['slot']}": (p, s) for p in make.draw_blueprint() for s in p["slots"]}
    for row in ROWS:
        plan, slot = drawn[row["row"]]
        assert (row["topic"], row["flaw"], row["voice"]) == (plan["topic"], slot["flaw"], slot["voice"])
        low, high = slot["band"]
        assert low <= len(row["completion"].split()) <= high


def test_score_is_the_mean_of_two_raters_in_range():
    """score = mean of both overall grades; aspects within 1-5."""
    for row in ROWS:
        assert row["score"] == sum(row["ratings"]) / 2
        assert all(1 <= r <= 10 for r in row["ratings"])
        assert all(1 <= a <= 5 for a in row["aspects"].values())
        assert set(row["aspects"]) == set(make.ASPECTS)


def test_raters_agree():
    """ICC at least 0.6; shuffled, the same figure is near 0 (the check can fail)."""
    ratings = np.array([row["ratings"] for row in ROWS])
    assert icc(ratings) >= 0.6
    shuffled = np.column_stack([ratings[:, 0], np.random.default_rng(0).permutation(ratings[:, 1])])
    assert abs(icc(shuffled)) < 0.1


def test_length_says_nothing_about_the_rating():
    """Spearman of rating with characters at most .15 in absolute value, overall and within prompts."""
    assert abs(spearmanr(SCORES, LENGTHS).statistic) <= 0.15
    assert abs(spearmanr(within(SCORES), within(LENGTHS.astype(float))).statistic) <= 0.15


def test_prompts_differ_and_so_do_their_completions():
    """sd of prompt means at least 1.2; range of at least 3 within 70% of prompts."""
    means, ranges = [], []
    for prompt in range(240):
        own = SCORES[prompt == PROMPTS]
        means.append(own.mean())
        ranges.append(np.ptp(own))
    assert np.std(means) >= 1.2
    assert np.mean(np.array(ranges) >= 3) >= 0.7


@pytest.mark.parametrize(
    ("field", "values", "share"),
    [("flaw", ("none", *make.FLAWS), 0.04), ("topic", make.TOPICS, 15 / 240), ("voice", make.VOICES, 0.1)],
)
def test_every_kind_is_there_often_enough(field, values, share):
    """Flaws on at least 4% of the rows, topics on at least 15 prompts, four voices and more."""
    counts = Counter(row[field] for row in ROWS)
    assert set(counts) == set(values)
    assert min(counts.values()) >= share * len(ROWS)


def test_every_rating_is_used():
    """Each rounded rating on at least 3% of the rows."""
    counts = Counter(data.rounded(SCORES).tolist())
    assert min(counts[r] for r in range(1, 11)) >= 0.03 * len(ROWS)


def shingles(text: str, size: int) -> set[tuple[str, ...]]:
    words = make.words(text)
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_completions_share_no_phrases_across_prompts():
    """At most 1% share an 8-word run with a completion of another prompt."""
    owners = defaultdict(set)
    for i, row in enumerate(ROWS):
        for run in shingles(row["completion"], 8):
            owners[run].add(PROMPTS[i])
    shared = [any(len(owners[run]) > 1 for run in shingles(row["completion"], 8)) for row in ROWS]
    assert np.mean(shared) <= 0.01


def test_no_near_duplicates_but_the_declared_twins():
    """Jaccard of word 3-grams above 0.8 only between twins."""
    sets = [shingles(row["completion"], 3) for row in ROWS]
    twins = {frozenset((row["row"], row["twin_of"])) for row in ROWS if row["twin_of"]}
    for i in range(len(ROWS)):
        for j in range(i):
            union = len(sets[i] | sets[j])
            if union and len(sets[i] & sets[j]) > 0.8 * union:
                assert frozenset((ROWS[i]["row"], ROWS[j]["row"])) in twins


def test_openings_vary():
    """The commonest first three words open at most 2% of the rows."""
    starts = Counter(" ".join(make.words(row["completion"])[:3]) for row in ROWS)
    assert starts.most_common(1)[0][1] <= 0.02 * len(ROWS)


def test_twins_differ_in_a_few_words_and_say_where():
    """At least 60 pairs, half of each level; the same words but for at most four; flaw_at is where they part."""
    rows = {row["row"]: row for row in ROWS}
    twins = [row for row in ROWS if row["twin_of"]]
    assert len(twins) >= 60
    assert Counter(t["level"] for t in twins) == {"elementary": 33, "hard": 33}
    for twin in twins:
        other = rows[twin["twin_of"]]
        assert other["prompt_id"] == twin["prompt_id"]
        pairs = list(zip(other["completion"].split(), twin["completion"].split(), strict=True))
        assert 1 <= sum(a != b for a, b in pairs) <= 4
        at = twin["flaw_at"]
        assert other["completion"][:at] == twin["completion"][:at]
        assert other["completion"][at] != twin["completion"][at]


def test_flaws_point_into_their_text():
    """flaw_at is an offset in the completion exactly where there is a flaw."""
    for row in ROWS:
        assert (row["flaw"] == "none") == (row["flaw_at"] is None)
        if row["flaw_at"] is not None:
            assert 0 <= row["flaw_at"] < len(row["completion"])


def test_half_is_sealed_by_a_fixed_hash():
    """Between 40% and 60% of the prompts are sealed, and the hash is pinned."""
    sealed = len({row["prompt_id"] for row in ROWS if row["part"] == "sealed"})
    assert 0.4 * 240 <= sealed <= 0.6 * 240
    assert make.part("000000000000") == "sealed"


def test_check_of_form_finds_what_is_wrong():
    """A planted wrong band, a quote that is not there and a copied phrase are each reported."""
    sheet = [p for p in make.draw_blueprint() if p["hand"] == 0][:2]
    text = " ".join(f"word{i}" for i in range(9))
    written = [
        {
            "key": p["key"],
            "prompt": "q",
            "completions": [{"slot": s, "text": text, "flaw_quote": "absent"} for s in range(4)],
        }
        for p in sheet
    ]
    found = "\n".join(make.check_hand(written, sheet))
    for problem in ("9 words, band", "flaw_quote is not in the text", "shares 8 words", "starts like"):
        assert problem in found
