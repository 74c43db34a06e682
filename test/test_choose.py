"""Which exchange a call runs on: the argument, the environment, the ranks' one decision."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist

import ring_flash_attn as rfa
from ranks import run_ranks
from ring_flash_attn.core import choose, peer_memory
from ring_flash_attn.core.choose import ENVIRONMENT, wanted_exchange
from ring_flash_attn.core.peer_memory import Place, out_of_reach, place_of

CPU = torch.device("cpu")


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_the_copy_engine_for_triton_where_it_can_the_ring_for_others(unset):
    assert wanted_exchange(None, "triton") is None
    for name in ("flash", "aten", "reference"):
        assert wanted_exchange(None, name) == "ring"
    for name in ("triton", "aten"):
        assert wanted_exchange("copy-engine", name) == "copy-engine"
        assert wanted_exchange("ring", name) == "ring"


def test_the_environment_speaks_for_calls_that_do_not(unset, monkeypatch):
    for name in ("triton", "aten"):
        monkeypatch.setenv(ENVIRONMENT, "copy-engine")
        assert wanted_exchange(None, name) == "copy-engine"
        assert wanted_exchange("ring", name) == "ring"
        monkeypatch.setenv(ENVIRONMENT, "ring")
        assert wanted_exchange(None, name) == "ring"


@pytest.mark.parametrize("bad", ["nccl", "", "Ring", 1, True])
def test_a_bad_name_is_named(bad, unset, monkeypatch):
    expected = f"must be one of ring, copy-engine or unset, got {bad!r}"
    with pytest.raises(ValueError, match=f"^exchange {expected}$"):
        wanted_exchange(bad, "triton")
    if isinstance(bad, str):
        monkeypatch.setenv(ENVIRONMENT, bad)
        with pytest.raises(ValueError, match=f"^{ENVIRONMENT} {expected}$"):
            wanted_exchange(None, "triton")


def batch(**options):
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    return rfa.ring_attention(q, q, q, layout="zigzag", causal=True, **options)


def packed(**options):
    q = torch.randn(8, 2, 16, requires_grad=True)
    edges = torch.tensor([0, 8], dtype=torch.int32)
    return rfa.packed_attention(q, q, q, edges, 8, layout="zigzag", causal=True, **options)


def drop_in(exchange=None):
    q = torch.randn(1, 8, 2, 16)
    return rfa.zigzag_ring_flash_attn_func(q, q, q, causal=True)


FORMS = {"batch": batch, "packed": packed, "drop-in": drop_in}


def told(rank, cases):
    """Return what each call raised, as type and text; None for those that ran."""
    errors = []
    for form, options, environment in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(ENVIRONMENT, raising=False)
            if environment is not None:
                patch.setenv(ENVIRONMENT, environment[rank])
            try:
                FORMS[form](**{name: values[rank] for name, values in options.items()})
            except (ValueError, NotImplementedError) as error:
                errors.append((type(error), str(error)))
            else:
                errors.append(None)
    return errors


def test_what_ranks_are_told(monkeypatch):
    monkeypatch.setenv("RING_FLASH_ATTN_CHECK", "1")
    both, ring = ("copy-engine", "copy-engine"), ("ring", "ring")
    cases = [
        ("batch", {"exchange": both}, None),
        ("packed", {"exchange": both}, None),
        ("drop-in", {}, both),
        ("batch", {"exchange": ("ring", "copy-engine")}, None),
        ("packed", {"exchange": ("ring", "copy-engine")}, None),
        ("drop-in", {}, ("ring", "nonsense")),
        ("batch", {"exchange": ("ring", "nonsense")}, None),
        ("batch", {"exchange": ring}, both),
        ("batch", {"exchange": (None, None)}, None),
        ("batch", {"exchange": both}, None),
    ]
    for rank, errors in enumerate(run_ranks(2, told, cases)):
        for index in (0, 1, 2, 9):
            kind, text = errors[index]
            assert kind is NotImplementedError
            assert text.startswith("the copy-engine exchange cannot run on this group")
            for each in (0, 1):
                assert f"rank {each}: its tensors are on cpu" in text
            assert "exchange='ring'" in text
        for index in (3, 4):
            kind, text = errors[index]
            assert kind is ValueError
            assert "exchange: rank 0 has ring, rank 1 has copy-engine" in text
        for index in (5, 6):
            kind, text = errors[index]
            name = ENVIRONMENT if index == 5 else "exchange"
            assert kind is ValueError
            assert f"{name} must be one of ring, copy-engine or unset, got 'nonsense'" in text
            assert text.startswith(name) == (rank == 1)
        assert errors[7] is None and errors[8] is None


def count_gathers(rank):
    count = 0
    gather = dist.all_gather_object

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        return gather(*args, **kwargs)

    dist.all_gather_object = counting
    for _ in range(4):
        with pytest.raises(NotImplementedError):
            batch(exchange="copy-engine")
    decided = count
    # What is automatic takes the ring where there is no GPU, without a word.
    choose.AUTOMATIC = ("aten", "flash2", "flash3", "flash4", "reference")
    batch()[0].sum().backward()
    return [decided, count]


def test_a_group_decides_once(unset):
    # Two comparisons of the first two calls, and two gathers for the decision.
    assert run_ranks(2, count_gathers) == [[4, 4]] * 2


def forbidden(rank):
    """Return what a call raises where rank 1 may not map its peers' memory."""

    def open_memory(group, device):
        if rank == 1:
            raise RuntimeError("pidfd_getfd:\n Operation not permitted")
        return "memory"

    choose.place_of = lambda device: Place("x", "ab"[rank], ())
    choose.out_of_reach = lambda places, rank, device: []
    choose.PeerMemory = open_memory
    with pytest.raises(NotImplementedError) as caught:
        batch(exchange="copy-engine")
    return str(caught.value)


