"""What the streams of a GPU do during one call, forward and backward, over each exchange.

    torchrun --nproc_per_node 4 benchmark/timeline.py          # measures, and draws if it can
    python benchmark/timeline.py --draw                        # draws what was measured

Rank 0 records one call with torch.profiler. Beside it, without the profiler, the call is timed in
turn with the same schedule without messages (still.py): their difference is the communication that
computing does not hide. Both are medians of the slowest rank. Writes timeline.json and timeline.svg
into benchmark/results. Needs GPUs to measure, matplotlib to draw.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import rows
import timing
import torch
import torch.distributed as dist
from kernels import draw
from rank_timing import slowest_times
from rings import ring, step
from still import still

from comparison import Place, join
from ring_flash_attn.core.attention import Attention

STEM = "timeline"
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
BARRIER = "AllReduce"  # the kernel of torch's barrier; no exchange has one
# Kinds, each with its colour and what a name of its work contains; the first that fits.
KINDS = {
    "NCCL": ("#c0532b", ("nccl",)),
    "copy": ("#e0a030", ("memcpy",)),
    "attention forward": ("#1b6ca8", ("fwd_kernel",)),
    "attention backward": ("#12324a", ("bwd_kernel", "_dkv_kernel", "_dq_kernel")),
    "other": ("#8a8a8a", ("",)),
}


class Span(NamedTuple):
    """One piece of work of a GPU: microseconds from the first piece's begin."""

    stream: int
    name: str
    begin: float
    end: float


class Panel(NamedTuple):
    """One exchange: milliseconds of the call and of the same schedule without messages."""

    exchange: str
    call_ms: float
    still_ms: float
    spans: list[Span]

    @property
    def exposed_ms(self) -> float:
        return self.call_ms - self.still_ms


def kind_of(name: str) -> str:
    """Return the kind of a kernel or copy."""
    return next(kind for kind, (_, parts) in KINDS.items() if any(x in name.lower() for x in parts))


def spans_of(trace: dict) -> list[Span]:
    """Return what the GPU did after the last barrier, in order of time.

    Args:
        trace: as torch.profiler exports it.
    """
    found = [
        Span(x["args"]["stream"], x["name"], x["ts"], x["ts"] + x["dur"])
        for x in trace["traceEvents"]
        if x.get("ph") == "X" and x.get("cat") in DEVICE_WORK
    ]
    found.sort(key=lambda x: x.begin)
    starts = [index for index, x in enumerate(found) if BARRIER in x.name]
    found = found[starts[-1] + 1 :] if starts else found
    if not found:
        return []
    zero = found[0].begin
    return [x._replace(begin=x.begin - zero, end=x.end - zero) for x in found]


def stream_names(spans: list[Span]) -> dict[int, str]:
    """Return what each stream is for, the busiest of attention first.

    The stream with most attention computes, one with NCCL's kernels is NCCL's, others copy.
    """
    time: dict[int, dict[str, float]] = {}
    for x in spans:
        kinds = time.setdefault(x.stream, {})
        kinds[kind_of(x.name)] = kinds.get(kind_of(x.name), 0.0) + x.end - x.begin

    def attention(stream: int) -> float:
        return sum(t for kind, t in time[stream].items() if kind.startswith("attention"))

    names = {}
    for stream in sorted(time, key=lambda x: (-attention(x), x)):
        if attention(stream) > 0:
            word = "compute"
        else:
            word = (
                "NCCL" if "NCCL" in time[stream] else "copy" if "copy" in time[stream] else "side"
            )
        count = sum(name.split()[0] == word for name in names.values())
        names[stream] = word if count == 0 else f"{word} {count + 1}"
    return names


def busy_us(spans: list[Span]) -> float:
    """Return the microseconds in which at least one of the spans runs."""
    total, until = 0.0, float("-inf")
    for x in sorted(spans, key=lambda x: x.begin):
        total += max(0.0, x.end - max(x.begin, until))
        until = max(until, x.end)
    return total


def picture(panels: list[Panel], title: str, path: Path) -> None:
    """Draw one panel an exchange, one row a stream, all to one scale of time."""
    import matplotlib

    matplotlib.use("Agg")
    # Equal input gives an equal file.
    matplotlib.rcParams["svg.hashsalt"] = "ring_flash_attn"
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    lanes = [stream_names(panel.spans) for panel in panels]
    heights = [max(1, len(x)) for x in lanes]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(11, 0.55 * sum(heights) + 1.1 * len(panels) + 0.6),
        squeeze=False,
        sharex=True,
        gridspec_kw={"height_ratios": heights},
    )
    for axis, panel, names in zip(axes[:, 0], panels, lanes, strict=True):
        _panel(axis, panel, names)
    axes[-1, 0].set_xlabel("ms")
    shown = {kind_of(x.name) for panel in panels for x in panel.spans}
    handles = [
        Patch(color=color, label=kind) for kind, (color, _) in KINDS.items() if kind in shown
    ]
    figure.legend(handles=handles, ncols=len(KINDS), loc="lower center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _panel(axis, panel: Panel, names: dict[int, str]) -> None:
    for lane, stream in enumerate(names):
        for kind, (color, _) in KINDS.items():
            parts = [
                (x.begin / 1e3, (x.end - x.begin) / 1e3)
                for x in panel.spans
                if x.stream == stream and kind_of(x.name) == kind
            ]
            # No edges: a gap of nothing but an edge's width would not be seen.
            axis.broken_barh(parts, (lane - 0.4, 0.8), facecolors=color, linewidth=0)
    axis.set_yticks(range(len(names)), list(names.values()), fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title(
        f"{panel.exchange}: {panel.call_ms:.2f} ms, without messages {panel.still_ms:.2f} ms, "
        f"exposed {panel.exposed_ms:.2f} ms",
        fontsize=9,
        loc="left",
    )


def write(path: Path, given: dict, panels: list[Panel]) -> None:
    """Write what was measured. `given`: where and of what."""
    found = [
        {**x._asdict(), "exposed_ms": x.exposed_ms, "spans": [[*span] for span in x.spans]}
        for x in panels
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**given, "panels": found}) + "\n")


