"""Rated sets: what is read, what is refused and where, and what is done with the rows."""

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from interp import InterpError, data
from interp.sets.make import prompt_id

FIELDS = ("prompt", "completion", "score")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The Hub client's cache goes to the test's own folder, and its progress bars stay away."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def some_rows(prompts: int = 6, each: int = 4) -> list[dict]:
    """Rows whose ratings cover 1 to 10, several completions a prompt."""
    return [
        {
            "prompt": f"Question {p}?",
            "completion": f"Answer {p} {c}" + " word" * (c + 1),
            "score": 1 + (7 * p + 3 * c) % 10,
        }
        for p in range(prompts)
        for c in range(each)
    ]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_as(suffix: str, path, rows):
    """`rows` written to `path` in the format of `suffix`, by other code than the reader's."""
    if suffix == ".jsonl":
        return write_lines(path, rows)
    if suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def texts(rated) -> list[tuple]:
    return [tuple(row[name] for name in FIELDS) for row in rated.rows]


def failing(source, *expected: str, **options) -> None:
    """Loading fails with one line that holds every expected piece."""
    with pytest.raises(InterpError) as caught:
        data.load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(piece in message for piece in expected), message


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    """A set reads the same from each format: texts with commas, quotes and line breaks, order, scores."""
    rows = [*some_rows(), {"prompt": 'Say "a, b"\nand c', "completion": "x\r\ny, ü\u2028z", "score": 2.5}]
    rated = data.load(write_as(suffix, tmp_path / f"set{suffix}", rows))
    assert texts(rated) == [tuple(row[name] for name in FIELDS) for row in rows]
    assert isinstance(rated.rows, datasets.Dataset)
    assert list(rated.rows["prompt_id"]) == [prompt_id(row["prompt"]) for row in rows]
    assert rated.skipped == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), min_size=1),
            st.text(st.characters(codec="utf-8"), min_size=1),
            st.integers(1, 10),
        ).filter(lambda row: row[0].strip() and row[1].strip()),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_any_text_survives_json_lines(tmp_path_factory, rows, ascii_only):
    """Whatever text is written as JSON lines, escaped or not, is read back unchanged."""
    path = tmp_path_factory.mktemp("any") / "set.jsonl"
    lines = [json.dumps(dict(zip(FIELDS, row, strict=True)), ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("\n".join(lines).encode())
    assert texts(data.load(path, scale=(1, 10))) == [(p, c, float(s)) for p, c, s in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_bom_crlf_and_blank_lines_change_nothing(tmp_path, suffix):
    """A byte order mark, CRLF line ends and blank lines are as good as none of them."""
    plain = write_as(suffix, tmp_path / f"plain{suffix}", some_rows())
    lines = plain.read_text(encoding="utf-8").split("\n")
    other = tmp_path / f"other{suffix}"
    other.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(line.rstrip("\r") for line in lines).encode())
    assert data.load(other).fingerprint == data.load(plain).fingerprint


def test_lone_surrogates_are_replaced(tmp_path):
    """A lone surrogate escape becomes U+FFFD, also in nested values; a surrogate pair stays one character."""
    path = tmp_path / "set.jsonl"
    line = '{"prompt": "p \\ud83d\\ude00", "completion": "a\\uDC00b", "score": 3, "meta": {"k": ["\\ud800"]}}'
    path.write_text(line, encoding="utf-8")
    row = data.load(path).rows[0]
    assert (row["prompt"], row["completion"], row["meta"]) == ("p \U0001f600", "a\ufffdb", {"k": ["\ufffd"]})


def test_extra_columns_are_kept_even_of_mixed_type(tmp_path):
    """Other columns stay, absent values are None; a column without a common type becomes JSON text, noted."""
    rows = [row | {"topic": f"t{i}"} for i, row in enumerate(some_rows())]
    rows[0]["odd"], rows[1]["odd"] = {"a": 1}, "text"
    rated = data.load(write_lines(tmp_path / "set.jsonl", rows))
    assert list(rated.rows["topic"]) == [row["topic"] for row in rows]
    assert [json.loads(v) for v in rated.rows["odd"][:3]] == [{"a": 1}, "text", None]
    assert any("column odd" in note for note in rated.notes)


@pytest.mark.parametrize("where", [0, 5])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"completion": " \n"}, "empty completion"),
        ({"completion": None}, "empty completion"),
        ({"completion": 5}, "of type int"),
        ({"prompt": ""}, "empty prompt"),
        ({"score": float("nan")}, "score nan"),
        ({"score": float("inf")}, "inf"),
        ({"score": "N/A"}, "N/A"),
        ({"score": None}, "score None"),
        ({"score": "great"}, "great"),
        ({"score": True}, "True"),
        ({"score": [3]}, "[3]"),
        ({"score": 11}, "expected 1 to 10"),
        ({"score": 0.99}, "expected 1 to 10"),
    ],
)
def test_a_bad_row_names_its_line(tmp_path, where, change, expected):
    """An unusable text or score in a file is an error with file:line; without it the set loads."""
    rows = some_rows(2)
    path = write_lines(tmp_path / "set.jsonl", rows)
    assert len(data.load(path, scale=(1, 10))) == 8
    rows[where] |= change
    write_lines(path, rows)
    failing(path, f"set.jsonl:{where + 1}: ", expected, scale=(1, 10))


