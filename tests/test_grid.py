"""The whole probe experiment on a tiny model: planted and null ratings, the JSON contract, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import rated_files
import tiny

from interp import InterpError, chat, data, stats
from interp.analyses import findings, grid

POSITIONS = ("prompt_end", "last", "mean")
KEYS = {
    *("command", "model", "data", "seed", "versions", "seconds", "assumptions", "rows", "skipped", "prompts", "tokens"),
    *("layers", "positions", "site", "estimator", "best", "choices", "heldout", "baselines", "best_baseline"),
    *("added_value", "within_prompt_gain", "null", "grid"),
}
METRICS = ("pearson", "spearman", "mae", "rmse", "r2", "slope", "within_prompt_accuracy")


@pytest.fixture(scope="module")
def subject():
    """A tiny random Llama with a ChatML template."""
    tokenizer = tiny.tokenizer()
    return tiny.wrap(tiny.model("llama", tokenizer), tokenizer, "tiny")


@pytest.fixture(scope="module")
def settings():
    return grid.Settings(positions=POSITIONS, draws=99)


def run(subject, settings, tmp, **file):
    rated = data.load(rated_files.write(tmp / "set.jsonl", **file), scale=(1, 10))
    return grid.compute(subject, rated, chat.Encoder(subject.tokenizer), settings, workspace_dir=tmp)


@pytest.fixture(scope="module")
def planted(subject, settings, tmp_path_factory):
    """A run on ratings that a word decides."""
    return run(subject, settings, tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def null(subject, settings, tmp_path_factory):
    """A run on shuffled ratings."""
    return run(subject, settings, tmp_path_factory.mktemp("null"), planted=False)


def test_json_has_every_key_of_the_contract(planted):
    """The object serialises, and has the keys that others rely on."""
    facts = json.loads(json.dumps(planted.facts, allow_nan=False))
    assert set(facts) >= KEYS
    assert set(facts["heldout"]) >= {*METRICS, "pearson_ci", "within_prompt_accuracy_ci", "pairs", "fold_seed_spread"}
    assert set(facts["null"]) >= {"draws", "corrected_p", "nested_p", "nested_draws"}
    assert set(facts["seconds"]) >= {"encode", "record", "fit", "baselines", "null", "total"}
    assert np.shape(facts["grid"]["pearson"]) == (4, 3)
    for found in facts["baselines"].values():
        assert set(found) >= set(METRICS)
    assert [c["fold"] for c in facts["choices"]] == [0, 1, 2, 3, 4]
    assert set(facts["best"]) == {"layer", "position", "lambda"}


def test_a_planted_rating_is_found(planted):
    """High r, the smallest p there can be, and a sentence that says so."""
    held = planted.facts["heldout"]
    assert held["pearson"] > 0.7
    assert held["pearson_ci"][0] > 0.6
    assert planted.facts["null"]["corrected_p"] == pytest.approx(1 / 100)
    assert planted.facts["null"]["within_corrected_p"] == pytest.approx(1 / 100)
    assert abs(planted.facts["null"]["control_pearson"]) < 0.35


def test_shuffled_ratings_are_not(null):
    """Nothing is claimed where there is nothing."""
    assert null.facts["null"]["corrected_p"] > 0.01
    assert null.facts["finding"].startswith("No evidence")
    assert null.facts["heldout"]["pearson_ci"][0] < 0.1


def test_headline_is_the_table_s_own_figure(planted):
    """heldout.pearson follows from the saved table: predictions minus their fold's training mean."""
    frame = planted.to_frame()
    y, fold = frame["score"].to_numpy(), frame["fold"].to_numpy()
    centre = np.array([y[fold != f].mean() for f in fold])
    assert stats.pearson(y, frame["prediction"] - centre) == pytest.approx(
        planted.facts["heldout"]["pearson"], abs=1e-6
    )
    assert np.allclose(centre, frame["centre"])
    for name, found in planted.facts["baselines"].items():
        if found["pearson"] is not None:
            assert stats.pearson(y, frame[name] - centre) == pytest.approx(found["pearson"], abs=1e-6)


def test_the_prompt_s_end_knows_nothing_within_prompts(planted):
    """Before the completion starts all completions of a prompt look alike: within-prompt r does not exist there."""
    assert planted.facts["best"]["position"] != "prompt_end"
    at = planted.facts["positions"].index("prompt_end")
    assert max(row[at] or 0 for row in planted.facts["grid"]["pearson"]) < 0.4


def test_what_the_words_decide_the_probe_does_not_add(planted):
    """The rating is one word: TF-IDF reads it too, and added value is about nothing."""
    assert planted.facts["baselines"]["tfidf_words"]["pearson"] > 0.7
    assert planted.facts["added_value"]["pearson"] < 0.1


def test_refitted_probe_reads_the_ratings(planted, subject, tmp_path):
    """The saved direction, applied to the recorded activations, gives ratings in points."""
    frame = planted.to_frame()
    assert planted.probe.scale == (1.0, 10.0)
    assert planted.probe.layer == planted.facts["best"]["layer"]
    assert planted.probe.hook_name.startswith("blocks.")
    assert planted.probe.provenance["model_fingerprint"] == subject.fingerprint
    assert len(frame) == planted.facts["rows"]


