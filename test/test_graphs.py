"""CUDA graphs of whole calls: what can be captured replays as eager, what cannot is refused.

On GPUs each exchange is captured, forward and backward, and replayed with fresh inputs. On the CPU
a capture is pretended: an error must come before anything is sent.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from ring_flash_attn.core import capture
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.capture import check_messages
from ring_flash_attn.core.exchange import RingExchange
from ring_flash_attn.core.gather import GatheredCall, _Gather
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.plan import plan_ring
from ring_flash_attn.ranks import Ranks

GPU = torch.device("cuda", 0)
BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
NAMES = ("out", "lse", "dq", "dk", "dv")
ROWS, HEAD_DIM = 512, 128
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


def refused(make) -> str:
    """Return what `make` raises, with the messages that were started before."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(dist, "batch_isend_irecv", sent.append)
        with pytest.raises(RuntimeError) as caught:
            make()
    assert not sent
    return str(caught.value)


def refusals_over_gloo(rank: int) -> list[str]:
    """Return what a ring, a gather and a ring of one step say in a pretended capture."""
    k = SimpleNamespace(shape=(1, 8, 2, 16), device=GPU, dtype=torch.float32)
    attention, rows = Attention(1.0, True, (-1, -1)), Layout("zigzag", 8, 2)
    plan = plan_ring(attention, rows, rows, rank)
    ring = refused(lambda: RingExchange(None, plan, k, k, torch.float32))
    call = GatheredCall(attention, plan, None, None, 1, slice(0, 16))
    gather = refused(lambda: _Gather(call, k, k))
    alone = Layout("zigzag", 8, 1)
    RingExchange(None, plan_ring(attention, alone, alone, 0), k, k, torch.float32)  # sends nothing
    return [ring, gather]


def test_gloo_is_refused_before_anything_is_sent():
    for told in run_ranks(2, refusals_over_gloo):
        for text in told:
            assert "which a CUDA graph cannot capture" in text
            assert "through host memory; use an nccl group" in text


