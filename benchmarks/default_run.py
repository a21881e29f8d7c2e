"""The default run as its user sees it: wall seconds and peak memory, from an empty workspace and again.

python benchmarks/default_run.py [--controls]
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = ("--help", "data --help", "probe --help", "score --help")


def run(arguments: list[str], workspace: str) -> tuple[float, str]:
    environment = {**os.environ, "INTERP_WORKSPACE": workspace}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "cli.py", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    return time.perf_counter() - began, done.stdout.decode()


def main() -> None:
    workspace = tempfile.mkdtemp()
    command = ["probe", "--layer", "all", "--position", "all", "--json", "--figures", f"{workspace}/figures"]
    try:
        cold, out = run(command, workspace)
        facts = json.loads(out)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"empty workspace: {cold:.0f} s, peak {peak:.2f} GiB; stages {facts['seconds']}")
        again, _ = run(command, workspace)
        print(f"results cached: {again:.1f} s")
        shutil.rmtree(facts["run_dir"])
        fit, out = run(command, workspace)
        print(f"activations cached: {fit:.0f} s; stages {json.loads(out)['seconds']}")
        if "--controls" in sys.argv:
            controls, _ = run([*command, "--controls"], workspace)
            print(f"--controls on top: {controls - fit:.0f} s more")
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    for arguments in COMMANDS:
        print(f"{arguments}: {min(run(arguments.split(), workspace)[0] for _ in range(5)):.2f} s")


if __name__ == "__main__":
    main()
