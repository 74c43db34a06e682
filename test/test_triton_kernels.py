"""The Triton kernels through TritonBackend, against float64 dense attention.

Runs on the GPU if there is one; else in Triton's interpreter, on lengths that suit its small tiles.
Buffers are full of NaN before each launch, so an element that is not written shows.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import oracle

pytest.importorskip("triton")

from ring_flash_attn.backends import triton as triton_backend
from ring_flash_attn.backends import work
from ring_flash_attn.backends.base import GradTarget, state_dtype
from ring_flash_attn.backends.triton import TritonBackend
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.plan import Block, StepPlan, plan_local, plan_ring
from ring_flash_attn.core.tables import key_tables, query_tables
from ring_flash_attn.kernels.configs import launch_config

pytestmark = [
    pytest.mark.kernel,
    # Triton's interpreter turns arrays of one element into loop bounds.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

FLOAT32_BOUND = 2e-5
# A GPU's tiles have 64 to 128 rows where the interpreter's have 16 and 32.
SCALE = 5 if torch.cuda.is_available() else 1
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Inputs:
    """q, dout [B, L, H, D]; k, v [B, Lk, Hk, D]; dlse [B, H, L] float32 or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None


def random_inputs(
    device,
    q_len: int,
    k_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 16,
    batch: int = 1,
    dlse: bool = True,
) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    k_len = q_len if k_len is None else k_len
    q, dout = (normal(batch, q_len, heads[0], head_dim) for _ in range(2))
    k, v = (normal(batch, k_len, heads[1], head_dim) for _ in range(2))
    lse_gradient = normal(batch, heads[0], q_len, dtype=torch.float32)
    return Inputs(q, k, v, dout, lse_gradient if dlse else None)


