"""Every public name of ring-flash-attn 0.1.8 is here under its module path, with its parameters.

Annotations need not match. A name that is not built yet stands in NOT_YET with the reason, so that
the table is covered whole: what is in neither list is forgotten, and fails.
"""

import importlib
import inspect
import pickle

import pytest
import torch

import ring_flash_attn
from upstream_signatures import ADAPTERS, CLASSES, EXPORTS, FUNCTIONS

# Modules below ring_flash_attn; an entry is a whole module or module.name.
BUILT = ("ring_flash_attn", "zigzag_ring_flash_attn", "stripe_flash_attn", "utils")
NOT_YET = (
    ("ring_flash_attn_varlen", "packed sequences"),
    ("zigzag_ring_flash_attn_varlen", "packed sequences"),
    ("llama3_flash_attn_varlen", "packed sequences on the all-gather schedule"),
    ("triton_utils", "its functions reshape the lse of packed sequences"),
    ("utils.flatten_varlen_lse", "reshapes the lse of packed sequences"),
    ("utils.unflatten_varlen_lse", "reshapes the lse of packed sequences"),
    ("adapters.hf_adapter", "the Hugging Face adapter"),
)

TABLE = [
    (module, name)
    for table in (FUNCTIONS, CLASSES, ADAPTERS["functions"], ADAPTERS["variables"])
    for module, names in table.items()
    for name in names
]


def _listed(entries, module: str, name: str) -> bool:
    return module in entries or f"{module}.{name}" in entries


def _is_built(module: str, name: str) -> bool:
    return _listed(BUILT, module, name) and not _listed(dict(NOT_YET), module, name)


def _built(table) -> list[tuple[str, str]]:
    return [(m, name) for m, names in table.items() for name in names if _is_built(m, name)]


BUILT_FUNCTIONS = _built(FUNCTIONS)
BUILT_CLASSES = _built(CLASSES)
CALLS = [(module, name) for module, name in BUILT_FUNCTIONS if name.endswith("_func")]
PUBLIC_FUNCTIONS = [
    *BUILT_FUNCTIONS,
    *(("triton_ring_flash_attn", f"triton_{name}") for _, name in CALLS),
]


def _find(module: str, name: str):
    return getattr(importlib.import_module(f"ring_flash_attn.{module}"), name)


def _parameters(function) -> str:
    """Render names, order, kinds and defaults as the table does, without annotations."""
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(bare))[1:-1]


@pytest.mark.parametrize(("module", "name"), TABLE)
def test_every_upstream_name_is_built_or_accounted_for(module, name):
    assert _listed(BUILT, module, name) or _listed(dict(NOT_YET), module, name)


@pytest.mark.parametrize(
    ("module", "name"), [entry for entry in TABLE if _listed(dict(NOT_YET), *entry)]
)
def test_what_is_not_yet_there_is_not_there(module, name):
    # Else it is built and untested: take its entry out of NOT_YET.
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        _find(module, name)


@pytest.mark.parametrize(("module", "name"), BUILT_FUNCTIONS)
def test_a_function_has_upstreams_parameters(module, name):
    assert _parameters(_find(module, name)) == FUNCTIONS[module][name]


@pytest.mark.parametrize(("module", "name"), BUILT_CLASSES)
def test_a_class_has_upstreams_parameters(module, name):
    found, methods = _find(module, name), CLASSES[module][name]
    if "forward" in methods:
        # Users call an autograd function's `apply`, whose arguments are forward's without ctx.
        assert issubclass(found, torch.autograd.Function)
        assert _parameters(found.apply) == methods["forward"].removeprefix("ctx, ")
        return
    assert {method: _parameters(getattr(found, method)) for method in methods} == methods


@pytest.mark.parametrize("name", EXPORTS)
def test_the_package_exports_upstreams_names(name):
    (module,) = (module for module, names in FUNCTIONS.items() if name in names)
    if not _is_built(module, name):
        pytest.skip(f"{module} is not built yet: {dict(NOT_YET)[module]}")
    assert getattr(ring_flash_attn, name) is _find(module, name)


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_a_call_has_a_triton_twin_of_equal_signature(module, name):
    native, twin = _find(module, name), _find("triton_ring_flash_attn", f"triton_{name}")
    assert twin is not native
    assert inspect.signature(twin) == inspect.signature(native)
    assert getattr(ring_flash_attn, f"triton_{name}") is twin


@pytest.mark.parametrize(("module", "name"), PUBLIC_FUNCTIONS)
def test_a_public_function_is_found_by_its_own_name(module, name):
    function = _find(module, name)
    assert function.__name__ == function.__qualname__ == name
    assert getattr(importlib.import_module(function.__module__), name) is function
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(("module", "name"), PUBLIC_FUNCTIONS)
def test_a_public_function_has_a_docstring(module, name):
    assert (_find(module, name).__doc__ or "").strip()
