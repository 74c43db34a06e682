"""Timelines: what is read of a trace, what is drawn, and that `still` computes without messages."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import oracle
from ranks import run_ranks

FOLDER = Path(__file__).resolve().parent.parent / "benchmark"
sys.path.append(str(FOLDER))

import still  # noqa: E402
import timeline  # noqa: E402
from timeline import Panel, Span  # noqa: E402

from ring_flash_attn import ring_attention  # noqa: E402
from ring_flash_attn.backends.reference import ReferenceBackend  # noqa: E402
from ring_flash_attn.core import function  # noqa: E402
from ring_flash_attn.core.attention import Attention  # noqa: E402
from ring_flash_attn.core.layout import Layout  # noqa: E402
from ring_flash_attn.core.plan import plan_ring  # noqa: E402
from ring_flash_attn.core.ring import ring_backward, ring_forward  # noqa: E402
from ring_flash_attn.core.traffic import ring_traffic  # noqa: E402

RANKS, LENGTH = 3, 12
COPY = [
    Span(7, "_hopper_fwd_kernel", 0.0, 100.0),
    Span(20, "Memcpy PtoP (Device -> Device)", 10.0, 60.0),
    Span(7, "_hopper_bwd_kernel", 110.0, 300.0),
    Span(7, "void at::native::vectorized_elementwise_kernel<4, add>", 300.0, 310.0),
    Span(24, "Memcpy DtoD (Device -> Device)", 120.0, 170.0),
]
RING = [Span(7, "_fwd_kernel", 0.0, 50.0), Span(31, "ncclDevKernel_SendRecv(args)", 20.0, 90.0)]


def event(name, ts, dur, stream, category="kernel", phase="X"):
    args = {"stream": stream, "device": 0}
    return {"ph": phase, "cat": category, "name": name, "ts": ts, "dur": dur, "args": args}


def test_spans_are_the_gpus_own_in_order_of_time():
    trace = {
        "traceEvents": [
            event("_bwd_kernel_dq", 1050.5, 10.0, 7),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 990.0, 5.0, 31),
            event("_fwd_kernel", 950.0, 5.0, 7),
            event("cudaLaunchKernel", 900.0, 5.0, 0, "cuda_runtime"),
            event("Memcpy PtoP", 1000.0, 4.0, 20, "gpu_memcpy"),
            event("Memset (Device)", 1020.0, 1.0, 20, "gpu_memset"),
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
            event("flow", 1000.0, 0.0, 7, "ac2g", "s"),
        ]
    }
    assert timeline.spans_of(trace) == [
        Span(20, "Memcpy PtoP", 0.0, 4.0),
        Span(20, "Memset (Device)", 20.0, 21.0),
        Span(7, "_bwd_kernel_dq", 50.5, 60.5),
    ]
    assert timeline.spans_of({"traceEvents": []}) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_hopper_fwd_kernel", "attention forward"),
        ("_fwd_kernel", "attention forward"),
        ("_hopper_bwd_kernel", "attention backward"),
        ("_hopper_dkv_kernel", "attention backward"),
        ("_hopper_dq_kernel", "attention backward"),
        ("_bwd_kernel_dkv", "attention backward"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "NCCL"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("_delta_kernel", "other"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
    ],
)
def test_kinds(name, kind):
    assert timeline.kind_of(name) == kind


def test_streams_are_named_by_what_they_do():
    assert timeline.stream_names(COPY) == {7: "compute", 20: "copy", 24: "copy 2"}
    assert timeline.stream_names(RING) == {7: "compute", 31: "NCCL"}
    assert timeline.stream_names([]) == {}


def test_time_in_which_several_streams_work_counts_once():
    assert timeline.busy_us(COPY) == 300.0
    assert timeline.busy_us(RING) == 90.0
    assert timeline.busy_us([]) == 0.0


def test_what_was_recorded_is_read_back_and_drawn(tmp_path, capsys):
    panels = [Panel("ring", 2.5, 2.0, RING), Panel("copy-engine", 2.125, 2.0, COPY)]
    given = {"world_size": 4, "gpu": "a GPU", "torch": "2.0", "date": "2026-01-02"}
    given |= {"layout": "zigzag", "local_len": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}
    timeline.write(tmp_path / "timeline.json", given, panels)
    assert timeline.read(tmp_path / "timeline.json") == (given, panels)
    assert timeline.main(["--draw", "--to", str(tmp_path)]) == 0
    assert "copy-engine: 2.125 ms, without messages 2.000 ms, exposed 0.125 ms" in (
        capsys.readouterr().out
    )
    pytest.importorskip("matplotlib")
    drawn = (tmp_path / "timeline.svg").read_text()
    timeline.picture(panels, timeline.title_of(given), tmp_path / "again.svg")
    assert drawn == (tmp_path / "again.svg").read_text()
    for kind, (color, _) in timeline.KINDS.items():
        assert color in drawn, kind
    assert timeline.KINDS["NCCL"][0] not in picture_of(panels[1:], tmp_path)


def picture_of(panels, folder) -> str:
    timeline.picture(panels, "title", folder / "one.svg")
    return (folder / "one.svg").read_text()


def test_a_gap_is_left_blank(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    timeline._panel(axis, Panel("copy-engine", 1.0, 1.0, COPY), timeline.stream_names(COPY))
    edges = sorted(
        (float(path.vertices[:, 0].min()), float(path.vertices[:, 0].max()))
        for bars in axis.collections
        for path in bars.get_paths()
        if path.vertices[:, 1].min() < 0  # the first row: compute
    )
    pyplot.close(figure)
    assert edges == [(0.0, 0.1), (0.11, 0.3), (0.3, 0.31)]


def test_ranks_measure_a_call_and_the_same_without_messages(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(FOLDER / "timeline.py"), "--exchanges", "ring", "--local-len", "16"]
    command += ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--repeats", "2"]
    command += ["--run-id", "r1", "--commit", "c1", "--tree", "t1", "--to", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    given, [panel] = timeline.read(tmp_path / "timeline.json")
    assert [given[x] for x in ("run", "commit", "tree", "world_size")] == ["r1", "c1", "t1", 2]
    assert panel.exchange == "ring" and panel.call_ms > 0 and panel.still_ms > 0
    assert (panel.spans != []) == torch.cuda.is_available()


def still_result(kind: str, layout: str, window: tuple[int, int], rank: int):
    """Return what the still schedule gives on a rank, and what dense attention to copies gives."""
    generator = torch.Generator().manual_seed(rank)
    q, k, v, dout = (
        torch.randn(1, LENGTH, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2, 4)
    )
    attention, rows = Attention(0.31, True, window), Layout(layout, LENGTH, RANKS)
    plan = plan_ring(attention, rows, rows, rank)
    traffic = ring_traffic(attention, rows, rows, rank)
    runs, given = ReferenceBackend(), (plan, k, v, torch.float64)

    def exchange():
        if kind == "ring":
            return still.StillRing(None, *given, traffic)
        return still.StillCopyEngine(traffic, *given)

    out, lse = ring_forward(attention, plan, runs, exchange(), q)
    saved = runs.prepare_backward(dout, out, lse, None)
    got = oracle.Result(out, lse, *ring_backward(attention, plan, runs, exchange(), saved, q))
    mine = oracle.positions(layout, LENGTH, RANKS, rank)
    # The source's keys lie at its positions, and are this rank's.
    theirs = [x for source in range(RANKS) for x in oracle.positions(layout, LENGTH, RANKS, source)]
    mask = oracle.visible(mine, theirs, True, window)
    copies = [x.repeat(1, RANKS, 1, 1) for x in (k, v)]
    want = oracle.dense(q, *copies, mask, dout, softmax_scale=0.31)
    dk, dv = (x.unflatten(1, (RANKS, LENGTH)).sum(1) for x in (want.dk, want.dv))
    return got, want._replace(dk=dk, dv=dv)


@pytest.mark.parametrize("window", [(-1, -1), (5, 0)], ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("kind", ["ring", "copy-engine"])
def test_still_runs_every_step_on_this_ranks_keys(kind, layout, window):
    for rank in range(RANKS):
        got, want = still_result(kind, layout, window, rank)
        # Over the ring no sums of dk, dv come.
        names = oracle.Result._fields[: 3 if kind == "ring" else 5]
        for name, x, y in zip(names, got, want, strict=False):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def messages_of(rank: int) -> list[int]:
    """Return how many messages a call sends, still and not."""
    sent, before = [0], dist.batch_isend_irecv

    def count(operations):
        sent[0] += len(operations)
        return before(operations)

    local = [torch.randn(1, 8, 4, 16, requires_grad=True) for _ in range(3)]

    def call() -> int:
        sent[0] = 0
        ring_attention(*local, backend="reference")[0].sum().backward()
        return sent[0]

    call(), call()
    dist.batch_isend_irecv = count
    with still.still():
        without = call()
    assert function.open_exchange.__name__ == "open_exchange"
    return [without, call()]


def test_still_sends_nothing_and_ends():
    for without, with_messages in run_ranks(2, messages_of):
        assert without == 0
        assert with_messages > 0