def poisoned(shape, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full(tuple(shape), torch.nan, device=like.device, dtype=dtype or torch.float32)


def forward_ring(backend, attention, steps, q, sources, out_dtype=None):
    """Fold steps into NaN-filled (out, lse) as a ring does: unseen rows of step 0 are filled."""
    out = poisoned(q.shape, q, out_dtype)
    lse = poisoned((q.shape[0], q.shape[2], q.shape[1]), q)
    for begin, end in steps[0].unseen_q():
        out[:, begin:end], lse[:, :, begin:end] = 0.0, -torch.inf
    for step in steps:
        k, v = sources[step.source]
        backend.forward(attention, step, q, k, v, out, lse)
    return out, lse


def backward_ring(backend, attention, steps, saved, q, sources, targets) -> Tensor:
    """Fold steps into a NaN-filled dq; `targets` maps a source to its (dk, dv) so far."""
    dq = poisoned(q.shape, q)
    for begin, end in steps[0].unseen_q():
        dq[:, begin:end] = 0.0
    for step in steps:
        k, v = sources[step.source]

        def target(step=step, k=k) -> GradTarget:
            add = step.source in targets
            if not add:
                targets[step.source] = poisoned(k.shape, k), poisoned(k.shape, k)
                for begin, end in step.unseen_k():
                    for x in targets[step.source]:
                        x[:, begin:end] = 0.0
            return GradTarget(*targets[step.source], add)

        backend.backward(attention, step, saved, q, k, v, dq, target)
    return dq


def run(attention, plan, x: Inputs, backend=None, out_dtype=None) -> oracle.Result:
    """Run one step forward and backward."""
    backend = backend or TritonBackend()
    assert backend.unsupported(attention, x.q, x.k, x.v) == []
    sources = {plan.source: (x.k, x.v)}
    out, lse = forward_ring(backend, attention, [plan], x.q, sources, out_dtype)
    saved = backend.prepare_backward(x.dout, out.to(x.q.dtype), lse, x.dlse)
    targets = {}
    dq = backward_ring(backend, attention, [plan], saved, x.q, sources, targets)
    return oracle.Result(out, lse, dq, *targets[plan.source])


def assert_right(got: oracle.Result, x: Inputs, mask: Tensor, scale: float) -> None:
    """Hold float32 to FLOAT32_BOUND and 16 bit to twice the error of a dense computation in it."""
    wide = [t.double() for t in (x.q, x.k, x.v)]
    dlse = None if x.dlse is None else x.dlse.double()
    want = oracle.dense(*wide, mask, x.dout.double(), dlse, scale)
    if x.q.dtype == torch.float32:
        for name, ours, truth in zip(oracle.Result._fields, got, want, strict=True):
            assert oracle.errors(ours, truth).max_abs < FLOAT32_BOUND, name
    else:
        yardstick = oracle.dense_in_dtype(x.q, x.k, x.v, mask, x.dout, x.dlse, scale)
        assert not oracle.beyond_bound(got, want, yardstick)


def check_local(
    x: Inputs, causal=False, window=(-1, -1), scale=0.3, backend=None, deterministic=False
) -> oracle.Result:
    """Run one device, compare, and return what came out."""
    attention = Attention(scale, causal, window, deterministic)
    q_len, k_len = x.q.shape[1], x.k.shape[1]
    got = run(attention, plan_local(attention, q_len, k_len), x, backend)
    rows = list(range(k_len - q_len, k_len))
    mask = oracle.visible(rows, list(range(k_len)), causal, window, x.q.device)
    assert_right(got, x, mask, scale)
    return got


def with_config(**changes):
    """Return a backend whose launch configurations are the table's with some fields replaced."""

    def lookup(*key):
        choice = launch_config(*key)
        return choice._replace(config=replace(choice.config, **changes))

    return TritonBackend(lookup)


MASKS = {
    "full": (False, (-1, -1)),
    "causal": (True, (-1, -1)),
    "causal-left9": (True, (9 * SCALE, -1)),
    "left9": (False, (9 * SCALE, -1)),
    "right6": (False, (-1, 6 * SCALE)),
    "left5-right3": (False, (5 * SCALE, 3 * SCALE)),
    "left40-right1": (False, (40 * SCALE, 1)),
    "itself": (False, (0, 0)),
    "wider-than-all": (False, (1000, 1000)),
}
LENGTHS = {
    "equal": (50 * SCALE, 50 * SCALE),
    "tiles-exactly": (64 * SCALE, 64 * SCALE),
    "one-row": (1, 50 * SCALE),
    "one-key": (37 * SCALE, 1),
    "fewer-queries": (17 * SCALE, 50 * SCALE),
    "fewer-keys": (50 * SCALE, 17 * SCALE),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(device, mask: str):
    check_local(random_inputs(device, 50 * SCALE + 3), *MASKS[mask])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("mask", ["full", "causal", "left5-right3"])
def test_lengths(device, mask: str, lengths: str):
    check_local(random_inputs(device, *LENGTHS[lengths]), *MASKS[mask])


@pytest.mark.parametrize("extra", range(16))
@pytest.mark.parametrize("left", [-1, 20], ids=["causal", "causal-left20"])
def test_alignments(device, left: int, extra: int):
    """Every remainder of the band's edges and of the last tile, counted in the smallest tiles."""
    x = random_inputs(device, 34 + extra, 50, heads=(1, 1))
    check_local(x, causal=True, window=(left, -1))


def test_queries_that_see_nothing_anywhere(device):
    # More queries than keys: the first 33 see nothing, whatever the tiles.
    x = random_inputs(device, 50 * SCALE, 17 * SCALE)
    got = check_local(x, causal=True)
    unseen = slice(0, 33 * SCALE)
    assert (got.lse[:, :, unseen] == -torch.inf).all()
    assert not got.out[:, unseen].any() and not got.dq[:, unseen].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 96, 128, 160, 192, 256])
def test_head_dims(device, head_dim: int, dtype: torch.dtype):
    x = random_inputs(device, 37 * SCALE, dtype=dtype, head_dim=head_dim)
    check_local(x, causal=True, scale=head_dim**-0.5)


@pytest.mark.parametrize("head_dim", [8, 24, 32, 64, 80, 96, 128, 192, 256])
def test_head_dims_float32(device, head_dim: int):
    x = random_inputs(device, 37 * SCALE, head_dim=head_dim)
    check_local(x, causal=True, scale=head_dim**-0.5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=lambda h: f"{h[0]}on{h[1]}")
