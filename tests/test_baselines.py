"""Every baseline meets its contract, finds what is planted for it, and equals scikit-learn doing the same."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from interp import baselines, crossval, stats
from interp.baselines import BASELINES, LEARNED, Rows, surface_features
from interp.ridge import LAMBDAS

PROMPTS, EACH = 45, 4
GROUPS = np.repeat(np.arange(PROMPTS), EACH)
#: Folds of equal size, by prompt.
ASSIGNMENT = np.random.default_rng(0).permutation(PROMPTS)[GROUPS] % 5
WORDS = [a + b for a in ("ba", "do", "fi", "gu", "la", "me") for b in ("kel", "mor", "nit", "pas", "run", "sot", "tov")]

#: Single precision moves predictions by less than this (the labels' sd is .34).
ROUNDING = 3e-5

every = pytest.mark.parametrize("name", BASELINES)
learned = pytest.mark.parametrize("name", sorted(LEARNED))


def texts(seed, marks):
    """Prompts and completions of random words, `marks` put into random places of about half of them each."""
    rng = np.random.default_rng(seed)

    def text(count):
        words = list(rng.choice(WORDS, count))
        for mark in marks:
            if rng.random() < 0.5:
                words.insert(int(rng.integers(count)), mark(rng))
        return " ".join(words) + "."

    return [text(4) for _ in range(PROMPTS)], [text(int(n)) for n in rng.integers(3, 20, PROMPTS * EACH)]


#: Marks that one kind of baseline sees: a word, a punctuation mark, letters inside words that occur once each.
MARKS = (
    lambda rng: "kindly",
    lambda rng: "really!",
    lambda rng: "".join(rng.choice(list("abcdefghij"), 4)) + "zqx" + "".join(rng.choice(list("abcdefghij"), 4)),
)


@pytest.fixture
def rows():
    """Rows with random texts, embeddings and log-probabilities."""
    prompts, completions = texts(1, MARKS)
    rng = np.random.default_rng(2)
    vectors = torch.from_numpy(rng.normal(size=(len(GROUPS), 20))).bfloat16()
    return Rows([prompts[g] for g in GROUPS], completions, vectors, -rng.exponential(2, size=(len(GROUPS), 3)))


#: What each baseline is there to see.
PLANTED = {
    "log_length": lambda rows: [np.log(len(c)) for c in rows.completions],
    "surface": lambda rows: ["!" in c for c in rows.completions],
    "tfidf_prompt": lambda rows: ["kindly" in p for p in rows.prompts],
    "tfidf_words": lambda rows: ["kindly" in c for c in rows.completions],
    "tfidf_characters": lambda rows: ["zqx" in c for c in rows.completions],
    "embedding": lambda rows: rows.embedding.double().numpy() @ np.linspace(-1, 1, 20),
    "surprise": lambda rows: rows.surprise[:, 1] - rows.surprise[:, 2],
}


def labels(name, rows, seed=3):
    """The planted signal and half as much noise, in label units."""
    signal = np.array(PLANTED.get(name, PLANTED["log_length"])(rows), float)
    noise = np.random.default_rng(seed).normal(size=len(signal))
    return 0.2 + 0.3 * (signal - signal.mean()) / signal.std() + 0.15 * noise


def evaluate(name, rows, y, assignment):
    found = baselines.evaluate(name, rows, y, assignment)
    assert found is not None
    return found


def r_of(y, found):
    """Held-out r; NaN for predictions that are the training means."""
    return float(stats.pearson_columns(y, found.prediction - found.centre)[0])


@every
def test_each_baseline_meets_its_contract(name, rows):
    """Finite predictions, inner ones outside the own fold, training means as centre; the cache changes nothing."""
    y = labels(name, rows)
    found = evaluate(name, rows, y, ASSIGNMENT)
    assert found.prediction.shape == found.centre.shape == y.shape
    assert np.isfinite(found.prediction).all()
    np.testing.assert_allclose(found.centre, crossval.centre_of(y, ASSIGNMENT))
    np.testing.assert_array_equal(np.isnan(found.inner), np.arange(5)[:, None] == ASSIGNMENT)
    again = evaluate(name, rows, y, ASSIGNMENT)
    np.testing.assert_array_equal(again.prediction, found.prediction)
    other = (ASSIGNMENT + GROUPS) % 5
    fresh = Rows(rows.prompts, rows.completions, rows.embedding, rows.surprise)
    expected = evaluate(name, fresh, -y, other).prediction
    np.testing.assert_array_equal(evaluate(name, rows, -y, other).prediction, expected)


def test_every_baseline_but_the_constant_has_a_planted_signal():
    """A new baseline needs a line in PLANTED."""
    assert {*PLANTED, "constant"} == set(BASELINES)
    assert set(BASELINES) >= LEARNED


@pytest.mark.parametrize("name", PLANTED)
def test_each_baseline_finds_its_planted_signal_and_none_in_shuffled_labels(name, rows):
    """A high r on what it is there to see; about 0 over 8 shuffles of the same labels across prompts."""
    y = labels(name, rows)
    planted = r_of(y, evaluate(name, rows, y, ASSIGNMENT))
    assert planted > 0.5
    rng = np.random.default_rng(4)
    blocks = y.reshape(PROMPTS, EACH)
    shuffled = [rng.permuted(blocks[rng.permutation(PROMPTS)], axis=1).ravel() for _ in range(8)]
    found = [r_of(z, evaluate(name, rows, z, ASSIGNMENT)) for z in shuffled]
    assert abs(np.mean(found)) < 0.15
    assert max(found) < planted - 0.1


def test_the_constant_knows_nothing(rows):
    """Training means, no correlation, whatever the labels."""
    y = labels("log_length", rows)
    found = evaluate("constant", rows, y, ASSIGNMENT)
    np.testing.assert_array_equal(found.prediction, found.centre)
    assert np.isnan(r_of(y, found))


@every
def test_no_baseline_learns_from_held_out_labels(name, rows):
    """New labels in fold 3 leave its predictions and inner predictions as they were, and change the others'."""
    y = labels(name, rows)
    held = ASSIGNMENT == 3
    before = evaluate(name, rows, y, ASSIGNMENT)
    after = evaluate(name, rows, np.where(held, y[::-1] + 0.3, y), ASSIGNMENT)
    np.testing.assert_allclose(after.prediction[held], before.prediction[held], atol=ROUNDING)
    np.testing.assert_allclose(after.inner[3][~held], before.inner[3][~held], atol=ROUNDING)
    assert np.abs(after.prediction - before.prediction)[~held].max() > 0.01