def test_a_bad_row_of_csv_and_parquet_is_named(tmp_path):
    """CSV errors name the line on which the row starts, after a completion of two lines; Parquet the row."""
    rows = [
        {"prompt": "p", "completion": "one\ntwo", "score": 3},
        {"prompt": "p", "completion": "x", "score": 77},
    ]
    failing(write_as(".csv", tmp_path / "set.csv", rows), "set.csv:4: score 77", scale=(1, 10))
    failing(write_as(".parquet", tmp_path / "set.parquet", rows), "set.parquet row 2: score 77", scale=(1, 10))
    failing(write_as(".json", tmp_path / "set.json", rows), "set.json row 2: score 77", scale=(1, 10))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"prompt": "p", "completion": "c", "score": 1}\n{"prompt": \n', ("a.jsonl:2", "JSON")),
        ("a.jsonl", b'\n\n[1, 2]\n', ("a.jsonl:3", "list", "object")),
        ("a.jsonl", b'{"prompt": "p"}\n{"prompt": "\xe9"}\n', ("a.jsonl:2", "UTF-8")),
        ("a.json", b'[{"prompt": "p"},\n {"prompt": }]', ("a.json:2", "JSON")),
        ("a.json", b"[1]", ("a.json row 1", "int")),
        ("a.jsonl", b"", ("a.jsonl", "no rows")),
        ("a.csv", b"prompt,completion,score\n", ("a.csv", "no rows")),
        ("a.csv", b"prompt,completion,score\na,b,3\na,b\n", ("a.csv:3", "2 fields", "expected 3")),
        ("a.csv", b'prompt,completion,score\na,b,3\na,"b,4\n\n', ("a.csv:3", "CSV")),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], ("a.jsonl.gz", "cannot be read")),
        ("a.jsonl.gz", b"plain", ("a.jsonl.gz", "cannot be read")),
        ("a.parquet", b"PAR1 no", ("a.parquet", "Parquet")),
        ("a.xlsx", b"", ("a.xlsx", ".csv", ".parquet")),
        ("a.jsonl", b'{"frage": "p", "score": 1}\n', ("a.jsonl", "prompt, completion", "frage", "--columns")),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(tmp_path, name, content, expected):
    """Malformed, empty, truncated and foreign files give one line with the place and what was expected."""
    (tmp_path / name).write_bytes(content)
    failing(tmp_path / name, *expected)


def test_a_source_that_is_not_there(tmp_path):
    """A missing file or an unknown name lists what could have been meant."""
    failing(tmp_path / "no.jsonl", "no.jsonl", "no such file", "pocketfeedback")
    failing("data/ratings.jsonl", "no such file")
    failing("ultrafedback", "ultrafedback", *data.DATASETS)


def test_a_very_long_csv_field_is_read(tmp_path):
    """A completion beyond the csv module's own limit of 131,072 characters is no error."""
    rows = [{"prompt": "p", "completion": "long " * 40_000, "score": 3}]
    assert texts(data.load(write_as(".csv", tmp_path / "set.csv", rows)))[0][1] == "long " * 40_000


# Columns and scales


def test_aliases_columns_and_nested_columns(tmp_path):
    """Usual names are recognised and noted; given and dotted ones win, and what they displace is noted."""
    rows = [
        {"Instruction": f"q{i}", "response": "r", "rating": i, "marks": {"overall": 5 - i}, "prompt2": "z"}
        for i in range(1, 5)
    ]
    path = write_lines(tmp_path / "set.jsonl", rows)
    guessed = data.load(path)
    assert texts(guessed) == [(f"q{i}", "r", i) for i in range(1, 5)]
    assert any("prompt = Instruction, completion = response, score = rating" in n for n in guessed.notes)
    named = data.load(path, columns={"prompt": "prompt2", "score": "marks.overall"})
    assert texts(named) == [("z", "r", 5 - i) for i in range(1, 5)]
    assert list(named.rows["rating"]) == [1, 2, 3, 4] and named.rows["marks"][0] == {"overall": 4}
    failing(path, "set.jsonl", "'absent'", "Instruction", "--columns", columns={"score": "absent"})
    shadowed = write_lines(tmp_path / "two.jsonl", [row | {"score": 1} for row in rows])
    both = data.load(shadowed, columns={"score": "rating"})
    assert list(both.scores) == [1, 2, 3, 4] and any("left out" in note for note in both.notes)


