"""What a rank of the all-gather schedule sees, against documents and positions row by row."""

import random
from itertools import pairwise

import pytest
import torch

from ring_flash_attn.core.gather_layout import llama3_flash_attn_prepare_cu_seqlens


def packings(world_size):
    """Yield documents' lengths whose sum is a positive multiple of world_size."""
    generator = random.Random(world_size)
    yield from ([world_size], [6 * world_size], [0, 3 * world_size, 0], [world_size] * 5)
    for _ in range(60):
        lengths = [generator.choice((0, 0, 1, 2, 5, 11)) for _ in range(generator.randrange(1, 9))]
        lengths.insert(
            generator.randrange(len(lengths) + 1), world_size - sum(lengths) % world_size
        )
        yield lengths


def cumulative(lengths, dtype=torch.int32):
    return torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=dtype)


def seen_by_hand(lengths, causal, rank, world_size):
    """Return for each row of the rank the global rows that it sees."""
    document = [n for n, length in enumerate(lengths) for _ in range(length)]
    local_len = len(document) // world_size
    return [
        [j for j in range(len(document)) if document[j] == document[i] and (j <= i or not causal)]
        for i in range(rank * local_len, (rank + 1) * local_len)
    ]


def seen_by_flash_attn(cu_seqlens_q, cu_seqlens_k, local_k_slice, causal):
    """Return the same from what flash-attn is given; causal aligns at the bottom right."""
    seen, first = [], local_k_slice.start
    documents = zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    for (q_begin, q_end), (k_begin, k_end) in documents:
        for row in range(q_begin, q_end):
            end = k_end - (q_end - 1 - row) if causal else k_end
            seen.append(list(range(first + k_begin, first + end)))
    return seen


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_rank_sees_its_documents(world_size, causal):
    for lengths in packings(world_size):
        for rank in range(world_size):
            cu_q, cu_k, max_q, max_k, rows = llama3_flash_attn_prepare_cu_seqlens(
                cumulative(lengths), causal, rank, world_size
            )
            assert cu_q.dtype == cu_k.dtype == torch.int32
            cu_q, cu_k = cu_q.tolist(), cu_k.tolist()
            case = (lengths, rank)
            want = seen_by_hand(lengths, causal, rank, world_size)
            assert seen_by_flash_attn(cu_q, cu_k, rows, causal) == want, case
            # No row more than some row sees, and no document without a row.
            assert rows == slice(min(map(min, want)), max(map(max, want)) + 1), case
            assert (cu_q[0], cu_k[0]) == (0, 0)
            assert (cu_q[-1], cu_k[-1]) == (len(want), rows.stop - rows.start), case
            assert all(begin < end for begin, end in pairwise(cu_q)), case
            for longest, cu_seqlens in ((max_q, cu_q), (max_k, cu_k)):
                assert type(longest) is int
                assert longest == max(end - begin for begin, end in pairwise(cu_seqlens)), case


def test_by_hand():
    cu_seqlens = cumulative([3, 7, 2])

    def prepared(causal, rank):
        cu_q, cu_k, *rest = llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, causal, rank, 2)
        return cu_q.tolist(), cu_k.tolist(), *rest

    assert prepared(True, 0) == ([0, 3, 6], [0, 3, 6], 3, 3, slice(0, 6))
    assert prepared(False, 0) == ([0, 3, 6], [0, 3, 10], 3, 7, slice(0, 10))
    assert prepared(True, 1) == ([0, 4, 6], [0, 7, 9], 4, 7, slice(3, 12))


def test_results_stay_on_the_device_of_cu_seqlens(device):
    cu_seqlens = cumulative([3, 5], torch.int64).to(device)
    cu_q, cu_k, *_ = llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, True, 1, 2)
    assert cu_q.device == cu_k.device == cu_seqlens.device
    assert cu_q.dtype == cu_k.dtype == torch.int32


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(cu_seqlens=[0, 4]), TypeError, "cu_seqlens must be a tensor, got list"),
        (
            dict(cu_seqlens=torch.tensor([0.0, 4.0])),
            TypeError,
            r"cu_seqlens must have an integer dtype, got torch\.float32",
        ),
        (
            dict(cu_seqlens=torch.tensor([False, True])),
            TypeError,
            r"cu_seqlens must have an integer dtype, got torch\.bool",
        ),
        (
            dict(cu_seqlens=torch.tensor([[0, 4]])),
            ValueError,
            r"cu_seqlens must have one axis, got shape \[1, 2\]",
        ),
        (
            dict(cu_seqlens=torch.tensor([], dtype=torch.int32)),
            ValueError,
            r"cu_seqlens must start at 0, got \[\]",
        ),
        (
            dict(cu_seqlens=torch.tensor([2, 4])),
            ValueError,
            r"cu_seqlens must start at 0, got \[2, 4\]",
        ),
        (
            dict(cu_seqlens=torch.tensor([0, 4, 2])),
            ValueError,
            r"cu_seqlens must not decrease, got \[0, 4, 2\]",
        ),
        (
            dict(cu_seqlens=torch.tensor([0, 4, 7])),
            ValueError,
            r"cu_seqlens must end with a positive multiple of 2 \(world_size\), got 7",
        ),
        (
            dict(cu_seqlens=torch.tensor([0, 0])),
            ValueError,
            r"cu_seqlens must end with a positive multiple of 2 \(world_size\), got 0",
        ),
        (dict(causal=1), TypeError, "causal must be True or False, got 1"),
        (dict(rank="0"), TypeError, "rank must be an int, got '0'"),
        (dict(rank=2), ValueError, r"rank must be in \[0, 2\), got 2"),
        (dict(rank=-1), ValueError, r"rank must be in \[0, 2\), got -1"),
        (dict(world_size=True), TypeError, "world_size must be an int, got True"),
        (dict(world_size=0), ValueError, "world_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(changed, error, message):
    good = dict(cu_seqlens=torch.tensor([0, 4]), causal=True, rank=0, world_size=2)
    with pytest.raises(error, match=message):
        llama3_flash_attn_prepare_cu_seqlens(**{**good, **changed})
