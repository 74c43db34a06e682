"""Imports go one way, and the package imports where flash-attn and transformers are missing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ring_flash_attn"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

PUBLIC = (
    "ring_flash_attn",
    "ring_flash_attn_varlen",
    "zigzag_ring_flash_attn",
    "zigzag_ring_flash_attn_varlen",
    "stripe_flash_attn",
    "llama3_flash_attn_varlen",
    "triton_ring_flash_attn",
    "triton_utils",
    "utils",
)

# What public modules bind their names to.
ENTRIES = (
    "core.api",
    "core.forms",
    "core.packed_api",
    "core.packed_forms",
    "core.gather_forms",
)

# Module (below ring_flash_attn, "" is its __init__) -> the modules of ours that it may import.
# "x.*" speaks for package x and for all in it that has no line of its own.
MAY_IMPORT = {
    "kernels.*": ("kernels",),
    "core": (),
    "core.layout": (),
    "core.packed_layout": ("core.layout",),
    "core.gather_layout": (),
    "core.attention": (),
    "core.plan": ("core.layout", "core.attention"),
    "core.tables": ("core.plan",),
    "core.packed": ("core.plan", "core.attention", "core.layout"),
    "backends.*": (
        "core.plan",
        "core.packed",
        "core.tables",
        "core.attention",
        "kernels",
        "backends",
    ),
    "core.capture": ("ranks",),
    "core.exchange": (
        "utils",
        "core.capture",
        "core.plan",
        "core.packed",
        "core.traffic",
        "backends.base",
        "backends.shares",
    ),
    "core.traffic": ("core.plan", "core.packed", "core.attention", "core.layout"),
    "core.transport": (),
    "core.watchdog": (),
    "core.merge": ("core.plan", "core.packed"),
    "core.peer_buffers": ("core.transport", "core.merge"),
    "core.schedule": (
        "core.merge",
        "core.peer_buffers",
        "core.packed",
        "core.plan",
        "core.traffic",
        "backends.base",
    ),
    "core.peer_memory": ("core.transport", "core.watchdog"),
    "core.copy_engine": (
        "backends.base",
        "backends.shares",
        "core.peer_buffers",
        "core.schedule",
        "core.transport",
        "core.traffic",
        "core.plan",
        "core.packed",
    ),
    # The one place that knows both exchanges.
    "core.choose": (
        "core.agree",
        "core.exchange",
        "core.copy_engine",
        "core.peer_buffers",
        "core.peer_memory",
        "core.traffic",
        "core.plan",
        "core.packed",
    ),
    "core.ring": (
        "backends.base",
        "backends.missed",
        "core.exchange",
        "core.plan",
        "core.packed",
        "core.attention",
    ),
    "core.gather": (
        "backends.base",
        "ranks",
        "utils",
        "core.capture",
        "core.plan",
        "core.packed",
        "core.attention",
    ),
    "core.function": (
        "core.ring",
        "core.gather",
        "core.choose",
        "core.exchange",
        "core.plan",
        "core.packed",
        "core.attention",
        "core.layout",
        "backends.base",
    ),
    "core.validate": ("ranks", "core.attention", "core.layout"),
    "core.agree": ("core.validate", "utils"),
    "core.api": (
        "ranks",
        "core.agree",
        "core.choose",
        "core.traffic",
        "core.function",
        "core.validate",
        "core.attention",
        "core.layout",
        "core.plan",
        "backends",
    ),
    # The templates of the public functions, which the public modules bind.
    "core.forms": ("core.agree", "core.api", "core.function", "core.validate"),
    "core.packed_api": (
        "ranks",
        "core.agree",
        "core.api",
        "core.choose",
        "core.traffic",
        "core.function",
        "core.gather",
        "core.packed",
        "core.validate",
        "backends",
    ),
    "core.packed_forms": (
        "core.agree",
        "core.forms",
        "core.function",
        "core.packed_api",
        "core.validate",
    ),
    "core.gather_forms": (
        "core.agree",
        "core.forms",
        "core.function",
        "core.packed_api",
        "core.packed_forms",
        "core.validate",
    ),
    "ranks": (),
    "utils": ("ranks",),
    "": (*ENTRIES, "core.layout", "core.packed_layout", *PUBLIC),
    **{name: (*ENTRIES, *PUBLIC) for name in PUBLIC if name != "utils"},
    "llama3_flash_attn_varlen": (*ENTRIES, "core.gather_layout", *PUBLIC),
    "triton_ring_flash_attn": (*ENTRIES, "kernels", *PUBLIC),
}

# Optional packages: imported inside the function that needs them, or the import of ours breaks.
OPTIONAL = ("flash_attn", "transformers")


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return what `source` imports and may not, as "line: why".

    Args:
        module: name below ring_flash_attn, dotted, "" for the package itself.
        source: its text.
        is_package: whether it is an __init__, whose relative imports start at itself.
    """
    allowed = _allowed(module)
    if allowed is None:
        return [f"0: no line of MAY_IMPORT speaks for {module!r}"]
    package = module if is_package else module.rpartition(".")[0]
    found = []
    for line, name, at_import in _imports(ast.parse(source), package):
        ours, theirs = _split(name)
        if ours is not None and not any(_within(ours, target) for target in allowed):
            found.append(f"{line}: {module!r} imports {name}, allowed are {allowed}")
        if theirs in OPTIONAL and at_import:
            found.append(f"{line}: {name} imported at module level")
        if theirs and module.startswith("kernels") and not _suits_kernels(theirs):
            found.append(f"{line}: a kernel module imports {name}, allowed is triton")
    return found