def test_messages_in_place_of_prompt_and_completion(tmp_path):
    """A conversation gives completion and prompt; the turns before are kept and all make the prompt's id."""
    user, other = {"role": "user", "content": "Hi"}, {"role": "user", "content": "Other"}
    system, done = {"role": "system", "content": "Be brief"}, {"role": "assistant", "content": "Hello"}
    chats = [[user, done], [system, user, done], [other, done, user, done]]
    path = write_lines(tmp_path / "set.jsonl", [{"messages": m, "score": 3, "answer": "gold"} for m in chats])
    rated = data.load(path)
    assert texts(rated) == [("Hi", "Hello", 3)] * 3
    assert list(rated.rows["messages"]) == [m[:-1] for m in chats]
    ids = rated.rows["prompt_id"]
    assert ids[0] == prompt_id("Hi") and len(set(ids)) == 3
    again = write_lines(tmp_path / "again.jsonl", list(rated.rows))
    assert data.load(again).fingerprint == rated.fingerprint
    trl = write_lines(tmp_path / "trl.jsonl", [{"prompt": m[:-1], "completion": m[-1:], "score": 3} for m in chats])
    assert data.load(trl).fingerprint == rated.fingerprint
    plain = data.load(write_lines(tmp_path / "plain.jsonl", [dict(zip(FIELDS, ("Hi", "Hello", 3), strict=True))]))
    assert "messages" not in plain.rows.column_names and plain.rows["prompt_id"][0] == ids[0]


@pytest.mark.parametrize(
    "messages",
    [
        "text",
        [],
        [{"role": "user"}],
        [{"role": "user", "content": "Hi"}],
        [{"role": "assistant", "content": "Hello"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}],
    ],
)
def test_malformed_messages_name_their_line(tmp_path, messages):
    """Turns without a user's, or not ending with the assistant's text, are an error with its line."""
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": good, "score": 3}, {"messages": messages, "score": 3}]
    failing(write_lines(tmp_path / "set.jsonl", rows), "set.jsonl:2: ")