def read(path: Path) -> tuple[dict, list[Panel]]:
    """Return what `write` wrote."""
    given = json.loads(path.read_text())
    panels = [
        Panel(x["exchange"], x["call_ms"], x["still_ms"], [Span(*span) for span in x["spans"]])
        for x in given.pop("panels")
    ]
    return given, panels


def title_of(given: dict) -> str:
    return (
        f"{given['world_size']} x {given['gpu']}, {given['layout']} causal, forward and backward, "
        f"{given['local_len']} rows a rank, {given['heads']}/{given['kv_heads']} heads, "
        f"{given['head_dim']}, torch {given['torch']}, {given['date']}"
    )


def record(call: timing.Run, place: Place) -> list[Span]:
    """Return what this rank's GPU does in one call; the others call too. Empty but on rank 0."""
    from torch.profiler import ProfilerActivity, profile

    def run() -> None:
        # The profiler takes its time to start, so ranks meet behind that.
        dist.barrier()
        torch.cuda.synchronize()
        call()
        torch.cuda.synchronize()

    if place.rank > 0:
        run()
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        return spans_of(json.loads(path.read_text()))


def measure(options: argparse.Namespace, place: Place) -> list[Panel]:
    """Return a panel for each exchange. Collective."""
    attention = Attention(options.head_dim**-0.5, True, (-1, -1))
    sizes = (1, options.local_len, options.heads, options.kv_heads, options.head_dim)
    inputs = draw(*sizes, timing.DTYPES[options.dtype], attention, 1 + place.rank)
    calls = {
        exchange: step(ring("triton", options.layout, inputs, exchange), inputs)
        for exchange in options.exchanges
    }

    def without_messages(call: timing.Run) -> timing.Run:
        def run() -> None:
            with still():
                call()

        return run

    runs = {(name, False): call for name, call in calls.items()}
    runs |= {(name, True): without_messages(call) for name, call in calls.items()}
    times = slowest_times(runs, options.repeats, place)
    on_gpu = place.device.type == "cuda"
    for call in calls.values() if on_gpu else ():
        record(call, place)  # the profiler's own start
    return [
        Panel(
            name,
            times[name, False].p50,
            times[name, True].p50,
            record(call, place) if on_gpu else [],
        )
        for name, call in calls.items()
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exchanges", nargs="+", choices=("ring", "copy-engine"), default=["ring", "copy-engine"])
    add("--layout", choices=("contiguous", "zigzag", "stripe"), default="zigzag")
    add("--local-len", type=int, default=8192 if on_gpu else 32)
    add("--heads", type=int, default=32 if on_gpu else 4)
    add("--kv-heads", type=int, default=8 if on_gpu else 2)
    add("--head-dim", type=int, default=128 if on_gpu else 16)
    add("--dtype", choices=timing.DTYPES, default="bf16")
    add("--repeats", type=int, default=15 if on_gpu else 2)
    add("--to", type=Path, default=rows.RESULTS, help="folder of timeline.json and the picture")
    add("--format", choices=("svg", "png"), default="svg")
    add("--draw", action="store_true", help="draw what was measured before")
    add("--run-id", "--run", dest="run", default=timing.new_run(), help="of the measurement")
    add("--tree", help="hash of ring_flash_attn/, where git is absent")
    add("--commit", help="hash of the commit, where git is absent")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    path = options.to / f"{STEM}.json"
    if not options.draw:
        place = join()
        try:
            panels = measure(options, place)
        finally:
            dist.destroy_process_group()
        if place.rank > 0:
            return 0
        asked = ("layout", "local_len", "heads", "kv_heads", "head_dim", "dtype")
        given = timing.origin(options.run, options.commit, options.tree)
        given |= {"world_size": place.world_size} | {x: getattr(options, x) for x in asked}
        write(path, given, panels)
    given, panels = read(path)
    for x in panels:
        print(
            f"{x.exchange}: {x.call_ms:.3f} ms, without messages {x.still_ms:.3f} ms, "
            f"exposed {x.exposed_ms:.3f} ms; GPU busy {busy_us(x.spans) / 1e3:.3f} ms when recorded"
        )
    if not any(x.spans for x in panels):
        print("not drawn: no GPU, nothing recorded")
        return 0
    try:
        picture(panels, title_of(given), options.to / f"{STEM}.{options.format}")
    except ImportError as error:
        print(f"not drawn: {error}; draw {path} elsewhere with --draw")
    return 0


if __name__ == "__main__":
    sys.exit(main())
