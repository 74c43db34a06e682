"""RingComm, AllGatherComm and RingExchange over gloo: who gets what, and what is sent at all."""

import pytest
import torch
import torch.distributed as dist

import oracle
from ranks import run_ranks
from ring_flash_attn import ring_attention
from ring_flash_attn.utils import (
    AllGatherComm,
    RingComm,
    get_default_args,
    lost,
    update_out_and_lse,
)


def ring_of(rank: int, members: list[int] | None) -> list[float]:
    group = None if members is None else dist.new_group(members)
    if members is not None and rank not in members:
        return []
    comm = RingComm(group)
    own = torch.full((3,), float(rank))
    received = comm.send_recv(own)
    comm.commit()
    comm.wait()
    k, v = comm.send_recv_kv(own, own + 0.5)
    comm.wait()
    return [received[0].item(), k[0].item(), v[0].item()]


def test_ring_comm_receives_from_the_previous_rank():
    assert run_ranks(3, ring_of, None) == [[2, 2, 2.5], [0, 0, 0.5], [1, 1, 1.5]]


def test_ring_comm_maps_a_subgroup_to_global_ranks():
    assert run_ranks(4, ring_of, [1, 3]) == [[], [3, 3, 3.5], [], [1, 1, 1.5]]


def test_ring_comm_of_one_rank_copies():
    assert run_ranks(1, ring_of, None) == [[0, 0, 0.5]]


def protocol_errors(rank: int) -> list[str]:
    comm, messages = RingComm(None), []
    with pytest.raises(RuntimeError) as caught:
        comm.wait()
    messages.append(str(caught.value))
    comm.send_recv(torch.zeros(1))
    comm.commit()
    with pytest.raises(RuntimeError) as caught:
        comm.commit()
    messages.append(str(caught.value))
    return messages


def test_ring_comm_refuses_wait_before_commit_and_commit_twice():
    assert run_ranks(1, protocol_errors) == [
        [
            "RingComm.wait called before commit",
            "RingComm.commit called twice without a wait in between",
        ]
    ]


class Broken:
    """A request whose peer has gone."""

    def wait(self) -> None:
        raise dist.DistBackendError("gone")


def broken_transfers(rank: int) -> list[str]:
    def refuse(operations):
        raise dist.DistBackendError("refused")

    comm, messages = RingComm(None), []
    comm.send_recv(torch.zeros(1))
    # A backend that batches returns one request for a send and a receive.
    for start in (refuse, lambda operations: [Broken()]):
        dist.batch_isend_irecv = start
        with pytest.raises(dist.DistBackendError) as caught:
            comm.commit()
            comm.wait()
        messages.append(str(caught.value))
        if start is refuse:
            with pytest.raises(RuntimeError, match="wait called before commit"):
                comm.wait()
    gatherer = AllGatherComm()
    gatherer.handles.append(Broken())
    with pytest.raises(dist.DistBackendError) as caught:
        gatherer.wait()
    return [*messages, str(caught.value)]


def test_a_failed_transfer_keeps_its_type_and_says_who_did_what():
    for rank, messages in enumerate(run_ranks(2, broken_transfers)):
        start = f"ring attention: global rank {rank}, group of 2, "
        both = f"sending to global rank {1 - rank} and receiving from global rank {1 - rank}"
        assert messages == [
            f"{start}{both} (a message, hop 1): refused",
            f"{start}{both} (a message, hop 2): gone",
            f"{start}waiting to gather tensors: gone",
        ]


def gather(rank: int) -> list[float]:
    comm, gathered = AllGatherComm(), torch.empty(4)
    comm.all_gather(gathered, torch.full((2,), float(rank)))
    comm.wait()
    return gathered.tolist()


def test_all_gather_comm():
    assert run_ranks(2, gather) == [[0, 0, 1, 1]] * 2