def test_messages_and_completion_must_agree(tmp_path):
    """A completion beside a conversation that already ends with another answer is an error."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": chat, "completion": text, "score": 3} for text in ("Hello", "Bye")]
    assert texts(data.load(write_lines(tmp_path / "one.jsonl", rows[:1]))) == [("Hi", "Hello", 3)]
    failing(write_lines(tmp_path / "two.jsonl", rows), "two.jsonl:2: ", "differ")


@pytest.mark.parametrize(
    ("scores", "scale"),
    [
        ([1, 3, 5], (1, 5)),
        ([1, 5.5], (1, 10)),
        ([2, 10], (1, 10)),
        ([0, 0.4], (0, 1)),
        ([0, 1], (0, 1)),
        ([1, 1], (1, 5)),
        ([0, 2], (0, 2)),
        ([-3, 12], (-3, 12)),
    ],
)
def test_the_scale_is_guessed_and_said(tmp_path, scores, scale):
    """Without --scale the usual scale that holds all scores is taken, else their range, with a note."""
    rows = [{"prompt": "p", "completion": str(i), "score": s} for i, s in enumerate(scores)]
    path = write_lines(tmp_path / "set.jsonl", rows)
    rated = data.load(path)
    assert rated.scale == scale
    assert any(f"{scale[0]:g}:{scale[1]:g}" in note and "--scale" in note for note in rated.notes)
    wide = data.load(path, scale=(-5, 20))
    assert wide.scale == (-5, 20) and wide.notes == () and wide.fingerprint != rated.fingerprint


def test_one_score_outside_the_usual_scales_tells_no_scale(tmp_path):
    """Where every score is the same 50, a scale must be given."""
    path = write_lines(tmp_path / "set.jsonl", [{"prompt": "p", "completion": "c", "score": 50}])
    failing(path, "50", "--scale")
    assert data.load(path, scale=(0, 100)).labels().tolist() == [0]


def test_parse_columns_and_scale():
    """The texts of --columns and --scale become a mapping and a pair; other texts say what was expected."""
    assert data.parse_columns(" prompt=q, score=marks.overall ,") == {"prompt": "q", "score": "marks.overall"}
    assert data.parse_scale("-3:3.5") == (-3.0, 3.5)
    for text in ("prompt", "prompt=", "=q", "prompt=a,prompt=b", "promt=a"):
        with pytest.raises(InterpError, match="--columns"):
            data.parse_columns(text)
    for text in ("10", "1:2:3", "10:1", "1:1", "a:b", "nan:1", "1:inf", ""):
        with pytest.raises(InterpError, match="scale"):
            data.parse_scale(text)


@settings(max_examples=100, deadline=None)
@given(st.floats(-100, 100), st.floats(0.1, 100), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_and_ratings_are_inverse(low, width, shares):
    """Labels run linearly from -1 at the lowest to 1 at the highest rating, and rating() undoes them."""
    scores = [low + share * width for share in (0.0, *shares, 1.0)]
    rated = made(scores, scale=(low, low + width))
    assert np.allclose(rated.labels(), [2 * share - 1 for share in (0, *shares, 1)], atol=1e-9)
    assert np.allclose(rated.rating(rated.labels()), scores, atol=1e-9)


# Published sets: small copies of their schemas, read by the real load_dataset


def ultrafeedback_rows() -> list[dict]:
    """Two rows of openbmb/UltraFeedback's nesting: string ratings, "N/A", a wrong 10, a missing rating."""

    def completion(model, text, overall, *marks):
        names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
        annotations = {n: {"Rating": m, "Rationale": "because"} for n, m in zip(names, marks, strict=True)}
        annotations["helpfulness"] |= {"Rationale For Rating": "so", "Type": ["1"]}
        means = [float(m) for m in marks if m != "N/A"]
        return {
            "annotations": annotations,
            "critique": "fine",
            "custom_system_prompt": "Be honest.",
            "fine-grained_score": sum(means) / len(means) if means else 0.0,
            "model": model,
            "overall_score": overall,
            "principle": "honesty",
            "response": text,
        }

    first = [
        completion("a", "Good", 8.5, "5", "4", "5", "N/A"),
        completion("b", "Wrongly ten", 10.0, "1", "2", "1", "2"),
        completion("c", "Rightly ten", 10.0, "5", "5", "5", "5"),
        completion("d", "Unrated", None, "3", "3", "3", "3"),
    ]
    second = [
        completion("a", "", 7.0, "4", "4", "4", "4"),
        completion("b", "Poor", 2.0, "2", "1", "1", "2"),
        completion("c", "Off the scale", 85.0, "2", "1", "1", "2"),
        completion("d", "No aspects", 10.0, "N/A", "N/A", "N/A", "N/A"),
    ]
    shared = {"correct_answers": ["None"], "incorrect_answers": ["None"], "models": ["a", "b", "c", "d"]}
    return [
        {"source": "sharegpt", "instruction": "Explain tides", "completions": first, **shared},
        {"source": "flan", "instruction": "Name a prime", "completions": second, **shared},
    ]


def published(monkeypatch, tmp_path, name, rows, file, suffix=".parquet"):
    """Lets the named set be loaded from a folder of the published layout in place of the Hub."""
    folder = tmp_path / name
    (folder / "data").mkdir(parents=True)
    write_as(suffix, folder / "data" / f"{file}{suffix}", rows)
    monkeypatch.setitem(data.DATASETS, name, replace(data.DATASETS[name], hub=str(folder)))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_ultrafeedback_is_flattened_and_mended(monkeypatch, tmp_path, suffix):
    """Four completions a row become rows; gaps are counted; only the 10 that its aspects deny becomes 1."""
    published(monkeypatch, tmp_path, "ultrafeedback", ultrafeedback_rows(), "train", suffix)
    rated = data.load("ultrafeedback")
    assert [(r["model"], r["completion"], r["score"]) for r in rated.rows] == [
        ("a", "Good", 8.5),
        ("b", "Wrongly ten", 1.0),
        ("c", "Rightly ten", 10.0),
        ("b", "Poor", 2.0),
        ("d", "No aspects", 10.0),
    ]
    assert rated.skipped == {"no rating": 1, "empty completion": 1, "score out of scale": 1}
    assert rated.rows[0]["aspects"] == {
        "instruction_following": 5.0,
        "truthfulness": None,
        "honesty": 4.0,
        "helpfulness": 5.0,
    }
    assert rated.scale == (1, 10) and rated.groups.tolist() == [0, 0, 0, 1, 1]
    assert any("1 rows rated 10" in note and "set to 1" in note for note in rated.notes)
    kept = data.load("ultrafeedback", fix_labels=False)
    assert kept.scores.tolist() == [8.5, 10, 10, 2, 10] and data.label_check(kept) == [1]
    assert any("kept as published" in note for note in kept.notes)
    honest = data.load("ultrafeedback", columns={"score": "aspects.honesty"})
    assert honest.scores.tolist() == [4, 2, 5, 3, 1, 1] and honest.scale == (1, 5)
    failing("ultrafeedback", "score 85", scale=(1, 10))


