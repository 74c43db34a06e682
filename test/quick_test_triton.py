"""Check the Triton kernels in under a minute: `python test/quick_test_triton.py`.

First on one device, then a ring of two ranks: a batch, and packed documents. Uses a GPU if there
is one; else the CPU, in Triton's interpreter. Exit code 1 if anything is off.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which the library does on the first Triton call.
    os.environ["TRITON_INTERPRET"] = "1"

import oracle
from quick_interpreter import quicken
from ring_flash_attn import triton_flash_attn_backward, triton_flash_attn_forward

ON_GPU = torch.cuda.is_available()
COMPARISON = Path(__file__).with_name("test_ring_flash_attn_comparison.py")
# (rows of q, rows of k, heads, key heads, head dim, causal, window)
CASES = [
    (64, 64, 2, 2, 32, False, (-1, -1)),
    (77, 77, 4, 2, 64, True, (-1, -1)),
    (50, 80, 4, 1, 16, True, (-1, -1)),
    (96, 96, 2, 1, 32, True, (20, 0)),
]


def check_one_device(dtype: torch.dtype) -> list[str]:
    """Compare every case with float64 attention; return what is off."""
    device = "cuda" if ON_GPU else "cpu"
    generator = torch.Generator().manual_seed(0)
    wrong = []
    for case in CASES:
        rows, keys, heads, key_heads, head_dim, causal, window = case

        def normal(length: int, h: int, head_dim: int = head_dim) -> torch.Tensor:
            return torch.randn(2, length, h, head_dim, generator=generator).to(device, dtype)

        q, k, v = normal(rows, heads), normal(keys, key_heads), normal(keys, key_heads)
        dout = normal(rows, heads)
        masked = {"causal": causal, "window_size": window}
        out, lse = triton_flash_attn_forward(q, k, v, **masked)
        grads = triton_flash_attn_backward(dout, q, k, v, out, lse, **masked)
        # flash-attn's convention: the last query and the last key are at the same position.
        seen = oracle.visible(
            list(range(keys - rows, keys)), list(range(keys)), causal, window, device
        )
        truth = oracle.dense(*(x.double() for x in (q, k, v)), seen, dout.double())
        yardstick = oracle.dense_in_dtype(q, k, v, seen, dout)
        broken = oracle.beyond_bound(oracle.Result(out, lse, *grads), truth, yardstick)
        print(f"  {case} {dtype}: {'; '.join(broken) or 'ok'}", flush=True)
        wrong += broken
    return wrong


def check_two_ranks() -> int:
    """Run the comparison on two ranks, small; return its exit code."""
    length = "2048" if ON_GPU else "64"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(COMPARISON), "--global-length", length, "--heads", "4", "--kv-heads", "2"]
    command += ["--head-dim", "64" if ON_GPU else "16", "--masks", "causal", "--no-speed"]
    command += ["--packed-layouts", "zigzag"]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    ).returncode


def main() -> int:
    start = time.monotonic()
    if not ON_GPU:
        quicken()
    where = torch.cuda.get_device_name() if ON_GPU else "no GPU: CPU, Triton's interpreter"
    print(f"quick test of the Triton kernels on {where}\none device:")
    wrong = [text for dtype in (torch.float32, torch.bfloat16) for text in check_one_device(dtype)]
    print("two ranks:", flush=True)
    failed = check_two_ranks() != 0 or bool(wrong)
    seconds = time.monotonic() - start
    print(f"{'FAILED' if failed else 'PASSED'} in {seconds:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