def operations(rank: int, world_size: int, layout: str, window: tuple[int, int]) -> list[list]:
    """Return the (elements, dtype, destination) of every message of a forward and a backward."""
    sent, received = [], []
    start = dist.batch_isend_irecv

    def recording(ops):
        for op in ops:
            messages = sent if op.op is dist.isend else received
            messages.append((op.tensor.numel(), str(op.tensor.dtype), op.peer))
        return start(ops)

    dist.batch_isend_irecv = recording
    q, k, v = (torch.randn(1, 8, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    out, _ = ring_attention(q, k, v, layout=layout, causal=True, window_size=window)
    forward, sent = sent, []
    out.sum().backward()
    return [forward, sent, received]


def rows_that_travel(layout: str, window: tuple[int, int], size: int, rank: int) -> list[list]:
    """Return what a rank sends on: K, V hop by hop, sums likewise, and sums on their way home.

    Each as the number of rows from the first to the last that the ranks concerned read, with the
    source, cell by cell.
    """
    places = [oracle.positions(layout, 8, size, each) for each in range(size)]

    def seen(source: int, hop: int) -> set[int]:
        reader = places[(source + hop) % size]
        return set(
            oracle.visible(reader, places[source], True, window).any(0).nonzero()[:, 0].tolist()
        )

    def span(source: int, hops: range) -> int:
        rows = set().union(*(seen(source, hop) for hop in hops))
        count = max(rows) - min(rows) + 1 if rows else 0
        return 8 if count == 7 else count  # nearly all

    steps = max(hop for hop in range(size) if any(seen(x, hop) for x in range(size))) + 1
    source = [(rank - step) % size for step in range(steps)]
    return [
        [span(source[step], range(step + 1, steps)) for step in range(steps - 1)],
        [span(source[step], range(1, step + 1)) for step in range(1, steps - 1)],
        [span(source[-1], range(1, steps))],
    ]


@pytest.mark.parametrize(
    ("layout", "window", "size"),
    [
        ("contiguous", (-1, -1), 3),
        ("zigzag", (-1, -1), 3),
        ("stripe", (-1, -1), 3),
        ("contiguous", (5, 0), 4),
        ("contiguous", (8, 0), 4),
        ("zigzag", (5, 0), 4),
        ("stripe", (6, 0), 3),
    ],
    ids=str,
)
def test_no_row_travels_that_nobody_reads(layout: str, window: tuple[int, int], size: int):
    row, ahead, back = 2 * 2 * 16, [], []
    results = run_ranks(size, operations, size, layout, window)
    for rank, (forward, backward, _) in enumerate(results):
        keys, sums, home = rows_that_travel(layout, window, size, rank)
        last = len(keys)
        ahead.append([(n, "torch.float32", (rank + 1) % size) for n in keys if n])
        onward = [(n, "torch.float32", (rank + 1) % size) for n in sums if n]
        back.append(onward + [(n, "torch.float32", (rank - last) % size) for n in home if n])
        assert in_rows(forward, row) == ahead[rank]
        # The same K, V again, among them the sums, one hop behind.
        assert sorted(in_rows(backward, row)) == sorted(ahead[rank] + back[rank])
    for rank, (*_, received) in enumerate(results):
        sent_here = sum(
            elements
            for forward, backward, _ in results
            for elements, _, peer in (*forward, *backward)
            if peer == rank
        )
        assert sum(elements for elements, *_ in received) == sent_here


def in_rows(messages: list[tuple], row: int) -> list[tuple]:
    """Return (rows, dtype, destination); k and v that travel as two messages count as one."""
    whole, joined = 8 * row, []
    for elements, dtype, peer in messages:
        if elements != whole and joined and joined[-1][1] == elements:
            joined[-1] = (2 * elements, None, dtype, peer)
        else:
            joined.append((elements, elements, dtype, peer))
    return [(total // row, dtype, peer) for total, _, dtype, peer in joined]


def test_sums_start_at_the_second_rank_and_go_straight_home():
    """Three ranks: two hops of K, V; one of sums, then home."""
    for rank, (forward, backward, _) in enumerate(run_ranks(3, operations, 3, "stripe", (-1, -1))):
        hop = (2 * 8 * 2 * 16, "torch.float32", (rank + 1) % 3)
        assert forward == [hop] * 2
        assert backward == [hop] * 4


def test_one_rank_sends_nothing():
    assert run_ranks(1, operations, 1, "zigzag", (-1, -1)) == [[[], [], []]]


def test_update_out_and_lse_merges_halves_and_keeps_empty_rows_empty():
    torch.manual_seed(0)
    scores, values = torch.randn(1, 2, 5, 12).double(), torch.randn(1, 12, 2, 4).double()

    def attend(part: slice):
        chosen = scores[..., part]
        out = torch.einsum("bhij,bjhd->bihd", chosen.softmax(-1), values[:, part])
        return out, chosen.logsumexp(-1)

    out, lse = update_out_and_lse(None, None, *attend(slice(0, 5)))
    out, lse = update_out_and_lse(out, lse, *attend(slice(5, 12)))
    want_out, want_lse = attend(slice(0, 12))
    assert torch.allclose(out.double(), want_out, atol=1e-6)
    assert torch.allclose(lse.squeeze(-1).transpose(1, 2).double(), want_lse, atol=1e-6)

    nothing = torch.zeros(1, 5, 2, 4), torch.full((1, 2, 5), -torch.inf)
    out, lse = update_out_and_lse(*update_out_and_lse(None, None, *nothing), *nothing)
    assert (out == 0).all() and (lse == -torch.inf).all()

    out, lse = update_out_and_lse(None, None, *attend(slice(0, 5)))
    rows = (slice(None), slice(2, 5))
    part_out, part_lse = attend(slice(5, 12))
    out, lse = update_out_and_lse(out, lse, part_out[:, 2:], part_lse[:, :, 2:], slice_=rows)
    assert torch.allclose(out[:, 2:].double(), want_out[:, 2:], atol=1e-6)
    assert torch.allclose(out[:, :2].double(), attend(slice(0, 5))[0][:, :2], atol=1e-6)


def test_get_default_args_reads_functions_and_custom_ops():
    def flash(q, softcap=30.0, *, causal=True):
        return q

    class Op:
        _init_fn = staticmethod(flash)

    want = {"q": None, "softcap": 0.0, "causal": True}
    assert get_default_args(flash) == want
    assert get_default_args(Op()) == want


class Demanding(RuntimeError):
    """An error that cannot be made of a text alone."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


def test_an_error_of_any_type_says_what_was_lost(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    for error, kind in ((Demanding(7, "gone"), RuntimeError), (OSError("gone"), OSError)):
        said = lost(error, None, "sending K, V")
        assert type(said) is kind
        assert "rank 1" in str(said) and "sending K, V" in str(said) and "gone" in str(said)
