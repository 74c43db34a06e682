"""How long the host is inside the CUDA driver: launches, copies, stream operations, events.

What torch's own operations and NCCL ask of the driver is not seen, so the rest of a call's time is
at least what its Python takes.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch


class DriverClock:
    """Adds up the microseconds inside of functions.

    Attributes:
        us: so far.
    """

    def __init__(self) -> None:
        self.us = 0.0

    def timed(self, function: Callable) -> Callable:
        """Return a function that does the same, and counts."""

        @wraps(function)
        def wrapper(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.us += 1e6 * (time.perf_counter() - begin)

        return wrapper


@contextmanager
def driver_clock() -> Iterator[DriverClock]:
    """Count the driver's time of the kernels launched so far, of exchanges and of events."""
    clock = DriverClock()
    kept = []
    try:
        for owner, name in _entries():
            kept.append((owner, name, getattr(owner, name)))
            setattr(owner, name, clock.timed(kept[-1][2]))
        yield clock
    finally:
        for owner, name, function in reversed(kept):
            setattr(owner, name, function)


def _entries() -> list[tuple[object, str]]:
    """Return where this library calls the driver: an object and the name of what it calls."""
    if not torch.cuda.is_available():
        return []
    from ring_flash_attn.backends import launch
    from ring_flash_attn.core import peer_memory

    found: list[tuple[object, str]] = [
        (torch.cuda.Event, "record"),
        (torch.cuda.Stream, "wait_event"),
    ]
    found += [(peer_memory._driver(), name) for name in ("_batch", "_write", "_copy")]
    found += [(x, "_start") for x in gc.get_objects() if type(x) is launch._Direct]
    return found
