"""A rank that dies or never comes: the others raise within the group's timeout, and can go on.

What gloo does (torch 2.13): whoever is connected to a rank that was killed learns it from the
socket, mostly at once. A rank that lives but does not come shows only when the group's timeout is
over, and so does a neighbour that has raised; so the timeout is the bound that holds for all.
Afterwards the group is of no use. A new one of the survivors is.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from packed_cases import GATHER, PackedCase, attend, packed_errors
from ranks import run_ranks
from ring_cases import Case, shard_errors
from ring_flash_attn import backends, ring_attention
from ring_flash_attn.backends.reference import ReferenceBackend
from ring_flash_attn.core.agree import EXCHANGED_CALLS

RANKS, LOST = 3, 2
TIMEOUT_S = 5.0
MARGIN_S = 5.0
BOUND = 1e-10
NEVER_S = 600.0


class Failure(NamedTuple):
    """How rank LOST fails, and what the others must say that they were doing.

    Attributes:
        call: "ring" or "gather".
        method: of the backend, in whose `at`-th call, from 0, the rank kills itself; "sleep": it
            does not make the call at all.
        told: regular expression.
    """

    call: str
    method: str
    at: int
    told: str


PEER = "(sending to|receiving from) global rank [0-2]( and receiving from global rank [0-2])?"
FAILURES = {
    # Hop 2 of three ranks is started after the first step is computed, so it can never arrive.
    "ring-forward": Failure("ring", "forward", 0, rf"{PEER} \(K, V, hop [12]\)"),
    "ring-backward": Failure("ring", "backward", 1, rf"{PEER} \((sums of dK, dV|K, V), hop [12]\)"),
    "gather-forward": Failure("gather", "forward", 1, "waiting to gather K, V"),
    "gather-backward": Failure("gather", "backward", 1, "waiting to (gather K, V|sum dK, dV)"),
    "never-comes": Failure("ring", "sleep", EXCHANGED_CALLS, rf"{PEER} \(K, V, hop 1\)"),
    "never-comes-first": Failure("ring", "sleep", 0, "comparing the calls of all ranks"),
}
PACKED = PackedCase(GATHER, "several", "causal", key_heads=4)


class Told(NamedTuple):
    """What a survivor has seen.

    Attributes:
        error: type and text. cause: of what the library raised `from`.
        seconds: from the call to the error.
        largest_error: of all tensors of the calls over a new group, against the fp64 oracle.
        pids: of all ranks.
    """

    error: str
    cause: str
    seconds: float
    largest_error: float
    pids: list[int]


class Mortal(ReferenceBackend):
    """The reference backend, which kills its process in one call of one method."""

    def __init__(self, method: str, at: int) -> None:
        self._method, self._left = method, at

    def forward(self, *args) -> None:
        self._live("forward")
        super().forward(*args)

    def backward(self, *args) -> None:
        self._live("backward")
        super().backward(*args)

    def _live(self, method: str) -> None:
        if method == self._method:
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1


def attend_and_differentiate(call: str, rank: int, group: dist.ProcessGroup) -> None:
    torch.manual_seed(rank)
    if call == "ring":
        local = [torch.randn(1, 8, 4, 16, requires_grad=True) for _ in range(3)]
        out, _ = ring_attention(*local, backend="reference", group=group)
    else:
        rows = sum(PACKED.local_lengths)
        local = [torch.randn(rows, 4, 16, requires_grad=True) for _ in range(3)]
        out, _ = attend(PACKED, rank, RANKS, "reference", local, group)
    out.sum().backward()


def get_ready(rank: int, failure: Failure) -> dist.ProcessGroup:
    """Return a group with a short timeout, in whose next call rank LOST fails."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    # The first calls of a group compare, which is a wait of its own.
    for _ in range(failure.at if failure.method == "sleep" else EXCHANGED_CALLS):
        attend_and_differentiate(failure.call, rank, group)
    if rank == LOST:
        backends._BY_NAME["reference"] = Mortal(failure.method, failure.at)
    dist.barrier()
    return group