def test_the_nested_null_and_the_controls_are_there_when_asked_for(subject, settings, tmp_path):
    """nested_p comes from the whole selection on permuted labels; controls from random weights."""
    asked = replace(settings, nested_draws=19, controls=True, draws=19)
    found = run(subject, asked, tmp_path).facts
    assert found["null"]["nested_p"] == pytest.approx(1 / 20)
    assert found["null"]["nested_draws"] == 19
    assert -1 <= found["controls"]["random_weights"]["pearson"] <= 1


def test_the_nested_null_is_large_on_shuffled_ratings(subject, settings, tmp_path):
    """The nested p of nothing is not small."""
    asked = replace(settings, nested_draws=19, draws=19)
    assert run(subject, asked, tmp_path, planted=False).facts["null"]["nested_p"] > 0.05


def test_one_completion_a_prompt_gives_null_not_zero(subject, settings, tmp_path):
    """Figures that need two completions of a prompt are null."""
    found = run(subject, settings, tmp_path, prompts=60, completions=1).facts
    assert found["heldout"]["within_prompt_accuracy"] is None
    assert found["heldout"]["pairs"] == 0
    assert found["null"]["within_corrected_p"] is None
    assert found["within_prompt_gain"]["accuracy"] is None


def test_rows_too_long_are_skipped_and_counted(subject, settings, tmp_path):
    """--max-length leaves rows out and says so."""
    lengths = run(subject, settings, tmp_path).facts
    cut = run(subject, replace(settings, max_length=lengths["tokens"] // lengths["rows"]), tmp_path).facts
    assert cut["rows"] < lengths["rows"]
    assert sum(cut["skipped"].values()) == lengths["rows"] - cut["rows"]


def test_a_position_that_a_row_lacks_skips_the_row(subject, settings, tmp_path):
    """An integer position beyond a completion's end leaves that row out."""
    path = rated_files.write(tmp_path / "set.jsonl")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "Short?", "completion": "No", "score": 2}) + "\n")
    rated = data.load(path, scale=(1, 10))
    found = grid.compute(
        subject, rated, chat.Encoder(subject.tokenizer), replace(settings, positions=("9",)), workspace_dir=tmp_path
    )
    assert found.facts["skipped"] == {"shorter than the position asked for": 1}


def test_other_sites_go_through_the_bridge(subject, settings, tmp_path):
    """attn_out has n_layers layers, and another probe than resid."""
    found = run(subject, replace(settings, site="attn_out"), tmp_path)
    assert found.facts["layers"] == [0, 1, 2]
    assert found.probe.hook_name.endswith("hook_attn_out")


def test_equal_ratings_are_refused(subject, settings, tmp_path):
    """There is nothing to predict."""
    path = tmp_path / "flat.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"q{i}", "completion": "a b c", "score": 5}) + "\n" for i in range(20))
    )
    with pytest.raises(InterpError, match="every rating"):
        grid.compute(
            subject, data.load(path, scale=(1, 10)), chat.Encoder(subject.tokenizer), settings, workspace_dir=tmp_path
        )


def test_settings_change_the_key(subject, settings, tmp_path):
    """Every setting, the model, the data and the encoding enter the content key."""
    rated = data.load(rated_files.write(tmp_path / "a.jsonl"), scale=(1, 10))
    other = data.load(rated_files.write(tmp_path / "b.jsonl", seed=1), scale=(1, 10))
    encoder = chat.Encoder(subject.tokenizer)
    changes = {"seed": 1, "draws": 5, "max_length": 64, "site": "mlp_out", "positions": ("last",), "layers": (1,)}
    changes |= {"controls": True, "nested_draws": 3}
    keys = [replace(settings, **{name: value}).key(subject, rated, encoder) for name, value in changes.items()]
    keys += [settings.key(subject, other, encoder), settings.key(subject, rated, replace(encoder, system="Be brief."))]
    keys += [settings.key(subject.random_weights(), rated, encoder), settings.key(subject, rated, encoder)]
    assert len(set(keys)) == len(keys)
    assert set(changes) == set(settings.__dataclass_fields__)


@pytest.mark.parametrize(
    ("pearson", "low", "p", "added", "start"),
    [
        (0.5, 0.4, 0.001, [0.02, 0.1], "The rating can be read"),
        (0.5, 0.4, 0.001, [-0.02, 0.1], "The rating can be read"),
        (0.5, 0.4, 0.5, [0.02, 0.1], "No evidence"),
        (0.1, -0.1, 0.001, [0.02, 0.1], "No evidence"),
    ],
)
def test_the_sentence_follows_the_figures(planted, pearson, low, p, added, start):
    """Claimed only with a small corrected p and an interval above 0; added value only when its interval is."""
    facts = {**planted.facts, "heldout": {**planted.facts["heldout"], "pearson": pearson, "pearson_ci": [low, 0.6]}}
    facts["null"] = {**planted.facts["null"], "corrected_p": p}
    facts["added_value"] = {"pearson": 0.05, "pearson_ci": added}
    sentence = findings.finding(facts)
    assert sentence.startswith(start)
    assert ("it adds +0.05" in sentence) == (start.startswith("The") and added[0] > 0)
