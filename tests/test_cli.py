"""The command line as its users meet it: output, exit statuses, errors, speed of --help."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rated_files
import tiny

import cli
from interp import console, data, runs
from interp.probes import Probe

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)
ALL = {"command", "model", "data", "seed", "versions", "seconds", "run_dir", "figures", "assumptions"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model, a rated file and a place for a workspace."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = tiny.tokenizer()
    tiny.model("llama", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rated_files.write(folder / "set.jsonl")
    return folder


@pytest.fixture
def command(home, monkeypatch, capsys):
    """Run a command line in this process: (exit status, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cli.py", *map(str, words)])
        monkeypatch.setenv("INTERP_WORKSPACE", str(home / "workspace"))
        monkeypatch.setenv("COLUMNS", "120")
        status = console.run(cli.app)
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def probe_words(home, *more):
    base = (
        "probe",
        "--model",
        home / "model",
        "--data",
        home / "set.jsonl",
        "--scale",
        "1:10",
        "--figures",
        home / "figures",
    )
    return (*base, *more)


def test_probe_prints_a_table_a_sentence_and_paths(command, home):
    """The default form: what was found in words, and where it was written."""
    status, out, err = command(*probe_words(home, "--layer", "all", "--position", "last,mean"))
    assert status == 0, err
    assert "The rating can be read" in out
    assert "run dir" in out
    folder = next((home / "workspace" / "runs").iterdir())
    assert {p.name for p in folder.iterdir()} == {"result.json", "rows.parquet", "probe.safetensors", "manifest.json"}
    pictures = list((home / "figures").rglob("*.png"))
    assert len(pictures) >= 5
    assert all(p.with_suffix(".json").is_file() for p in pictures)
    assert "note: model" in err


def test_json_is_one_object_and_nothing_else(command, home):
    """--json: standard output parses; progress and notes are on standard error; the same object is saved."""
    status, out, _ = command(*probe_words(home, "--layer", "1-2", "--position", "mean", "--json"))
    assert status == 0
    facts = json.loads(out)
    assert set(facts) >= ALL
    assert facts["layers"] == [1, 2]
    saved = json.loads((Path(facts["run_dir"]) / "result.json").read_text())
    assert all(facts[k] == v for k, v in saved.items())
    assert all(Path(p).is_file() for p in facts["figures"])


def test_the_second_time_results_are_read(command, home):
    """The same command again reads the run; another seed makes another run."""
    words = probe_words(home, "--layer", "1", "--position", "mean", "--json")
    first = json.loads(command(*words)[1])
    _status, out, err = command(*words)
    assert "read from" in err
    assert json.loads(out) == first
    other = json.loads(command(*words, "--seed", "1")[1])
    assert other["run_dir"] != first["run_dir"]


@pytest.mark.parametrize(
    "option",
    [
        ("--rows", "60"),
        ("--balance",),
        ("--system", "You rate answers."),
        ("--max-length", "85"),
        ("--site", "mlp_out"),
        ("--dtype", "bfloat16"),
        ("--seed", "3"),
        ("--columns", "prompt=prompt,completion=prompt,score=score"),
        ("--scale", "0:20"),
        ("--controls",),
        ("--nested-null",),
        ("--template", "TEMPLATE"),
    ],
    ids=lambda option: option[0],
)
def test_options_change_the_result(command, home, option):
    """An option that changes nothing does not exist."""
    template = home / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}", encoding="utf-8")
    option = [str(template) if word == "TEMPLATE" else word for word in option]
    words = probe_words(home, "--layer", "1", "--position", "mean", "--json")
    base = json.loads(command(*words)[1])
    status, out, err = command(*words, *option)
    assert status == 0, err
    changed = json.loads(out)
    volatile = {"seconds", "run_dir", "figures", "assumptions"}
    assert {k: v for k, v in base.items() if k not in volatile} != {
        k: v for k, v in changed.items() if k not in volatile
    }


def test_batch_tokens_change_the_plan(command, home):
    """--batch-tokens makes other batches, and the same figures to rounding."""
    words = probe_words(home, "--layer", "2", "--position", "first", "--json")
    big = json.loads(command(*words, "--workspace", str(home / "big"), "--batch-tokens", "4000")[1])
    small = json.loads(command(*words, "--workspace", str(home / "small"), "--batch-tokens", "64")[1])
    plans = [json.loads(next((home / w / "activations").rglob("plan.json")).read_text()) for w in ("big", "small")]
    assert len(plans[0]) < len(plans[1])
    assert big["heldout"]["pearson"] == pytest.approx(small["heldout"]["pearson"], abs=1e-3)


def test_quiet_says_nothing_on_standard_error(command, home):
    """--quiet: no notes, no bars."""
    status, _, err = command(*probe_words(home, "--layer", "1", "--position", "mean", "--quiet"))
    assert (status, err) == (0, "")


