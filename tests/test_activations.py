"""record(): one pass over many conversations, on disk, resumable to the byte, read instead of run when it is there."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import InterpError, activations
from interp.activations import Activations, Recording, check_layers, make_plan, parse_layers, record
from interp.artifacts import load_json
from interp.capture import hook_name
from interp.chat import Encoded, Encoder
from interp.positions import POSITIONS

#: Relative, per cell; see test_capture.py.
CLOSE = 2e-5
#: Small, so that eleven conversations make several batches and shards.
BATCH = 128


@pytest.fixture(scope="module")
def rows():
    """Conversations with shared and unshared prompts, of 31 to 267 tokens."""
    return Encoder(tiny.tokenizer()).encode_all(tiny.conversations())[0]


@pytest.fixture(scope="module")
def subject():
    """A Llama of three layers."""
    return tiny.subject("llama")


@pytest.fixture(scope="module")
def recorded(subject, rows, tmp_path_factory):
    """One recording of everything, for reading."""
    return record(subject, rows, surprise=True, batch_tokens=BATCH, workspace_dir=tmp_path_factory.mktemp("read"))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative L2 difference over the last axis."""
    assert found.shape == expected.shape
    return float(((found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def everything(recording: Activations) -> torch.Tensor:
    """[layer, position, row, d_model]."""
    names, layers = recording.positions, recording.layers
    return torch.stack([torch.stack([cell for _, cell in recording.cells(layer, names)]) for layer in layers])


def expected_of(subject, rows, names) -> torch.Tensor:
    """The same by the plain model, row by row, position by position."""
    each = []
    for row in rows:
        states = tiny.hidden_states(subject, row.ids)
        each.append(torch.stack([tiny.pooled(states, row, name) for name in names], 1))
    return torch.stack(each, 2)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a recording."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def refuse(*_args, **_kwargs):
    """Stands in for a forward pass that must not happen."""
    raise AssertionError("a forward pass was run")


class TestValues:
    """What is recorded."""

    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "olmo2", "gpt2"])
    def test_matches_plain_transformers_and_a_loop(self, rows, architecture, workers, tmp_path):
        """Every layer, position and row, through several shards and batches, by one worker and two."""
        subject = tiny.subject(architecture)
        assert subject.n_layers == len(subject.blocks) == subject.model.config.num_hidden_layers
        assert subject.d_model == subject.model.get_input_embeddings().embedding_dim
        names = (*POSITIONS, "0", "-1")
        found = record(subject, rows, positions=names, batch_tokens=BATCH, workers=workers, workspace_dir=tmp_path)
        assert len(found.shards) > 2
        assert max(len(shard["batches"]) for shard in found.shards) > 1
        assert found.layers == tuple(range(subject.n_layers + 1))
        assert everything(found).dtype == torch.float32
        assert apart(everything(found), expected_of(subject, rows, names)) < CLOSE

    def test_order_of_rows_does_not_matter(self, subject, rows, recorded, tmp_path):
        """Another order of the same conversations gives the same values in that order."""
        order = [7, 0, 10, 3, 9, 1, 2, 8, 6, 5, 4]
        found = record(subject, [rows[i] for i in order], batch_tokens=BATCH, workspace_dir=tmp_path)
        assert apart(everything(found), everything(recorded)[:, :, order]) < CLOSE

    def test_batched_equals_one_by_one(self, subject, rows, recorded, tmp_path):
        """Each conversation alone in a recording of its own."""
        for i in (0, 1, 6):
            alone = record(subject, [rows[i]], workspace_dir=tmp_path)
            assert apart(everything(alone)[:, :, 0], everything(recorded)[:, :, i]) < CLOSE

    def test_surprise_matches_log_softmax(self, subject, rows, recorded):
        """Mean, minimum and last, of every row."""
        for row, found in zip(rows, recorded.surprise, strict=True):
            with torch.inference_mode():
                told = subject.model(torch.tensor([row.ids])).logits[0].log_softmax(-1).double().numpy()
            each = np.array([told[t - 1, row.ids[t]] for t in range(row.start, row.stop)])
            np.testing.assert_allclose(found, [each.mean(), each.min(), each[-1]], atol=1e-4)

    def test_tokens_match_the_cache_of_each_row(self, subject, rows, tmp_path):
        """Every layer and token, by the plain model and in TransformerLens' own cache."""
        found = record(subject, rows, positions="tokens", batch_tokens=BATCH, workspace_dir=tmp_path)
        assert found.positions == ("tokens",)
        for i, row in enumerate(rows):
            stored = torch.stack([found.tokens(layer, i) for layer in found.layers])
            assert apart(stored, tiny.hidden_states(subject, row.ids)) < CLOSE
        for i in (2, 7):
            _, cache = subject.run_with_cache(rows[i])
            expected = torch.stack([cache[found.hook_name(layer)][0] for layer in found.layers])
            assert apart(torch.stack([found.tokens(layer, i) for layer in found.layers]), expected) < CLOSE

    @pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_mid"])
    def test_sites_match_the_cache(self, subject, rows, site, tmp_path):
        """With the same positions, and the surprise from a pass of its own."""
        found = record(subject, rows, site=site, surprise=True, positions=("mean", "last"), workspace_dir=tmp_path)
        assert found.layers == (0, 1, 2)
        for i in (1, 5):
            _, cache = subject.run_with_cache(rows[i])
            states = torch.stack([cache[hook_name(site, layer, 3)][0] for layer in found.layers])
            expected = torch.stack([tiny.pooled(states, rows[i], name) for name in ("mean", "last")], 1)
            assert apart(everything(found)[:, :, i], expected) < CLOSE
        assert found.surprise.shape == (len(rows), 3)

    def test_bfloat16_is_stored_as_computed(self, rows, tmp_path):
        """Half the bytes; sums are still float32, so a cell is off by the model's rounding alone (some percent)."""
        subject = tiny.subject("llama")
        expected = expected_of(subject, rows, tuple(POSITIONS))
        subject.model.to(torch.bfloat16)
        found = everything(record(subject, rows, batch_tokens=BATCH, workspace_dir=tmp_path))
        assert found.dtype == torch.bfloat16
        assert CLOSE < apart(found, expected) < 0.1

    def test_running_states_are_recorded(self, rows, tmp_path):
        """A model with linear attention, from whole rows."""
        import transformers

        from interp.models import wrap

        tok = tiny.tokenizer()
        config = transformers.Lfm2Config(
            **tiny.WIDTH, num_hidden_layers=2, num_key_value_heads=2, vocab_size=len(tok), full_attn_idxs=[1]
        )
        torch.manual_seed(0)
        subject = wrap(transformers.Lfm2ForCausalLM(config), tok)
        found = record(subject, rows, positions=("mean", "end"), batch_tokens=BATCH, workspace_dir=tmp_path)
        assert apart(everything(found), expected_of(subject, rows, ("mean", "end"))) < CLOSE


class TestKey:
    """Asking twice reads; other settings are another recording."""

    def test_asking_twice_reads(self, subject, rows, recorded, monkeypatch):
        """Not one forward pass, and the same folder."""
        monkeypatch.setattr(Recording, "write", refuse)
        root = recorded.folder.parents[2]
        assert record(subject, rows, surprise=True, workspace_dir=root) == recorded
        with pytest.raises(AssertionError, match="forward pass"):
            record(subject, rows[1:], surprise=True, workspace_dir=root)

    def test_a_larger_recording_serves_a_smaller_request(self, subject, rows, recorded, monkeypatch):
        """Fewer layers or positions, or no surprise, are in it already."""
        monkeypatch.setattr(Recording, "write", refuse)
        root = recorded.folder.parents[2]
        for layers, positions in (([2], ("last", "mean")), (None, "mean"), ([0, 3], "all"), ([3, 0, 3], ("d1",))):
            assert record(subject, rows, layers=layers, positions=positions, workspace_dir=root) == recorded

    def test_a_smaller_recording_does_not_serve_a_larger_request(self, subject, rows, tmp_path):
        """A layer, a position or the surprise more is another folder; the first stays as it is."""
        small = record(subject, rows, layers=[1], positions=("mean",), workspace_dir=tmp_path)
        before = files(small.folder)
        more = [
            {"layers": [1, 2], "positions": ("mean",)},
            {"layers": [1], "positions": ("mean", "-1")},
            {"layers": [1], "positions": ("mean",), "surprise": True},
            {"layers": [1], "positions": "tokens"},
            {"layers": [1], "positions": ("mean",), "site": "mlp_out"},
        ]
        folders = [record(subject, rows, workspace_dir=tmp_path, **settings).folder for settings in more]
        assert len({small.folder, *folders}) == 6
        assert files(small.folder) == before

    def test_other_models_and_rows_are_other_recordings(self, subject, rows, tmp_path):
        """Weights, configuration, precision, rows and their order."""
        bfloat = tiny.subject("llama")
        bfloat.model.to(torch.bfloat16)
        moved = [Encoded(r.ids, r.start, r.stop - 1 if r.stop - r.start > 1 else r.stop, r.turn_end) for r in rows]
        asked = [
            (subject, rows),
            (tiny.subject("llama", seed=1), rows),
            (tiny.subject("llama", rms_norm_eps=1e-2), rows),
            (subject.random_weights(0), rows),
            (subject.random_weights(1), rows),
            (bfloat, rows),
            (subject, rows[:-1]),
            (subject, rows[::-1]),
            (subject, moved),
        ]
        options = {"layers": [1], "positions": ("last",), "workspace_dir": tmp_path}
        folders = [record(who, what, **options).folder for who, what in asked]
        assert len(set(folders)) == len(asked)
        assert record(tiny.subject("llama"), rows, **options).folder == folders[0]

    def test_manifest_says_what_is_there(self, recorded, subject, rows):
        """Format, key, model, settings and versions."""
        facts = load_json(recorded.folder / "manifest.json")
        assert facts["key"] == f"{recorded.folder.parent.name}/{recorded.folder.name}"
        assert facts["fingerprint"] == subject.fingerprint
        assert facts["dtype"] == "float32"
        assert facts["rows"] == len(rows)
        assert facts["versions"]["torch"] == torch.__version__
        assert sorted(i for shard in facts["shards"] for i in shard["rows"]) == list(range(len(rows)))


class TestResume:
    """Interrupted work is not lost and not changed."""

    SCRIPT = """
import sys, time
import tiny
from interp.activations import Recording, record
from interp.chat import Encoder

write = Recording.write
def slowly(self, shard, subject):
    write(self, shard, subject)
    print("written", flush=True)
    time.sleep(0.5)

Recording.write = slowly
subject = tiny.subject("llama")
rows = Encoder(tiny.tokenizer()).encode_all(tiny.conversations())[0]
record(subject, rows, surprise=True, batch_tokens=128, workers=2, workspace_dir=sys.argv[1])
"""

    def test_kill_and_resume_gives_identical_bytes(self, subject, rows, tmp_path, monkeypatch):
        """A process killed with -9 between and within shards, resumed here: every file as of an undisturbed run."""
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", self.SCRIPT, str(tmp_path / "killed")]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "written\n"
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        plan = next((tmp_path / "killed").rglob("plan.json"))
        done = sorted(plan.parent.glob("shard-*.safetensors"))
        assert 0 < len(done) < len(load_json(plan))
        assert not (plan.parent / "manifest.json").exists()
        times = [p.stat().st_mtime_ns for p in done]

        options = {"surprise": True, "batch_tokens": BATCH, "workers": 2}
        whole = record(subject, rows, workspace_dir=tmp_path / "whole", **options)
        # Another batch size now: the plan that was written first is the one that is followed.
        resumed = record(subject, rows, workspace_dir=tmp_path / "killed", **{**options, "batch_tokens": 9999})
        assert resumed.folder == plan.parent
        kept = {name: content for name, content in files(resumed.folder).items() if not name.startswith(".")}
        assert kept == files(whole.folder)
        assert [p.stat().st_mtime_ns for p in done] == times

    def test_workers_change_no_byte(self, subject, rows, tmp_path):
        """One, two or three jobs side by side."""
        made = [
            files(record(subject, rows, batch_tokens=BATCH, workers=n, workspace_dir=tmp_path / str(n)).folder)
            for n in (1, 2, 3)
        ]
        assert made[0] == made[1] == made[2]

    @pytest.mark.parametrize("error", [RuntimeError("something else"), KeyboardInterrupt()])
    def test_an_exception_leaves_what_was_written(self, subject, rows, tmp_path, monkeypatch, error):
        """No manifest, no half shard; the next call does only the rest."""
        write, count = Recording.write, []

        def failing(self, shard, who):
            count.append(shard["name"])
            if len(count) == 2:
                raise error
            write(self, shard, who)

        monkeypatch.setattr(Recording, "write", failing)
        options = {"batch_tokens": BATCH, "workers": 1, "workspace_dir": tmp_path}
        with pytest.raises(type(error)):
            record(subject, rows, **options)
        (plan,) = tmp_path.rglob("plan.json")
        written = set(files(plan.parent))
        assert {"plan.json", "shard-00000.safetensors"} <= written
        assert not {"manifest.json", "shard-00001.safetensors"} & written
        assert all(name == "plan.json" or re.fullmatch(r"shard-\d+\.safetensors", name) for name in written)
        again = record(subject, rows, **options)
        assert len(count) == 1 + len(again.shards)
        assert apart(everything(again), expected_of(subject, rows, again.positions)) < CLOSE

    def test_progress_counts_tokens(self, subject, rows, tmp_path):
        """Upwards to the total, on a resumed run as well."""
        seen = []
        options = {"batch_tokens": BATCH, "workers": 1, "workspace_dir": tmp_path}
        found = record(subject, rows, progress=lambda done, total: seen.append((done, total)), **options)
        total = sum(row.length for row in rows)
        assert [t for _, t in seen] == [total] * len(found.shards)
        assert [d for d, _ in seen] == sorted({d for d, _ in seen})
        assert seen[-1] == (total, total)
        (found.folder / "manifest.json").unlink()
        (found.folder / f"shard-{found.shards[-1]['name']}.safetensors").unlink()
        again = []
        record(subject, rows, progress=lambda done, total: again.append((done, total)), **options)
        assert again == seen


class TestMemory:
    """Bounded, and when it runs out: halve and go on."""

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
            RuntimeError("MPS backend out of memory"),
            MemoryError(),
        ],
        ids=["cuda", "cpu", "mps", "python"],
    )
    def test_halves_record_it_and_give_the_same_numbers(self, subject, rows, recorded, tmp_path, monkeypatch, error):
        """However deep: no shard above one row fits here. The plan on disk is the one that was carried out."""
        write, tried = Recording.write, []

        def small(self, shard, who):
            tried.append(shard["name"])
            if len(shard["rows"]) > 1:
                raise error
            write(self, shard, who)

        monkeypatch.setattr(Recording, "write", small)
        found = record(subject, rows, batch_tokens=BATCH, workers=2, workspace_dir=tmp_path)
        plan = load_json(found.folder / "plan.json")
        assert [len(shard["rows"]) for shard in plan] == [1] * len(rows)
        assert plan == list(found.shards)
        assert {p.name for p in found.folder.glob("shard-*")} == {f"shard-{s['name']}.safetensors" for s in plan}
        halved = [shard for shard in plan if len(shard["name"]) > 5]
        assert halved
        assert all(shard["batch_tokens"] == BATCH // 2 ** (len(shard["name"]) - 5) for shard in halved)
        assert apart(everything(found), everything(recorded)) < CLOSE
        # A resumed run goes by the halved plan.
        (found.folder / "manifest.json").unlink()
        (found.folder / f"shard-{plan[0]['name']}.safetensors").unlink()
        tried.clear()
        assert record(subject, rows, batch_tokens=BATCH, workspace_dir=tmp_path) == found
        assert tried == [plan[0]["name"]]

    def test_real_allocation_failure_is_recognised(self, subject, rows, tmp_path, monkeypatch):
        """What torch really raises when a processor's memory cannot hold a tensor."""
        write = Recording.write

        def huge(self, shard, who):
            if len(shard["rows"]) > 3:
                torch.empty(10**15)
            write(self, shard, who)

        monkeypatch.setattr(Recording, "write", huge)
        found = record(subject, rows, batch_tokens=4096, workers=1, workspace_dir=tmp_path)
        assert max(len(shard["rows"]) for shard in found.shards) <= 3

    def test_a_failed_attempt_lets_go_before_the_halves(self, subject, rows, tmp_path, monkeypatch):
        """Else its tensors stand in the way of the halves."""
        write, held = Recording.write, []

        def hungry(self, shard, who):
            gc.disable()
            assert not any(ref() is not None for ref in held)
            if len(shard["rows"]) > 2:
                big = torch.zeros(1000)
                held.append(weakref.ref(big))
                raise torch.OutOfMemoryError("with big in its frame")
            write(self, shard, who)

        monkeypatch.setattr(Recording, "write", hungry)
        try:
            record(subject, rows, batch_tokens=4096, workers=1, workspace_dir=tmp_path)
        finally:
            gc.enable()
        assert len(held) > 1

    def test_a_row_that_does_not_fit_alone(self, subject, rows, tmp_path, monkeypatch):
        """Then there is nothing left to halve."""

        def never(self, shard, who):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(Recording, "write", never)
        with pytest.raises(InterpError, match=r"row \d+ does not fit in memory: lower --max-length"):
            record(subject, rows, workspace_dir=tmp_path)

    @pytest.mark.parametrize(("positions", "limit"), [(tuple(POSITIONS), 40_000), ("tokens", 300_000)])
    def test_shards_are_bounded(self, subject, rows, tmp_path, monkeypatch, positions, limit):
        """Whatever the number of rows; beside the tensors a file has a header."""
        monkeypatch.setattr(activations, "SHARD_BYTES", limit)
        found = record(subject, rows, positions=positions, batch_tokens=10_000, workspace_dir=tmp_path)
        sizes = [p.stat().st_size for p in found.folder.glob("shard-*")]
        assert max(sizes) < limit + 2000
        assert len(sizes) > 1
        monkeypatch.setattr(activations, "SHARD_BYTES", 1 << 30)
        whole = record(subject, rows, positions=positions, batch_tokens=10_000, workspace_dir=tmp_path / "whole")
        assert len(whole.shards) == 1

    @settings(deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30)), min_size=1, max_size=40),
        st.integers(1, 120),
        st.integers(1, 12),
    )
    def test_plans_hold_every_row_once_within_the_budget(self, facts, batch_tokens, shard_rows):
        """Padded tokens of a forward call, rows of a shard; one prompt or completion may exceed what it must."""
        rows = [
            Encoded(
                (*([prompt] * (3 * prompt + 1)), *range(100, 100 + n)),
                3 * prompt + 1,
                3 * prompt + 1 + n,
                3 * prompt + n,
            )
            for prompt, n in facts
        ]
        plan = make_plan(rows, batch_tokens, shard_rows)
        assert sorted(i for shard in plan for i in shard["rows"]) == list(range(len(rows)))
        assert len({shard["name"] for shard in plan}) == len(plan)
        for shard in plan:
            assert len(shard["rows"]) <= shard_rows
            prompts = {rows[i].ids[: rows[i].start] for i in shard["rows"]}
            assert len(prompts) == 1 or len(prompts) * max(map(len, prompts)) <= batch_tokens
            assert sorted(i for batch in shard["batches"] for i in batch) == list(range(len(shard["rows"])))
            for batch in shard["batches"]:
                longest = max(rows[shard["rows"][i]].length - rows[shard["rows"][i]].start for i in batch)
                assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        longest_prompts = [max(rows[i].start for i in shard["rows"]) for shard in plan]
        assert longest_prompts == sorted(longest_prompts)


