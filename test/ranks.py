"""Run a function on several ranks of a group, one process each, and collect the results."""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from quick_interpreter import quicken

SPAWN = multiprocessing.get_context("spawn")


def run_ranks(
    world_size: int,
    work: Callable,
    *args,
    timeout_s: float = 300.0,
    lost: Collection[int] = (),
    transport: str = "gloo",
) -> list:
    """Call `work(rank, *args)` on every rank inside a group; return the results by rank.

    `work` must be importable (a module's top level); what it returns must pickle. A rank that
    raises, dies or outlasts `timeout_s` ends the others, and its traceback is raised here. Not so
    the ranks `lost`: nobody waits for them, they may die, and their result is the exit code, -9
    if they lived until the others had ended. `transport` is gloo, or nccl: a GPU for each rank.
    Over gloo ranks may share GPUs (`gpu_of`), also where one fetches from another's memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            SPAWN.Process(
                target=_enter, args=(folder, rank, world_size, transport, work, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        begin = time.monotonic()
        kept = [process for rank, process in enumerate(ranks) if rank not in lost]
        while any(process.is_alive() for process in kept):
            if time.monotonic() - begin > timeout_s:
                break
            if any(process.exitcode not in (None, 0) for process in kept):
                # The others would wait for this rank until the group's timeout.
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in kept]
        seconds = time.monotonic() - begin
        for process in ranks:
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
        if errors or any(code != 0 for code in codes):
            raise AssertionError(
                f"exit codes {codes} (None: ended after {seconds:.0f} s)\n" + "\n".join(errors)
            )
        return [
            ranks[rank].exitcode
            if rank in lost
            else torch.load(Path(folder, f"result{rank}"), weights_only=False)
            for rank in range(world_size)
        ]


def gpu_of(rank: int) -> torch.device:
    """Return a rank's GPU, which others share where there are more ranks than GPUs."""
    return torch.device("cuda", rank % torch.cuda.device_count())


def gpu_transport(world_size: int) -> str:
    """Return nccl where each rank has a GPU of its own, else gloo."""
    return "nccl" if world_size <= torch.cuda.device_count() else "gloo"


def _enter(
    folder: str, rank: int, world_size: int, transport: str, work: Callable, args: tuple
) -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        quicken()
    os.environ["LOCAL_RANK"] = str(rank)
    device = None
    if transport == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    elif 0 < torch.cuda.device_count() < world_size:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        torch.cuda.set_device(gpu_of(rank))
    try:
        dist.init_process_group(
            transport,
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
            device_id=device,
        )
        if transport == "gloo":
            # A rank whose work needs no other must not end while others still connect to it.
            dist.barrier()
        torch.save(work(rank, *args), Path(folder, f"result{rank}"))
        dist.destroy_process_group()
        code = 0
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        code = 1
    # gloo's threads may outlive the group (what `poison_empty` imports keeps it) and abort a
    # process whose interpreter is being torn down (PyTorch issue 190489): leave without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
