"""Every public form over packed documents gives what the dense oracle gives, on two ranks."""

from functools import cache

import pytest
import torch

import oracle
import ring_flash_attn as rfa
from packed_cases import (
    GATHER,
    PackedCase,
    edges_of,
    packed_tensors,
    rows_of,
    visible,
)
from ranks import run_ranks
from ring_cases import MASKS, TENSORS, poison_empty
from ring_flash_attn import (
    llama3_flash_attn_varlen,
    ring_flash_attn_varlen,
    stripe_flash_attn,
    triton_ring_flash_attn,
    zigzag_ring_flash_attn_varlen,
)

WORLD_SIZE = 2
MASK = "causal-window"
OPTIONS = {"causal": MASKS[MASK][0], "window_size": MASKS[MASK][1], "softmax_scale": 0.4}
STEMS = {
    "contiguous": "ring_flash_attn_varlen",
    "zigzag": "zigzag_ring_flash_attn_varlen",
    "stripe": "stripe_flash_attn_varlen",
    GATHER: "llama3_flash_attn_varlen",
}
MODULES = {
    "contiguous": ring_flash_attn_varlen,
    "zigzag": zigzag_ring_flash_attn_varlen,
    "stripe": stripe_flash_attn,
    GATHER: llama3_flash_attn_varlen,
}
CLASSES = {
    "contiguous": ring_flash_attn_varlen.RingFlashAttnVarlenFunc,
    "zigzag": zigzag_ring_flash_attn_varlen.ZigZagRingFlashAttnVarlenFunc,
    GATHER: llama3_flash_attn_varlen.Llama3FlashAttnVarlenFunc,
}
FORMS = ("func", "kvpacked", "qkvpacked", "bare", "class")
DTYPES = {"native": torch.float64, "triton": torch.float32}
BOUNDS = {"native": 1e-10, "triton": 2e-5}


class FormCase(PackedCase):
    """Documents of 12, 4 and 8 rows, halved by two ranks."""

    local_lengths = (6, 2, 4)


# A layout and the key heads gathered at a time.
PLACES = [*((layout, 1) for layout in oracle.LAYOUTS), (GATHER, 1), (GATHER, 2)]


def cases_of(kernels: str, layout: str, heads_k_stride: int) -> list[tuple[FormCase, str]]:
    """Return a case of every form; upstream's classes have no Triton twin."""
    # Rings with few heads, which Triton's interpreter walks one by one.
    n = 2 if layout == GATHER else 1
    sizes = {"heads": 2 * n, "head_dim": 16, "heads_k_stride": heads_k_stride}
    return [
        (FormCase(layout, "", MASK, key_heads=2 * n if form == "qkvpacked" else n, **sizes), form)
        for form in FORMS
        if form != "class" or (kernels == "native" and layout in CLASSES)
    ]


def public(kernels: str, layout: str, ending: str):
    """Return a public function by its name, from where upstream's users import it."""
    if kernels == "triton":
        return getattr(triton_ring_flash_attn, f"triton_{STEMS[layout]}_{ending}")
    return getattr(MODULES[layout], f"{STEMS[layout]}_{ending}")


def documents_of(case: PackedCase, rank: int, device) -> tuple:
    """Return what stands between v and the options: cu_seqlens and all that comes with it."""
    if case.layout != GATHER:
        cu_seqlens = torch.tensor(edges_of(case.local_lengths), dtype=torch.int32, device=device)
        return cu_seqlens, max(case.local_lengths)
    edges = edges_of(n * WORLD_SIZE for n in case.local_lengths)
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=device)
    prepared = rfa.llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, rank, WORLD_SIZE)
    *documents, local_k_slice = prepared
    return *documents, case.heads_k_stride, local_k_slice


def call(kernels: str, case: PackedCase, form: str, rank: int, q, k, v, dout, dlse) -> list:
    """Return out, lse, dq, dk, dv of one form. The bare backward takes no dlse."""
    documents = documents_of(case, rank, q.device)
    if form == "bare":
        halves = ()
        if case.layout == "zigzag":
            halves = tuple(
                zigzag_ring_flash_attn_varlen.get_half_index(documents[0], front=front)
                for front in (True, False)
            )
        forward, backward = (public(kernels, case.layout, x) for x in ("forward", "backward"))
        out, lse = forward(None, q, k, v, *documents, *halves, **OPTIONS)
        return [out, lse, *backward(None, dout, q, k, v, out, lse, *documents, *halves, **OPTIONS)]
    leaves = [q, k, v]
    if form == "kvpacked":
        leaves = [q, torch.stack([k, v], 1)]
    elif form == "qkvpacked":
        leaves = [torch.stack([q, k, v], 1)]
    for leaf in leaves:
        leaf.requires_grad_()
    out, lse, nothing = attend(kernels, case, form, leaves, documents)
    assert nothing is None
    grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    grads = [grads[0], *grads[1].unbind(1)] if form == "kvpacked" else grads
    grads = grads[0].unbind(1) if form == "qkvpacked" else grads
    return [out.detach(), lse.detach(), *grads]


def attend(kernels: str, case: PackedCase, form: str, leaves: list, documents: tuple) -> tuple:
    """Return (out, lse, None), after a call that returns out alone has given the same."""
    if form == "class":
        options = 0.0, OPTIONS["softmax_scale"], True, OPTIONS["window_size"], None, False
        run = CLASSES[case.layout].apply
        alone, result = (run(*leaves, *documents, *options, x, None) for x in (False, True))
    else:
        run = public(kernels, case.layout, "func" if form == "func" else f"{form}_func")
        alone = run(*leaves, *documents, **OPTIONS)
        result = run(*leaves, *documents, **OPTIONS, return_attn_probs=True)
    torch.testing.assert_close(alone, result[0], rtol=0, atol=0)
    return result