class TestErrors:
    """One line that says what was found and what to do."""

    @pytest.fixture
    def own(self, recorded, tmp_path):
        """A copy of the recording that may be damaged."""
        folder = tmp_path / "copy"
        shutil.copytree(recorded.folder, folder)
        return Activations.open(folder)

    @pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
    def test_damaged_shard_is_named(self, own, damage):
        """Whichever of the shards it is."""
        path = own.folder / f"shard-{own.shards[1]['name']}.safetensors"
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "missing":
            path.unlink()
        else:
            from safetensors.torch import save_file

            save_file({"weight": torch.ones(2)}, path)
        for read in (lambda: own.cell(1, "mean"), lambda: own.surprise):
            with pytest.raises(InterpError, match=re.escape(str(path))):
                read()

    @pytest.mark.parametrize("manifest", [None, "{", "{}", "[]", '{"site": "resid", "layers": 3}'])
    def test_damaged_manifest_is_named(self, own, manifest):
        """Missing, cut, or of something else."""
        path = own.folder / "manifest.json"
        path.unlink()
        if manifest is not None:
            path.write_text(manifest)
        with pytest.raises(InterpError, match=re.escape(str(path))):
            Activations.open(own.folder)

    def test_what_was_not_recorded_is_told(self, subject, rows, recorded, tmp_path):
        """Layers, positions, tokens and surprise: never another cell's values."""
        with pytest.raises(InterpError, match=r"layer 9 is not in .*it holds 0, 1, 2, 3"):
            recorded.cell(9, "mean")
        with pytest.raises(InterpError, match=r"position '5' is not in .*it holds prompt_end, first"):
            recorded.cell(1, "5")
        with pytest.raises(InterpError, match="holds no 'offsets'"):
            recorded.tokens(1, 0)
        found = record(subject, rows, layers=[1], positions="tokens", workspace_dir=tmp_path)
        for read in (lambda: found.cell(1, "tokens"), lambda: found.cell(1, "mean"), lambda: found.tokens(2, 0)):
            with pytest.raises(InterpError, match="it holds"):
                read()
        with pytest.raises(InterpError, match=f"row 99 is not in .*rows 0 to {len(rows) - 1}"):
            found.tokens(1, 99)
        with pytest.raises(InterpError, match="holds no 'surprise'"):
            _ = found.surprise

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            ({"layers": [4]}, "layer 4 does not exist: llama has layers 0 to 3 at resid"),
            ({"layers": [-1]}, "layer -1 does not exist"),
            ({"layers": [3], "site": "attn_out"}, "llama has layers 0 to 2 at attn_out"),
            ({"layers": []}, "no layer is asked for"),
            ({"positions": ("mean", "medain")}, "position 'medain' is unknown; choose from prompt_end"),
            ({"positions": "medain"}, "position 'medain' is unknown"),
            ({"positions": ()}, "choose from prompt_end"),
            ({"positions": ("7",)}, "too short for positions 7"),
            ({"site": "resid_post"}, "site 'resid_post' is unknown; choose from resid, resid_mid, attn_out, mlp_out"),
        ],
    )
    def test_bad_settings_leave_nothing_behind(self, subject, rows, tmp_path, wrong, told):
        """They are seen before anything is written."""
        with pytest.raises(InterpError, match=told):
            record(subject, rows, workspace_dir=tmp_path, **wrong)
        assert not list(tmp_path.rglob("*"))

    def test_no_rows(self, subject, tmp_path):
        """Every row was skipped, perhaps."""
        with pytest.raises(InterpError, match="there are no rows to record"):
            record(subject, [], workspace_dir=tmp_path)

    def test_a_damaged_recording_is_not_taken_for_none(self, subject, rows, tmp_path):
        """Its manifest is named, rather than gigabytes recorded again beside it."""
        found = record(subject, rows, layers=[0], positions=("mean",), workspace_dir=tmp_path)
        (found.folder / "manifest.json").write_text("{")
        with pytest.raises(InterpError, match=r"manifest\.json is no valid JSON"):
            record(subject, rows, layers=[0], positions=("mean",), workspace_dir=tmp_path)