def test_memory_that_may_not_be_mapped_is_a_reason(unset):
    why = "rank 1: torch's symmetric memory: pidfd_getfd: Operation not permitted"
    for text in run_ranks(2, forbidden):
        assert text.endswith(why)


def test_one_step_has_nothing_to_choose(unset):
    assert run_ranks(1, told, [("batch", {"exchange": ["copy-engine"]}, None)]) == [[None]]


# ---- who reaches whom


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs a, b, c, of which c is reached by nobody."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(peer_memory, "_uuid", lambda index: "abc"[index])
    reach = {0: {1}, 1: {0}, 2: set()}
    monkeypatch.setattr(
        torch.cuda, "can_device_access_peer", lambda device, peer: peer in reach[device.index]
    )


def reasons(rank, *places):
    return out_of_reach(places, rank, torch.device("cuda", rank))


def test_ranks_of_one_host_with_peer_access(gpus):
    places = Place("x", "a", ()), Place("x", "b", ())
    assert reasons(0, *places) == reasons(1, *places) == []


def test_every_reason_is_given(gpus):
    here, there = Place("x", "a", ()), Place("y", "b", ())
    assert reasons(0, here, there) == ["rank 1 is on another host"]
    assert reasons(0, here, here) == ["rank 1 has the same GPU"]
    assert reasons(0, here, Place("x", "c", ())) == ["its GPU cannot reach the memory of rank 1's"]
    hidden = ["rank 1's GPU is hidden from it (CUDA_VISIBLE_DEVICES)"]
    assert reasons(0, here, Place("x", "d", ())) == hidden
    lacking = Place("x", "a", ("no driver",))
    assert reasons(0, lacking, there) == ["no driver", "rank 1 is on another host"]
    assert reasons(0, here, Place("x", "", ("no GPU",))) == []  # rank 1 says it itself


def test_ranks_share_a_gpu_where_torch_is_told_so(gpus, monkeypatch):
    here = Place("x", "a", ())
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    assert reasons(0, here, here) == []
    assert reasons(0, here, here._replace(host="y")) == ["rank 1 is on another host"]
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "0")
    assert reasons(0, here, here) == ["rank 1 has the same GPU"]


def test_a_place_without_a_gpu_says_so():
    place = place_of(CPU)
    assert place.device == "" and "on cpu" in place.unsupported[0]
    assert place.host == place_of(CPU).host


# ---- memory of a group


class Memory:
    """A `PeerMemory` that only counts."""

    def __init__(self, group, device):
        self.rank, self.world_size, self.settled = 0, 2, 0

    def settle(self):
        self.settled += 1

    def capturing(self):
        return False

    def shared(self, shape, dtype):
        return [torch.empty(tuple(shape), dtype=dtype) for _ in range(2)]

    def local(self, shape, dtype):
        return torch.empty(tuple(shape), dtype=dtype)


def test_a_group_s_memory_serves_every_shape_that_fits_and_dies_with_it(monkeypatch):
    monkeypatch.setattr(choose, "PeerMemory", Memory)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group, ours = dist.new_group([0]), choose._Group()
        choose._groups[group] = ours
        assert choose._open_memory(ours, group, CPU) == []

        def buffers(rows, ours=ours, group=group):
            k = torch.empty(1, rows, 1, 8)
            return choose._buffers(ours, k, torch.float32)

        first, store = buffers(100), ours.stores[CPU, torch.float32]
        memory = ours.memories[CPU]
        assert buffers(100) is first and store.size.elements == 2 * 100 * 8
        assert buffers(7).store is store and buffers(7).staged[0].shape == (2, 1, 7, 1, 8)
        for rows in range(1, choose.KEPT_SHAPES + 9):
            assert buffers(rows).store is store
        assert len(ours.buffers) == choose.KEPT_SHAPES and buffers(100).store is store
        assert memory.settled == 0
        # Larger ones, and by so much that the next need not grow it again.
        grown = buffers(101).store
        assert grown is not store and grown.size.elements == 2 * 125 * 8 and memory.settled == 1
        assert buffers(100).store is grown and buffers(125).store is grown
        assert {x.store for x in ours.buffers.values()} == {grown} and ours.kept == []
        other = choose._buffers(ours, torch.empty(1, 3, 1, 8).double(), torch.float64)
        assert other.store is not grown and memory.settled == 1
        grown.kept = True
        assert buffers(999).store.size.elements == 2 * 999 * 8
        assert ours.kept == [grown], "a graph may be replayed"

        gone = weakref.ref(ours)
        dist.destroy_process_group(group)
        del ours, first, store, grown, other, memory, group, buffers
        gc.collect()
        assert gone() is None
    finally:
        dist.destroy_process_group()
