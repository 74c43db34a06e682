"""Compare dense attention, the native ring and the Triton ring. A script and a pytest file in one.

    torchrun --nproc_per_node 4 test/test_ring_flash_attn_comparison.py
    torchrun --nproc_per_node 2 test/test_ring_flash_attn_comparison.py --global-length 4096

Prints max error, RMSE and relative error of out, lse, dq, dk, dv for every layout and mask, of
batches and of packed documents, then latency, throughput and peak memory. Exit code 1 if a bound is
missed. Uses the GPUs there are; without one it runs on the CPU: gloo, Triton's interpreter, small.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which the library does on the first Triton call.
    os.environ["TRITON_INTERPRET"] = "1"

import torch.distributed as dist
from tabulate import tabulate

from comparison import MASKS, TENSORS, ErrorRow, Place, Settings, backends, compare, join
from comparison_packed import PACKED_LAYOUTS, documents_of
from comparison_speed import SpeedRow, time_rings
from oracle import LAYOUTS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The float64 truth holds a [1024, S] chunk and a [S, S] mask; beyond this length flash attention
# on one GPU stands in for it.
LONGEST_TRUTH = {"cuda": 32768, "cpu": 4096}
# Triton kernels on P ranks must err no more than on one, and hold little more memory than native.
MOST_OF_ONE_DEVICE = 1.05
MOST_OF_NATIVE_MEMORY = 1.2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--global-length",
        type=int,
        default=8192 if on_gpu else 96,
        help="rows of the whole sequence, a multiple of 2 x ranks",
    )
    parser.add_argument("--heads", type=int, default=32 if on_gpu else 4, help="query heads")
    parser.add_argument(
        "--kv-heads",
        type=int,
        default=8 if on_gpu else 2,
        help="key and value heads, a divisor of --heads",
    )
    parser.add_argument(
        "--head-dim", type=int, default=128 if on_gpu else 32, help="width of a head"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of q, k, v")
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="layouts to compare"
    )
    parser.add_argument(
        "--packed-layouts",
        nargs="*",
        choices=PACKED_LAYOUTS,
        default=list(PACKED_LAYOUTS),
        help="layouts of packed documents to compare, under those of --masks that are causal",
    )
    parser.add_argument(
        "--masks",
        nargs="+",
        choices=MASKS,
        default=list(MASKS),
        help="masks to compare; window is causal, a quarter of the sequence",
    )
    parser.add_argument(
        "--repeats", type=int, default=15 if on_gpu else 1, help="timed repetitions"
    )
    parser.add_argument(
        "--truth",
        choices=("auto", "float64", "flash"),
        default="auto",
        help="what errors are measured against; auto: float64 where it fits",
    )
    parser.add_argument("--no-speed", action="store_true", help="errors only")
    parser.add_argument(
        "--inject",
        choices=TENSORS,
        help="spoil this tensor of the Triton ring by 1 %%, to see the comparison fail",
    )
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace, place: Place) -> Settings:
    multiple = 2 * place.world_size
    if options.global_length % multiple:
        raise SystemExit(f"--global-length must be a multiple of {multiple} (2 x ranks)")
    truth = options.truth
    if truth == "auto":
        fits = options.global_length <= LONGEST_TRUTH[place.device.type]
        truth = "float64" if fits else "flash"
    return Settings(
        options.global_length,
        options.heads,
        options.kv_heads,
        options.head_dim,
        options.batch,
        DTYPES[options.dtype],
        tuple(options.layouts),
        tuple(options.packed_layouts),
        tuple(options.masks),
        options.repeats,
        truth,
        options.inject,
    )


def heading(settings: Settings, place: Place, chosen: dict[str, str]) -> str:
    if place.device.type == "cuda":
        where = f"{torch.cuda.get_device_name()}, {place.transport}"
        if place.transport != "nccl":
            where += " (more ranks than GPUs: right, but no measure of speed)"
    else:
        where = (
            "no GPU: CPU tensors over gloo, Triton's interpreter (right, but no measure of speed)"
        )
    truth = {
        "float64": "dense float64 attention",
        "flash": "flash attention on one device",
    }[settings.truth]
    bound = {
        "float64": f"2 x that of a dense computation in {settings.dtype}, + 1e-5",
        "flash": "fixed by dtype, since both sides round",
    }[settings.truth]
    s = settings
    packed = s.packed(place.device)
    documents = ", ".join(map(str, documents_of(s.global_len, place.world_size)))
    return (
        f"ring_flash_attn comparison: {place.world_size} ranks, {where}\n"
        f"global length {s.global_len}, batch {s.batch}, heads {s.heads}/{s.key_heads}, head dim "
        f"{s.head_dim}, {s.dtype}, torch {torch.__version__}, native backend: "
        f"{chosen.get('native', 'none')}\n"
        f"packed: documents of {documents} rows, heads {packed.heads}/{packed.key_heads}\n"
        f"errors against {truth}; bound on the relative error: {bound}"
    )


def error_report(rows: list[ErrorRow]) -> str:
    columns = ("mask", "kernels", "layout", "tensor", "max error", "RMSE", "relative", "bound")
    table = [
        (*row[:4], *(f"{x:.2e}" for x in row[4:8]), f"{row.of_one_device:.2f}x", _verdict(row))
        for row in rows
    ]
    return tabulate(table, headers=(*columns, "of one device", ""), stralign="left")


def _verdict(row: ErrorRow) -> str:
    return "ok" if row.passed else "MISSED"


def speed_report(rows: list[SpeedRow]) -> str:
    table = [
        (
            row.implementation,
            row.layout,
            row.passes,
            f"{row.ms:.2f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.tflops_per_device:.4g}",
            f"{row.peak_mib:.0f}",
        )
        for row in rows
    ]
    columns = ("kernels", "layout", "pass", "ms", "tokens/s", "TFLOP/s a device", "peak MiB")
    return tabulate(table, headers=columns, stralign="left", disable_numparse=True)


def missed(settings: Settings, errors: list[ErrorRow], speeds: list[SpeedRow]) -> list[str]:
    """Return every bound that does not hold, as a sentence."""
    found = [
        f"{r.mask}, {r.implementation} {r.layout}: {r.tensor} has relative error {r.relative:.2e}, "
        f"bound {r.bound:.2e}"
        for r in errors
        if not r.passed
    ]
    if settings.dtype.itemsize == 2 and settings.truth == "float64" and settings.global_len >= 4096:
        found += [
            f"{r.mask}, {r.implementation} {r.layout}: {r.tensor} has {r.of_one_device:.3f} times "
            f"the relative error of one device, bound {MOST_OF_ONE_DEVICE}"
            for r in errors
            # lse is float32 whatever the dtype: its error is rounding noise of 1e-7.
            if r.implementation == "triton" and r.tensor != "lse"
            if r.of_one_device > MOST_OF_ONE_DEVICE
        ]
    peaks = {(r.implementation, r.layout): r.peak_mib for r in speeds if r.passes == "fwd+bwd"}
    found += [
        f"triton {layout}: peak memory {peak:.0f} MiB, native {peaks['native', layout]:.0f} MiB, "
        f"bound {MOST_OF_NATIVE_MEMORY} times that"
        for (name, layout), peak in peaks.items()
        if name == "triton" and ("native", layout) in peaks
        if peak > MOST_OF_NATIVE_MEMORY * peaks["native", layout]
    ]
    return found


def main() -> int:
    options = parse()
    place = join()
    settings = settings_of(options, place)
    chosen, refused = backends(settings, place)
    settings = replace(settings, implementations=tuple(chosen))

    def say(*words: str) -> None:
        if place.rank == 0:
            print(*words, flush=True)

    say(heading(settings, place, chosen))
    for name, reason in refused.items():
        say(f"not run: {name}: {reason}")
    if not chosen or (settings.truth == "flash" and "native" in refused):
        say("FAILED: nothing to compare with")
        return 1
    packed = settings.packed(place.device)
    documents = documents_of(settings.global_len, place.world_size)
    tables = [(settings, mask, ()) for mask in settings.masks]
    if packed.layouts:
        tables += [(packed, mask, documents) for mask in settings.masks if MASKS[mask][0]]
    errors = []
    for of_table, mask, lengths in tables:
        rows = compare(of_table, place, mask, lengths)
        errors += rows
        say("\n" + error_report(rows))
    speeds: list[SpeedRow] = []
    if not options.no_speed:
        speeds = time_rings(settings, place, settings.masks[0])
        say(f"\n{settings.masks[0]}, median of {settings.repeats}, slowest rank:")
        say(speed_report(speeds))
    found = missed(settings, errors, speeds)
    say("\n" + "\n".join(["MISSED:", *found] if found else ["PASSED: every bound holds."]))
    dist.destroy_process_group()
    return 1 if found else 0


def run(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), str(Path(__file__)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


SMALL = ("--global-length", "48", "--head-dim", "16", "--no-speed")


def test_comparison_passes_on_two_ranks():
    result = run(2, "--global-length", "64", "--head-dim", "16")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASSED: every bound holds." in result.stdout
    for word in (*PACKED_LAYOUTS, *TENSORS, *MASKS, "max error", "RMSE", "tokens/s"):
        assert word in result.stdout
    assert "native backend: " in result.stdout
    assert "packed: documents of 8, 40, 4, 12 rows" in result.stdout
    ok = [line.split() for line in result.stdout.splitlines() if line.endswith(" ok")]
    for kernels in ("native", "triton"):
        for mask in ("causal", "window"):
            of_packed = [line[3] for line in ok if line[:3] == ["packed", mask, kernels]]
            assert [of_packed.count(layout) for layout in PACKED_LAYOUTS] == [len(TENSORS)] * 4


def test_comparison_passes_on_eight_ranks():
    layouts = "--layouts", "zigzag", "--packed-layouts", "zigzag"
    small = "--global-length", "64", "--head-dim", "16", "--no-speed", "--masks", "causal"
    result = run(8, *small, *layouts)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 ranks" in result.stdout and "PASSED: every bound holds." in result.stdout


def test_comparison_passes_against_flash_attention():
    result = run(2, *SMALL, "--truth", "flash", "--masks", "causal", "--packed-layouts", "zigzag")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("tensor", ["out", "dq", "dk", "dv"])
def test_an_error_of_one_percent_fails_the_comparison(tensor: str):
    layouts = "--layouts", "zigzag", "--packed-layouts", "llama3"
    result = run(2, *SMALL, *layouts, "--masks", "causal", "--inject", tensor)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"causal, triton zigzag: {tensor} has relative error" in result.stdout
    assert f"packed causal, triton llama3: {tensor} has relative error" in result.stdout


def test_the_quick_test_passes_within_a_minute():
    script = Path(__file__).with_name("quick_test_triton.py")
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASSED in" in result.stdout


if __name__ == "__main__":
    sys.exit(main())
