"""A million tokens over four GPUs, forward and backward, against float64.

Out and lse of one key head's query heads are checked on every row, dk and dv of that head on
sampled keys; out, lse, dq of two more heads on sampled queries. On a CPU a small sequence goes the
same way, which is a test of the test: it must find what is spoiled.
"""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

import long_context
from ranks import run_ranks
from ring_flash_attn import ring_attention

LAYOUT = "zigzag"


class Size(NamedTuple):
    """One test: sizes of a rank, what runs it, and the bounds.

    Attributes:
        sampled: rows and keys a rank.
        bound: of out, dq, dk, dv: norm of a row's difference over the row's norm.
        lse_bound: absolute.
    """

    ranks: int
    local_len: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype
    backend: str
    device: str
    sampled: int
    bound: float
    lse_bound: float


# bfloat16 rounds by up to 2**-8 of a value. P, dS and the result are rounded, which makes about
# 2.5e-3 of a row's norm; rows differ little from each other, having 128 entries.
MILLION = Size(4, 2**18, 32, 8, 128, torch.bfloat16, "triton", "cuda", 32, 2**-7, 1e-3)
SMALL = Size(2, 48, 4, 2, 16, torch.float64, "reference", "cpu", 8, 1e-10, 1e-10)


def worst_errors(
    rank: int, size: Size, exchanges: tuple[str, ...], spoil: str | None
) -> dict[str, dict[str, float]]:
    """Return the largest error of out, lse, dq, dk, dv on this rank, by exchange.

    Args:
        spoil: the tensor of the last head to change by a tenth of it in one row; None for none.
    """
    device = torch.device(size.device, rank) if size.device == "cuda" else torch.device("cpu")
    shape = size.local_len, size.heads, size.key_heads, size.head_dim, size.dtype, device
    local = long_context.draw(LAYOUT, *shape, rank, size.ranks)
    results = {exchange: attend(size, local, exchange) for exchange in exchanges}
    if spoil is not None:
        for x in results.values():
            last = x[spoil][:, -1] if spoil == "lse" else x[spoil][:, :, -1]
            last[0, size.local_len // 2] *= 1.1
    errors = {exchange: dict.fromkeys(x, 0.0) for exchange, x in results.items()}
    rows = long_context.sample(local.positions, size.sampled)

    def note(name: str, compare, *want) -> None:
        for exchange, x in results.items():
            errors[exchange][name] = max(errors[exchange][name], compare(x[name][0], *want))

    # The last key head lies farthest from the start of memory.
    for key_head in dict.fromkeys((0, size.key_heads // 2, size.key_heads - 1)):
        keys, values = (
            long_context.gathered(x[0, :, key_head], local.positions).double()
            for x in (local.k, local.v)
        )
        heads = range(key_head * local.group, (key_head + 1) * local.group)
        whole = key_head == size.key_heads - 1
        for head in heads if whole else heads[-1:]:
            want = long_context.query_rows(local, head, rows, keys, values, with_dq=True)
            note("out", lambda x, h, y: long_context.row_error(x[rows, h], y), head, want.out)
            note("lse", lambda x, h, y: far(x[h, rows], y), head, want.lse)
            note("dq", lambda x, h, y: long_context.row_error(x[rows, h], y), head, want.dq)
        if whole:
            truth = whole_head(local, heads, keys, values)
            for head, want in truth.items():
                note("out", lambda x, h, y: long_context.row_error(x[:, h], y), head, want.out)
                note("lse", lambda x, h, y: far(x[h], y), head, want.lse)
            check_keys(local, truth, rows, keys, values, key_head, note)
        del keys, values
    return errors


def attend(size: Size, local: long_context.Local, exchange: str) -> dict[str, torch.Tensor]:
    """Return what the library gives."""
    leaves = [x.detach().requires_grad_() for x in (local.q, local.k, local.v)]
    options = {"layout": LAYOUT, "backend": size.backend, "causal": True, "exchange": exchange}
    out, lse = ring_attention(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, local.dout)
    tensors = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    return {name: x.detach() for name, x in tensors.items()}


def whole_head(local, heads, keys, values) -> dict[int, long_context.Rows]:
    """Return the truth of all of this rank's rows, in the order of the rows, by query head."""
    order = local.positions.argsort()
    back = order.argsort()
    found = {}
    for head in heads:
        rows = long_context.query_rows(local, head, order, keys, values, with_dq=False)
        found[head] = long_context.Rows(rows.out[back], rows.lse[back], None, rows.delta[back])
    return found


def check_keys(local, truth, rows, keys, values, key_head, note) -> None:
    """Note the errors of dk, dv of every rank's sampled keys, each on the rank that holds it."""
    for owner in range(dist.get_world_size()):
        places = local.positions[rows].clone()
        # The rank that holds position 0 may sample one less.
        count = torch.tensor([len(places)], device=places.device)
        dist.broadcast(count, owner)
        if dist.get_rank() != owner:
            places = places.new_empty(int(count))
        dist.broadcast(places, owner)
        wanted = long_context.key_rows(local, truth, places, keys, values)
        if dist.get_rank() == owner:
            for name, want in zip(("dk", "dv"), wanted, strict=True):
                note(name, lambda x, y: long_context.row_error(x[rows, key_head], y), want)


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    difference = (got.double() - want).abs().max()
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def check(
    size: Size, exchanges: tuple[str, ...], transport: str, spoil: str | None = None
) -> list[str]:
    """Return what is beyond its bound on any rank, as sentences; empty if nothing."""
    seen = run_ranks(
        size.ranks, worst_errors, size, exchanges, spoil, transport=transport, timeout_s=500
    )
    print(*enumerate(seen), sep="\n")
    return [
        f"{name} of rank {rank} over {exchange}: {error:.2e}"
        for rank, each in enumerate(seen)
        for exchange, errors in each.items()
        for name, error in errors.items()
        if not error <= (size.lse_bound if name == "lse" else size.bound)
    ]


def test_a_small_sequence_passes_on_the_cpu():
    assert check(SMALL, ("ring",), "gloo") == []


@pytest.mark.parametrize("name", ("out", "lse", "dq", "dk", "dv"))
def test_a_spoiled_row_is_found(name: str):
    broken = check(SMALL, ("ring",), "gloo", spoil=name)
    assert broken and all(x.startswith(f"{name} of") for x in broken)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < MILLION.ranks, reason="needs four NVIDIA GPUs")
def test_a_million_tokens_over_four_gpus():
    assert MILLION.ranks * MILLION.local_len == 1_048_576
    assert check(MILLION, ("ring", "copy-engine"), "nccl") == []


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_shorter_sequence_over_two_gpus():
    size = MILLION._replace(ranks=2, local_len=2**14)
    assert check(size, ("ring", "copy-engine"), "nccl") == []