def refusals_over_nccl(rank: int) -> list[str]:
    """Return what a group that says it is nccl's says before its first call, and after."""
    capture.ranks_of = lambda group: Ranks(rank, 2, (0, 1), "cuda:nccl")
    told = [refused(lambda: check_messages(None, GPU))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        check_messages(None, GPU)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        check_messages(None, GPU)
        for value in ("1", "Y", "true"):
            patch.setenv(BLOCKING, value)
            told.append(refused(lambda: check_messages(None, GPU)))
        patch.setenv(BLOCKING, "0")
        check_messages(None, GPU)
    return told


def test_nccl_needs_a_call_before_and_waits_on_streams():
    for first, *blocking in run_ranks(2, refusals_over_nccl):
        assert first.endswith("run one call before")
        assert len(blocking) == 3 and all(BLOCKING in text for text in blocking)


def test_cpu_tensors_are_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked"))
    check_messages(None, torch.device("cpu"))


def drawn(rank: int, seed: int, packed: bool) -> list[torch.Tensor]:
    """Return this rank's q, k, v, dout [1, L, ...], or [T, ...] if packed."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    tensors = [
        torch.randn(1, ROWS, heads, HEAD_DIM, generator=generator).to(
            f"cuda:{rank}", torch.bfloat16
        )
        for heads in (8, 2, 2, 8)
    ]
    return [x[0] for x in tensors] if packed else tensors


def attend(form: str, exchange: str, deterministic: bool, rank: int, size: int):
    """Return q, k, v -> out, lse of a form of call."""
    from ring_flash_attn import (
        gathered_attention,
        llama3_flash_attn_prepare_cu_seqlens,
        packed_attention,
        ring_attention,
    )

    options = {"backend": "triton", "causal": True, "deterministic": deterministic}
    if form == "batch":
        return lambda *x: ring_attention(*x, layout="zigzag", exchange=exchange, **options)
    edges = torch.tensor([0, 150, 400, ROWS], dtype=torch.int32, device=f"cuda:{rank}")
    if form == "packed":
        options |= {"layout": "zigzag", "exchange": exchange}
        return lambda *x: packed_attention(*x, edges, 250, **options)
    given = llama3_flash_attn_prepare_cu_seqlens(edges * size, True, rank, size)
    prepared = *given[:4], 1, given[4]
    return lambda *x: gathered_attention(*x, *prepared, **options)


def differing(got: list[torch.Tensor], want: list[torch.Tensor], exact: bool) -> list[str]:
    """Return the names of results that differ: in a bit, or if not `exact` by more than rounding.

    out and lse repeat bit for bit always.
    """
    bad = []
    for name, x, y in zip(NAMES, got, want, strict=True):
        near = 0.0 if exact or name in ("out", "lse") else 2**-7 * y.abs().max().item()
        if not torch.allclose(x, y, rtol=0, atol=near):
            bad.append(name)
    return bad


def replayed(
    rank: int, size: int, form: str, exchange: str, deterministic: bool
) -> list[list[str]]:
    """Capture a forward and a backward; return the results that differ from eager, by replay."""
    run, packed = attend(form, exchange, deterministic, rank, size), form != "batch"

    def both(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = run(*leaves)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

    static = drawn(rank, 0, packed)
    for _ in range(3):
        both(*static)
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The process group's watchdog goes on asking the GPU about its own events.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = both(*static)
    exact, bad = deterministic and form != "llama3", []  # whose sums are NCCL's
    for seed in range(1, 7):
        fresh = drawn(rank, seed, packed)
        want = both(*fresh)  # eager calls between the replays
        for target, x in zip(static, fresh, strict=True):
            target.copy_(x)
        for _ in range(1 + seed % 2):
            graph.replay()
        bad.append(differing(results, want, exact))
    torch.cuda.synchronize()
    return bad


def all_replayed(rank: int, size: int, exchange: str, forms: tuple[str, ...]) -> dict:
    """Return what differs by form and determinism."""
    torch.cuda.set_device(rank)
    cases = [(form, deterministic) for form in forms for deterministic in (True, False)]
    found = {}
    for form, deterministic in cases:
        print(f"rank {rank}: {form} over {exchange}, deterministic {deterministic}", flush=True)
        found[form, deterministic] = replayed(rank, size, form, exchange, deterministic)
    return found


@pytest.mark.gpu
@needs_gpus
@pytest.mark.parametrize(
    ("exchange", "forms"),
    [
        ("ring", ("batch", "packed")),
        ("copy-engine", ("batch", "packed")),
        ("gather", ("llama3",)),
    ],
    ids=["ring", "copy-engine", "gather"],
)
def test_replays_equal_eager_calls(exchange: str, forms: tuple[str, ...]):
    size = min(4, torch.cuda.device_count())
    for found in run_ranks(size, all_replayed, size, exchange, forms, transport="nccl"):
        assert found == {case: [[]] * 6 for case in found}


def refusal_on_gpu(rank: int, over_gloo: bool) -> list:
    """Return what a capture is told, and where a call after it differs from one before it."""
    from ring_flash_attn import ring_attention

    torch.cuda.set_device(rank)
    group = dist.new_group(backend="gloo") if over_gloo else None
    tensors = drawn(rank, 0, packed=False)[:3]

    def call():
        with torch.no_grad():
            return ring_attention(*tensors, backend="triton", exchange="ring", group=group)

    before = call()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
        with pytest.raises(RuntimeError) as caught:
            call()
    return [str(caught.value), [torch.equal(x, y) for x, y in zip(call(), before, strict=True)]]


@pytest.mark.gpu
@needs_gpus
@pytest.mark.parametrize("way", ["gloo", "blocking"])
def test_a_refused_capture_leaves_the_group_in_order(way: str, monkeypatch):
    over_gloo = way == "gloo"
    if not over_gloo:
        monkeypatch.setenv(BLOCKING, "1")
    for told, same in run_ranks(2, refusal_on_gpu, over_gloo, transport="nccl", timeout_s=150):
        assert ("nccl group" if over_gloo else BLOCKING) in told
        assert same == [True, True]
