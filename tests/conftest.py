"""Set before everything else: threads that yield, shapes and types of `interp` checked while the tests run."""

from __future__ import annotations

import ast
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is imported: threads that spin while they wait are 20 times slower beside a busy neighbour.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test asks the network for a model; transformers and datasets read these when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType

    from interp.models import Subject


#: Modules whose annotations do not hold yet.
UNCHECKED = {"interp.rated", "interp.ridge", "interp.stats"}


class _Checks(ast.NodeTransformer):
    """Puts jaxtyping's decorator, with beartype behind it, on every function and class of a module.

    jaxtyping's own import hook passes over names that are imported for type checkers alone, silently, and here
    those are most of them (Tensor, Subject, ...): so such imports are done in earnest.
    """

    #: An int serves where a float is asked for (PEP 484's numeric tower), as for every type checker.
    CHECKER = "__import__('beartype').beartype(conf=__import__('beartype').BeartypeConf(is_pep484_tower=True))"
    DECORATOR = f"__import__('jaxtyping').jaxtyped(typechecker={CHECKER})"

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            return node
        # One at a time, and a circle of imports is no error: that name then goes unchecked.
        text = "try:\n    pass\nexcept ImportError:\n    pass"
        tries = [ast.parse(text).body[0] for _ in node.body]
        for attempt, statement in zip(tries, node.body, strict=True):
            attempt.body = [statement]  # type: ignore[attr-defined]
        return tries

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(ast.parse(self.DECORATOR, mode="eval").body)
        return node  # functions inside functions are made over and over: their caller is checked

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, ast.parse(self.DECORATOR, mode="eval").body)
        return node


class _CheckedLoader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """The instrumented module; never from or to the bytecode that other processes share."""
        tree = _Checks().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _CheckedFinder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "interp" or fullname in UNCHECKED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _CheckedLoader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _CheckedFinder())


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from a second thread, and the machine may be shared."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The embedded model in float32, for reading only: converted once (25 s) where no workspace holds it yet."""
    from interp import models

    root = Path(__file__).parents[1]
    places = [Path(p) for p in (os.environ.get("INTERP_TEST_WORKSPACE"), root / "workspace") if p]
    name = f"models/{models.EMBEDDED}-{models.EMBEDDED_SHA256[:12]}/model.safetensors"
    held = next((place for place in places if (place / name).is_file()), None)
    return models.load(device="cpu", dtype="float32", workspace_dir=held or tmp_path_factory.mktemp("workspace"))