def test_a_copy_of_a_published_set_is_recognised(tmp_path):
    """A file of UltraFeedback's columns is read like the set itself, and this is noted."""
    path = write_lines(tmp_path / "copy.jsonl", ultrafeedback_rows()[:1])
    rated = data.load(path)
    assert rated.scores.tolist() == [8.5, 1, 10] and rated.scale == (1, 10)
    assert any("read as rows of ultrafeedback" in note for note in rated.notes)
    broken = [{"instruction": "q", "completions": [{"text": "no response"}]}]
    failing(write_lines(tmp_path / "broken.jsonl", broken), "broken.jsonl:1", "schema")


def test_binarized_gives_both_sides(monkeypatch, tmp_path):
    """Each pair becomes a chosen and a rejected row, with their own scores, from split train_prefs."""

    def chat(text):
        return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]

    row = {"prompt": "Why?", "prompt_id": "feed" * 16, "chosen": chat("Yes"), "rejected": chat("No")}
    row |= {"messages": chat("Yes"), "score_chosen": 8.5, "score_rejected": 4.0}
    blank = row | {"rejected": chat("")}
    published(monkeypatch, tmp_path, "ultrafeedback-binarized", [row, blank], "train_prefs-00000-of-00001")
    rated = data.load("ultrafeedback-binarized")
    assert texts(rated) == [("Why?", "Yes", 8.5), ("Why?", "No", 4.0), ("Why?", "Yes", 8.5)]
    assert list(rated.rows["side"]) == ["chosen", "rejected", "chosen"]
    assert set(rated.rows["prompt_id"]) == {prompt_id("Why?")} and rated.skipped == {"empty completion": 1}
    assert data.duplicates(rated) == 1
    failing("ultrafeedback-binarized", "fix_labels", "aspects", fix_labels=True)


def test_helpsteer2_formula_and_turns(monkeypatch, tmp_path):
    """The score is the mean of three marks on 1 to 10, and a prompt of several turns becomes messages."""
    turns = "First\n<extra_id_1>Assistant\nReply\n\nmore\n<extra_id_1>User\nSecond"
    marks = (
        {"correctness": 4, "coherence": 4},
        {"correctness": 3, "coherence": 4},
        {"correctness": 0, "coherence": 0},
    )
    rows = [
        {"prompt": p, "response": "R", "helpfulness": h, **m, "complexity": 2, "verbosity": 1}
        for p, h, m in zip(("c#", turns, "c#"), (4, 2, 0), marks, strict=True)
    ]
    published(monkeypatch, tmp_path, "helpsteer2", rows, "train", ".jsonl")
    rated = data.load("helpsteer2")
    assert np.allclose(rated.scores, [10, 3 / 4 * 9 + 1, 1])
    assert rated.rows[1]["prompt"] == "Second"
    assert rated.rows[1]["messages"] == [
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "Reply\n\nmore"},
        {"role": "user", "content": "Second"},
    ]
    assert rated.rows["prompt_id"][0] == prompt_id("c#") and list(rated.rows["verbosity"]) == [1, 1, 1]


def test_no_network_names_the_embedded_set(monkeypatch):
    """A connection error for any Hub set ends in one line with the set's id and the way out."""
    asked = []

    def unreachable(name, **options):
        asked.append((name, options))
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    failing("owner/name", "owner/name", "Couldn't reach", "--data pocketfeedback", split="test")
    for name in ("ultrafeedback", "ultrafeedback-binarized", "helpsteer2"):
        failing(name, data.DATASETS[name].hub, "--data pocketfeedback")
        failing(data.DATASETS[name].hub, "--data pocketfeedback")
    assert asked[:2] == [("owner/name", {"split": "test"}), ("openbmb/UltraFeedback", {"split": "train"})]


