"""Run-time checks of `interp`'s annotations, shapes among them, for the tests alone.

jaxtyping's own import hook passes over names that are imported for type checkers only, silently, and in this
library those are most of them (Tensor, Subject, ...). This one does such imports in earnest.
"""

from __future__ import annotations

import ast
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import TYPE_CHECKING, Any

import numpy as np
from beartype import BeartypeConf, BeartypeHintOverrides, beartype
from jaxtyping import jaxtyped

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType

#: Modules whose annotations do not hold yet.
UNCHECKED = {"interp.rated", "interp.stats"}

#: numpy's integers and plain ints serve where an int or a float is asked for, as they do in the code.
NUMBERS = BeartypeHintOverrides({int: int | np.integer, float: float | int | np.integer | np.floating})
decorate = jaxtyped(typechecker=beartype(conf=BeartypeConf(hint_overrides=NUMBERS)))


class Checks(ast.NodeTransformer):
    """Puts `decorate` on every function and class of a module."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            return node
        # One at a time, and a circle of imports is no error: that name then goes unchecked.
        attempts = []
        for statement in node.body:
            (attempt,) = ast.parse("try:\n    pass\nexcept ImportError:\n    pass").body
            attempt.body = [statement]  # type: ignore[attr-defined]
            attempts.append(attempt)
        return attempts

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(self._decorator())
        return node  # not those inside it, which are made over and over

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, self._decorator())
        return node

    @staticmethod
    def _decorator() -> ast.expr:
        return ast.parse(f"__import__({__name__!r}).decorate", mode="eval").body


class CheckedLoader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """The instrumented module; never from or to the bytecode that other processes share."""
        tree = Checks().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class CheckedFinder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "interp" or fullname in UNCHECKED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = CheckedLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """From now on, modules of `interp` are checked as they are imported."""
    sys.meta_path.insert(0, CheckedFinder())
