"""Artifacts: whole or not there, named by what they hold, and readable without running anybody's code."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interp import InterpError, artifacts
from interp.artifacts import (
    atomic,
    atomic_folder,
    content_key,
    digest_files,
    load_json,
    load_tensors,
    open_tensors,
    save_json,
    save_tensors,
    versions,
    workspace,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def names(folder: Path) -> list[str]:
    """Every name in a folder, hidden ones too."""
    return sorted(os.listdir(folder))


class TestContentKey:
    """Equal facts, equal key: on every machine and in every version."""

    def test_value_is_pinned(self):
        """A key that changes orphans every recording on every disk."""
        assert content_key(model="m", layers=[0, 1], nested={"b": 1.5, "a": None}) == "45db492a4ff4ea64"

    def test_order_and_tuples_do_not_matter(self):
        """What is equal as JSON is equal."""
        assert content_key(a=1, b=(1, 2)) == content_key(b=[1, 2], a=1)

    @given(JSON, JSON)
    def test_differs_exactly_when_the_json_differs(self, one, other):
        """The oracle is json itself."""
        same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
        assert (content_key(x=one) == content_key(x=other)) is same

    def test_format_is_part_of_it(self, monkeypatch):
        """Raising FORMAT leaves every older folder aside."""
        before = content_key(a=1)
        monkeypatch.setattr(artifacts, "FORMAT", artifacts.FORMAT + 1)
        assert content_key(a=1) != before

    def test_what_is_no_json_is_refused(self):
        """A key from a repr would change with the address of an object."""
        with pytest.raises(TypeError):
            content_key(a=object())


class TestAtomic:
    """A reader sees the old file, or the whole new one."""

    def test_replaces_when_the_block_ends(self, tmp_path):
        """The positive control: without an exception the file is there, alone, in a folder made for it."""
        path = tmp_path / "new" / "file"
        with atomic(path) as temporary:
            temporary.write_text("new")
            assert not path.exists()
        assert path.read_text() == "new"
        assert names(path.parent) == ["file"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_exception_leaves_the_old_file_and_nothing_else(self, tmp_path, error):
        """Also when the user interrupts."""
        path = tmp_path / "file"
        path.write_text("old")

        def write():
            with atomic(path) as temporary:
                temporary.write_text("half")
                raise error

        with pytest.raises(error):
            write()
        assert path.read_text() == "old"
        assert names(tmp_path) == ["file"]

    def test_folder_appears_whole(self, tmp_path):
        """It replaces what was there under the name, files and all."""
        path = tmp_path / "deep" / "folder"
        path.mkdir(parents=True)
        (path / "stale").write_text("of an older run")
        with atomic_folder(path) as temporary:
            (temporary / "file").write_text("new")
            assert names(path) == ["stale"]
        assert names(path) == ["file"]
        assert names(path.parent) == ["folder"]

    def test_folder_exception_leaves_the_old_one(self, tmp_path):
        """As for a file."""
        path = tmp_path / "folder"
        path.mkdir()
        (path / "file").write_text("old")

        def write():
            with atomic_folder(path) as temporary:
                (temporary / "file").write_text("half")
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write()
        assert (path / "file").read_text() == "old"
        assert names(tmp_path) == ["folder"]

    def test_files_are_as_readable_as_any(self, tmp_path):
        """Temporary files are private; a shared workspace needs the modes that the umask gives."""
        plain = tmp_path / "plain"
        plain.write_text("")
        saved = save_json(tmp_path / "saved.json", {})
        with atomic_folder(tmp_path / "folder") as temporary:
            save_json(temporary / "sub" / "saved.json", {})
            private = temporary / "private"
            private.touch(mode=0o600)
        made = [saved, tmp_path / "folder" / "sub" / "saved.json", tmp_path / "folder" / "private"]
        assert {p.stat().st_mode for p in made} == {plain.stat().st_mode}

    def test_umask_is_left_alone(self, tmp_path, monkeypatch):
        """Shards are written by several threads, and reading the umask means setting it, for the whole process."""

        def refuse(mask: int) -> int:
            raise AssertionError(f"umask set to {mask}")

        monkeypatch.setattr(os, "umask", refuse)
        save_json(tmp_path / "x.json", {})
        with atomic_folder(tmp_path / "folder"):
            pass


class TestJson:
    """Facts: every value that JSON has, and nothing else."""

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(value=JSON)
    def test_round_trip(self, tmp_path, value):
        """What is loaded is what was saved."""
        assert load_json(save_json(tmp_path / "x.json", value)) == value

    def test_lone_surrogates_survive(self, tmp_path):
        """Half an emoji in somebody's data must not end a run when its result is saved."""
        value = {"text \ud83d": ["\udfff", "é🙂"]}
        path = save_json(tmp_path / "x.json", value)
        assert load_json(path) == value
        assert "é🙂" in path.read_text(encoding="utf-8")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
    def test_what_json_has_not_is_refused(self, tmp_path, value):
        """A missing figure is null; the file that was there stays."""
        path = save_json(tmp_path / "x.json", {"r": None})
        with pytest.raises((ValueError, TypeError)):
            save_json(path, {"r": value})
        assert load_json(path) == {"r": None}
        assert names(tmp_path) == ["x.json"]

    @pytest.mark.parametrize("damage", [b"", b'{"a": 1', b"\xff\xfe{}", b"not json"])
    def test_damaged_file_is_named(self, tmp_path, damage):
        """And told what to do with it."""
        path = tmp_path / "x.json"
        path.write_bytes(damage)
        with pytest.raises(InterpError, match=f"{re.escape(str(path))} is no valid JSON.*delete it and run again"):
            load_json(path)

    def test_missing_file_is_named(self, tmp_path):
        """With what makes it again."""
        with pytest.raises(InterpError, match=r"gone\.json is missing: run the command"):
            load_json(tmp_path / "gone.json")