def test_a_hub_id_goes_through_load_dataset(monkeypatch):
    """Any Hub set is read through load_dataset: a split is chosen and noted, empty texts are counted."""
    sets = {
        "test": datasets.Dataset.from_list([{"question": "t", "answer": "u", "rating": 5}]),
        "train": datasets.Dataset.from_list(
            [{"question": "a", "answer": text, "rating": 4} for text in ("x", " ", "y")]
        ),
    }
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: sets[split] if split else datasets.DatasetDict(sets)
    )
    rated = data.load("owner/name")
    assert texts(rated) == [("a", "x", 4), ("a", "y", 4)] and rated.skipped == {"empty completion": 1}
    assert any("split train of test, train" in note for note in rated.notes)
    assert texts(data.load("owner/name", split="test")) == [("t", "u", 5)]
    sets["train"] = datasets.Dataset.from_list([{"question": "a", "answer": "x", "rating": "N/A"}])
    failing("owner/name", "owner/name row 1", "N/A")


def test_a_local_folder(tmp_path):
    """A folder of save_to_disk and one of data files give the file's rows; splits are checked."""
    rows = some_rows()
    file = write_lines(tmp_path / "set.jsonl", rows)
    single, both, plain = tmp_path / "single", tmp_path / "both", tmp_path / "plain"
    stored = datasets.Dataset.from_list(rows)
    stored.save_to_disk(str(single))
    datasets.DatasetDict({"train": stored, "test": stored.select([0])}).save_to_disk(str(both))
    plain.mkdir()
    write_lines(plain / "train.jsonl", rows)
    for folder in (single, both, plain):
        assert data.load(folder).fingerprint == data.load(file).fingerprint
    assert len(data.load(both, split="test")) == 1
    failing(both, "'dev'", "train, test", split="dev")
    failing(single, "without splits", split="train")
    failing(file, "split", split="train")
    empty = tmp_path / "empty"
    empty.mkdir()
    failing(empty, "empty", "no dataset")


def test_the_shipped_set_goes_through_the_same_reader(monkeypatch, tmp_path):
    """pocketfeedback is JSON lines in the package, on 1 to 10; without it the error says what to do."""
    rows = [
        row | {"row": f"p{i}", "prompt_id": "stale", "topic": "cooking", "twin_of": None}
        for i, row in enumerate(some_rows())
    ]
    write_lines(tmp_path / "pocketfeedback.jsonl", rows)
    monkeypatch.setattr(data.resources, "files", lambda package: tmp_path)
    rated = data.load()
    assert rated.name == "pocketfeedback" and rated.scale == (1, 10) and rated.notes == ()
    assert list(rated.rows["row"]) == [row["row"] for row in rows]
    assert rated.rows["prompt_id"][0] == prompt_id(rows[0]["prompt"])
    failing("pocketfeedback", "split", split="train")
    (tmp_path / "pocketfeedback.jsonl").unlink()
    failing("pocketfeedback", "install")


@pytest.mark.parametrize("name", list(data.DATASETS))
def test_every_named_set_is_described(name):
    """Each entry of the registry says what it is and its licence, and a Hub set how it is read."""
    source = data.DATASETS[name]
    assert source.description and source.licence and source.scale[0] < source.scale[1]
    assert (source.hub is None) == (source.flatten is None) == (not source.schema)


def test_nothing_heavy_is_imported():
    """Importing the module, as --help does, loads neither torch nor datasets, pandas, SciPy or pyarrow."""
    heavy = ["torch", "datasets", "pandas", "scipy", "sklearn", "pyarrow"]
    code = f"import sys, interp.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What is done with the rows


def made(scores, prompts=None, scale=(1, 10), **columns) -> data.RatedSet:
    """A rated set of these scores, by default one prompt each."""
    prompts = [f"p{i}" for i in range(len(scores))] if prompts is None else prompts
    table = {
        "prompt_id": [prompt_id(p) for p in prompts],
        "prompt": list(prompts),
        "completion": [f"completion {i}" for i in range(len(scores))],
        "score": [float(s) for s in scores],
    }
    return data.RatedSet("made", datasets.Dataset.from_dict(table | columns), scale)


def test_a_rated_set_needs_its_columns_and_a_scale():
    """A set without a score column, or with its scale upside down, is refused."""
    rated = made([1, 2])
    with pytest.raises(InterpError, match="score"):
        replace(rated, rows=rated.rows.remove_columns("score"))
    with pytest.raises(InterpError, match="scale"):
        replace(rated, scale=(10, 1))


