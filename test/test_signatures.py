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
from ring_flash_attn import triton_ring_flash_attn
from ring_flash_attn.zigzag_ring_flash_attn_varlen import get_half_index, get_half_lse
from upstream_signatures import ADAPTERS, CLASSES, EXPORTS, FUNCTIONS

# Modules below ring_flash_attn; an entry is a whole module or module.name.
BUILT = (
    "ring_flash_attn",
    "ring_flash_attn_varlen",
    "zigzag_ring_flash_attn",
    "zigzag_ring_flash_attn_varlen",
    "stripe_flash_attn",
    "llama3_flash_attn_varlen",
    "triton_utils",
    "utils",
)
NOT_YET = (("adapters.hf_adapter", "the Hugging Face adapter"),)
# Triton JIT objects: the function is their `fn`, and they do not pickle.
KERNELS = (("triton_utils", "flatten_kernel"), ("triton_utils", "unflatten_kernel"))

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
# Stripes of packed documents are this library's own, in the forms of upstream's other layouts.
STRIPE_VARLEN = [
    ("stripe_flash_attn", name.replace("ring_", "stripe_"))
    for name in FUNCTIONS["ring_flash_attn_varlen"]
]
CALLS = [
    (module, name)
    for module, name in [*BUILT_FUNCTIONS, *STRIPE_VARLEN]
    if name.endswith(("_func", "_forward", "_backward"))
]
PUBLIC_FUNCTIONS = [
    *BUILT_FUNCTIONS,
    *STRIPE_VARLEN,
    *(("triton_ring_flash_attn", f"triton_{name}") for _, name in CALLS),
]


def _find(module: str, name: str):
    return getattr(importlib.import_module(f"ring_flash_attn.{module}"), name)


def _function(module: str, name: str):
    found = _find(module, name)
    return found.fn if (module, name) in KERNELS else found


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
    assert _parameters(_function(module, name)) == FUNCTIONS[module][name]


@pytest.mark.parametrize(("module", "name"), STRIPE_VARLEN)
def test_packed_stripes_have_the_parameters_of_packed_rings(module, name):
    of_rings = FUNCTIONS["ring_flash_attn_varlen"][name.replace("stripe_", "ring_")]
    assert _parameters(_find(module, name)) == of_rings
    if name.endswith("_func"):
        assert getattr(ring_flash_attn, name) is _find(module, name)


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
    assert getattr(ring_flash_attn, name) is _find(module, name)
    assert name in ring_flash_attn.__all__


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_a_call_has_a_triton_twin_of_equal_signature(module, name):
    native, twin = _find(module, name), _find("triton_ring_flash_attn", f"triton_{name}")
    assert twin is not native
    assert inspect.signature(twin) == inspect.signature(native)
    assert getattr(ring_flash_attn, f"triton_{name}") is twin


@pytest.mark.parametrize(("module", "name"), PUBLIC_FUNCTIONS)
def test_a_public_function_is_found_by_its_own_name(module, name):
    function = _function(module, name)
    assert function.__name__ == function.__qualname__ == name
    found = getattr(importlib.import_module(function.__module__), name)
    assert found is _find(module, name)
    if (module, name) not in KERNELS:
        assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(("module", "name"), PUBLIC_FUNCTIONS)
def test_a_public_function_has_a_docstring(module, name):
    assert (_function(module, name).__doc__ or "").strip()


def test_there_is_a_triton_twin_of_every_call_and_of_nothing_else():
    names = {f"triton_{name}" for _, name in CALLS}
    # One device, without a ring: this library's own.
    names |= {"triton_flash_attn_forward", "triton_flash_attn_backward"}
    functions = {name for name in triton_ring_flash_attn.__all__ if name.startswith("triton_")}
    assert functions == names


# Documents of rows 0-3, none, 4-5 and 6-11.
CU_SEQLENS = torch.tensor([0, 4, 4, 6, 12], dtype=torch.int32)
FRONT = [True, True, False, False, True, False, True, True, True, False, False, False]


def test_a_half_index_marks_half_of_every_document():
    front = get_half_index(CU_SEQLENS, front=True)
    back = get_half_index(CU_SEQLENS, front=False)
    assert front.dtype == back.dtype == torch.bool
    assert front.tolist() == FRONT
    assert back.tolist() == [not x for x in FRONT]


def test_a_half_index_of_one_document_is_a_slice():
    one = torch.tensor([0, 6], dtype=torch.int32)
    assert get_half_index(one, front=True) == slice(None, 3)
    assert get_half_index(one, front=False) == slice(3, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_half_lse_holds_half_of_every_document(dtype):
    nan = float("nan")  # behind a document: not to be read
    lse = torch.tensor(
        [
            [[1, 2, 3, 4, nan, nan], [11, 12, 13, 14, nan, nan]],
            [[nan] * 6, [nan] * 6],
            [[5, 6, nan, nan, nan, nan], [15, 16, nan, nan, nan, nan]],
            [[21, 22, 23, 24, 25, 26], [31, 32, 33, 34, 35, 36]],
        ],
        dtype=dtype,
    )
    front = get_half_lse(lse, CU_SEQLENS, front=True)
    back = get_half_lse(lse, CU_SEQLENS, front=False)
    assert front.dtype == back.dtype == dtype
    assert front.tolist() == [
        [[1, 2, 0], [11, 12, 0]],
        [[0, 0, 0], [0, 0, 0]],
        [[5, 0, 0], [15, 0, 0]],
        [[21, 22, 23], [31, 32, 33]],
    ]
    assert back.tolist() == [
        [[3, 4, 0], [13, 14, 0]],
        [[0, 0, 0], [0, 0, 0]],
        [[6, 0, 0], [16, 0, 0]],
        [[24, 25, 26], [34, 35, 36]],
    ]


def test_a_packed_lse_is_halved_document_by_document():
    lse = torch.arange(14.0).repeat(2, 1)  # two rows behind the last document
    lse[1] += 20
    front = get_half_lse(lse, CU_SEQLENS, front=True)
    back = get_half_lse(lse, CU_SEQLENS, front=False)
    assert front.tolist() == [[0, 1, 4, 6, 7, 8, 0], [20, 21, 24, 26, 27, 28, 0]]
    assert back.tolist() == [[2, 3, 5, 9, 10, 11, 0], [22, 23, 25, 29, 30, 31, 0]]
    one = torch.tensor([0, 6], dtype=torch.int32)
    assert get_half_lse(lse[:, :6], one, front=True).tolist() == [[0, 1, 2], [20, 21, 22]]
    assert get_half_lse(lse[:, :6], one, front=False).tolist() == [[3, 4, 5], [23, 24, 25]]
