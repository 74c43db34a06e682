"""What a packed call sends, and in which order, and where it reads tensors on the host."""

import sys
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import ring_flash_attn as rfa
from packed_cases import GATHER, PackedCase, edges_of
from ranks import run_ranks
from ring_flash_attn.core.agree import EXCHANGED_CALLS

FUNCS = {
    "contiguous": "ring_flash_attn_varlen_func",
    "zigzag": "zigzag_ring_flash_attn_varlen_func",
    "stripe": "stripe_flash_attn_varlen_func",
    GATHER: "llama3_flash_attn_varlen_func",
}
# Whatever turns a tensor's numbers into the host's.
READS = (
    *("item", "tolist", "numpy", "cpu", "nonzero"),
    *("__bool__", "__int__", "__index__", "__float__"),
)
HALF, SINGLE = torch.float16, torch.float32
FORWARD, BACKWARD = ("forward",), ("backward",)


class CallCase(PackedCase):
    """Two small documents."""

    local_lengths = (2, 4)


def case_of(layout: str, causal: bool, heads_k_stride: int = 1) -> CallCase:
    return CallCase(layout, "", "causal" if causal else "full", 4, 2, 16, heads_k_stride)


class Messages(TorchDispatchMode):
    """Record all that torch.distributed does: (operation, elements, dtype), the peer if it has one.

    Every send, receive and collective of every process group passes here, whatever it is called by.
    """

    def __init__(self, events: list) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in ("send", "recv_"):
            [message], _, peer, _ = args
            self._events.append((name, message.numel(), message.dtype, peer))
        elif func.namespace == "c10d":
            # A collective's arguments are its output, then its input.
            message = args[1] if isinstance(args[1], torch.Tensor) else torch.empty(0)
            self._events.append((name, message.numel(), message.dtype))
        return func(*args, **(kwargs or {}))


def record_steps(events: list) -> None:
    """Record when a backend computes; in a process of its own, since nothing is put back.

    Triton's kernels, which the interpreter takes a minute for, are left out: no number is asked.
    """
    from ring_flash_attn.backends import launch
    from ring_flash_attn.backends.blocks import BlockBackend
    from ring_flash_attn.backends.triton import TritonBackend

    launch.launch = lambda *_, **__: None

    def recorded(name: str, compute):
        def method(*args):
            events.append((name,))
            return compute(*args)

        return method

    for backend in (BlockBackend, TritonBackend):
        for name in ("forward", "backward"):
            setattr(backend, name, recorded(name, getattr(backend, name)))


def record_reads(reads: list) -> None:
    """Record which functions of the library read a tensor's numbers on the host."""

    def recorded(original):
        def method(tensor, *args, **options):
            caller = sys._getframe(1)
            module = caller.f_globals["__name__"]
            if module.startswith("ring_flash_attn."):
                name = module.removeprefix("ring_flash_attn.")
                reads.append(f"{name}.{caller.f_code.co_name}")
            return original(tensor, *args, **options)

        return method

    for name in READS:
        setattr(torch.Tensor, name, recorded(getattr(torch.Tensor, name)))


def calls_of(rank: int, world_size: int, kernels: str, cases: list[CallCase]) -> list[tuple]:
    """Return, case by case, the events and the reads of a forward and of a backward."""
    events, reads, found = [], [], []
    record_steps(events)
    record_reads(reads)
    for index, case in enumerate(cases):
        # The first calls of the group let the ranks agree.
        for _ in range(EXCHANGED_CALLS + 1 if index == 0 else 1):
            with Messages(events):
                passes = forward_and_backward(rank, world_size, kernels, case, events, reads)
        found.append(passes)
    return found


def forward_and_backward(
    rank: int, world_size: int, kernels: str, case: CallCase, events: list, reads: list
) -> tuple:
    """Return the events and the reads of a forward, and of its backward."""
    q, k, v = (torch.randn(6, heads, 16).half().requires_grad_() for heads in (4, 2, 2))
    func = getattr(rfa, FUNCS[case.layout] if kernels == "native" else twin(case.layout))
    documents = documents_of(case, rank, world_size)
    events.clear()
    reads.clear()
    out = func(q, k, v, *documents, causal=case.mask == "causal")
    forward = events.copy(), reads.copy()
    events.clear()
    reads.clear()
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return forward, (events.copy(), reads.copy())


def twin(layout: str) -> str:
    return f"triton_{FUNCS[layout]}"


