"""Ends a process whose copy-engine pass does not end: a peer has died, or has not come.

A stream that waits for a mailbox waits for ever, and the host behind it. NCCL's watchdog ends the
process once an operation is older than the group's timeout; this does the same for passes.

Each pass gets a number. Its last operation on the caller's stream writes the number into pinned
host memory, which a thread reads once a second. The thread touches no GPU, so nothing that waits
there holds it up. Passes that a CUDA graph captures are not watched, as NCCL watches none.
"""

import faulthandler
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

PERIOD_S = 1.0  # between two looks
# A process that was stopped, by a debugger or by the system, has not waited meanwhile.
LONGEST_LOOK_S = 5 * PERIOD_S
TELL_S = 5.0  # for `tell`, which asks a GPU that may not answer
NUMBERS = 2**32  # of a 32-bit word in host memory
HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # 0 and 2: NCCL's watchdog ends no process


class Watchdog:
    """Watch the passes of one group on one device.

    Passes end in the order in which they were opened. A pass is late when nothing has ended for
    `timeout_s` while it was the next to end; how far the host runs ahead does not matter.

    Args:
        name: whose passes, for the error: "global rank 1, group of 4".
        timeout_s: the group's.
        ended: returns the number that the last ended pass has written; 0 before the first.
        tell: returns what the rank waits for, in words; may hang.
        end: gets the error; ends the process.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        timeout_s: float,
        ended: Callable[[], int],
        tell: Callable[[], str] = lambda: "",
        end: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._timeout_s, self._ended = name, timeout_s, ended
        self._tell, self._end, self._clock = tell, end or end_process, clock
        self._opened: deque[tuple[int, str]] = deque()  # appended here, popped by the thread
        self._number = 0
        self._waited, self._looked = 0.0, clock()

    def open(self, what: str) -> int:
        """Return the number that the pass has to write when it is over. `what`: for the error."""
        # 0 is what nobody has written.
        self._number = self._number % (NUMBERS - 1) + 1
        self._opened.append((self._number, what))
        return self._number

    def look(self) -> None:
        """Count the time since the last look, and end the process if a pass is late."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, LONGEST_LOOK_S), now
        if not self._opened:
            self._waited = 0.0
            return
        if self._forget_ended():
            self._waited = 0.0
            return
        self._waited += passed
        if self._waited < self._timeout_s:
            return
        number, what = self._opened[0]
        error = (
            f"ring attention: {self._name}: pass {number} ({what}) over the copy engine has not "
            f"ended for {self._waited:.0f} s, the group's timeout is {self._timeout_s:.0f} s: "
            "another rank has died or has not come. The results of this rank's later work would "
            "be wrong, so its process ends."
        )
        self._end(" ".join(filter(None, (error, answer(self._tell, TELL_S)))))

    def _forget_ended(self) -> bool:
        """Drop the passes up to the one that has ended last; return whether there were any."""
        last, found = self._ended(), False
        # What was opened after `last` has a number ahead of it, by less than half of all numbers.
        while last and self._opened and (last - self._opened[0][0]) % NUMBERS < NUMBERS // 2:
            self._opened.popleft()
            found = True
        return found


def start(watchdog: Watchdog, period_s: float = PERIOD_S) -> threading.Event:
    """Let a daemon thread look for as long as anybody else holds the watchdog.

    Returns:
        An event that ends the thread when set, as the end of the interpreter does too.
    """
    over = threading.Event()
    weakref.finalize(watchdog, over.set)  # runs at exit as well
    threading.Thread(
        target=_watch, args=(weakref.ref(watchdog), over, period_s), name="copy-engine", daemon=True
    ).start()
    return over


def _watch(watched: Callable[[], Watchdog | None], over: threading.Event, period_s: float) -> None:
    while not over.wait(period_s):
        watchdog = watched()
        if watchdog is None:
            return
        watchdog.look()
        del watchdog


def answer(ask: Callable[[], str], seconds: float) -> str:
    """Return what `ask` returns, or why it has not."""
    said: list[str] = []

    def run() -> None:
        try:
            said.append(ask())
        except Exception as error:  # of a GPU in any state, and the process is about to end
            said.append(f"(asking what it waits for: {type(error).__name__}: {error})")

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(seconds)
    return said[0] if said else f"(its GPU did not say within {seconds:.0f} s what it waits for)"


def end_process(error: str) -> None:
    """Write the error and every thread's stack, and abort, as NCCL's watchdog does."""
    try:
        print(error, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2, all_threads=True)
    finally:
        os.abort()


def is_wanted() -> bool:
    """Return whether a process may be ended, by the variable that says so for NCCL's watchdog."""
    return os.environ.get(HANDLING, "3") not in ("0", "2")


def group_timeout_s(group: dist.ProcessGroup, device: torch.device) -> float:
    """Return the timeout that the group was made with."""
    return group._get_backend(device).options._timeout.total_seconds()


def word() -> torch.Tensor:
    """Return a zero in host memory [1] int32; pinned, so that a stream can write it."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=torch.cuda.is_available())


def read(memory: torch.Tensor) -> int:
    """Return the unsigned number in a `word`."""
    return int(memory.item()) % NUMBERS