def changed_texts(rows, where, change):
    """The rows with `change` made to the prompts and completions that `where` marks."""
    prompts, completions = (
        [change(t) if w else t for t, w in zip(part, where, strict=True)] for part in (rows.prompts, rows.completions)
    )
    return Rows(prompts, completions, rows.embedding, rows.surprise)


@learned
def test_words_of_held_out_texts_are_not_learned(name, rows):
    """New words in the texts of fold 3 do not exist for its predictions; the folds trained on them learn them."""
    y = labels(name, rows)
    held = ASSIGNMENT == 3
    before = evaluate(name, rows, y, ASSIGNMENT)
    longer = changed_texts(rows, held, lambda t: t + " ζηθ ικλ ζηθ")
    after = evaluate(name, longer, y, ASSIGNMENT)
    np.testing.assert_allclose(after.prediction[held], before.prediction[held], atol=ROUNDING)
    np.testing.assert_allclose(after.inner[3][~held], before.inner[3][~held], atol=ROUNDING)
    assert np.abs(after.prediction - before.prediction)[~held].max() > 1e-3


@learned
@pytest.mark.parametrize("kernel_rows", [5000, 10], ids=["kernel", "svd"])
def test_a_held_out_text_changes_its_own_prediction_only(name, rows, kernel_rows, monkeypatch):
    """Another text, one without a single known word too, changes that row's prediction and no other of its fold."""
    monkeypatch.setattr(baselines, "KERNEL_ROWS", kernel_rows)
    monkeypatch.setattr(baselines, "SVD_DIMENSIONS", 30)
    y = labels(name, rows)
    held = ASSIGNMENT == 3
    row = np.arange(len(y)) == np.flatnonzero(held)[5]
    before = evaluate(name, rows, y, ASSIGNMENT)
    for text in ("bakel bakel kindly domor", "ζηθ"):
        after = evaluate(name, changed_texts(rows, row, lambda _t, text=text: text), y, ASSIGNMENT)
        rest = held & ~row
        np.testing.assert_allclose(after.prediction[rest], before.prediction[rest], atol=ROUNDING)
        np.testing.assert_allclose(after.inner[3][~held], before.inner[3][~held], atol=ROUNDING)
        assert abs(after.prediction - before.prediction)[row].item() > 1e-3


