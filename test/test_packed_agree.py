"""One bad rank of two in a packed call: both ranks raise, and say which argument differs."""

import re

import pytest
import torch

import ring_flash_attn as rfa
from ranks import run_ranks


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments_of(kind: str) -> dict:
    edges = ints(0, 6, 8, 12)
    given = {name: torch.randn(12, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    if kind != "llama3":
        return given | {"cu_seqlens": edges, "max_seqlen": 6}
    edges = {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": 6, "max_seqlen_k": 6}
    return given | edges | {"heads_k_stride": 1, "local_k_slice": slice(0, 12)}


# How rank 1 differs: layout or llama3, changes, what rank 0 is told, what rank 1 is told.
BAD_RANKS = {
    "other documents": (
        "ring",
        {"cu_seqlens": ints(0, 4, 8, 12)},
        r"agree on cu_seqlens: rank 0 has \[0, 6, 8, 12\], rank 1 has \[0, 4, 8, 12\]",
        r"agree on cu_seqlens: rank 0 has \[0, 6, 8, 12\], rank 1 has \[0, 4, 8, 12\]",
    ),
    "fewer documents": (
        "stripe",
        {"cu_seqlens": ints(0, 6, 8)},
        r"agree on cu_seqlens: .* rank 1 has \[0, 6, 8\]",
        r"agree on cu_seqlens: .* rank 1 has \[0, 6, 8\]",
    ),
    "an odd document": (
        "zigzag_ring",
        {"cu_seqlens": ints(0, 6, 7, 12)},
        "rank 1 of the group raised ValueError: cu_seqlens must hold even local lengths",
        "^cu_seqlens must hold even local lengths",
    ),
    "no tensor": (
        "zigzag_ring",
        {"cu_seqlens": [0, 6, 8, 12]},
        "rank 1 of the group raised TypeError: cu_seqlens must be a tensor",
        "^cu_seqlens must be a tensor",
    ),
    "another stride of heads": (
        "llama3",
        {"heads_k_stride": 2},
        "agree on heads_k_stride: rank 0 has 1, rank 1 has 2",
        "agree on heads_k_stride: rank 0 has 1, rank 1 has 2",
    ),
}


def one_bad_rank(rank: int, case: str) -> list[str]:
    """Return what this rank is told on each of the first calls, which compare unasked."""
    kind, changes, *_ = BAD_RANKS[case]
    arguments = arguments_of(kind)
    arguments |= changes if rank == 1 else {}
    told = []
    for stem in (f"{kind}_flash_attn_varlen", f"triton_{kind}_flash_attn_varlen"):
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(rfa, f"{stem}_func")(**arguments, causal=True)
        told.append(str(caught.value))
    return told


@pytest.mark.parametrize("case", BAD_RANKS)
def test_both_ranks_raise_when_one_is_bad(case):
    *_, for_good, for_bad = BAD_RANKS[case]
    good, bad = run_ranks(2, one_bad_rank, case)
    for told, wanted in ((good, for_good), (bad, for_bad)):
        assert len(told) == 2 and all(re.search(wanted, x) for x in told), told
