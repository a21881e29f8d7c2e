"""The documentation is true: its commands parse and run, and it names every command, position and baseline."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import cli
from interp import console
from interp.baselines import BASELINES
from interp.data import DATASETS
from interp.positions import POSITIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:sh|console)\n(.*?)```", README, re.S)
LINES = [line.removeprefix("$ ") for block in BLOCKS for line in block.splitlines()]
COMMANDS = sorted({line.split("#")[0].strip() for line in LINES if re.match(r"python cli\.py ", line)})
#: What needs the network, or files of the reader's own, is parsed but not run here.
ELSEWHERE = re.compile(r"(Qwen|mistralai|ultrafeedback|helpsteer2|my_\w+|--device cuda)")


def test_the_readme_shows_commands():
    """The two commands of the contract are there."""
    assert "make probe" in README
    assert "make test" in README
    assert any("--layer all --position all" in c for c in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_readme_parses(line):
    """Its command and all its options exist."""
    words = shlex.split(line)[2:]
    group = typer.main.get_command(cli.app)
    name, command, rest = group.resolve_command(group.make_context("cli.py", words[:0] or ["data"]), words)
    command.make_context(name, rest)


@pytest.mark.parametrize("line", [c for c in COMMANDS if not ELSEWHERE.search(c)])
def test_every_command_of_the_readme_runs(line, embedded_home, monkeypatch, capsys):
    """Run on the embedded model; a probe run on a few rows, so that it takes seconds."""
    words = shlex.split(line)[2:]
    if words[0] == "probe":
        words += ["--rows", "40", "--figures", str(embedded_home / "figures")]
    if "--json" not in words:
        words.append("--json")
    monkeypatch.setattr(sys, "argv", ["cli.py", *words])
    monkeypatch.setenv("INTERP_WORKSPACE", str(embedded_home))
    status = console.run(cli.app)
    out = capsys.readouterr()
    assert status == 0, out.err
    assert json.loads(out.out)["command"] == words[0]


@pytest.mark.parametrize("name", [*POSITIONS, *BASELINES, *DATASETS])
def test_the_readme_names_every_registered_thing(name):
    """Positions, baselines and sets stand in its tables (tenths as d1 ... d10)."""
    shown = "d1" if re.fullmatch(r"d\d+", name) else name
    assert f"`{shown}`" in README


def test_every_command_has_help_and_stands_in_the_readme():
    """A command is documented in both places."""
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        assert command.help
        assert f"python cli.py {name}" in README


def test_links_lead_somewhere():
    """Local links and pictures of the README exist."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target


def test_the_example_runs(embedded_home):
    """examples/grid.py prints a finding and a steered logit."""
    environment = {**__import__("os").environ, "INTERP_WORKSPACE": str(embedded_home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "examples/grid.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "largest change of a logit" in done.stdout
