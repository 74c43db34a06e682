"""A rank that is killed in the middle of a ring: over NCCL and the copy engine, and, on CPUs, gloo.

On a GPU nobody waits on the host, so no call raises: a watchdog ends the process (SIGABRT) once
an operation is older than the group's timeout. NCCL's does so in a thread of torch's, by default
(TORCH_NCCL_ASYNC_ERROR_HANDLING=3), and sleeps 4 x TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC before, one
minute if unset, which these tests shorten. With TORCH_NCCL_BLOCKING_WAIT=1 there is no watchdog:
the host waits, and the call raises. The copy engine's watchdog is `core.watchdog`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from ring_cases import Case, shard_errors
from ring_flash_attn import backends, ring_attention
from ring_flash_attn.core.agree import EXCHANGED_CALLS
from test_failure import Mortal

TIMEOUT_S = 10.0
MARGIN_S = 30.0  # of which NCCL's abort, which prints C++ stacks, may take most
START_S = 120.0  # imports, contexts and communicators
LOST = 1
BOUND = 1e-10
NCCL_SAYS = "Watchdog caught collective operation timeout|NCCL communicator encountered error"
WE_SAY = "RuntimeError: ring attention: global rank|DistBackendError: ring attention: global rank"


class Way(NamedTuple):
    """How K, V travel, and how a survivor ends.

    Attributes:
        told: regular expression of what it writes to stderr.
        codes: exit codes.
        options: environment variables.
    """

    transport: str
    exchange: str
    told: str
    codes: tuple[int, ...]
    options: dict[str, str]


# gloo's threads may abort a process whose interpreter is being torn down (PyTorch issue 190489).
RAISED = (1, -signal.SIGABRT)
WAYS = {
    "gloo": Way("gloo", "ring", WE_SAY, RAISED, {}),
    "nccl": Way("nccl", "ring", NCCL_SAYS, (-signal.SIGABRT,), {}),
    "nccl-blocking": Way("nccl", "ring", WE_SAY, RAISED, {"TORCH_NCCL_BLOCKING_WAIT": "1"}),
    "copy-engine": Way(
        "nccl",
        "copy-engine",
        r"ring attention: .* over the copy engine has not ended for \d+ s, the group's timeout is",
        (-signal.SIGABRT,),
        {},
    ),
}
QUICK = {
    "OMP_NUM_THREADS": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "500",
    "TORCH_DISABLE_ADDR2LINE": "1",
    # What deterministic algorithms ask for, which `shard_errors` turns on.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def script(rank: int, size: int, folder: str, way: Way, killed: bool) -> None:
    """One rank: with `killed`, in a group where rank LOST dies; else compare with the truth."""
    device = None
    if way.transport == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        way.transport,
        init_method=f"file://{folder}/store-{killed}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=START_S),
        device_id=device,
    )
    where = str(device or "cpu")
    if killed:
        die_or_wait(rank, where, way.exchange)
    else:
        case = Case("zigzag", 6, "causal")
        [measured] = shard_errors(rank, size, [case], "reference", torch.float64, where)
        assert max(x.ours.max_abs for x in measured.values()) < BOUND
    dist.destroy_process_group()


def die_or_wait(rank: int, where: str, exchange: str) -> None:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    torch.manual_seed(rank)
    local = [torch.randn(1, 64, 4, 16, device=where, requires_grad=True) for _ in range(3)]

    def call() -> None:
        out, _ = ring_attention(*local, backend="reference", group=group, exchange=exchange)
        out.sum().backward()
        if where != "cpu":
            torch.cuda.synchronize()

    for _ in range(EXCHANGED_CALLS):
        call()
    dist.barrier()
    if rank == LOST:
        # In the first step, while the first hop is under way and later ones are not.
        backends._BY_NAME["reference"] = Mortal("forward", 0)
    call()


def start(rank: int, size: int, folder: Path, name: str, killed: bool) -> subprocess.Popen:
    """Start a rank in a session of its own, its stderr in a file."""
    way = WAYS[name]
    options = QUICK | way.options | {"RING_FLASH_ATTN_EXCHANGE": way.exchange}
    options["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    given = [str(rank), str(size), str(folder), name, str(int(killed))]
    with (folder / f"{killed}-{rank}").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, __file__, *given],
            stderr=errors,
            start_new_session=True,
            env=os.environ | options,
        )


def end_times(processes: list[subprocess.Popen], limit_s: float) -> list[float]:
    """Return when each process has ended; inf if it lives on. Kill what is left."""
    begin, times = time.monotonic(), [float("inf")] * len(processes)
    try:
        while float("inf") in times and time.monotonic() - begin < limit_s:
            for rank, process in enumerate(processes):
                if times[rank] == float("inf") and process.poll() is not None:
                    times[rank] = time.monotonic()
            if times[LOST] < float("inf"):
                begin, limit_s = times[LOST], TIMEOUT_S + MARGIN_S
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return times


def check(name: str, size: int, folder: Path) -> None:
    """Kill a rank, look how the others end, and use their GPUs again."""
    way = WAYS[name]
    processes = [start(rank, size, folder, name, True) for rank in range(size)]
    times = end_times(processes, 2 * START_S)
    errors = [(folder / f"True-{rank}").read_text() for rank in range(size)]
    assert processes[LOST].returncode == -signal.SIGKILL, errors[LOST]
    for rank, process in enumerate(processes):
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        if rank != LOST:
            seconds = times[rank] - times[LOST]
            print(f"{name}: rank {rank} ended with {process.returncode} after {seconds:.1f} s")
            assert seconds < TIMEOUT_S + MARGIN_S, errors[rank]
            assert process.returncode in way.codes, errors[rank]
            assert re.search(way.told, errors[rank]), errors[rank]
    anew = [start(rank, size, folder, name, False) for rank in range(size)]
    end_times(anew, START_S)
    errors = [(folder / f"False-{rank}").read_text() for rank in range(size)]
    assert [process.returncode for process in anew] == [0] * size, "\n".join(errors)


def test_a_killed_rank_over_gloo(tmp_path: Path):
    check("gloo", 3, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("name", ["nccl", "nccl-blocking", "copy-engine"])
def test_a_killed_rank_on_gpus(name: str, tmp_path: Path):
    check(name, min(4, torch.cuda.device_count()), tmp_path)


if __name__ == "__main__":
    rank, size, folder, name, killed = sys.argv[1:]
    script(int(rank), int(size), folder, WAYS[name], killed == "1")
