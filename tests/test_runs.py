"""Finished runs are saved whole and read back; a command takes the probe that fits, and says where it is from."""

import os
from dataclasses import replace

import pytest
import tiny
import torch

from interp import InterpError, chat, data, runs
from interp.analyses import grid, scoring
from interp.analyses.grid import GridResult
from interp.probes import Probe


@pytest.fixture(scope="module")
def subject():
    """A tiny random Llama with a ChatML template."""
    tokenizer = tiny.tokenizer()
    return tiny.wrap(tiny.model("llama", tokenizer), tokenizer, "tiny")


def probe_of(subject, seed=0, **provenance) -> Probe:
    """A random probe that claims to be fitted on `subject`."""
    direction = torch.randn(subject.d_model, generator=torch.Generator().manual_seed(seed))
    known = {"model": subject.name, "model_fingerprint": subject.fingerprint, "dtype": "float32"}
    where = {"layer": 1, "position": "mean", "site": "resid", "hook_name": "blocks.1.hook_resid_pre"}
    fitted = {"estimator": "ridge", "penalty": 1.0, "projection_sd": 1.0, "residual_norm": 2.0}
    return Probe(direction, 0.1, scale=(1.0, 10.0), provenance={**known, **provenance}, **where, **fitted)


def saved(subject, folder, name, seed, age):
    """A run's folder with a probe, `age` seconds old."""
    result = GridResult(
        {"x": 1.5, "none": None}, {"prompt_id": ["a", "b"], "score": [1.0, 2.5]}, probe_of(subject, seed)
    )
    path = folder / "runs" / name
    runs.save_grid(result, path)
    stamp = os.path.getmtime(path / "probe.safetensors") - age
    os.utime(path / "probe.safetensors", (stamp, stamp))
    return path, result


def test_a_run_is_read_back_as_it_was_saved(subject, tmp_path):
    """Facts, table and probe survive; without a manifest there is no run."""
    path, result = saved(subject, tmp_path, "probe-a", 0, 0)
    again = runs.load_grid(path)
    assert again is not None
    assert (again.facts, again.rows) == (result.facts, result.rows)
    assert torch.equal(again.probe.direction, result.probe.direction)
    (path / "manifest.json").unlink()
    assert runs.load_grid(path) is None


def test_the_newest_probe_that_fits_is_taken(subject, tmp_path):
    """Newest first; a probe of other weights is passed over; a given one goes before all."""
    old, _ = saved(subject, tmp_path, "probe-old", 1, 500)
    new, _ = saved(subject, tmp_path, "probe-new", 2, 100)
    saved(replace(subject, fingerprint="weights:other"), tmp_path, "probe-other", 3, 0)
    assert runs.find_probe(subject, None, tmp_path)[1] == str(new / "probe.safetensors")
    found, where = runs.find_probe(subject, str(old), tmp_path)
    assert where == str(old / "probe.safetensors")
    assert torch.equal(found.direction, probe_of(subject, 1).direction)


def test_missing_and_foreign_probes_are_refused(subject, tmp_path):
    """One line each: no probe there, none fits, a file that is no probe."""
    with pytest.raises(InterpError, match="no probe at"):
        runs.find_probe(subject, str(tmp_path / "nothing"))
    with pytest.raises(InterpError, match="run `python cli"):
        runs.find_probe(subject, None, tmp_path)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a tensor file")
    with pytest.raises(InterpError, match=r"x\.safetensors"):
        runs.find_probe(subject, str(path))


def test_a_mismatch_between_probe_and_model_is_told(subject):
    """Nothing to say where all fits; the model, the dtype or the weights where they differ."""
    assert runs.mismatch(probe_of(subject), subject) == []
    assert "bfloat16" in runs.mismatch(probe_of(subject, dtype="bfloat16"), subject)[0]
    assert "other weights" in runs.mismatch(probe_of(subject, model_fingerprint="weights:x"), subject)[0]


def test_a_probe_brings_its_system_message_and_template(subject):
    """`score` renders as the probe was fitted, unless told otherwise."""
    encoder = chat.Encoder(subject.tokenizer)
    fitted = probe_of(subject, system="Be brief.", template="{{ messages[0]['content'] }}")
    assert scoring.as_fitted(encoder, fitted).system == "Be brief."
    assert scoring.as_fitted(encoder, fitted).template == "{{ messages[0]['content'] }}"
    assert scoring.as_fitted(replace(encoder, system="Mine."), fitted).system == "Mine."


def test_scoring_equals_the_probe_by_hand(subject):
    """The rating is the projection of the mean residual stream, mapped to the scale; a text too short is None."""
    encoder, probe = chat.Encoder(subject.tokenizer), replace(probe_of(subject), position="3")
    rows = [{"prompt": "Hi", "completion": "rain falls and cools the capital"}, {"prompt": "Hi", "completion": "a"}]
    found = scoring.compute(subject, encoder, probe, rows).facts["texts"]
    encoded = encoder.encode(chat.messages_of("Hi", rows[0]["completion"]))
    hidden = subject.model(torch.tensor([encoded.ids]), output_hidden_states=True).hidden_states[1][
        0, encoded.start + 3
    ]
    by_hand = (float(hidden @ probe.direction) + 0.1 + 1) / 2 * 9 + 1
    assert found[0]["rating"] == pytest.approx(by_hand, rel=1e-4)
    assert found[1]["rating"] is None


def test_the_shipped_probe_fits_the_embedded_model_and_the_shipped_set():
    """It is a probe of 576 dimensions for the pinned weights, fitted on the set as it is now."""
    from interp.models import EMBEDDED_SHA256

    probe = Probe.load(runs.SHIPPED)
    assert len(probe.direction) == 576
    assert probe.provenance["model_fingerprint"] == f"gguf:{EMBEDDED_SHA256[:32]}"
    assert probe.provenance["data_fingerprint"] == data.load().fingerprint
    assert runs.SHIPPED.stat().st_size < 10_000


@pytest.mark.slow
def test_the_shipped_probe_is_made_again(embedded):
    """Refitting its cell on the whole set gives the same direction (cosine above 0.9999) and the same ratings."""
    from interp import probes
    from interp.activations import record

    shipped, rated = Probe.load(runs.SHIPPED), data.load()
    kept, rows, _ = grid.encode(rated, chat.Encoder(embedded.tokenizer), grid.Settings(), 1024)
    found = record(embedded, rows, layers=[shipped.layer], positions=[shipped.position])
    choice = probes.Choice(None, shipped.layer, shipped.position, shipped.penalty)
    again = probes.refit(found, choice, kept.labels(), kept.scale, {})
    assert float(again.unit @ shipped.unit) > 0.9999
    x = found.cell(shipped.layer, shipped.position)
    assert torch.allclose(again.rating(x), shipped.rating(x), atol=0.01)
