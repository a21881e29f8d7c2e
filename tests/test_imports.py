"""The house's imports run in one direction, and what `--help` needs stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Each module may import what stands before it. A new module takes its place here.
ORDER = (
    "interp",
    "interp.artifacts",
    "interp.stats",
    "interp.nulls",
    "interp.figures",
    "interp.sets.make",
    "interp.sources",
    "interp.columns",
    "interp.rated",
    "interp.data",
    "interp.positions",
    "interp.chat",
    "interp.hooked",
    "interp.models",
    "interp.capture",
    "interp.activations",
    "interp.ridge",
    "interp.crossval",
    "interp.baselines",
    "interp.probes",
    "interp.analyses.findings",
    "interp.analyses.grid",
    "interp.analyses.grid_plot",
    "interp.analyses.scoring",
    "interp.runs",
    "interp.console",
    "interp.views",
    "cli",
)
LEAVES = ("interp.artifacts", "interp.stats", "interp.figures")


def path_of(name: str) -> Path:
    path = ROOT / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(name: str) -> set[str]:
    """Our modules that `name` imports at run time, inside functions too; not those for type checking alone."""
    tree = ast.parse(path_of(name).read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in ORDER else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {module for module in found if module.split(".")[0] in ("interp", "cli")} - {name}


def test_every_module_has_its_place():
    """ORDER lists exactly the modules that there are."""
    files = [p for p in (ROOT / "interp").rglob("*.py") if p.name != "__init__.py"]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    assert names | {"interp", "cli"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_no_back_arrow(name):
    """A module imports only what stands before it."""
    late = {module for module in imports_of(name) if ORDER.index(module) > ORDER.index(name)}
    assert not late, f"{name} imports {late}"


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_know_no_result_types(name):
    """artifacts, stats and figures import nothing of ours but errors and each other."""
    assert imports_of(name) <= {"interp", *LEAVES}


@pytest.mark.parametrize("name", ["cli", "interp.data", "interp.positions", "interp.console", "interp.stats"])
def test_light_modules_do_not_load_torch(name):
    """What --help and the registries need imports neither torch nor transformers nor datasets."""
    code = f"import sys, {name}; print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_import_of_a_later_module_would_be_seen():
    """The check itself finds imports inside functions."""
    assert "interp.figures" in imports_of("interp.runs")
    assert "interp.chat" in imports_of("interp.models")