def test_score_reads_the_newest_probe(command, home):
    """A text with the planted good word is rated above one with the bad word."""
    command(*probe_words(home, "--layer", "all", "--position", "mean"))
    texts = ("rain water Seine dog Seine swim Seine falls", "rain water think dog think swim think falls")
    words = [w for text in texts for w in ("--text", text)]
    status, out, err = command("score", "--model", home / "model", *words, "--prompt", "Question?", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert set(facts) >= ALL
    good, bad = (t["rating"] for t in facts["texts"])
    assert good > bad + 1
    assert "runs" in facts["probe"]


def test_score_takes_a_file_of_conversations_and_a_given_probe(command, home):
    """Rows without a score, and messages, are scored; a skipped row is null and counted."""
    path = home / "talk.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "rain Seine"}]
    long = {"messages": [turns[0], {"role": "assistant", "content": "rain " * 500}]}
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps(long) + "\n", encoding="utf-8")
    run = json.loads(command(*probe_words(home, "--layer", "2", "--position", "last", "--json"))[1])["run_dir"]
    status, out, err = command(
        "score", path, "--model", home / "model", "--probe", run, "--max-length", "200", "--json"
    )
    assert status == 0, err
    facts = json.loads(out)
    assert facts["layer"] == 2
    assert facts["texts"][0]["rating"] is not None
    assert facts["texts"][1]["rating"] is None
    assert sum(facts["skipped"].values()) == 1


def test_score_without_a_probe_says_what_to_do(command, home, tmp_path):
    """No probe fits this model yet: the error names the command."""
    status, _, err = command("score", "--model", home / "model", "--text", "x", "--workspace", tmp_path)
    assert status == 1
    assert "python cli.py probe --model" in err


def test_a_probe_of_another_width_is_refused(command, home, tmp_path):
    """The error names both widths."""
    import torch

    facts = {"layer": 1, "position": "mean", "site": "resid", "hook_name": "x", "scale": (1, 10), "estimator": "ridge"}
    path = Probe(torch.ones(7), 0.0, penalty=1.0, projection_sd=1.0, residual_norm=1.0, **facts).save(
        tmp_path / "p.safetensors"
    )
    status, _, err = command("score", "--model", home / "model", "--text", "x", "--probe", path)
    assert status == 1
    assert "7 wide" in err


def test_data_shows_the_shipped_set(command):
    """Counts in the table, and the same in JSON."""
    status, out, _ = command("data")
    assert status == 0
    assert "960" in out
    assert "needless_refusal" in out
    facts = json.loads(command("data", "--json")[1])
    assert set(facts) >= ALL
    assert (facts["rows"], facts["prompts"]) == (960, 240)


BAD = {
    "unknown layer": (("--layer", "99"), "layers 0 to 3"),
    "unknown position": (("--position", "middle"), "prompt_end"),
    "unknown site": (("--site", "nowhere"), "resid_mid"),
    "no such file": (("--data", "missing.jsonl"), "pocketfeedback"),
    "no such model": (("--model", "nothing"), "smollm2"),
    "unknown column": (("--columns", "score=stars"), "stars"),
    "scale": (("--scale", "ten"), "--scale"),
    "dtype": (("--dtype", "int4"), "bfloat16"),
    "too few prompts": (("--rows", "8"), "folds"),
    "template": (("--template", "no/such"), "--template"),
    "all too long": (("--max-length", "8"), "longer than 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, home, tmp_path, case, monkeypatch):
    """Exit 1, one line that starts `error:`, says what to do; no half-written artifact."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words, expected = BAD[case]
    status, _out, err = command(*probe_words(home, "--workspace", tmp_path / "w", *words))
    told = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 1
    assert len(told) == 1
    assert expected in told[0]
    assert "Traceback" not in err
    assert not list((tmp_path / "w").rglob("*.tmp"))
    assert not list((tmp_path / "w").rglob("runs/*"))


def test_wrong_usage_exits_2(command):
    """An unknown option, and a command that needs one of two inputs."""
    assert command("probe", "--nope")[0] == 2
    assert command("score")[0] == 2
    assert command("nonsense")[0] == 2


def test_debug_shows_the_traceback(command, home):
    """--debug raises instead of telling."""
    with pytest.raises(Exception, match="layer 99"):
        command(*probe_words(home, "--layer", "99", "--debug"))


def test_interrupt_exits_130(command, home, monkeypatch):
    """Ctrl-C is told in one line."""

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupt)
    status, _, err = command("data")
    assert status == 130
    assert err.startswith("error: interrupted")


def test_a_damaged_run_is_named(command, home):
    """A truncated result gives an error that names the file."""
    words = probe_words(home, "--layer", "0", "--position", "mean", "--json")
    folder = Path(json.loads(command(*words)[1])["run_dir"])
    (folder / "rows.parquet").write_bytes(b"PAR1")
    status, _, err = command(*words)
    assert status == 1
    assert "rows.parquet" in err


def test_run_folders_are_readable_and_unique():
    """Model and data by name, the key's first digits at the end."""
    path = runs.folder("probe", "Qwen/Qwen2.5-1.5B-Instruct", "a/b.jsonl.gz", "0123456789abcdef", "w")
    assert path == Path("w/runs/probe-Qwen2.5-1.5B-Instruct-b.jsonl.gz-01234567")


@pytest.mark.parametrize("words", [[], *[[name] for name in COMMANDS]], ids=lambda w: " ".join(w) or "top")
def test_help_is_there_and_fast(words):
    """Every command has help, in under half a second at best of three (the machine may be busy)."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "cli.py", *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - began)
        if times[-1] < 0.5:
            break
    assert "Usage" in done.stdout
    assert min(times) < 0.5