def documents_of(case: CallCase, rank: int, world_size: int) -> tuple:
    if case.layout != GATHER:
        edges = edges_of(case.local_lengths)
        return torch.tensor(edges, dtype=torch.int32), max(case.local_lengths)
    edges = edges_of(n * world_size for n in case.local_lengths)
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    causal = case.mask == "causal"
    prepared = rfa.llama3_flash_attn_prepare_cu_seqlens(cu_seqlens, causal, rank, world_size)
    return *prepared[:4], case.heads_k_stride, prepared[4]


def exchange(rank: int, world_size: int, dtype: torch.dtype, offset: int = 1) -> list[tuple]:
    """Return a message of k, v or of dk, dv: 2 tensors of 6 rows, 2 heads, width 16."""
    size = 2 * 6 * 2 * 16
    to, source = (rank + offset) % world_size, (rank - offset) % world_size
    return [("send", size, dtype, to), ("recv_", size, dtype, source)]


def ring_events(rank: int, world_size: int) -> tuple[list, list]:
    """Return what a ring does whose every step sees something."""
    kv, dkv = (exchange(rank, world_size, dtype) for dtype in (HALF, SINGLE))
    # Sums start at step 1, the first reader's; after the last step they are P - 1 ranks from home.
    home = exchange(rank, world_size, SINGLE, 1 - world_size)
    hops = world_size - 1
    forward = [*kv, FORWARD] * hops + [FORWARD]
    backward = [*kv, BACKWARD] + [*kv, BACKWARD, *dkv] * (hops - 1) + [BACKWARD, *home]
    return forward, backward


def gather_events(slices: int) -> tuple[list, list]:
    """Return what llama3 does, where each next slice is gathered while one is computed."""
    size = 2 * 6 * (2 // slices) * 16  # k and v in one message
    gather = [("_allgather_base_", size, HALF)]
    scatter = [("_reduce_scatter_base_", size * 2, SINGLE)]
    forward, backward = [*gather], [*gather]
    for index in range(slices):
        following = gather if index + 1 < slices else []
        forward += [*following, FORWARD]
        backward += [*following, BACKWARD, *scatter]
    return forward, backward


RINGS = [case_of(layout, causal=False) for layout in oracle.LAYOUTS]
# Causal rows see something of every rank here, of contiguous ones only the earlier ranks do.
RINGS += [case_of(layout, causal=True) for layout in ("zigzag", "stripe")]
GATHERS = [case_of(GATHER, causal, stride) for causal in (False, True) for stride in (1, 2)]
CASES = {2: [*RINGS, *GATHERS], 3: RINGS}
CALLS = [
    pytest.param(
        kernels,
        world_size,
        index,
        marks=pytest.mark.kernel if kernels == "triton" else (),
        id=f"{kernels}-P{world_size}-{case.layout}-{case.mask}-{case.heads_k_stride}",
    )
    for kernels in ("native", "triton")
    for world_size, cases in CASES.items()
    for index, case in enumerate(cases)
]


@cache
def recorded(world_size: int, kernels: str):
    return run_ranks(world_size, calls_of, world_size, kernels, CASES[world_size])


@pytest.mark.parametrize(("kernels", "world_size", "index"), CALLS)
def test_a_call_sends_this_and_nothing_else(kernels, world_size, index):
    case = CASES[world_size][index]
    for rank, found in enumerate(recorded(world_size, kernels)):
        if case.layout == GATHER:
            want = gather_events(2 // case.heads_k_stride)
        else:
            want = ring_events(rank, world_size)
        assert tuple(events for events, _ in found[index]) == want, f"rank {rank}"


@pytest.mark.parametrize(("kernels", "world_size", "index"), CALLS)
def test_the_host_reads_nothing_but_edges_on_entry(kernels, world_size, index):
    case = CASES[world_size][index]
    # Edges on the CPU are checked on every call, read once; the backward reads none.
    want = ["core.packed.edges"] * (2 if case.layout == GATHER else 1)
    for rank, found in enumerate(recorded(world_size, kernels)):
        assert [reads for _, reads in found[index]] == [want, []], f"rank {rank}"


def first_calls(rank: int) -> list[list]:
    events, found = [], []
    case = case_of("stripe", causal=True)
    documents = documents_of(case, rank, 2)
    q = torch.randn(6, 2, 16)
    with Messages(events):
        for _ in range(EXCHANGED_CALLS + 2):
            events.clear()
            rfa.stripe_flash_attn_varlen_func(q, q, q, *documents, causal=True)
            found.append([name for name, *_ in events])
    return found


def test_only_the_first_calls_exchange_words():
    # Words travel as their lengths and their bytes, both before the ring starts.
    ring = ["send", "recv_"]
    words = ["allgather_"] * 2
    want = [words + ring] * EXCHANGED_CALLS + [ring] * 2
    assert run_ranks(2, first_calls) == [want] * 2