class TestTensors:
    """safetensors: exact, whole, and from nobody's pickle."""

    def test_round_trip(self, tmp_path):
        """Types, values, shapes and facts; also views that are not contiguous."""
        made = torch.arange(12.0).reshape(3, 4)
        tensors = {"t": made.T, "half": made.to(torch.bfloat16), "one": torch.tensor(3), "none": torch.empty(0, 2)}
        loaded, facts = load_tensors(save_tensors(tmp_path / "x.safetensors", tensors, {"b": [1, None], "a": "é"}))
        assert facts == {"b": [1, None], "a": "é"}
        assert loaded.keys() == tensors.keys()
        assert all(loaded[k].dtype == v.dtype and torch.equal(loaded[k], v) for k, v in tensors.items())

    def test_facts_are_optional(self, tmp_path):
        """Anybody's safetensors file can be read."""
        assert load_tensors(save_tensors(tmp_path / "x.safetensors", {"t": torch.ones(2)}))[1] == {}

    def test_same_tensors_same_bytes(self, tmp_path):
        """A file's bytes do not depend on the order in which its facts were put together."""
        one = save_tensors(tmp_path / "1", {"t": torch.ones(2)}, {"a": 1, "b": 2})
        other = save_tensors(tmp_path / "2", {"t": torch.ones(2)}, {"b": 2, "a": 1})
        assert one.read_bytes() == other.read_bytes()

    @pytest.mark.parametrize("keep", [0, 5, 40, -1])
    def test_truncated_file_is_named(self, tmp_path, keep):
        """Wherever it was cut: nothing, the header's length, the header, the last byte."""
        path = save_tensors(tmp_path / "x.safetensors", {"t": torch.ones(64)})
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(InterpError, match=r"x\.safetensors is truncated or no safetensors file.*run again"):
            load_tensors(path)

    def test_foreign_and_missing_files_are_named(self, tmp_path):
        """A file without what is needed is another file under this name."""
        path = save_tensors(tmp_path / "x.safetensors", {"t": torch.ones(2)})
        with open_tensors(path, needs="t") as opened:
            assert torch.equal(opened.get_tensor("t"), torch.ones(2))
        with pytest.raises(InterpError, match=r"x\.safetensors holds no 'layer\.3'"), open_tensors(path, "layer.3"):
            pass
        with (
            pytest.raises(InterpError, match=r"gone\.safetensors is missing"),
            open_tensors(tmp_path / "gone.safetensors"),
        ):
            pass

    def test_failed_save_leaves_the_old_file(self, tmp_path):
        """A tensor that cannot be stored leaves no half-written file."""
        path = save_tensors(tmp_path / "x.safetensors", {"t": torch.ones(2)})
        before = path.read_bytes()
        shared = torch.ones(4)
        with pytest.raises(RuntimeError):
            save_tensors(path, {"a": shared, "b": shared})
        assert path.read_bytes() == before
        assert names(tmp_path) == ["x.safetensors"]