OPTIONS = {
    "tfidf_prompt": {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"},
    "tfidf_words": {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"},
    "tfidf_characters": {"analyzer": "char_wb", "ngram_range": (2, 4)},
}


def by_sklearn(name, rows, y, reduce=None):
    """TF-IDF, ridge and a grid search fitted anew inside each outer fold, in float64."""
    prediction = np.empty(len(y))
    read = np.array(rows.prompts if name == "tfidf_prompt" else rows.completions)
    for a in range(5):
        train = ~np.equal(ASSIGNMENT, a)
        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, **OPTIONS[name]).fit(read[train])
        x = vectorizer.transform(read)
        x = reduce.fit(x[train]).transform(x) if reduce else x.toarray()
        x *= np.sqrt(baselines.KERNEL_SCALE)  # every text here has a known word, and so norm 1
        split = PredefinedSplit(ASSIGNMENT[train])
        search = GridSearchCV(Ridge(), {"alpha": list(LAMBDAS)}, cv=split, scoring="neg_mean_squared_error")
        prediction[~train] = search.fit(x[train], y[train]).predict(x[~train])
    return prediction


@learned
def test_tfidf_matches_sklearn(name, rows):
    """Kernel ridge on TF-IDF equals vectorizer + Ridge with an intercept, to 1e-4 of the labels' sd."""
    y = labels(name, rows)
    found = evaluate(name, rows, y, ASSIGNMENT)
    np.testing.assert_allclose(found.prediction, by_sklearn(name, rows, y), atol=1e-4 * y.std())


def test_many_rows_are_reduced_as_sklearn_does(rows, monkeypatch):
    """Above KERNEL_ROWS: truncated SVD fitted without the held-out fold, then ridge."""
    monkeypatch.setattr(baselines, "KERNEL_ROWS", 10)
    monkeypatch.setattr(baselines, "SVD_DIMENSIONS", 25)
    y = labels("tfidf_words", rows)
    found = evaluate("tfidf_words", rows, y, ASSIGNMENT)
    expected = by_sklearn("tfidf_words", rows, y, TruncatedSVD(25, random_state=0))
    np.testing.assert_allclose(found.prediction, expected, atol=1e-3 * y.std())


def test_the_reduction_of_few_words_loses_nothing(rows, monkeypatch):
    """With no more words than dimensions the large-set path gives what the kernel gives."""
    few = Rows(rows.prompts, [" ".join(c.split()[:3]) for c in rows.completions])
    y = labels("tfidf_words", rows)
    monkeypatch.setitem(baselines.WORDS, "ngram_range", (1, 1))
    kernel = evaluate("tfidf_words", few, y, ASSIGNMENT)
    few.cache.clear()
    monkeypatch.setattr(baselines, "KERNEL_ROWS", 10)
    reduced = evaluate("tfidf_words", few, y, ASSIGNMENT)
    np.testing.assert_allclose(reduced.prediction, kernel.prediction, atol=1e-4 * y.std())


def test_baselines_without_what_they_look_at_are_left_out():
    """No embedding and no log-probabilities: None, and the others answer."""
    rows = Rows(["a"] * 10, ["b"] * 10)
    assignment = np.arange(10) % 5
    missing = {name for name in BASELINES if baselines.evaluate(name, rows, np.arange(10.0), assignment) is None}
    assert missing == {"embedding", "surprise"}


ODD = ["", " ", "\n\n", "\x00", "😀", "！？", "a", "...", "```", "١٢٣", "ﷺ" * 50, "word " * 400, "\ud800"]


@every
def test_odd_and_empty_texts_are_finite(name):
    """Empty texts, control characters, emoji, lone surrogates: finite predictions from every baseline."""
    n = len(ODD) * 2
    rng = np.random.default_rng(5)
    rows = Rows(ODD * 2, list(reversed(ODD)) * 2, rng.normal(size=(n, 3)), rng.normal(size=(n, 3)))
    found = evaluate(name, rows, rng.normal(size=n), rng.permutation(n) % 5)
    assert np.isfinite(found.prediction).all()


@pytest.mark.parametrize("text", ["", "ok"])
def test_texts_that_are_all_the_same_predict_nothing(text):
    """Every baseline of the text falls back to training means, and no r is made out of rounding."""
    n = 40
    rng = np.random.default_rng(6)
    rows, y = Rows([text] * n, [text] * n), rng.normal(size=n)
    for name in set(BASELINES) - {"embedding", "surprise"}:
        found = evaluate(name, rows, y, np.arange(n) % 5)
        np.testing.assert_array_equal(found.prediction, found.centre, err_msg=name)


def test_a_prompt_baseline_orders_nothing_within_a_prompt(rows):
    """Its predictions tie for the completions of a prompt: accuracy exactly one half, no r within prompts."""
    y = 10 * labels("tfidf_prompt", rows)
    found = evaluate("tfidf_prompt", rows, y, ASSIGNMENT)
    figures = stats.metrics(y, found.prediction, GROUPS, found.centre, draws=20)
    assert figures["within_prompt_accuracy"] == 0.5
    assert figures["pairs"]
    assert figures["within"] is None
    assert r_of(y, found) > 0.3


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_surface_features_are_finite_for_any_text(text):
    """Always the same number of finite values, lengths and shares never negative."""
    found = surface_features(text)
    assert len(found) == len(surface_features("A plain text."))
    assert np.isfinite(found).all()
    assert min(found) >= 0


def test_surface_features_count_what_they_say():
    """A text whose surface is known by hand."""
    text = "# Title\n- I can't do **that**, sorry!\n- You may `try` 12 (or 3)?\n```x```\nDone."
    found = surface_features(text)
    n = 14  # Title I can't do that sorry You may try 12 or 3 x Done
    assert found[:3] == pytest.approx([np.log1p(len(text)), np.log1p(n), np.log1p(5)])
    assert found[3] == pytest.approx(n / 3)
    assert found[6:9] == [2, 1, pytest.approx(8 / len(text))]
    assert found[10] == 1
    assert found[11] == pytest.approx(3 / len(text))
    assert found[14:16] == pytest.approx([1 / len(text)] * 2)
    assert found[19:21] == pytest.approx([2 / n, 1 / n])
    assert found[21:23] == pytest.approx([1 / n, 1 / n])
    assert found[23] == 1