def survive(rank: int, failure: Failure, folder: str) -> Told:
    pids = [0] * RANKS
    dist.all_gather_object(pids, os.getpid())
    group = get_ready(rank, failure)
    if rank == LOST and failure.method == "sleep":
        time.sleep(NEVER_S)
    begin = time.monotonic()
    seen = None
    try:
        attend_and_differentiate(failure.call, rank, group)
    except RuntimeError as error:
        seen = f"{type(error).__name__}: {error}", str(error.__cause__), time.monotonic() - begin
    assert seen is not None, f"rank {rank} has not noticed"
    del group
    dist.destroy_process_group()
    return Told(*seen, go_on(rank, folder), pids)


def go_on(rank: int, folder: str) -> float:
    """Return the largest error of a ring and of a gathered call over a new group of survivors."""
    left = [other for other in range(RANKS) if other != LOST]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/survivors",
        rank=left.index(rank),
        world_size=len(left),
        timeout=timedelta(seconds=60),
    )
    where = dist.get_rank(), len(left)
    sort = "reference", torch.float64, "cpu"
    measured = shard_errors(*where, [Case("zigzag", 6, "causal")], *sort)
    measured += packed_errors(*where, [PACKED], *sort)
    return max(tensor.ours.max_abs for case in measured for tensor in case.values())


@cache
def everything() -> dict[str, list | AssertionError]:
    """Run all failures, side by side, since they mostly wait; return what each rank has seen."""

    def run(failure: Failure) -> list | AssertionError:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return run_ranks(RANKS, survive, failure, folder, lost=[LOST], timeout_s=90)
            except AssertionError as error:
                return error

    with ThreadPoolExecutor(len(FAILURES)) as pool:
        return dict(zip(FAILURES, pool.map(run, FAILURES.values()), strict=True))


def told(name: str) -> list:
    """Return a Told by rank; the exit code for the rank that was lost."""
    seen = everything()[name]
    if isinstance(seen, AssertionError):
        raise seen
    return seen


def survivors(name: str) -> list[Told]:
    return [seen for rank, seen in enumerate(told(name)) if rank != LOST]


@pytest.mark.parametrize("name", FAILURES)
def test_the_others_raise_within_the_timeout_of_the_group(name: str):
    assert told(name)[LOST] == -signal.SIGKILL
    for survivor in survivors(name):
        assert survivor.seconds < TIMEOUT_S + MARGIN_S


@pytest.mark.parametrize("name", FAILURES)
def test_the_error_says_which_rank_was_doing_what(name: str):
    for rank, survivor in enumerate(survivors(name)):
        start = f"RuntimeError: ring attention: global rank {rank}, group of {RANKS}, "
        want = f"{re.escape(start)}{FAILURES[name].told}: {re.escape(survivor.cause)}"
        assert re.fullmatch(want, survivor.error, re.DOTALL), survivor.error
        assert "gloo" in survivor.cause


@pytest.mark.parametrize("name", FAILURES)
def test_a_new_group_of_the_survivors_computes_the_truth(name: str):
    for survivor in survivors(name):
        assert survivor.largest_error < BOUND


@pytest.mark.parametrize("name", FAILURES)
def test_no_rank_is_left_running_or_unreaped(name: str):
    for survivor in survivors(name):
        for pid in survivor.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def script(rank: int, folder: str) -> None:
    """Do what a training script does: leave the error to the interpreter."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    failure = FAILURES["ring-backward"]
    attend_and_differentiate(failure.call, rank, get_ready(rank, failure))


def test_scripts_that_catch_nothing_end_by_themselves(tmp_path: Path):
    """Each in a session of its own, of which nothing is left."""
    command = [sys.executable, __file__, str(tmp_path)]
    path = os.pathsep.join(filter(None, sys.path))
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(RANKS)
    ]
    try:
        # All of it: the imports, the calls before, the timeout and the end of the interpreter.
        errors = [process.communicate(timeout=60 + TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        if rank == LOST:
            assert process.returncode == -signal.SIGKILL
        else:
            assert process.returncode not in (0, -signal.SIGKILL)
            assert re.search(FAILURES["ring-backward"].told, errors[rank]), errors[rank]


if __name__ == "__main__":
    script(int(sys.argv[2]), sys.argv[1])
