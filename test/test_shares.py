"""Shares of dk, dv summed: which rows hold numbers, in which order, rounded once."""

import pytest
import torch

from ring_flash_attn.backends.shares import Shares, sum_in_one_pass, sum_shares

SUMS = [sum_shares, pytest.param(sum_in_one_pass, marks=pytest.mark.kernel)]
LENGTH = 11
# cu_seqlens, units of a document, the rows of each unit of each document
DOCUMENTS = [
    ([0, 4, 4, 10], 2, [[(0, 2), (2, 4)], [(4, 4), (4, 4)], [(4, 7), (7, 10)]]),
    ([1, 6, 11], 2, [[(1, 3), (3, 5)], [(6, 8), (8, 10)]]),  # rows 5 and 10 are left over
    ([0, 3, 11], 1, [[(0, 3)], [(3, 11)]]),
    ([0, 0], 1, [[(0, 0)]]),
    ([0, *range(1, 10)], 1, [[(n, n + 1)] for n in range(9)]),
]


def draw(shares, device, batch=1, heads=3, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shape = 2, batch, LENGTH, heads, head_dim
    drawn = torch.randn(1 + shares, *shape, generator=generator)
    return drawn[0].to(device), drawn[1:].to(device)


def expect(own, landed, rows):
    """Return own plus the shares in the given rows, a list of them for each share."""
    total = own.clone()
    for share, held in zip(landed, rows, strict=True):
        for row in held:
            total[:, :, row] += share[:, :, row]
    return total


def hide(landed, rows):
    """Put NaN where a share holds nothing."""
    for share, held in zip(landed, rows, strict=True):
        share[:, :, [row for row in range(LENGTH) if row not in held]] = torch.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("work", SUMS)
def test_rows_of_a_batch(work, dtype, device):
    parts = (0, 11), None, (3, 7), (0, 1)
    rows = [range(*(part or (0, 0))) for part in parts]
    own, landed = draw(len(parts) + 1, device, batch=2, heads=5, head_dim=16)
    hide(landed[:-1], rows)
    landed[-1] = torch.nan  # a plan may have fewer steps than there are slots
    result = torch.full_like(own, torch.nan, dtype=dtype)
    work(result, own, Shares(landed, parts))
    assert torch.equal(result, expect(own, landed[:-1], rows).to(dtype))


@pytest.mark.parametrize(("cu_seqlens", "units", "at"), DOCUMENTS, ids=str)
@pytest.mark.parametrize("work", SUMS)
def test_units_of_documents(work, cu_seqlens, units, at, device):
    parts = ((0, 1), (0, units), None, (units - 1, units))
    rows = [
        [
            row
            for document in at
            for unit in document[slice(*(part or (0, 0)))]
            for row in range(*unit)
        ]
        for part in parts
    ]
    own, landed = draw(len(parts), device)
    hide(landed, rows)
    on_device = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    result = torch.full_like(own, torch.nan)
    work(result, own, Shares(landed, parts, units, on_device))
    want = expect(own, landed, rows)
    covered = {row for document in at for unit in document for row in range(*unit)}
    if units > 1:
        left_over = set(range(cu_seqlens[-1])) - covered
        want[:, :, sorted(left_over)] = torch.nan
    assert torch.equal(result.isnan(), want.isnan())
    assert torch.equal(result.nan_to_num(), want.nan_to_num())


def test_a_row_wider_than_a_program(device):
    own, landed = draw(2, device, heads=9, head_dim=128)
    result = torch.full_like(own, torch.nan)
    sum_shares(result, own, Shares(landed, ((0, 5), (2, 11))))
    assert torch.equal(result, expect(own, landed, [range(5), range(2, 11)]))


@pytest.mark.kernel
def test_a_row_wider_than_a_program_of_the_kernel(device):
    own, landed = draw(2, device, heads=9, head_dim=128)
    result = torch.full_like(own, torch.nan)
    sum_in_one_pass(result, own, Shares(landed, ((0, 5), (2, 11))))
    assert torch.equal(result, expect(own, landed, [range(5), range(2, 11)]))


@pytest.mark.parametrize("parts", [(), ((0, 2),)])
@pytest.mark.parametrize("work", SUMS)
def test_without_shares_what_is_left_over_is_nan_too(work, parts, device):
    own, _ = draw(0, device)
    cu_seqlens = torch.tensor([1, 6, 10], dtype=torch.int32, device=device)
    result = torch.zeros_like(own)
    work(result, own, Shares(None, parts, 2, cu_seqlens))
    assert result.isnan().any(4).any(3).any(1).any(0).nonzero().flatten().tolist() == [0, 5]
    assert torch.equal(result[:, :, 1:5], own[:, :, 1:5])
    assert torch.equal(result[:, :, 6:], own[:, :, 6:])


def test_without_shares_it_is_rounded(device):
    own, _ = draw(0, device)
    result = torch.empty_like(own, dtype=torch.bfloat16)
    sum_shares(result, own, Shares(None))
    assert torch.equal(result, own.to(torch.bfloat16))


@pytest.mark.parametrize("work", SUMS)
def test_the_result_may_be_what_is_added_to(work, device):
    own, landed = draw(1, device)
    want = expect(own, landed, [range(3, 7)])
    work(own, own, Shares(landed, ((3, 7),)))
    assert torch.equal(own, want)
