"""The partitions of running Gluon programs, one thread each, of which one runs at a time.

A partition gives way where it waits, and after it signals, so a run repeats exactly and a deadlock
is known at once: every partition waits. What is asynchronous (copies, wgmma) ends when nothing else
can go on, the latest end that the kernel allows.
"""

import random
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np

from gluon_types import EmulationError

# Set to True in every module whose kernels the emulator runs.
MARK = "__run_by_gluon_emulator__"
WARP = 32  # threads


class Deadlock(EmulationError):
    """Every partition waits for something that none of them will do."""


class _Stopped(Exception):
    """Another partition has failed."""


@dataclass
class NamedBarrier:
    """A hardware barrier, on which `arrived` of `threads` threads have arrived."""

    threads: int
    arrived: int = 0
    generation: int = 0


@dataclass
class Program:
    """One program of a launch. Its named barriers are shared by its partitions."""

    index: tuple[int, ...]
    grid: tuple[int, ...]
    named: dict[int, NamedBarrier] = field(default_factory=dict)


def _always() -> bool:
    return True


def _never() -> bool:
    return False


class Task:
    """A partition: what it runs, what it waits for, and what it has in flight.

    It can go on if `ready` says so, or once `complete` has ended what is asynchronous and says so;
    with `last` only when nobody else can.
    `products` are its wgmmas not executed yet, `stores` its TMA stores, both oldest first.
    `unfenced` forgets what it has stored in and loaded from shared memory since its last fence.
    """

    def __init__(
        self, scheduler: "Scheduler", program: Program, name: str, num_warps: int, work: Callable
    ) -> None:
        self.scheduler, self.program, self.num_warps = scheduler, program, num_warps
        self.name, self._work = f"{name} of program {program.index}", work
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = _always
        self.complete: Callable[[], bool] = _never
        self.last = False
        self.rank = 0.0
        self.waits_for: Callable[[], str] | str = ""
        self.finished = False
        self.products: list[Any] = []
        self.stores: list[Callable[[], None]] = []
        self.unfenced: list[Callable[[], Any]] = []
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        error: Exception | None = None
        _here.task = self
        # A GPU raises nothing for overflow, NaN or a division by zero.
        try:
            with suppress(_Stopped), np.errstate(all="ignore"):
                self.scheduler.check()
                self._work()
                self._check_nothing_in_flight()
        except EmulationError as failure:
            failure.args = (f"{self.name}: {failure}",)
            error = failure
        except Exception as failure:
            error = failure
        self.scheduler.end(self, error)

    def _check_nothing_in_flight(self) -> None:
        for what, left in (("wgmmas", self.products), ("TMA stores", self.stores)):
            if left:
                raise EmulationError(f"ended with {len(left)} {what} in flight")

    def describe(self) -> str:
        """Return what it waits for and where."""
        what = self.waits_for if isinstance(self.waits_for, str) else self.waits_for()
        frame = sys._current_frames().get(self.thread.ident or 0)
        return f"{self.name} waits for {what}, at {kernel_lines(frame)}"


_here = threading.local()


def here() -> Task:
    """Return the running partition."""
    if not hasattr(_here, "task"):
        raise EmulationError("a Gluon operation was called outside of a kernel")
    return _here.task