class TestDigests:
    """A digest of many gigabytes is taken once, and again whenever it may have changed."""

    @pytest.fixture
    def files(self, tmp_path):
        """Two files of a model."""
        for name in ("b.bin", "a.bin"):
            (tmp_path / name).write_bytes(name.encode() * 100)
        return [tmp_path / "b.bin", tmp_path / "a.bin"]

    def test_matches_hashlib(self, files, tmp_path):
        """By hand: name and sha256 of each file, in order of name."""
        lines = "".join(f"{p.name}:{hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in sorted(files))
        expected = hashlib.sha256(lines.encode()).hexdigest()
        assert digest_files(files, tmp_path / "cache" / "digests.json") == expected
        assert digest_files(reversed(files), tmp_path / "cache" / "digests.json") == expected

    def test_unchanged_files_are_not_read_again(self, files, tmp_path, monkeypatch):
        """The second time is free."""
        cache = tmp_path / "digests.json"
        first = digest_files(files, cache)

        def refuse(*_args):
            raise AssertionError("a file was read")

        monkeypatch.setattr(hashlib, "file_digest", refuse)
        assert digest_files(files, cache) == first
        with pytest.raises(AssertionError, match="was read"):
            digest_files(files, tmp_path / "another.json")

    @pytest.mark.parametrize("change", ["size", "time"])
    def test_size_and_time_each_invalidate(self, files, tmp_path, change):
        """A file rewritten with the same length is seen by its time, one with its time restored by its size."""
        cache = tmp_path / "digests.json"
        first = digest_files(files, cache)
        stat = files[0].stat()
        content = files[0].read_bytes()
        files[0].write_bytes(content + b"x" if change == "size" else b"x" + content[1:])
        time = stat.st_mtime_ns + (change == "time")
        os.utime(files[0], ns=(time, time))
        changed = digest_files(files, cache)
        assert changed != first
        assert changed == digest_files(files, tmp_path / "fresh.json")

    def test_name_is_part_of_it(self, files, tmp_path):
        """Two shards that change places make another model."""
        first = digest_files(files, tmp_path / "digests.json")
        a, b = (p.read_bytes() for p in files)
        files[0].write_bytes(b)
        files[1].write_bytes(a)
        assert digest_files(files, tmp_path / "fresh.json") != first

    def test_damaged_cache_is_made_again(self, files, tmp_path):
        """It holds nothing that cannot be had from the files."""
        cache = tmp_path / "digests.json"
        cache.write_text("{")
        first = digest_files(files, cache)
        assert first == digest_files(files, tmp_path / "fresh.json")
        assert len(load_json(cache)) == 2


def test_workspace_is_argument_then_variable_then_default(monkeypatch, tmp_path):
    """In this order."""
    monkeypatch.setenv("INTERP_WORKSPACE", str(tmp_path))
    assert workspace("x") == Path("x")
    assert workspace() == tmp_path
    monkeypatch.delenv("INTERP_WORKSPACE")
    assert workspace() == Path("workspace")


def test_versions_name_the_libraries():
    """As the interpreter has them."""
    assert versions()["torch"] == torch.__version__
    assert all(versions().values())
