"""Runs Gluon kernels for Hopper (Triton 3.6, sm_90) on numpy, where Triton has no interpreter.

    module = load_module("ring_flash_attn/kernels/hopper/forward.py")
    module.kernel[(grid,)](*tensors_and_descriptors, num_warps=4, maxnreg=168)

`load_module` executes a source file against modules of ours in place of triton.experimental.gluon;
its kernels then run on CPU tensors, one thread per warp-specialised partition, one at a time.

The other test/gluon_*.py are its parts.

Modelled: mbarriers (arrivals, parity, transaction bytes), TMA loads, stores and reductions with
what lies out of bounds, wgmma in flight, named barriers, types and their rounding, int32 wrapping
and truncating division, atomics, the bounds of every pointer, the fence between a store in shared
memory and its reading by TMA or wgmma, a linear layout in place of a TMA's swizzle. A deadlock, an
arrival too many, an access outside of a tensor, a result used too early and a missing fence raise
EmulationError; a buffer given away or read too early shows as NaN or as wrong numbers.

Not modelled: all other layouts, bank conflicts, registers, thread_barrier (which does nothing),
races between the threads of a partition, fences before a TMA load overwrites what was read, memory
ordering between programs, Triton's typing of loop-carried variables, clusters, and the accuracy of
ex2.approx.
"""

import ast
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gluon_arrays import Tensor, scalar, truncated_divide, truncated_modulo
from gluon_language import Settings, gluon_modules
from gluon_tasks import MARK, Deadlock
from gluon_types import EmulationError

__all__ = ["Deadlock", "EmulationError", "load_module"]

PACKAGE = "gluon_emulated"  # what loaded modules' packages are put under, to be nobody else's


def load_module(
    path: str | Path,
    replace: dict[str, str] | None = None,
    *,
    timeout_s: float = 60.0,
    seed: int | None = None,
    programs_at_once: int = 4,
) -> ModuleType:
    """Execute a source file with Gluon's modules replaced by the emulator's; return the module.

    It must import Gluon by `from`. Files that it imports relatively are loaded the same way, and
    packages' __init__ not at all. sys.modules is left as it was, so a function that imports Gluon
    when it is called gets the real one.

    Args:
        path: the file.
        replace: source fragments and what to put in their place, to plant a bug. Each must occur
            exactly once in the file and those it imports relatively.
        timeout_s: the longest that a launch may take, against loops without end; a deadlock is
            found without it.
        seed: None runs the partitions in a fixed order, a number in a random one.
        programs_at_once: how many programs of a launch run side by side.

    Raises:
        ValueError: a fragment does not occur, or more than once.
    """
    path = Path(path).resolve()
    name, root = path.stem, path.parent
    while (root / "__init__.py").exists():
        name, root = f"{root.name}.{name}", root.parent
    finder = _Finder(root, replace or {})
    before = dict(sys.modules)
    sys.modules.update(gluon_modules(Settings(timeout_s, seed, programs_at_once)))
    sys.meta_path.insert(0, finder)
    try:
        module = importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        sys.meta_path.remove(finder)
        for added in set(sys.modules) - set(before):
            del sys.modules[added]
        sys.modules.update(before)
    finder.check_fragments()
    return module


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds PACKAGE.a.b in root/a/b.py, loads packages empty and files as kernels of ours."""

    def __init__(self, root: Path, replace: dict[str, str]) -> None:
        self._root, self._replace = root, replace
        self._occurrences: Counter[str] = Counter()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        first, *parts = fullname.split(".")
        if first != PACKAGE:
            return None
        place = self._root.joinpath(*parts)
        file = place.with_suffix(".py") if parts else place
        if not place.is_dir() and not file.is_file():
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, is_package=not file.is_file())
        spec.origin = str(file)
        return spec

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None and spec.origin is not None
        if spec.submodule_search_locations is not None:
            return
        module.__file__ = spec.origin
        source = Path(spec.origin).read_text()
        self._occurrences.update({fragment: source.count(fragment) for fragment in self._replace})
        for fragment, replacement in self._replace.items():
            source = source.replace(fragment, replacement)
        tree = ast.fix_missing_locations(_DeviceArithmetic().visit(ast.parse(source)))
        module.__dict__.update({MARK: True, **_DEVICE_FUNCTIONS})
        exec(compile(tree, spec.origin, "exec"), module.__dict__)

    def check_fragments(self) -> None:
        for fragment in self._replace:
            if self._occurrences[fragment] != 1:
                raise ValueError(
                    f"a fragment to replace must occur once, occurs "
                    f"{self._occurrences[fragment]} times: {fragment!r}"
                )


def _device_range(*bounds: Any) -> Iterator[Tensor]:
    """Count in the kernel's integers, not in Python's."""
    return map(scalar, range(*map(int, bounds)))


_DEVICE_FUNCTIONS: dict[str, Callable] = {
    "__gluon_range__": _device_range,
    "__gluon_floordiv__": truncated_divide,
    "__gluon_mod__": truncated_modulo,
}


class _DeviceArithmetic(ast.NodeTransformer):
    """Gives kernels what differs from Python even where a variable began as a Python number.

    Inside @gluon.jit functions // and % truncate, and range counts in int32 scalars. Functions of
    the host in the same file stay as they are.
    """

    _in_kernel = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        names = {ast.unparse(x).partition("(")[0] for x in node.decorator_list}
        outside, self._in_kernel = self._in_kernel, bool(names & {"gluon.jit", "jit"})
        self.generic_visit(node)
        self._in_kernel = outside
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if self._in_kernel and node.id == "range":
            return ast.copy_location(ast.Name("__gluon_range__", ast.Load()), node)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return self._divided(node, node.op, node.left, node.right)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        value = self._divided(node, node.op, ast.Name(node.target.id, ast.Load()), node.value)
        return node if value is node else ast.copy_location(ast.Assign([node.target], value), node)

    def _divided(self, node: Any, op: ast.operator, left: ast.expr, right: ast.expr) -> Any:
        if not self._in_kernel or not isinstance(op, ast.FloorDiv | ast.Mod):
            return node
        name = "__gluon_mod__" if isinstance(op, ast.Mod) else "__gluon_floordiv__"
        call = ast.Call(ast.Name(name, ast.Load()), [left, right], [])
        return ast.copy_location(call, node)