class TestLayers:
    """`--layer`."""

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (" all ", None),
            ("last", (3,)),
            ("0", (0,)),
            ("2,0,2", (0, 2)),
            ("0,2-3", (0, 2, 3)),
            ("1-1", (1,)),
            ("0,last", (0, 3)),
        ],
    )
    def test_parse(self, subject, text, expected):
        """`all`, `last`, numbers and ranges."""
        assert parse_layers(text, subject) == expected

    @pytest.mark.parametrize("text", ["", "one", "1-", "-1", "3-1", "1,,2", "1.5", "all,1"])
    def test_parse_refuses(self, subject, text):
        """And tells what there is."""
        with pytest.raises(InterpError, match=r"--layer .* is not understood; use `all`, `last`, or 0 to 3"):
            parse_layers(text, subject)

    def test_parse_refuses_layers_that_are_not_there(self, subject):
        """The last of the stream is no layer of the other sites."""
        with pytest.raises(InterpError, match="layers 0 to 3 at resid"):
            parse_layers("2-4", subject)
        assert parse_layers("last", subject, "mlp_out") == (2,)
        with pytest.raises(InterpError, match="layers 0 to 2 at mlp_out"):
            parse_layers("3", subject, "mlp_out")

    def test_check(self, subject):
        """None is all; repeats are one."""
        assert check_layers(None, subject, "resid") == (0, 1, 2, 3)
        assert check_layers(None, subject, "attn_out") == (0, 1, 2)
        assert check_layers([3, 1, 3], subject, "resid") == (1, 3)


def test_recording_the_embedded_model(embedded, tmp_path):
    """Two real chat rows on the real model: every layer, three positions, against plain transformers."""
    from interp.chat import messages_of

    prompt = "Why is the sky blue? Answer in one sentence."
    said = ["Because air scatters short wavelengths more than long ones.", "It reflects the sea, I think 🙂."]
    rows, _, skipped = Encoder(embedded.tokenizer).encode_all(messages_of(prompt, text) for text in said)
    assert not skipped
    names = ("prompt_end", "mean", "end")
    found = record(embedded, rows, positions=names, workspace_dir=tmp_path)
    assert everything(found).shape == (31, 3, 2, 576)
    assert apart(everything(found), expected_of(embedded, rows, names)) < CLOSE
