"""Bad input raises, naming the argument, before anything is sent."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import ring_flash_attn as rfa
from ranks import run_ranks
from ring_flash_attn.core import validate
from ring_flash_attn.core.validate import check_transport
from ring_flash_attn.ranks import Ranks
from ring_flash_attn.ring_flash_attn import ring_flash_attn_backward, ring_flash_attn_forward


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors(**changes) -> list:
    given = {name: torch.randn(1, 8, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return list((given | changes).values())


TENSOR_CASES = {
    "q no tensor": ("q", None, TypeError, "q must be a tensor"),
    "q 3-D": ("q", torch.zeros(8, 4, 16), ValueError, r"q must be \[B, L, H, D\], got shape \[8"),
    "q empty": ("q", torch.zeros(1, 0, 4, 16), ValueError, "q must be .* no empty axis"),
    "q integer": ("q", torch.zeros(1, 8, 4, 16).int(), TypeError, "q must have a float dtype"),
    "q heads": ("q", torch.zeros(1, 8, 3, 16), ValueError, "q's heads must be a multiple"),
    "k dtype": ("k", torch.zeros(1, 8, 2, 16).half(), ValueError, "k must have q's dtype"),
    "k device": ("k", torch.zeros(1, 8, 2, 16, device="meta"), ValueError, "k must be on q's dev"),
    "k batch": ("k", torch.zeros(2, 8, 2, 16), ValueError, "k must have q's batch size 1"),
    "k head dim": ("k", torch.zeros(1, 8, 2, 8), ValueError, "k must have q's head dim 16"),
    "k length": ("k", torch.zeros(1, 6, 2, 16), ValueError, "v must have k's shape"),
    "q scalar": ("q", torch.tensor(1.0), ValueError, "q must be .* got shape"),
    "q list": ("q", [[1.0]], TypeError, "q must be a tensor .* got list"),
    "q bool": ("q", torch.zeros(1, 8, 4, 16).bool(), TypeError, "q must have a float dtype"),
    "q complex": ("q", torch.zeros(1, 8, 4, 16).cfloat(), TypeError, "q must have a float dtype"),
    "q no batch": ("q", torch.zeros(0, 8, 4, 16), ValueError, "q must be .* no empty axis"),
    "q no heads": ("q", torch.zeros(1, 8, 0, 16), ValueError, "q must be .* no empty axis"),
    "q no width": ("q", torch.zeros(1, 8, 4, 0), ValueError, "q must be .* no empty axis"),
    "q fewer heads": ("q", torch.zeros(1, 8, 1, 16), ValueError, "q's heads must be a multiple"),
    "k 5-D": ("k", torch.zeros(1, 8, 2, 2, 16), ValueError, r"k must be \[B, L, Hk, D\]"),
    "k integer": ("k", torch.zeros(1, 8, 2, 16).long(), TypeError, "k must have a float dtype"),
    "k empty": ("k", torch.zeros(1, 0, 2, 16), ValueError, "k must be .* no empty axis"),
    "v no tensor": ("v", 3.0, TypeError, "v must be a tensor .* got float"),
    "v batch": ("v", torch.zeros(2, 8, 2, 16), ValueError, "v must have q's batch size 1"),
    "v device": ("v", torch.zeros(1, 8, 2, 16, device="meta"), ValueError, "v must be on q's dev"),
    "v width": ("v", torch.zeros(1, 8, 2, 24), ValueError, "v must have q's head dim 16"),
    "v heads": ("v", torch.zeros(1, 8, 4, 16), ValueError, "v must have k's shape"),
    "v dtype": ("v", torch.zeros(1, 8, 2, 16).double(), ValueError, "v must have q's dtype"),
}
OPTION_CASES = {
    "window short": ({"window_size": (3,)}, TypeError, "window_size must be a pair"),
    "window int": ({"window_size": 3}, TypeError, "window_size must be a pair"),
    "window float": ({"window_size": (3.0, 0)}, TypeError, "window_size must hold two ints"),
    "window below -1": ({"window_size": (-2, 0)}, ValueError, "window_size must hold ints >= -1"),
    "dropout text": ({"dropout_p": "0"}, TypeError, "dropout_p must be a number"),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
    "dropout on": ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: no backend"),
    "alibi": ({"alibi_slopes": torch.ones(4)}, NotImplementedError, "alibi_slopes: no backend"),
    "scale text": ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number"),
    "scale 0": ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be finite and > 0"),
    "scale nan": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite"),
    "causal None": ({"causal": None}, TypeError, "causal must be True or False"),
    "deterministic 1": ({"deterministic": 1}, TypeError, "deterministic must be True or False"),
    "probs None": ({"return_attn_probs": None}, TypeError, "return_attn_probs must be True or Fa"),
    "probs 1": ({"return_attn_probs": 1}, TypeError, "return_attn_probs must be True or False"),
    "window None": ({"window_size": None}, TypeError, "window_size must be a pair"),
    "window text": ({"window_size": "ab"}, TypeError, "window_size must be a pair"),
    "window long": ({"window_size": (1, 2, 3)}, TypeError, "window_size must be a pair"),
    "window bool": ({"window_size": (True, 0)}, TypeError, "window_size must hold two ints"),
    "window right": (
        {"window_size": (0, -5)},
        ValueError,
        r"ints >= -1 \(-1: open\), got \(0, -5\)",
    ),
    "dropout nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in"),
    "dropout None": ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
    "dropout bool": ({"dropout_p": True}, TypeError, "dropout_p must be a number"),
    "alibi list": ({"alibi_slopes": [1.0]}, NotImplementedError, "alibi_slopes: no backend"),
    "scale bool": ({"softmax_scale": True}, TypeError, "softmax_scale must be a number"),
    "scale inf": ({"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite"),
    "scale negative": ({"softmax_scale": -1.0}, ValueError, "softmax_scale must be finite and > 0"),
    "scale tensor": ({"softmax_scale": torch.ones(1)}, TypeError, "softmax_scale must be a number"),
    "causal 1": ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    "deterministic None": ({"deterministic": None}, TypeError, "deterministic must be True or F"),
    "group int": ({"group": 0}, TypeError, "group must be a ProcessGroup or None, got int"),
    "group text": ({"group": "world"}, TypeError, "group must be a ProcessGroup or None"),
}
FUNCS = [
    rfa.ring_flash_attn_func,
    rfa.zigzag_ring_flash_attn_func,
    rfa.stripe_flash_attn_func,
    rfa.triton_ring_flash_attn_func,
    rfa.triton_zigzag_ring_flash_attn_func,
    rfa.triton_stripe_flash_attn_func,
]


@pytest.mark.parametrize("func", FUNCS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", TENSOR_CASES)
def test_bad_tensor(func, case):
    name, value, error, message = TENSOR_CASES[case]
    with pytest.raises(error, match=message):
        func(*tensors(**{name: value}))


@pytest.mark.parametrize("func", FUNCS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", OPTION_CASES)
def test_bad_option(func, case):
    options, error, message = OPTION_CASES[case]
    with pytest.raises(error, match=message):
        func(*tensors(), **options)


@pytest.mark.parametrize("masked", [{"causal": True}, {"window_size": (3, 3)}], ids=str)
def test_lengths_that_differ_need_positions(masked):
    short = torch.zeros(1, 6, 2, 16)
    with pytest.raises(ValueError, match="k must have q's local length 8"):
        rfa.ring_flash_attn_func(*tensors(k=short, v=short), **masked)


@pytest.mark.parametrize("name", ["q", "k"])
def test_zigzag_needs_an_even_local_length_even_on_one_rank(name):
    odd = torch.zeros(1, 7, 4 if name == "q" else 2, 16)
    changes = {"q": odd} if name == "q" else {"k": odd, "v": odd}
    for func in (rfa.zigzag_ring_flash_attn_func, rfa.triton_zigzag_ring_flash_attn_func):
        with pytest.raises(ValueError, match=f"{name} must have an even local length"):
            func(*tensors(**changes))


def test_there_are_at_least_sixty_cases():
    assert len(TENSOR_CASES) + len(OPTION_CASES) >= 60


def test_checks_do_not_live_in_asserts():
    """`python -O` drops asserts; every case must raise all the same."""
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "bad_tensor or bad_option or lengths or even or packed", "-W", "ignore"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "failed" not in result.stdout


def test_packed_forms_name_their_own_argument():
    with pytest.raises(ValueError, match=r"qkv must be .* with 3 on axis 2"):
        rfa.ring_flash_attn_qkvpacked_func(torch.zeros(1, 8, 2, 4, 16))
    with pytest.raises(ValueError, match=r"kv must be .* with 2 on axis 2"):
        rfa.ring_flash_attn_kvpacked_func(torch.zeros(1, 8, 4, 16), torch.zeros(1, 8, 3, 2, 16))
    with pytest.raises(ValueError, match=r"qkv must be \[B, L, 3, H, D\]"):
        rfa.triton_stripe_flash_attn_qkvpacked_func(torch.zeros(1, 8, 4, 16))
    with pytest.raises(TypeError, match="kv must be a tensor"):
        rfa.zigzag_ring_flash_attn_kvpacked_func(torch.zeros(1, 8, 4, 16), None)


def test_unknown_layout_and_backend():
    with pytest.raises(ValueError, match="layout must be one of contiguous, zigzag, stripe"):
        rfa.ring_attention(*tensors(), layout="ring")
    with pytest.raises(ValueError, match="backend must be one of native, triton"):
        rfa.ring_attention(*tensors(), backend="cute")


def test_backward_checks_what_the_forward_returned():
    q, k, v = tensors()
    out, lse = ring_flash_attn_forward(None, q, k, v, None)
    for bad, message in (
        ({"dout": q[:, :4]}, "dout must have q's shape"),
        ({"out": None}, "out must be a tensor like q"),
        ({"softmax_lse": lse.transpose(1, 2)}, "softmax_lse must have q as"),
    ):
        arguments = {"dout": out, "out": out, "softmax_lse": lse} | bad
        with pytest.raises((TypeError, ValueError), match=message):
            ring_flash_attn_backward(None, q=q, k=k, v=v, softmax_scale=None, **arguments)


def outside_the_group(rank: int) -> str:
    group = dist.new_group([0])
    if rank == 0:
        return ""
    with pytest.raises(ValueError, match="group must hold this rank") as caught:
        rfa.ring_flash_attn_func(*tensors(), group=group)
    return str(caught.value)


def test_a_group_of_other_ranks():
    assert "group must hold this rank" in run_ranks(2, outside_the_group)[1]


def no_group(rank: int) -> str:
    dist.destroy_process_group()
    try:
        with pytest.raises(ValueError, match=r"group: torch.distributed has no process group"):
            rfa.ring_flash_attn_func(*tensors())
    finally:
        # The harness destroys a group at the end.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return "raised"


def test_no_process_group():
    assert run_ranks(1, no_group) == ["raised"]


def triton_without_interpreter(rank: int) -> str:
    import os

    os.environ.pop("TRITON_INTERPRET", None)
    with pytest.raises(NotImplementedError) as caught:
        rfa.triton_ring_flash_attn_func(*tensors())
    return str(caught.value)


def test_triton_on_cpu_tensors_says_how_to_turn_the_interpreter_on(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in run_ranks(1, triton_without_interpreter)[0]


def test_a_group_that_cannot_send_the_tensors(monkeypatch):
    def group_of(size, backends):
        monkeypatch.setattr(validate, "ranks_of", lambda group: Ranks(0, size, (), backends))

    group_of(1, "cuda:nccl")
    check_transport(None, torch.zeros(1))  # one rank sends nothing
    group_of(2, "cuda:nccl")
    with pytest.raises(ValueError, match=r"group must be able to send q's device cpu, got .*nccl"):
        check_transport(None, torch.zeros(1))
    group_of(2, "cpu:gloo,cuda:nccl")
    check_transport(None, torch.zeros(1))