def _allowed(module: str) -> tuple[str, ...] | None:
    if module in MAY_IMPORT:
        return MAY_IMPORT[module]
    return MAY_IMPORT.get(module.partition(".")[0] + ".*")


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, absolute dotted name, whether it runs when the module is imported)."""
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, at_import = pending.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, at_import
        if isinstance(node, ast.ImportFrom):
            # `from .core import plan` names a module only together with its alias.
            base = _base(node, package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", at_import
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        pending.extend((child, at_import) for child in ast.iter_child_nodes(node))


def _base(node: ast.ImportFrom, package: str) -> str:
    if node.level == 0:
        return node.module or ""
    parts = ["ring_flash_attn", *package.split(".")] if package else ["ring_flash_attn"]
    parts = parts[: len(parts) - (node.level - 1)]
    return ".".join([*parts, node.module] if node.module else parts)


def _split(name: str) -> tuple[str | None, str | None]:
    """Return (name below ring_flash_attn, None) if it is ours, else (None, its root)."""
    root, _, rest = name.partition(".")
    return (rest, None) if root == "ring_flash_attn" else (None, root)


def _within(name: str, target: str) -> bool:
    return name == target or name.startswith(target + ".")


def _suits_kernels(root: str) -> bool:
    return root == "triton" or root in sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    is_package = path.name == "__init__.py"
    parts = path.parts[:-1] if is_package else path.with_suffix("").parts
    assert not violations(".".join(parts), (PACKAGE / path).read_text(), is_package)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.layout", "from .attention import Attention"),
        ("core.layout", "from . import attention"),
        ("core.plan", "from ..backends.base import Backend"),
        ("core.plan", "import ring_flash_attn.backends.base"),
        ("core.plan", "def late():\n    from ..backends import base"),
        ("core.validate", "from ring_flash_attn import utils"),
        ("core.ring", "from ..backends.aten import AtenBackend"),
        ("core.exchange", "from ..triton_utils import flatten_varlen_lse"),
        ("backends.triton", "from ..core.api import ring_attention"),
        ("backends.triton", "from .. import core"),
        ("kernels.forward", "from ..core.plan import Block"),
        ("kernels.hopper.forward", "from ...backends import base"),
        ("kernels.forward", "import torch"),
        ("ring_flash_attn", "from .kernels import forward"),
        ("ring_flash_attn", "from .core.plan import plan_ring"),
        ("utils", "from .core.api import ring_attention"),
        ("triton_ring_flash_attn", "from .backends.triton import TritonBackend"),
        ("backends.flash", "import flash_attn"),
        ("backends.flash", "try:\n    from flash_attn import x\nexcept ImportError:\n    pass"),
        ("ring_flash_attn", "class A:\n    import transformers.modeling_utils"),
        ("core.unheard_of", ""),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(violations(module, source)) == 1


def test_a_package_resolves_relative_imports_from_itself():
    assert not violations("backends", "from .aten import AtenBackend", is_package=True)
    assert violations("core", "from .plan import Block", is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.plan", "from .layout import Layout, Run\nimport functools"),
        ("core.ring", "from ..backends.base import Backend\nfrom ring_flash_attn.core import plan"),
        ("kernels.hopper.forward", "import triton.language as tl\nfrom ..tile import load"),
        ("backends.flash", "def run():\n    from flash_attn import flash_attn_func"),
        ("ring_flash_attn", "from . import utils\nfrom .core.api import ring_attention"),
        ("triton_ring_flash_attn", "from .kernels.forward import _fwd_kernel"),
    ],
)
def test_a_lawful_import_passes(module, source):
    assert not violations(module, source)


def test_the_package_imports_without_its_optional_packages():
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); import ring_flash_attn"
    # None in sys.modules makes an import raise ModuleNotFoundError, as if nothing were installed.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_triton_the_native_names_work_and_the_others_say_what_to_install():
    code = """
import sys
import importlib.util
sys.modules["triton"] = None
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else found(name, *a)
import torch, torch.distributed as dist, ring_flash_attn
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
q = torch.randn(1, 8, 2, 16)
assert ring_flash_attn.zigzag_ring_flash_attn_func(q, q, q, causal=True).isfinite().all()
try:
    ring_flash_attn.triton_ring_flash_attn_func(q, q, q)
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout
