"""One bad rank: every rank raises, soon, and says which rank and what."""

import os
import re
import time
from functools import cache

import pytest
import torch
import torch.distributed as dist

import ring_flash_attn as rfa
from ranks import run_ranks
from ring_flash_attn.core import agree

# What rank 1 does otherwise than rank 0, and what rank 0 must be told.
TENSORS = {
    "q dtype alone": (lambda q, k, v: (q.half(), k, v), "rank 1 .* k must have q's dtype"),
    "every dtype": (lambda q, k, v: (q.half(), k.half(), v.half()), "dtype: .*rank 1 has torch.fl"),
    "batch": (lambda q, k, v: (q[:1], k[:1], v[:1]), r"q shape: .*rank 1 has \[1, 8, 4, 16\]"),
    "length": (lambda q, k, v: (q[:, :6], k[:, :6], v[:, :6]), "q shape: .*rank 1 has"),
    "odd length": (lambda q, k, v: (q[:, :7], k[:, :7], v[:, :7]), "rank 1 .* q must have an even"),
    "key heads": (lambda q, k, v: (q, k[:, :, :1], v[:, :, :1]), "k and v shape: .*rank 1 has"),
    "no tensor": (lambda q, k, v: (q, None, v), "rank 1 .* k must be a tensor"),
    "empty": (lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0]), "rank 1 .* no empty axis"),
}
OPTIONS = {
    "causal": ({"causal": False}, "mask and scale: .*rank 1 has Attention.*causal=False"),
    "window": ({"window_size": (2, 0)}, r"mask and scale: .*rank 1 has .*window=\(2, 0\)"),
    "scale": ({"softmax_scale": 0.5}, "mask and scale: .*rank 1 has .*softmax_scale=0.5"),
    "dropout": ({"dropout_p": 0.5}, "rank 1 .* NotImplementedError: dropout_p"),
}


CASES = [("tensors", name) for name in TENSORS] + [("options", name) for name in OPTIONS]


def one_bad_rank(rank: int, cases: list[tuple[str, str]]) -> list[tuple[str, float]]:
    told = []
    for kind, name in cases:
        q, k, v = (torch.randn(2, 8, heads, 16) for heads in (4, 2, 2))
        options = {"causal": True}
        if rank == 1 and kind == "tensors":
            q, k, v = TENSORS[name][0](q, k, v)
        elif rank == 1:
            options |= OPTIONS[name][0]
        start = time.monotonic()
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
            rfa.zigzag_ring_flash_attn_func(q, k, v, **options)
        error = caught.value
        told.append((f"{type(error).__name__}: {error}", time.monotonic() - start))
    return told


@cache
def on_every_call():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RING_FLASH_ATTN_CHECK", "1")
        return run_ranks(2, one_bad_rank, CASES)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name for _, name in CASES])
def test_both_ranks_raise_when_one_is_bad(index: int):
    kind, name = CASES[index]
    (told, seconds), (_, other_seconds) = (rank[index] for rank in on_every_call())
    assert told.startswith("ValueError")
    assert re.search((TENSORS if kind == "tensors" else OPTIONS)[name][1], told), told
    assert max(seconds, other_seconds) < 10


def test_the_first_calls_compare_unasked():
    assert "RING_FLASH_ATTN_CHECK" not in os.environ
    cases = [("tensors", "length"), ("options", "dropout")]
    assert len(cases) == agree.EXCHANGED_CALLS
    good, bad = run_ranks(2, one_bad_rank, cases)
    assert "q shape" in good[0][0] and "q shape" in bad[0][0]
    assert "rank 1 of the group raised NotImplementedError: dropout_p" in good[1][0]
    assert bad[1][0].startswith("NotImplementedError: dropout_p")


def exchanges(rank: int, calls: int) -> int:
    count = 0
    gather = dist.all_gather_object

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        return gather(*args, **kwargs)

    dist.all_gather_object = counting
    q = torch.randn(1, 8, 2, 16)
    for _ in range(calls):
        rfa.ring_flash_attn_func(q, q, q)
    return count


def test_only_the_first_calls_of_a_group_exchange():
    assert "RING_FLASH_ATTN_CHECK" not in os.environ
    assert run_ranks(2, exchanges, 7) == [agree.EXCHANGED_CALLS] * 2
    assert run_ranks(1, exchanges, 3) == [0]


def test_every_call_exchanges_when_asked_to(monkeypatch):
    monkeypatch.setenv("RING_FLASH_ATTN_CHECK", "1")
    assert run_ranks(2, exchanges, 5) == [5] * 2


def packed_on_one_rank(rank: int) -> str:
    q, kv = torch.randn(1, 8, 4, 16), torch.randn(1, 8, 2 + rank, 2, 16)
    with pytest.raises(ValueError) as caught:
        rfa.ring_flash_attn_kvpacked_func(q, kv)
    return str(caught.value)


def test_the_packed_forms_check_inside_the_agreement():
    good, bad = run_ranks(2, packed_on_one_rank)
    assert bad.startswith("kv must be")
    assert "rank 1 of the group raised ValueError: kv must be" in good


def two_groups(rank: int) -> list[int]:
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    q = torch.randn(1, 8, 2, 16)
    for group in (*groups, None):
        for _ in range(3):
            rfa.ring_flash_attn_func(q, q, q, group=group)
    return sorted(agree._calls.values())


def test_groups_are_counted_apart():
    assert run_ranks(2, two_groups) == [[agree.EXCHANGED_CALLS] * 3] * 2