def test_fingerprint_tells_texts_scores_order_and_turns_apart():
    """Equal rows have equal fingerprints; another text, score, order, scale or earlier turn another."""
    rated = made([1, 2, 3])
    assert rated.fingerprint == made([1, 2, 3], extra=[1, 2, 3]).fingerprint

    def turns(text):
        return [[{"role": "system", "content": text}, {"role": "user", "content": "p"}]] * 3

    others = [
        made([1, 2, 4]),
        made([1, 2, 3], prompts=["p0", "p1", "other"]),
        made([1, 2, 3], scale=(1, 5)),
        rated.select([1, 0, 2]),
        rated.select([0, 1]),
        made([1, 2, 3], messages=turns("a")),
        made([1, 2, 3], messages=turns("b")),
    ]
    assert len({rated.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1


def test_rows_keeps_whole_prompts_in_file_order(tmp_path):
    """--rows takes whole prompts until the number is reached, others by another seed, in the file's order."""
    path = write_lines(tmp_path / "set.jsonl", some_rows(30, 3))
    everything = data.load(path)
    drawn = [data.load(path, rows=20, seed=seed) for seed in range(4)]
    for rated in drawn:
        assert len(rated) == 21 and set(Counter(rated.rows["prompt"]).values()) == {3}
        assert texts(rated) == [t for t in texts(everything) if t in set(texts(rated))]
        assert any("21 of 90 rows: 7 whole prompts" in note for note in rated.notes)
    assert len({rated.fingerprint for rated in drawn}) == 4
    assert data.load(path, rows=20, seed=1).fingerprint == drawn[1].fingerprint
    larger = data.load(path, rows=91)
    assert larger.fingerprint == everything.fingerprint and any("91 rows asked" in n for n in larger.notes)
    assert data.load(path, rows=90).notes == everything.notes
    failing(path, "--rows", rows=0)


def test_balance_has_equal_counts_of_rounded_ratings(tmp_path):
    """Every rating that occurs is drawn as often as the rarest; halves round up; absent ratings are noted."""
    scores = [1] * 7 + [2.5] * 4 + [3] * 3 + [4.4] * 9 + [6.5, 7.0, 7.49, 7.2]
    path = write_lines(
        tmp_path / "set.jsonl",
        [{"prompt": f"p{i}", "completion": "c", "score": s} for i, s in enumerate(scores)],
    )
    drawn = [data.load(path, balance=True, seed=seed) for seed in range(5)]
    for rated in drawn:
        assert Counter(np.floor(rated.scores + 0.5)) == {1: 4, 3: 4, 4: 4, 7: 4}
        assert any("no row is rated 2, 5, 6, 8, 9, 10" in note for note in rated.notes)
        assert [int(p[1:]) for p in rated.rows["prompt"]] == sorted(int(p[1:]) for p in rated.rows["prompt"])
    assert len({rated.fingerprint for rated in drawn}) > 1
    assert data.load(path, balance=True, seed=2).fingerprint == drawn[2].fingerprint
    assert len(data.load(path, balance=True, rows=9)) == 8


def test_winner_loser_matches_a_loop():
    """The labels are those of a loop over prompts, ties and single completions included."""
    rng = np.random.default_rng(0)
    prompts = [f"p{i}" for i in rng.integers(0, 30, 90)]
    rated = made(rng.integers(1, 6, 90), prompts)
    expected = []
    for i, prompt in enumerate(prompts):
        rivals = [rated.scores[j] for j, p in enumerate(prompts) if p == prompt and j != i]
        best = bool(rivals) and all(rated.scores[i] > r for r in rivals)
        worst = bool(rivals) and all(rated.scores[i] < r for r in rivals)
        expected.append(best - worst)
    labels = data.winner_loser(rated)
    assert labels.tolist() == expected and set(expected) == {-1, 0, 1}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=2, max_size=120), st.integers(2, 7), st.integers(0, 2**31))
def test_folds_never_share_a_prompt(groups, k, seed):
    """Each row has one fold, no prompt two, no fold is empty; sizes differ by one prompt's rows at most."""
    if len(set(groups)) < k:
        with pytest.raises(InterpError, match="folds"):
            data.folds(groups, k, seed)
        return
    fold = data.folds(np.array(groups), k, seed)
    assert fold.shape == (len(groups),)
    assert len(set(zip(groups, fold.tolist(), strict=True))) == len(set(groups))
    sizes = np.bincount(fold, minlength=k)
    assert len(sizes) == k and sizes.min() > 0
    assert sizes.max() - sizes.min() <= max(Counter(groups).values())
    assert np.array_equal(fold, data.folds(np.array(groups), k, seed))


def test_folds_differ_by_seed_and_take_any_labels():
    """Another seed deals the prompts otherwise, text labels serve as codes do, and one fold is refused."""
    groups = np.repeat(np.arange(50), 4)
    first, second = data.folds(groups, seed=0), data.folds(groups, seed=1)
    assert np.bincount(first).tolist() == np.bincount(second).tolist() == [40] * 5
    assert not np.array_equal(first, second)
    assert np.array_equal(first, data.folds([f"{g:02d}" for g in groups], seed=0))
    with pytest.raises(InterpError, match="folds"):
        data.folds(groups, k=1)


