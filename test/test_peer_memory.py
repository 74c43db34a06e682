"""`PeerMemory` over a stand-in for CUDA: mailboxes in real memory, ranks on threads.

The stand-in does every operation at once, whatever its stream, so it also shows that ranks do not
wait for each other in a circle where all streams share one hardware queue.
"""

import ctypes
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import _symmetric_memory as symmetric

import oracle
from copy_engine_ranks import CAUSAL, WINDOW, Layer
from ring_flash_attn.backends.reference import ReferenceBackend
from ring_flash_attn.core import peer_memory
from ring_flash_attn.core.copy_engine import CopyEngineExchange
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.peer_buffers import PeerBuffers, PeerStore, size_of
from ring_flash_attn.core.peer_memory import PeerMemory, _StreamMemory
from ring_flash_attn.core.plan import plan_ring
from ring_flash_attn.core.ring import ring_backward, ring_forward
from ring_flash_attn.core.traffic import ring_traffic
from ring_flash_attn.core.transport import FREE, Channel
from simulated_ring import attention_of

CPU = torch.device("cpu")


class Stream:
    cuda_stream = 0

    def __init__(self, device=None, priority=0):
        pass

    def wait_event(self, event):
        assert event.recorded


class Event:
    recorded = False

    def record(self, stream):
        self.recorded = True


class Driver:
    """Stream memory operations and copies, done at once."""

    def copy(self, stream, target, source, size):
        ctypes.memmove(target, source, size)

    prepare = _StreamMemory.prepare

    def write(self, stream, address, value):
        ctypes.c_uint32.from_address(address).value = value

    def run(self, stream, prepared):
        count, batch = prepared
        assert count == len(batch)
        for each in batch:
            number = ctypes.c_int32.from_address(each.address)
            if each.operation == peer_memory._WRITE:
                number.value = each.value
                continue
            begin = time.monotonic()
            while number.value < each.value:
                assert time.monotonic() - begin < 20, "ranks wait for each other"
                time.sleep(1e-4)