def kernel_lines(frame: FrameType | None) -> str:
    """Return the up to three innermost lines of kernels on a stack, as "file:line < file:line"."""
    found = []
    while frame is not None and len(found) < 3:
        if frame.f_globals.get(MARK):
            file = frame.f_code.co_filename.rpartition("/")[2]
            found.append(f"{file}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "an unknown line"


class Scheduler:
    """Decides which partition runs next: the next in line, or with a seed one of random rank.

    With a seed, what is asynchronous may also end while others can go on.
    """

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else random.Random(seed)
        self._tasks: list[Task] = []
        self._error: Exception | None = None
        self._done = threading.Event()

    def add(self, task: Task) -> None:
        """Start a partition's thread, which waits for its turn."""
        self._tasks.append(task)
        task.thread.start()

    def run(self, timeout_s: float) -> None:
        """Run all partitions to their ends; raise what the first one to fail has raised."""
        self._tasks[0].turn.release()
        if not self._done.wait(timeout_s):
            running = [task.name for task in self._tasks if not task.finished]
            self._fail(EmulationError(f"not done after {timeout_s} s, unfinished: {running}"))
        for task in self._tasks:
            # A partition that never gives way cannot be stopped; its thread is a daemon.
            task.thread.join(5.0 if self._error is None else 0.2)
        if self._error is not None:
            raise self._error

    def check(self) -> None:
        """Raise in a partition of a launch that has failed."""
        if self._error is not None:
            raise _Stopped

    def give_way(
        self,
        ready: Callable[[], bool] = _always,
        waits_for: Callable[[], str] | str = "",
        complete: Callable[[], bool] = _never,
    ) -> None:
        """Let others run; return when it is the caller's turn again and it can go on, see Task."""
        me = here()
        self.check()
        me.ready, me.waits_for, me.complete = ready, waits_for, complete
        following = self._next(me)
        if following is None:
            self._report_deadlock()
        elif following is not me:
            following.turn.release()
            me.turn.acquire()
        self.check()
        me.ready, me.complete = _always, _never

    def give_way_to_all(self, waits_for: str, last: bool = False) -> None:
        """Let others run until none of them can: then what the caller has in flight may end.

        With `last` also what the others have in flight ends before, if that lets them go on.
        """
        here().last = last
        self.give_way(_never, waits_for, _always)
        here().last = False

    def end(self, task: Task, error: Exception | None) -> None:
        """Note that a partition has ended, and hand its turn on."""
        task.finished = True
        if error is not None:
            self._fail(error)
        elif self._error is None:
            following = self._next(task)
            if following is not None:
                following.turn.release()
            elif all(other.finished for other in self._tasks):
                self._done.set()
            else:
                self._report_deadlock()

    def _next(self, task: Task) -> Task | None:
        """Return the first in line after `task`, it being the last, that can go on."""
        place = self._tasks.index(task) + 1
        line = [x for x in self._tasks[place:] + self._tasks[:place] if not x.finished]
        if self._random is not None:
            # Whom it prefers it does for a while, so that others fall behind by much.
            if self._random.random() < 0.05:
                for other in self._tasks:
                    other.rank = self._random.random()
            line.sort(key=lambda x: x.rank)
            return next((x for x in line if x.ready() or x.complete()), None)
        ready = next((x for x in line if x.ready()), None)
        line.sort(key=lambda x: x.last)
        return ready or next((x for x in line if x.complete()), None)

    def _report_deadlock(self) -> None:
        waiting = [task.describe() for task in self._tasks if not task.finished]
        self._fail(Deadlock("deadlock: " + "; ".join(waiting)))

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        for task in self._tasks:
            task.turn.release()
        self._done.set()


def named_barrier(index: int, threads: int, wait: bool) -> None:
    """Arrive with all threads of the partition, and wait for the others if asked to."""
    task = here()
    if not 0 <= index < 16 or threads % WARP:
        raise EmulationError(f"named barrier {index} of {threads} threads does not exist")
    barrier = task.program.named.setdefault(index, NamedBarrier(threads))
    if barrier.arrived and barrier.threads != threads:
        raise EmulationError(
            f"named barrier {index} is used for {threads} threads while others wait on it for "
            f"{barrier.threads}"
        )
    barrier.threads = threads
    barrier.arrived += WARP * task.num_warps
    if barrier.arrived > threads:
        raise EmulationError(f"{barrier.arrived} threads arrived on barrier {index} of {threads}")
    generation = barrier.generation
    if barrier.arrived == threads:
        barrier.arrived, barrier.generation = 0, generation + 1
    if not wait or barrier.generation != generation:
        task.scheduler.give_way()
        return
    task.scheduler.give_way(
        lambda: barrier.generation != generation,
        lambda: f"named barrier {index} ({barrier.arrived} of {threads} threads arrived)",
    )


def check_balance(program: Program) -> None:
    """Raise if a named barrier is left with arrivals that no phase has used."""
    for index, barrier in program.named.items():
        if barrier.arrived:
            raise EmulationError(
                f"named barrier {index} was left unbalanced: {barrier.arrived} of "
                f"{barrier.threads} threads have arrived"
            )


def warp_specialize(
    functions_and_args: list[tuple[Callable, tuple]],
    worker_num_warps: list[int],
    worker_num_regs: list[int],
) -> None:
    """Run the first function in the caller's partition beside the others in ones of their own."""
    counts = {len(functions_and_args) - 1, len(worker_num_warps), len(worker_num_regs)}
    if len(counts) != 1:
        raise EmulationError(
            f"{len(functions_and_args)} partitions need one number of warps and of registers for "
            f"each but the first, got {worker_num_warps} and {worker_num_regs}"
        )
    me = here()
    workers = []
    for place, (function, args) in enumerate(functions_and_args[1:]):

        def work(function: Callable = function, args: tuple = args) -> None:
            function(*args)

        name = f"partition {place + 1} ({_name(function)})"
        workers.append(Task(me.scheduler, me.program, name, worker_num_warps[place], work))
    for worker in workers:
        me.scheduler.add(worker)
    function, args = functions_and_args[0]
    whole, me.name = me.name, f"partition 0 ({_name(function)}) of program {me.program.index}"
    function(*args)
    me.name = whole
    me.scheduler.give_way(
        lambda: all(worker.finished for worker in workers), "the other partitions to end"
    )


def _name(function: Callable) -> str:
    return getattr(function, "__name__", str(function))