def errors_of_forms(rank: int, kernels: str, cases: list) -> list[list[float]]:
    poison_empty()
    dtype, found = DTYPES[kernels], []
    # Native in float64, which no CUDA kernel takes; Triton where its kernels run.
    device = "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"
    for case, form in cases:
        whole = packed_tensors(case, WORLD_SIZE, dtype, device)
        wide = [x.double()[None] for x in whole]
        dlse = None if form == "bare" else wide[4]
        seen = visible(case, WORLD_SIZE, device)
        want = oracle.dense(*wide[:3], seen, wide[3], dlse, OPTIONS["softmax_scale"])
        rows = torch.tensor(rows_of(case, WORLD_SIZE, rank), device=device)
        local = [x[rows] for x in whole[:4]]
        got = call(kernels, case, form, rank, *local, whole[4][:, rows])
        assert [x.dtype for x in got] == [dtype] * 5
        found.append([])
        for name, x, y in zip(TENSORS, got, want, strict=True):
            target = y[0].index_select(1 if name == "lse" else 0, rows)
            assert x.shape == target.shape, name
            found[-1].append(oracle.errors(x, target).max_abs)
    return found


@cache
def measured(kernels: str, layout: str, heads_k_stride: int):
    cases = cases_of(kernels, layout, heads_k_stride)
    return run_ranks(WORLD_SIZE, errors_of_forms, kernels, cases)


CASES = [
    pytest.param(
        kernels,
        layout,
        heads_k_stride,
        index,
        marks=pytest.mark.kernel if kernels == "triton" else (),
        id=f"{kernels}-{layout}-{heads_k_stride}-{form}",
    )
    for kernels in DTYPES
    for layout, heads_k_stride in PLACES
    for index, (_, form) in enumerate(cases_of(kernels, layout, heads_k_stride))
]


@pytest.mark.parametrize(("kernels", "layout", "heads_k_stride", "index"), CASES)
def test_every_form_equals_dense(kernels: str, layout: str, heads_k_stride: int, index: int):
    for rank, errors in enumerate(measured(kernels, layout, heads_k_stride)):
        message = f"{', '.join(TENSORS)} on rank {rank}: {errors[index]}"
        assert max(errors[index]) < BOUNDS[kernels], message


def with_rows_of_no_document(rank: int, kernels: str) -> list[list[float]]:
    poison_empty()
    dtype, found = DTYPES[kernels], []
    device = "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"
    for layout in oracle.LAYOUTS:
        case = FormCase(layout, "", MASK, 2, 1)
        *whole, _ = packed_tensors(case, WORLD_SIZE, dtype, device)
        wide = [x.double()[None] for x in whole]
        seen = visible(case, WORLD_SIZE, device)
        want = oracle.dense(*wide[:3], seen, wide[3], None, OPTIONS["softmax_scale"])
        rows = torch.tensor(rows_of(case, WORLD_SIZE, rank), device=device)
        # Three more rows of large numbers: whoever reads them is wrong everywhere.
        local = [torch.cat([x[rows], torch.full_like(x[:3], 1e4)]) for x in whole]
        got = call(kernels, case, "bare", rank, *local, None)
        found.append([])
        for name, x, y in zip(TENSORS, got, want, strict=True):
            dim = 1 if name == "lse" else 0
            nothing = -torch.inf if name == "lse" else 0
            inside, behind = x.split([len(rows), 3], dim)
            assert torch.equal(behind, torch.full_like(behind, nothing)), (layout, name, behind)
            found[-1].append(oracle.errors(inside, y[0].index_select(dim, rows)).max_abs)
    return found


@pytest.mark.parametrize("kernels", ["native", pytest.param("triton", marks=pytest.mark.kernel)])
def test_rows_of_no_document_are_nothing(kernels: str):
    for errors in run_ranks(WORLD_SIZE, with_rows_of_no_document, kernels):
        for layout, found in zip(oracle.LAYOUTS, errors, strict=True):
            assert max(found) < BOUNDS[kernels], f"{layout}: {', '.join(TENSORS)}: {found}"


def dtypes_of_half(rank: int, kernels: str) -> list[list[torch.dtype]]:
    device = "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"
    found = []
    for layout in ("zigzag", GATHER):
        case = FormCase(layout, "", MASK, 2, 1)
        whole = packed_tensors(case, WORLD_SIZE, torch.float16, device)
        rows = torch.tensor(rows_of(case, WORLD_SIZE, rank), device=device)
        local = [x[rows] for x in whole[:4]]
        got = call(kernels, case, "func", rank, *local, whole[4][:, rows])
        found.append([x.dtype for x in got])
    return found


@pytest.mark.parametrize("kernels", ["native", pytest.param("triton", marks=pytest.mark.kernel)])
def test_gradients_have_the_inputs_dtype_and_lse_is_float32(kernels: str):
    half = torch.float16
    want = [half, torch.float32, half, half, half]
    for found in run_ranks(WORLD_SIZE, dtypes_of_half, kernels):
        assert found == [want] * 2


def test_the_top_level_exports_are_the_modules_own():
    for layout, stem in STEMS.items():
        for ending in ("func", "kvpacked_func", "qkvpacked_func"):
            assert getattr(rfa, f"{stem}_{ending}") is public("native", layout, ending)
        for ending in ("func", "kvpacked_func", "qkvpacked_func", "forward", "backward"):
            name = f"triton_{stem}_{ending}"
            assert getattr(rfa, name) is public("triton", layout, ending)