def test_grouped_heads_and_batches(device, heads: tuple[int, int]):
    x = random_inputs(device, 21 * SCALE, 25 * SCALE, torch.bfloat16, heads, batch=2)
    check_local(x, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_the_gradient_of_lse(device, dtype: torch.dtype):
    check_local(random_inputs(device, 37 * SCALE, dtype=dtype, dlse=False), causal=True)


def _packed(x: Inputs) -> Inputs:
    qkv = torch.stack((x.q, x.k, x.v), 2)
    return replace(x, q=qkv[:, :, 0], k=qkv[:, :, 1], v=qkv[:, :, 2])


def _heads_first(x: Inputs) -> Inputs:
    def strided(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    return replace(x, q=strided(x.q), k=strided(x.k), v=strided(x.v), dout=strided(x.dout))


def _wider(x: Inputs, before: int, after: int) -> Inputs:
    def strided(t: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(t, (before, after), value=torch.nan)
        return wide[..., before : wide.shape[-1] - after]

    return replace(x, q=strided(x.q), k=strided(x.k), v=strided(x.v), dout=strided(x.dout))


def _odd_strides(x: Inputs) -> Inputs:
    return _wider(x, 0, 3)


def _odd_base(x: Inputs) -> Inputs:
    return _wider(x, 1, 15)


def _last_dim_strided(x: Inputs) -> Inputs:
    def strided(t: Tensor) -> Tensor:
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    return replace(x, q=strided(x.q), k=strided(x.k), v=strided(x.v), dout=strided(x.dout))


def _expanded(x: Inputs) -> Inputs:
    # What autograd gives for out.sum() and lse.sum(); keys shared by all heads.
    dout, dlse = (torch.ones((), device=t.device, dtype=t.dtype) for t in (x.dout, x.dlse))
    k, v = (t[:, :, :1].expand(t.shape) for t in (x.k, x.v))
    return replace(x, k=k, v=v, dout=dout.expand(x.dout.shape), dlse=dlse.expand(x.dlse.shape))


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(
    "view", [_packed, _heads_first, _odd_strides, _odd_base, _last_dim_strided, _expanded]
)
def test_strided_inputs(device, view, tma: bool):
    x = random_inputs(device, 37 * SCALE, dtype=torch.bfloat16, heads=(2, 2), batch=2)
    check_local(view(x), causal=True, backend=with_config(tma=tma))


@pytest.mark.parametrize("mask", ["causal", "left5-right3"])
@pytest.mark.parametrize("head_dim", [24, 64, 80])
def test_descriptors_load_what_pointers_load(device, head_dim: int, mask: str):
    x = random_inputs(device, 50 * SCALE, 37 * SCALE, torch.bfloat16, (2, 1), head_dim, batch=2)
    by_pointer = check_local(x, *MASKS[mask], backend=with_config(tma=False))
    by_descriptor = check_local(x, *MASKS[mask], backend=with_config(tma=True))
    if not torch.cuda.is_available():  # Compiled, they are two kernels, which may round apart.
        for name, a, b in zip(oracle.Result._fields, by_pointer, by_descriptor, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("poison", ["next-batch", "next-rows"])
def test_nan_next_to_the_sequence_stays_there(device, poison: str, tma: bool):
    clean = random_inputs(device, 37 * SCALE, dtype=torch.bfloat16, batch=2, dlse=False)
    if poison == "next-batch":
        tensors = {name: getattr(clean, name).clone() for name in ("q", "k", "v", "dout")}
        for t in tensors.values():
            t[1] = torch.nan
        dirty = replace(clean, **tensors)
    else:
        tensors = {}
        for name in ("q", "k", "v", "dout"):
            t = getattr(clean, name)
            longer = torch.full_like(torch.cat([t, t], 1), torch.nan)
            longer[:, : t.shape[1]] = t
            tensors[name] = longer[:, : t.shape[1]]
        dirty = replace(clean, **tensors)
    backend = with_config(tma=tma)
    want = check_local(clean, causal=True, backend=backend)
    attention = Attention(0.3, True)
    got = run(attention, plan_local(attention, 37 * SCALE, 37 * SCALE), dirty, backend)
    kept = slice(0, 1) if poison == "next-batch" else slice(0, 2)
    for name, a, b in zip(oracle.Result._fields, got, want, strict=True):
        assert torch.equal(a[kept], b[kept]), name


RING_MASKS = ["full", "causal", "causal-left9", "left40-right1"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids=lambda n: f"P{n}")
@pytest.mark.parametrize("mask", RING_MASKS)
@pytest.mark.parametrize("kind", oracle.LAYOUTS)
def test_ring_in_one_process(device, kind: str, mask: str, world_size: int):
    """All ranks' steps one after the other: what merges across steps, and across blocks of one."""
    causal, window = MASKS[mask]
    local_len = 2 * ((36 * SCALE + 3) // world_size // 2)
    size = world_size
    x = random_inputs(device, local_len * size, heads=(1, 1))
    got = ring(Attention(0.3, causal, window), Layout(kind, local_len, size), x)
    rows = list(range(local_len * size))
    assert_right(got, x, oracle.visible(rows, rows, causal, window, device), 0.3)


def ring(attention, layout: Layout, x: Inputs) -> oracle.Result:
    """Run every rank's ring on the shards of x, and return the results as global tensors."""
    backend, size = TritonBackend(), layout.world_size

    def shards(t: Tensor, dim: int = 1) -> list[Tensor]:
        return [oracle.shard(t, layout.kind, size, rank, dim) for rank in range(size)]

    q, dout, dlse = shards(x.q), shards(x.dout), shards(x.dlse, 2)
    sources = dict(enumerate(zip(shards(x.k), shards(x.v), strict=True)))
    outs, lses, dqs, targets = [], [], [], {}
    for rank in range(size):
        steps = plan_ring(attention, layout, layout, rank).steps
        out, lse = forward_ring(backend, attention, steps, q[rank], sources)
        saved = backend.prepare_backward(dout[rank], out.to(x.q.dtype), lse, dlse[rank])
        dq = backward_ring(backend, attention, steps, saved, q[rank], sources, targets)
        outs.append(out), lses.append(lse), dqs.append(dq)
    dks, dvs = ([targets[rank][i] for rank in range(size)] for i in (0, 1))
    return oracle.Result(
        oracle.unshard(outs, layout.kind),
        oracle.unshard(lses, layout.kind, 2),
        *(oracle.unshard(grads, layout.kind) for grads in (dqs, dks, dvs)),
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_several_blocks_on_one_row(device, dtype: torch.dtype):
    """A zigzag with a wide window: a tile walks several entries, in dKV for each query head."""
    window, local_len, size = (20 * SCALE, 20 * SCALE), 18 * SCALE // 2 * 2, 4
    attention, layout = Attention(0.2, False, window), Layout("zigzag", local_len, size)
    steps = [
        step for rank in range(size) for step in plan_ring(attention, layout, layout, rank).steps
    ]
    for tables in (query_tables, key_tables):
        tiles = [tile for step in steps for tile in tables(step.blocks, 16).tiles]
        assert any(tile.end_entry - tile.first_entry > 1 for tile in tiles)
    x = random_inputs(device, local_len * size, dtype=dtype, heads=(2, 1), head_dim=32)
    rows = list(range(local_len * size))
    mask = oracle.visible(rows, rows, False, window, device)
    assert_right(ring(attention, layout, x), x, mask, 0.2)


def test_rows_that_see_nothing_in_a_step(device):
    """Rows of a tile that the band misses: (0, -inf) merged with (0, -inf)."""
    n = 40 * SCALE
    x = random_inputs(device, n, dlse=False)
    attention, backend = Attention(0.3), TritonBackend()
    # Query i sees keys up to i - 20; not trimmed, so the first 20 rows are in tiles.
    below = Block(0, n, 0, n, -n, -20 * SCALE)
    out, lse = poisoned(x.q.shape, x.q), poisoned((1, 2, n), x.q)
    backend.forward(attention, StepPlan(0, 0, (below,), n, n), x.q, x.k, x.v, out, lse)
    k, v = x.k.flip(1), x.v.flip(1)
    backend.forward(attention, StepPlan(1, 1, (below,), n, n), x.q, k, v, out, lse)
    rows = list(range(n))
    seen = oracle.visible(rows, [j + 20 * SCALE for j in rows], True, device=device)
    doubled = replace(x, k=torch.cat([x.k, k], 1), v=torch.cat([x.v, v], 1))
    wide = [t.double() for t in (doubled.q, doubled.k, doubled.v)]
    want_out, want_lse = oracle.attention(*wide, torch.cat([seen, seen], 1), 0.3)
    assert oracle.errors(out, want_out).max_abs < FLOAT32_BOUND
    assert oracle.errors(lse, want_lse).max_abs < FLOAT32_BOUND
    assert not out[:, : 20 * SCALE].any()


@pytest.mark.parametrize("carry", [False, True], ids=["store", "carry"])
def test_out_of_the_inputs_dtype(device, carry: bool):
    """A 16-bit `out` is the float32 one, rounded by each step."""
    n = 37 * SCALE
    x = random_inputs(device, n, dtype=torch.bfloat16, head_dim=80, dlse=False)
    attention, backend = Attention(0.2), TritonBackend()
    halves = [Block(0, n, a, b, a - n + 1, b - 1) for a, b in ((0, n // 2), (n // 2, n))]
    blocks = [(halves[0],), (halves[1],)] if carry else [tuple(halves)]
    steps = [StepPlan(i, 0, step_blocks, n, n) for i, step_blocks in enumerate(blocks)]
    sources = {0: (x.k, x.v)}
    out, lse = forward_ring(backend, attention, steps, x.q, sources, torch.bfloat16)
    everything = torch.ones(n, n, dtype=torch.bool, device=device)
    wide = [t.double() for t in (x.q, x.k, x.v)]
    want_out, want_lse = oracle.attention(*wide, everything, 0.2)
    in_dtype = oracle.dense_in_dtype(x.q, x.k, x.v, everything, x.dout, None, 0.2)
    bound = 2 * oracle.errors(in_dtype.out, want_out).max_abs + 1e-5
    assert oracle.errors(out, want_out).max_abs <= bound
    assert oracle.errors(lse, want_lse).max_abs < FLOAT32_BOUND


@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_copies_of_lse_and_delta(device, num_warps: int):
    """With more warps dKV loads lse and delta several times over (LaunchConfig.copies)."""
    if torch.cuda.is_available() and num_warps == 1:
        pytest.skip("a GPU's tiles do not fit one warp")
    check_local(random_inputs(device, 37 * SCALE), True, backend=with_config(num_warps=num_warps))


@pytest.mark.parametrize("heads_that_fit", [1, 2, 100])
def test_order_of_programs_changes_nothing(device, monkeypatch, heads_that_fit: int):
    x = random_inputs(device, 37 * SCALE, heads=(6, 3))
    want = check_local(x, causal=True)
    monkeypatch.setattr(
        work, "L2_BYTES", heads_that_fit * 2 * x.k[0, :, 0].numel() * x.k.element_size()
    )
    got = check_local(x, causal=True)
    for name, a, b in zip(oracle.Result._fields, got, want, strict=True):
        assert torch.equal(a, b), name


def test_state_may_be_a_slice_of_heads(device):
    """llama3 computes some heads at a time, in place."""
    n = 37 * SCALE
    x = random_inputs(device, n, dtype=torch.bfloat16, heads=(4, 2), batch=2)
    attention, backend = Attention(0.3, True), TritonBackend()
    plan = plan_local(attention, n, n)
    out, dq = poisoned(x.q.shape, x.q), poisoned(x.q.shape, x.q)
    dk, dv = poisoned(x.k.shape, x.k), poisoned(x.k.shape, x.k)
    lse = poisoned((2, 4, n), x.q)
    for h in (0, 1):
        mine, keys = slice(2 * h, 2 * h + 2), slice(h, h + 1)
        q, k, v = x.q[:, :, mine], x.k[:, :, keys], x.v[:, :, keys]
        backend.forward(attention, plan, q, k, v, out[:, :, mine], lse[:, mine])
        saved = backend.prepare_backward(
            x.dout[:, :, mine], out[:, :, mine].to(q.dtype), lse[:, mine], x.dlse[:, mine]
        )
        target = GradTarget(dk[:, :, keys], dv[:, :, keys], False)
        backend.backward(attention, plan, saved, q, k, v, dq[:, :, mine], lambda t=target: t)
    rows = list(range(n))
    got = oracle.Result(out, lse, dq, dk, dv)
    assert_right(got, x, oracle.visible(rows, rows, True, device=device), 0.3)


def test_gradients_are_repeatable(device):
    x = random_inputs(device, 50 * SCALE, dtype=torch.bfloat16, heads=(4, 1))
    first, second = (check_local(x, causal=True, deterministic=True) for _ in range(2))
    for name, a, b in zip(oracle.Result._fields, first, second, strict=True):
        assert torch.equal(a, b), name


def test_target_is_asked_for_once_and_after_dq(device):
    n = 20
    x = random_inputs(device, n)
    attention, backend = Attention(0.3, True), TritonBackend()
    plan = plan_local(attention, n, n)
    out, lse = forward_ring(backend, attention, [plan], x.q, {0: (x.k, x.v)})
    saved = backend.prepare_backward(x.dout, out, lse, x.dlse)
    dq, calls = poisoned(x.q.shape, x.q), []

    def target() -> GradTarget:
        calls.append(not dq.isnan().any())
        return GradTarget(torch.zeros_like(x.k), torch.zeros_like(x.v), True)

    backend.backward(attention, plan, saved, x.q, x.k, x.v, dq, target)
    assert calls == [True]


def test_a_step_without_blocks_touches_nothing(device):
    x = random_inputs(device, 20)
    attention, backend = Attention(0.3, True), TritonBackend()
    nothing = StepPlan(1, 1, (), 20, 20)
    out, lse = torch.ones_like(x.q), torch.ones(1, 2, 20, device=device)
    backend.forward(attention, nothing, x.q, x.k, x.v, out, lse)
    saved = backend.prepare_backward(x.dout, out, lse, None)
    dq = torch.ones_like(x.q)
    backend.backward(attention, nothing, saved, x.q, x.k, x.v, dq, lambda: pytest.fail("asked"))
    assert (out == 1).all() and (lse == 1).all() and (dq == 1).all()


def test_reasons_name_what_came_and_who_takes_it(device):
    backend, attention = TritonBackend(), Attention(1.0)

    def reasons(dtype=torch.float32, head_dim=16, v_dim=None, k_dtype=None) -> str:
        q = torch.zeros(1, 4, 2, head_dim, device=device, dtype=dtype)
        k = q.to(k_dtype or dtype)
        return "; ".join(backend.unsupported(attention, q, k, k[..., :v_dim]))

    assert reasons() == ""
    assert "float64" in reasons(torch.float64) and "reference" in reasons(torch.float64)
    assert "264" in reasons(head_dim=264) and "reference" in reasons(head_dim=264)
    assert "20" in reasons(head_dim=20)
    assert "8 and 16" in reasons(v_dim=8)
    assert "float16" in reasons(k_dtype=torch.float16)
    assert state_dtype(torch.bfloat16) == torch.float32


def test_a_cpu_tensor_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_backend, "INTERPRETED", type(triton_backend.INTERPRETED)(False))
    q = torch.zeros(1, 4, 2, 16)
    (reason,) = TritonBackend().unsupported(Attention(1.0), q, q, q)
    assert "TRITON_INTERPRET=1" in reason and "before importing ring_flash_attn" in reason


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_finished_result_may_have_another_dtype_than_in_the_call_before(device, head_dim: int):
    """Calls alike in all but where finished rows go: launches are kept from call to call."""
    n = 37 * SCALE
    x = random_inputs(device, n, dtype=torch.bfloat16, head_dim=head_dim, dlse=False)
    attention, backend = Attention(head_dim**-0.5, True), TritonBackend()
    step = plan_local(attention, n, n)
    seen = {}
    for turn in range(2):
        for dtype in (None, torch.bfloat16, torch.float16):
            out, dq = poisoned(x.q.shape, x.q), poisoned(x.q.shape, x.q)
            results = [None if dtype is None else poisoned(x.q.shape, x.q, dtype) for _ in range(2)]
            lse = poisoned((1, x.q.shape[2], n), x.q)
            backend.forward(attention, step, x.q, x.k, x.v, out, lse, results[0])
            final = out if dtype is None else results[0]
            saved = backend.prepare_backward(x.dout, final.to(x.q.dtype), lse, None)
            dk, dv = poisoned(x.k.shape, x.k), poisoned(x.k.shape, x.k)
            target = GradTarget(dk, dv, add=False)
            backend.backward(
                attention, step, saved, x.q, x.k, x.v, dq, lambda to=target: to, results[1]
            )
            seen[turn, dtype] = final, dq if dtype is None else results[1]
    for (_, dtype), got in seen.items():
        for ours, wide in zip(got, seen[0, None], strict=True):
            assert ours.dtype == (dtype or torch.float32)
            assert oracle.errors(ours.double(), wide.double()).max_abs <= 2**-6
