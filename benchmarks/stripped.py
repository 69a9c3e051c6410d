"""A model's network without its hook points: what its forward pass would cost if nobody could look inside.

The family's module and the components are imported a second time from sources in which `self.hook_x(value)` reads
`value`, `self.hook_x.listeners` reads `()` and no hook point is made; the copy then takes over the weights.
"""

import ast
import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hooked_vla.spec import ModelSpec

_PACKAGES = ("hooked_vla.components", "hooked_vla.models")


class WithoutHooks(ast.NodeTransformer):
    """Takes hook points out of a module's syntax tree."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return ast.copy_location(ast.Pass(), node) if _is_hook(node.targets[0]) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        return self.visit(node.args[0]) if _is_hook(node.func) else self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "listeners" and _is_hook(node.value):
            return ast.copy_location(ast.Tuple([], ast.Load()), node)
        return self.generic_visit(node)


def _is_hook(node: ast.AST) -> bool:
    """Whether the node is `self.hook_...`."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
        return False
    return node.value.id == "self" and node.attr.startswith("hook_")


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        tree = WithoutHooks().visit(ast.parse(Path(self.path).read_text()))
        exec(compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True), vars(module))


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if not _is_ours(fullname):
            return None
        found = super().find_spec(fullname, path, target)
        if found is not None and isinstance(found.loader, importlib.machinery.SourceFileLoader):
            found.loader = _Loader(found.loader.name, found.loader.path)
        return found


def _is_ours(name: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in _PACKAGES)


@contextmanager
def _second_import() -> Iterator[None]:
    """Within the block, networks and components import anew and stripped; afterwards they are what they were."""
    first = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    parent = vars(sys.modules["hooked_vla"])
    attributes = {name: parent[name] for package in _PACKAGES if (name := package.rpartition(".")[2]) in parent}
    sys.meta_path.insert(0, _Finder())
    try:
        yield
    finally:
        del sys.meta_path[0]
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(first)
        parent.update(attributes)


def stripped(spec: ModelSpec, net: nn.Module) -> Any:
    """A network like `net`, sharing its weights, without hook points."""
    with _second_import():
        copy = importlib.import_module(f"hooked_vla.models.{spec.family}").NETWORK(spec)
    copy.load_state_dict(net.state_dict(), assign=True)
    return copy.eval()