@pytest.mark.parametrize("seed", range(5))
def test_one_large_prompt_leaves_folds_even(seed):
    """A prompt of 12 rows fills a fold of its own when 48 single ones can make up the other four."""
    groups = [0] * 12 + list(range(1, 49))
    assert np.bincount(data.folds(np.array(groups), 5, seed)).tolist() == [12] * 5


def test_roles_depend_on_the_prompt_alone():
    """Roles are the same in any order and subset, of shares 40/40/20, and independent of `part`."""
    ids = [prompt_id(f"prompt {i}") for i in range(5000)]
    given_roles = data.roles(ids)
    assert np.array_equal(data.roles(ids[::-7]), given_roles[::-7])
    shares = {name: np.mean(given_roles == name) for name in ("dpo", "probe", "test")}
    # Four standard errors of a share of 5,000 draws.
    assert all(
        abs(shares[n] - s) < 4 * np.sqrt(s * (1 - s) / 5000) for n, s in (("dpo", 0.4), ("probe", 0.4), ("test", 0.2))
    )
    # Fixed for good: a change of the hash would let prompts that trained one run score another.
    fixed = data.roles([digit * 12 for digit in "0123456789"])
    assert " ".join(fixed) == "probe probe probe dpo probe dpo probe dpo probe test"
    from interp.sets.make import part

    sealed = np.array([part(i) == "sealed" for i in ids])
    assert abs(np.mean(given_roles[sealed] == "dpo") - np.mean(given_roles[~sealed] == "dpo")) < 0.06


def test_duplicates_ignore_case_and_white_space(tmp_path):
    """A repeated completion counts once for each repetition under its prompt, and not under another."""
    answers = [
        ("p", "Same text"),
        ("P ", "same  TEXT"),
        ("q", "Same text"),
        ("p", "other"),
        ("p", "same text\n"),
    ]
    rows = [{"prompt": p, "completion": c, "score": 3} for p, c in answers]
    assert data.duplicates(data.load(write_lines(tmp_path / "set.jsonl", rows))) == 2
    assert data.duplicates(made([1, 2, 3])) == 0


def test_summary_says_what_is_there(tmp_path):
    """Counts, histograms and moments equal those of plain loops, and the whole is JSON."""
    rows = [row | {"flaw": "none" if i % 3 else "vague", "part": "open"} for i, row in enumerate(some_rows(5, 3))]
    rows += [{"prompt": "Alone?", "completion": "Answer with flaw", "score": 9.5, "flaw": None, "part": "sealed"}]
    shown = data.summary(data.load(write_lines(tmp_path / "set.jsonl", rows)))
    scores, lengths = [r["score"] for r in rows], [len(r["completion"].split()) for r in rows]
    assert json.loads(json.dumps(shown)) == shown
    assert (shown["rows"], shown["prompts"], shown["completions_per_prompt"]) == (16, 6, {"1": 1, "3": 5})
    ratings = Counter(int(s + 0.5) for s in scores)
    assert shown["ratings"] == {str(r): ratings[r] for r in range(1, 11)}
    assert shown["score"]["mean"] == pytest.approx(np.mean(scores))
    assert shown["score"]["sd"] == pytest.approx(np.std(scores, ddof=1))
    means = [np.mean([r["score"] for r in rows if r["prompt"] == p]) for p in {r["prompt"] for r in rows}]
    assert shown["score"]["sd_prompt_means"] == pytest.approx(np.std(means, ddof=1))
    assert shown["words"] == {"min": 3, "q25": 4, "median": 5, "q75": 6, "max": 6}
    assert shown["characters"]["max"] == max(len(r["completion"]) for r in rows)
    assert shown["length_rating_spearman"] == pytest.approx(spearmanr(lengths, scores).statistic)
    assert shown["counts"] == {"flaw": {"None": 1, "none": 10, "vague": 5}, "part": {"open": 15, "sealed": 1}}
    assert shown["duplicates"] == 0 and shown["skipped"] == {} and shown["scale"] == [1, 10]


def test_summary_of_one_row_has_no_spread():
    """What one row cannot tell (spread, correlation) is None, never 0."""
    shown = data.summary(made([4]))
    assert shown["length_rating_spearman"] is None
    assert shown["score"] == {"mean": 4, "sd": None, "sd_prompt_means": None}
