"""The oracle itself: against torch's attention, finite differences, and its own second path."""

import math

import pytest
import torch

import oracle

WINDOWS = [(-1, -1), (0, 0), (3, -1), (-1, 2), (2, 1), (100, 100)]


def inputs(q_len, k_len, heads=4, key_heads=2, dtype=torch.float64, head_dim=8):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, dout = random(2, q_len, heads, head_dim), random(2, q_len, heads, head_dim)
    k, v = random(2, k_len, key_heads, head_dim), random(2, k_len, key_heads, head_dim)
    return q, k, v, dout, random(2, heads, q_len)


def test_positions_by_hand():
    assert [oracle.positions("contiguous", 3, 2, r) for r in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert [oracle.positions("stripe", 3, 2, r) for r in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    assert [oracle.positions("zigzag", 4, 3, r) for r in (0, 1, 2)] == [
        [0, 1, 10, 11],
        [2, 3, 8, 9],
        [4, 5, 6, 7],
    ]


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("dim", [1, 2])
def test_unshard_restores_what_shard_cut(layout, dim):
    x = torch.arange(2 * 24 * 24).reshape(2, 24, 24)
    shards = [oracle.shard(x, layout, 4, rank, dim) for rank in range(4)]
    assert [s.shape[dim] for s in shards] == [6] * 4
    first = shards[3].select(dim, 0)
    assert torch.equal(first, x.select(dim, oracle.positions(layout, 6, 4, 3)[0]))
    assert torch.equal(oracle.unshard(shards, layout, dim), x)


def test_visible_by_hand():
    rows = range(4)
    assert oracle.visible(rows, rows, False).all()
    assert oracle.visible(rows, rows, True).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert oracle.visible(rows, rows, False, (1, 0)).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    assert torch.equal(
        oracle.visible(rows, rows, True, (1, 3)), oracle.visible(rows, rows, False, (1, 0))
    )
    # Positions, not row numbers, decide.
    assert oracle.visible([7, 2], [1, 2, 6, 9], True, (3, -1)).int().tolist() == [
        [0, 0, 1, 0],
        [1, 1, 0, 0],
    ]


@pytest.mark.parametrize("causal", [False, True], ids=["open", "causal"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_attention_and_gradients_match_torch(causal, window):
    q, k, v, dout, _ = inputs(9, 9)
    mask = oracle.visible(range(9), range(9), causal, window)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    want_gradients = torch.autograd.grad(want, (q, k, v), dout)
    out, _ = oracle.attention(q, k, v, mask, 0.3)
    assert oracle.errors(out, want).max_abs < 1e-13
    for got, expected in zip(
        oracle.gradients(q, k, v, mask, dout, softmax_scale=0.3), want_gradients, strict=True
    ):
        assert oracle.errors(got, expected).max_abs < 1e-13


def test_lse_is_the_natural_log_of_the_exponential_sum():
    q, k, v, *_ = inputs(3, 5, heads=1, key_heads=1)
    mask = oracle.visible([0, 2, 4], range(5), True)
    _, lse = oracle.attention(q, k, v, mask)
    for i, seen in enumerate([1, 3, 5]):
        sums = sum(math.exp(float(q[1, i, 0] @ k[1, j, 0]) / math.sqrt(8)) for j in range(seen))
        assert abs(float(lse[1, 0, i]) - math.log(sums)) < 1e-14


def test_gradients_match_finite_differences():
    q, k, v, *_ = inputs(4, 5, head_dim=2)
    mask = oracle.visible([0, 9, 2, 3], [1, 0, 3, 2, 20], True, (3, -1))  # row 1 sees nothing
    assert not mask[1].any()
    seen = mask.any(1)

    def seen_rows(*qkv):
        out, lse = oracle.attention(*qkv, mask)
        return out, lse[:, :, seen]

    assert torch.autograd.gradcheck(seen_rows, [x.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("path", [oracle.dense, oracle.chunked, oracle.dense_in_dtype])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_that_see_nothing_give_zeros_and_never_nan(path, dtype):
    if path is oracle.dense and dtype is torch.bfloat16:
        dtype = torch.float16
    q, k, v, dout, dlse = inputs(6, 4, dtype=dtype)
    mask = oracle.visible([5, 0, 50, 1, 60, 2], [0, 1, 2, 30], True, (5, -1))
    mask[0] = False
    result = path(q, k, v, mask, dout, dlse)
    empty = ~mask.any(1)
    assert empty.tolist() == [True, False, True, False, True, False]
    assert not result.out[:, empty].any() and not result.dq[:, empty].any()
    assert (result.lse[:, :, empty] == -math.inf).all()
    assert result.lse[:, :, ~empty].isfinite().all()
    assert not result.dk[:, 3].any() and not result.dv[:, 3].any()  # a key that nobody sees
    assert all(x.isfinite().all() for x in (result.out, result.dq, result.dk, result.dv))


def test_a_mask_that_shows_nothing_at_all():
    q, k, v, dout, dlse = inputs(3, 3)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    for path in (oracle.dense, oracle.chunked):
        result = path(q, k, v, mask, dout, dlse)
        assert (result.lse == -math.inf).all()
        assert not any(x.any() for x in (result.out, result.dq, result.dk, result.dv))


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 1024])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["no_dlse", "dlse"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_both_paths_agree(window, with_dlse, chunk_rows):
    q, k, v, dout, dlse = inputs(9, 7)
    mask = oracle.visible(range(3, 12), range(7), True, window)
    arguments = q, k, v, mask, dout, dlse if with_dlse else None, 0.4
    for got, want in zip(
        oracle.chunked(*arguments, chunk_rows=chunk_rows), oracle.dense(*arguments), strict=True
    ):
        assert oracle.errors(got, want).max_abs < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dense_in_dtype_rounds_to_that_dtype(dtype):
    q, k, v, dout, dlse = inputs(40, 40, dtype=dtype)
    mask = oracle.visible(range(40), range(40), True)
    got = oracle.dense_in_dtype(q, k, v, mask, dout, dlse)
    want = oracle.dense(*(x.double() for x in (q, k, v)), mask, dout, dlse)
    assert {x.dtype for x in (got.out, got.dq, got.dk, got.dv)} == {dtype}
    assert got.lse.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    for name in ("out", "dq", "dk", "dv"):
        relative = oracle.errors(getattr(got, name), getattr(want, name)).relative
        assert unit / 10 < relative < unit, name
    assert oracle.errors(got.lse, want.lse).max_abs < 1e-5
    assert not oracle.beyond_bound(got, want, got)


def test_errors_counts_what_it_says():
    want = torch.tensor([3.0, 4.0, 0.0, 0.0])
    got = torch.tensor([3.0, 4.0, 0.0, 0.5])
    assert oracle.errors(got, want) == (0.5, 0.25, 0.1)
    assert oracle.errors(want, want) == (0.0, 0.0, 0.0)
    assert oracle.errors(got, 0 * want).relative == math.inf


@pytest.mark.parametrize(
    ("got", "want"),
    [
        ([math.nan, 1.0], [0.0, 1.0]),
        ([math.inf, 1.0], [0.0, 1.0]),
        ([-math.inf, 1.0], [0.0, 1.0]),
        ([0.0, 1.0], [-math.inf, 1.0]),
        ([math.nan, 1.0], [-math.inf, 1.0]),
        ([0.0], [0.0, 1.0]),
    ],
    ids=str,
)
def test_errors_refuses_what_no_number_describes(got, want):
    with pytest.raises(AssertionError):
        oracle.errors(torch.tensor(got), torch.tensor(want))
    assert oracle.errors(torch.tensor(want), torch.tensor(want)).max_abs == 0.0


def test_beyond_bound_names_the_tensor_that_breaks_it():
    q, k, v, dout, _ = inputs(8, 8, dtype=torch.bfloat16)
    mask = oracle.visible(range(8), range(8), True)
    want = oracle.dense(*(x.double() for x in (q, k, v)), mask, dout)
    in_dtype = oracle.dense_in_dtype(q, k, v, mask, dout)
    wrong = in_dtype._replace(dk=in_dtype.dk + 0.1)
    assert [line.split(":")[0] for line in oracle.beyond_bound(wrong, want, in_dtype)] == ["dk"] * 2
