"""Bad input to the packed forms raises, naming the argument, before anything is sent."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import ring_flash_attn as rfa
from ring_flash_attn.llama3_flash_attn_varlen import (
    llama3_flash_attn_varlen_backward,
    llama3_flash_attn_varlen_forward,
)
from ring_flash_attn.ring_flash_attn_varlen import (
    ring_flash_attn_varlen_backward,
    ring_flash_attn_varlen_forward,
)

ROWS = 12


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def rows(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


def tensors() -> dict:
    shapes = {"q": (ROWS, 4, 16), "k": (ROWS, 2, 16), "v": (ROWS, 2, 16)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def ring_arguments() -> dict:
    return {"cu_seqlens": ints(0, 6, 8, 12), "max_seqlen": 6}


def gathered_arguments() -> dict:
    return {
        "cu_seqlens_q": ints(0, 6, 8, 12),
        "cu_seqlens_k": ints(0, 6, 8, 12),
        "max_seqlen_q": 6,
        "max_seqlen_k": 6,
        "heads_k_stride": 1,
        "local_k_slice": slice(0, 12),
    }


META = {"device": "meta"}
# What every form checks: arguments that are bad, the error, what it says.
COMMON_CASES = {
    "q no tensor": ({"q": None}, TypeError, r"q must be a tensor \[T, H, D\], got None"),
    "q list": ({"q": [[1.0]]}, TypeError, "q must be a tensor .* got list"),
    "q 4-D": ({"q": rows(1, 12, 4, 16)}, ValueError, r"q must be \[T, H, D\], got shape \[1, 12"),
    "q 2-D": ({"q": rows(12, 64)}, ValueError, r"q must be \[T, H, D\], got shape \[12, 64\]"),
    "q empty": ({"q": rows(0, 4, 16)}, ValueError, "q must be .* no empty axis"),
    "q integer": ({"q": rows(12, 4, 16).int()}, TypeError, "q must have a float dtype"),
    "q heads": ({"q": rows(12, 3, 16)}, ValueError, "q's heads must be a multiple of k's"),
    "k no tensor": ({"k": 1.0}, TypeError, "k must be a tensor .* got float"),
    "k 4-D": ({"k": rows(1, 12, 2, 16)}, ValueError, r"k must be \[T, Hk, D\]"),
    "k rows": (
        {"k": rows(10, 2, 16), "v": rows(10, 2, 16)},
        ValueError,
        "k must have q's 12 packed rows, got 10",
    ),
    "k dtype": ({"k": rows(12, 2, 16).half()}, ValueError, "k must have q's dtype"),
    "k device": ({"k": rows(12, 2, 16, **META)}, ValueError, "k must be on q's device"),
    "k head dim": ({"k": rows(12, 2, 8)}, ValueError, "k must have q's head dim 16"),
    "v no tensor": ({"v": None}, TypeError, "v must be a tensor"),
    "v rows": ({"v": rows(10, 2, 16)}, ValueError, "v must have k's shape"),
    "v heads": ({"v": rows(12, 4, 16)}, ValueError, "v must have k's shape"),
    "v dtype": ({"v": rows(12, 2, 16).double()}, ValueError, "v must have q's dtype"),
    "dropout on": ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: no backend"),
    "dropout text": ({"dropout_p": "0"}, TypeError, "dropout_p must be a number"),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
    "alibi": ({"alibi_slopes": rows(4)}, NotImplementedError, "alibi_slopes: no backend"),
    "window int": ({"window_size": 3}, TypeError, "window_size must be a pair"),
    "window float": ({"window_size": (3.0, 0)}, TypeError, "window_size must hold two ints"),
    "window below -1": ({"window_size": (-2, 0)}, ValueError, "window_size must hold ints >= -1"),
    "scale 0": ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be finite and > 0"),
    "scale text": ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number"),
    "scale inf": ({"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite"),
    "causal 1": ({"causal": 1}, TypeError, "causal must be True or False"),
    "deterministic None": ({"deterministic": None}, TypeError, "deterministic must be True or F"),
    "probs 1": ({"return_attn_probs": 1}, TypeError, "return_attn_probs must be True or False"),
    "group text": ({"group": "world"}, TypeError, "group must be a ProcessGroup or None"),
}
# Of one argument that is a cu_seqlens, in every form that has it; NAME is its name.
CU_SEQLENS_CASES = {
    "None": (None, TypeError, r"NAME must be a tensor \[N \+ 1\], got None"),
    "list": ([0, 6, 8, 12], TypeError, "NAME must be a tensor .* got list"),
    "float": (ints(0, 6, 8, 12).float(), TypeError, "NAME must be int32, got torch.float32"),
    "int64": (ints(0, 6, 8, 12).long(), TypeError, "NAME must be int32, got torch.int64"),
    "scalar": (torch.tensor(0, dtype=torch.int32), ValueError, r"NAME must be \[N \+ 1\]"),
    "2-D": (ints(0, 6, 8, 12)[None], ValueError, r"NAME must be \[N \+ 1\].* got \[1, 4\]"),
    "empty": (ints(), ValueError, r"NAME must be \[N \+ 1\], N >= 1 documents, got \[0\]"),
    "one edge": (ints(0), ValueError, r"NAME must be \[N \+ 1\], N >= 1 documents, got \[1\]"),
    "strided": (ints(0, 9, 6, 9, 8, 9, 12)[::2], ValueError, "NAME must be contiguous, .*2"),
    "device": (ints(0, 6, 8, 12).to("meta"), ValueError, "NAME must be on q's device cpu"),
    "late start": (ints(2, 6, 8, 12), ValueError, "NAME must start at 0, got 2"),
    "negative": (ints(-2, 2, 6, 12), ValueError, "NAME must start at 0, got -2"),
    "decreasing": (ints(0, 6, 4, 8), ValueError, "NAME must not decrease, got 6, 4 at document 1"),
    "past the rows": (ints(0, 6, 8, 14), ValueError, "NAME must end within the 12 .* got 14"),
}
MAX_SEQLEN_CASES = {
    "bool": (True, TypeError, "NAME must be an int, got bool"),
    "None": (None, TypeError, "NAME must be an int, got NoneType"),
    "float": (6.0, TypeError, "NAME must be an int, got float"),
    "tensor": (torch.tensor(6), TypeError, "NAME must be an int, got Tensor"),
    "0": (0, ValueError, "NAME must be at least 1, got 0"),
    "too small": (5, ValueError, "NAME must be at least the longest .* 5 and 6 rows in document 0"),
}
GATHERED_CASES = {
    "fewer documents in k": (
        {"cu_seqlens_k": ints(0, 6, 12)},
        ValueError,
        "cu_seqlens_k must name as many documents as cu_seqlens_q, 3, got 2",
    ),
    "k past the slice": (
        {"local_k_slice": slice(0, 10)},
        ValueError,
        "cu_seqlens_k must end within the 10 packed rows, got 12",
    ),
    "stride 0": ({"heads_k_stride": 0}, ValueError, "heads_k_stride must be at least 1, got 0"),
    "stride not dividing": ({"heads_k_stride": 3}, ValueError, "heads_k_stride must divide k's 2"),
    "stride bool": ({"heads_k_stride": True}, TypeError, "heads_k_stride must be an int"),
    "stride float": ({"heads_k_stride": 1.0}, TypeError, "heads_k_stride must be an int"),
    "stride None": ({"heads_k_stride": None}, TypeError, "heads_k_stride must be an int"),
    "slice pair": ({"local_k_slice": (0, 12)}, TypeError, "local_k_slice must be a slice, got tu"),
    "slice negative": (
        {"local_k_slice": slice(-12, 12)},
        ValueError,
        "local_k_slice must lie with",
    ),
    "slice from the end": ({"local_k_slice": slice(0, -1)}, ValueError, "local_k_slice must lie"),
    "slice empty": ({"local_k_slice": slice(4, 4)}, ValueError, "local_k_slice must lie within"),
    "slice beyond": (
        {"local_k_slice": slice(0, 13)},
        ValueError,
        "local_k_slice must lie within the 12 gathered rows",
    ),
    "slice step": ({"local_k_slice": slice(0, 12, 2)}, TypeError, "local_k_slice must be slice"),
    "slice no start": ({"local_k_slice": slice(None, 12)}, TypeError, "local_k_slice must be sl"),
    "slice no stop": ({"local_k_slice": slice(0, None)}, TypeError, "local_k_slice must be sli"),
    "slice float": ({"local_k_slice": slice(0, 12.0)}, TypeError, "local_k_slice must be sli"),
}


def _named(cases: dict, name: str) -> dict:
    """Return the cases of one argument as changes to a call."""
    return {
        f"{name} {case}": ({name: value}, error, message.replace("NAME", name))
        for case, (value, error, message) in cases.items()
    }


RING_CASES = (
    COMMON_CASES | _named(CU_SEQLENS_CASES, "cu_seqlens") | _named(MAX_SEQLEN_CASES, "max_seqlen")
)
LLAMA3_CASES = COMMON_CASES | GATHERED_CASES
for _side in ("q", "k"):
    LLAMA3_CASES |= _named(CU_SEQLENS_CASES, f"cu_seqlens_{_side}")
    LLAMA3_CASES |= _named(MAX_SEQLEN_CASES, f"max_seqlen_{_side}")
# 4 heads in each of q, k, v.
PACKED_CASES = {
    "kv no tensor": ("kv", None, TypeError, "kv must be a tensor"),
    "kv of three": ("kv", rows(12, 3, 4, 16), ValueError, r"kv must be \[T, 2, Hk, D\] with 2 on"),
    "kv behind": ("kv", rows(12, 4, 2, 16), ValueError, "kv must be .* with 2 on axis 1"),
    "kv 5-D": ("kv", rows(1, 12, 2, 4, 16), ValueError, r"kv must be \[T, 2, Hk, D\], got shape"),
    "kv rows": ("kv", rows(10, 2, 4, 16), ValueError, "k must have q's 12 packed rows, got 10"),
    "qkv no tensor": ("qkv", None, TypeError, "qkv must be a tensor"),
    "qkv of two": ("qkv", rows(12, 2, 4, 16), ValueError, r"qkv must be \[T, 3, H, D\] with 3 on"),
    "qkv 5-D": ("qkv", rows(1, 12, 3, 4, 16), ValueError, r"qkv must be \[T, 3, H, D\], got"),
    "qkv 3-D": ("qkv", rows(12, 4, 16), ValueError, r"qkv must be \[T, 3, H, D\], got shape"),
    "qkv integer": ("qkv", rows(12, 3, 4, 16).int(), TypeError, "qkv must have a float dtype"),
}
RING_STEMS = [
    f"{twin}{layout}_flash_attn_varlen"
    for twin in ("", "triton_")
    for layout in ("ring", "zigzag_ring", "stripe")
]
LLAMA3_STEMS = ["llama3_flash_attn_varlen", "triton_llama3_flash_attn_varlen"]


def raises(func, error: type, message: str, **arguments) -> None:
    with pytest.raises(error, match=message) as caught:
        func(**arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize("stem", RING_STEMS)
@pytest.mark.parametrize("case", RING_CASES)
def test_bad_input_to_a_ring(stem, case):
    changes, error, message = RING_CASES[case]
    arguments = tensors() | ring_arguments() | changes
    raises(getattr(rfa, f"{stem}_func"), error, message, **arguments)


@pytest.mark.parametrize("stem", LLAMA3_STEMS)
@pytest.mark.parametrize("case", LLAMA3_CASES)
def test_bad_input_to_llama3(stem, case):
    changes, error, message = LLAMA3_CASES[case]
    arguments = tensors() | gathered_arguments() | changes
    raises(getattr(rfa, f"{stem}_func"), error, message, **arguments)


@pytest.mark.parametrize("stem", RING_STEMS + LLAMA3_STEMS)
@pytest.mark.parametrize("case", PACKED_CASES)
def test_bad_packing_names_the_packed_argument(stem, case):
    name, value, error, message = PACKED_CASES[case]
    arguments = gathered_arguments() if stem in LLAMA3_STEMS else ring_arguments()
    if name == "kv":
        arguments["q"] = rows(12, 4, 16)
    func = getattr(rfa, f"{stem}_{name}packed_func")
    raises(func, error, message, **{name: value}, **arguments)


@pytest.mark.parametrize("stem", [stem for stem in RING_STEMS if "zigzag" in stem])
def test_zigzag_needs_an_even_local_length_of_every_document(stem):
    arguments = tensors() | {"cu_seqlens": ints(0, 6, 9, 12), "max_seqlen": 6}
    message = "cu_seqlens must hold even local lengths in the zigzag layout .* 3 rows in document 1"
    raises(getattr(rfa, f"{stem}_func"), ValueError, message, **arguments)


def test_packed_attention_names_its_layout_and_backend():
    arguments = tensors() | ring_arguments()
    for changes, message in (
        ({"layout": "gathered"}, "layout must be one of contiguous, zigzag, stripe"),
        ({"backend": "cute"}, "backend must be one of native, triton"),
    ):
        raises(rfa.packed_attention, ValueError, message, **arguments, **changes)
    message = "backend must be one of native, triton"
    arguments = tensors() | gathered_arguments()
    raises(rfa.gathered_attention, ValueError, message, **arguments, backend="cute")


FORMS_ALONE = {
    "ring": (ring_flash_attn_varlen_forward, ring_flash_attn_varlen_backward, ring_arguments),
    "llama3": (
        llama3_flash_attn_varlen_forward,
        llama3_flash_attn_varlen_backward,
        gathered_arguments,
    ),
}


@pytest.mark.parametrize("form", FORMS_ALONE)
def test_a_bare_backward_checks_what_the_forward_returned(form):
    forward, backward, documents = FORMS_ALONE[form]
    arguments = tensors() | documents() | {"process_group": None, "softmax_scale": None}
    out, lse = forward(**arguments)
    for changes, error, message in (
        ({"dout": out[:4]}, ValueError, "dout must have q's shape"),
        ({"out": None}, TypeError, "out must be a tensor like q"),
        ({"softmax_lse": lse.T}, ValueError, r"softmax_lse must have q as \[H, T\]'s shape"),
        ({"softmax_lse": lse[None]}, ValueError, r"softmax_lse must have q as \[H, T\]'s shape"),
    ):
        given = {"dout": out, "out": out, "softmax_lse": lse} | changes
        raises(backward, error, message, **arguments, **given)


def test_checks_do_not_live_in_asserts():
    """`python -O` drops asserts; every case must raise all the same."""
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "(bad or zigzag or names_its) and not triton", "-W", "ignore"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "failed" not in result.stdout