class Host:
    """The ranks' symmetric memory: the n-th allocation of each belongs together."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size)
        self.tensors = [[] for _ in range(size)]
        self.own = threading.local()

    def empty(self, elements, dtype, device):
        assert peer_memory.os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
        self.tensors[self.own.rank].append(torch.empty(elements, dtype=dtype))
        return self.tensors[self.own.rank][-1]

    def rendezvous(self, tensor, name):
        assert name == "the group"
        index = len(self.tensors[self.own.rank]) - 1
        self.barrier.wait()
        return SimpleNamespace(
            barrier=self.barrier.wait,
            get_buffer=lambda rank, shape, dtype: self.tensors[rank][index].view(shape),
        )


@pytest.fixture
def host(monkeypatch):
    host = Host(3)
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "current_stream": lambda device: Stream(),
        "synchronize": lambda device: None,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(symmetric, "empty", host.empty)
    monkeypatch.setattr(symmetric, "rendezvous", host.rendezvous)
    monkeypatch.setattr(peer_memory, "_driver", Driver)
    ranks = SimpleNamespace(
        get_rank=lambda group=None: 0 if group is None else group.rank,
        get_world_size=lambda group: 3,
    )
    monkeypatch.setattr(peer_memory, "dist", ranks)
    monkeypatch.setattr(peer_memory.watchdog, "group_timeout_s", lambda group, device: 600.0)
    # Threads would take it back while another still allocates.
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    return host


def on_threads(host, work):
    """Return work(rank) of every rank; raise what one raises."""
    results = [None] * host.size

    def enter(rank):
        host.own.rank = rank
        try:
            results[rank] = work(rank)
        except BaseException as error:
            results[rank] = error
            host.barrier.abort()

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(host.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def memories(host):
    """Return the memory of every rank."""

    def work(rank):
        memory = PeerMemory(SimpleNamespace(rank=rank, group_name="the group"), CPU)
        host.barrier.wait()
        return memory

    return on_threads(host, work)


def calls(host, rank, layers):
    """Return the results of each layer, and the mailboxes afterwards."""
    memory = PeerMemory(SimpleNamespace(rank=rank, group_name="the group"), CPU)
    buffers, results = None, []
    for layer in layers:
        given = layer.given(host.size)
        q, k, v, dout = (oracle.shard(x, layer.layout, host.size, rank) for x in given[:4])
        dlse = oracle.shard(given.dlse, layer.layout, host.size, rank, 2)
        attention, backend = attention_of(layer.mask), ReferenceBackend()
        rows = Layout(layer.layout, layer.local_len, host.size)
        plan, traffic = (make(attention, rows, rows, rank) for make in (plan_ring, ring_traffic))
        if buffers is None:
            shape = tuple(k.shape)
            store = PeerStore(memory, size_of(shape, memory.world_size), k.dtype, k.dtype)
            buffers = PeerBuffers(store, shape)
        arguments = buffers, traffic, plan, k, v, k.dtype
        out, lse = ring_forward(attention, plan, backend, CopyEngineExchange(*arguments, False), q)
        saved = backend.prepare_backward(dout, out, lse, dlse)
        grads = ring_backward(
            attention, plan, backend, CopyEngineExchange(*arguments, True), saved, q
        )
        results.append([out, lse, *grads])
    return results, memory


@pytest.mark.usefixtures("empty_is_nan")
def test_ranks_meet_in_real_mailboxes(host):
    layers = [
        Layer("zigzag"),
        Layer("contiguous", CAUSAL, sign=-0.7),
        Layer("contiguous", WINDOW),
        Layer("stripe", batch=1, sign=0.5),
    ] * 3
    ranks = on_threads(host, lambda rank: calls(host, rank, layers))
    for rank, (results, memory) in enumerate(ranks):
        for layer, got in zip(layers, results, strict=True):
            for x, y in zip(got, layer.want(host.size, rank), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
        mail = memory._mail[rank]
        for peer in set(range(host.size)) - {rank}:
            assert mail[peer].tolist() == [int(channel in FREE) for channel in Channel]


def test_nothing_is_allocated_while_a_graph_is_captured(host, monkeypatch):
    memory = memories(host)[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for allocate in (memory.shared, memory.local):
        with pytest.raises(RuntimeError, match="run both once before"):
            allocate((2, 2), torch.float32)
    with pytest.raises(RuntimeError, match="run both once before"):
        memory.settle()


def test_a_captured_pass_is_not_tied_to_calls_outside(host, monkeypatch):
    """CUDA refuses a wait for an event from outside a capture, and one outside for one of it."""

    memory, waited = memories(host)[0], []
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: waited.append(event))
    memory.close_pass(memory.open_pass())
    assert waited == [], "there was no pass before"
    before = memory.record(memory.open_pass())
    assert len(waited) == 1
    memory.close_pass(Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [memory.record(memory.open_pass()) for _ in range(2)]
    assert len(waited) == 1 and before not in captured and captured[0] is not captured[1]
    memory.close_pass(Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert memory.record(memory.open_pass()) is before, "events are used again"
    assert waited[1] is waited[0] and waited[0] not in (before, *captured)


def test_a_pass_tells_the_watchdog_that_it_is_over(host, monkeypatch):
    memory, ended = memories(host)[0], []
    watching = memory._watchdog
    watching._end, watching._clock = ended.append, iter([0.0, 4.0, *range(8, 10000, 4)]).__next__
    stream = memory.open_pass()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    memory.close_pass(memory.open_pass())
    assert int(memory._ended) == 0, "a captured pass is not watched"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    memory._captured = False
    memory.close_pass(stream)
    assert int(memory._ended) == 1
    for _ in range(200):
        watching.look()
    assert not ended
    memory.open_pass()
    monkeypatch.setattr(peer_memory.watchdog, "answer", lambda ask, seconds: "")
    while not ended:
        watching.look()
    assert "pass 2" in ended[0] and "global rank 0, group of 3" in ended[0]
    memory.close_pass(stream)


def test_an_error_of_the_driver_is_named():
    memory = object.__new__(_StreamMemory)
    memory._batch = memory._copy = memory._write = lambda *arguments: 801
    with pytest.raises(RuntimeError, match=r"cuStreamBatchMemOp failed with .* 801"):
        memory.run(Stream(), memory.prepare([(1, 0, 1)]))
    with pytest.raises(RuntimeError, match=r"cuMemcpyAsync failed with .* 801"):
        memory.copy(Stream(), 0, 0, 1)
    with pytest.raises(RuntimeError, match=r"cuStreamWriteValue32 failed with .* 801"):
        memory.write(Stream(), 0, 1)


def test_a_batch_lies_in_memory_as_the_driver_reads_it():
    """CUstreamBatchMemOpParams of cuda.h: 48 bytes, the kind, the address, the number, flags 0."""
    memory = object.__new__(_StreamMemory)
    count, batch = memory.prepare([(1, 0x1122334455, 1), (2, 0x66, 0)])
    words = (ctypes.c_uint64 * 12).from_buffer(batch)
    assert (count, list(words)) == (2, [1, 0x1122334455, 1, 0, 0, 0, 2, 0x66, 0, 0, 0, 0])


def test_multicast_is_off_while_memory_is_allocated(monkeypatch):
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    for before in (None, "0", "1"):
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
        with peer_memory._without_multicast():
            assert peer_memory.os.environ[name] == "1"
        assert peer_memory.os.environ.get(name) == before
