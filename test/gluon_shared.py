"""Shared memory and mbarriers of Gluon programs, on numpy."""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from gluon_arrays import Tensor
from gluon_tasks import here, kernel_lines
from gluon_types import Dtype, EmulationError, poison


class Layout:
    """Any layout: what it was made of, which nothing here looks at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def get_default_for(cls, *args: Any, **kwargs: Any) -> "Layout":
        return cls(*args, **kwargs)


class MBarrierLayout(Layout):
    """The layout that makes shared memory one of mbarriers."""


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all bytes expected have come."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.parity = self.pending = self.transaction = 0
        self.in_flight: list[tuple[Callable[[], None], int]] = []

    def __str__(self) -> str:
        return (
            f"{self.name}, in a phase of parity {self.parity} that lacks {self.pending} of "
            f"{self.count} arrivals and {self.transaction} bytes"
        )

    def arrive(self, count: int, expected_bytes: int = 0) -> None:
        if not self.count:
            raise EmulationError(f"{self.name} is used before mbarrier.init")
        if count > self.pending:
            raise EmulationError(f"{count} arrivals over-arrive at {self}")
        self.pending -= count
        self.transaction += expected_bytes
        self._end_phase_if_complete()

    def land(self) -> None:
        """Complete the copies in flight."""
        landing, self.in_flight = self.in_flight, []
        for land, size in landing:
            land()
            self.transaction -= size
            self._end_phase_if_complete()

    def _end_phase_if_complete(self) -> None:
        if self.pending == 0 and self.transaction == 0:
            self.parity, self.pending = self.parity ^ 1, self.count


class SharedMemory:
    """Shared memory or a view of a part: `values` is a numpy view, of Barriers for mbarriers."""

    def __init__(
        self,
        values: np.ndarray,
        dtype: Dtype,
        layout: Any = None,
        whole: "Overlaps | None" = None,
    ) -> None:
        self.values, self.dtype, self.layout = values, dtype, layout
        self.handle = self
        self._overlaps = Overlaps() if whole is None else whole

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.shape, layout=self.layout)

    def index(self, index: Any) -> "SharedMemory":
        if not 0 <= int(index) < len(self.values):
            raise EmulationError(f"index {int(index)} of shared memory of shape {self.shape}")
        return self._view(self.values[int(index)])

    def reshape(self, shape: Sequence[int]) -> "SharedMemory":
        values = self.values.reshape([int(size) for size in shape])
        if not np.shares_memory(values, self.values):
            raise NotImplementedError(f"reshape of permuted shared memory to {shape}")
        return self._view(values)

    def permute(self, order: Sequence[int]) -> "SharedMemory":
        return self._view(self.values.transpose(tuple(order)))

    def slice(self, start: int, length: int, dim: int = 0) -> "SharedMemory":
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise EmulationError(f"slice {start} + {length} of axis {dim} of shape {self.shape}")
        parts = [slice(None)] * self.values.ndim
        parts[dim] = slice(start, start + length)
        return self._view(self.values[tuple(parts)])

    def _reinterpret(self, dtype: Dtype, shape: Sequence[int], layout: Any) -> "SharedMemory":
        """Return the same bytes as another type: what one view holds, writing the other spoils."""
        shape = [int(size) for size in shape]
        sizes = [
            int(np.prod(n)) * x.primitive_bitwidth
            for n, x in ((self.shape, self.dtype), (shape, dtype))
        ]
        if sizes[0] != sizes[1]:
            raise EmulationError(
                f"shared memory {self.shape} {self.dtype} is not as large as {shape} {dtype}"
            )
        values = self._overlaps.other(self, dtype, shape)
        return SharedMemory(values, dtype, layout, self._overlaps)

    def spoil_overlapping(self) -> None:
        """Destroy what views of another type hold of these bytes, which are about to change."""
        self._overlaps.spoil(self.values)

    def _view(self, values: np.ndarray) -> "SharedMemory":
        return SharedMemory(values, self.dtype, self.layout, self._overlaps)

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.values.copy(), self.dtype)

    def store(self, value: Tensor) -> None:
        if value.dtype is not self.dtype or value.shape != self.shape:
            raise EmulationError(
                f"store of {value.shape} {value.dtype} into shared memory {self.shape} {self.dtype}"
            )
        self.spoil_overlapping()
        self.values[...] = value.values


class Overlaps:
    """Views of the same bytes as different types: each in an array of its own."""

    def __init__(self) -> None:
        self._pairs: dict[tuple, tuple[np.ndarray, Dtype, np.ndarray, Dtype]] = {}

    def other(self, memory: SharedMemory, dtype: Dtype, shape: list[int]) -> np.ndarray:
        """Return the array that stands for the bytes of `memory` as another type."""
        key = memory.values.ctypes.data, dtype, tuple(shape)
        if key not in self._pairs:
            values = np.full(shape, poison(dtype), dtype.held_in)
            self._pairs[key] = memory.values, memory.dtype, values, dtype
        return self._pairs[key][2]

    def spoil(self, changed: np.ndarray) -> None:
        for one, one_type, two, two_type in self._pairs.values():
            if np.shares_memory(one, changed):
                two[...] = poison(two_type)
            if np.shares_memory(two, changed):
                one[...] = poison(one_type)


def allocate_shared_memory(
    element_ty: Dtype, shape: Sequence[int], layout: Any, value: Tensor | None = None
) -> SharedMemory:
    """Return shared memory that holds `value`, without one NaN or the least integer."""
    shape = [int(size) for size in shape]
    if isinstance(layout, MBarrierLayout):
        barriers = np.empty(shape, object)
        where = kernel_lines(sys._getframe())
        for place in np.ndindex(*shape):
            barriers[place] = Barrier(f"mbarrier {list(place)} allocated at {where}")
        return SharedMemory(barriers, element_ty, layout)
    values = np.full(shape, poison(element_ty), element_ty.held_in)
    memory = SharedMemory(values, element_ty, layout)
    if value is not None:
        memory.store(value)
    return memory


def barrier_in(memory: SharedMemory) -> Barrier:
    """Return the one mbarrier that a view shows."""
    found = memory.values.reshape(-1)
    if found.dtype != object or found.size != 1:
        raise EmulationError(f"one mbarrier is needed, got {memory.shape} {memory.dtype}")
    return found[0]


def mbarrier_init(mbarrier: SharedMemory, count: int) -> None:
    """Make phases of `count` arrivals, the first of parity 0."""
    barrier = barrier_in(mbarrier)
    if not 0 < count < 2**20:
        raise EmulationError(f"{barrier.name} cannot have {count} arrivals")
    barrier.count = barrier.pending = int(count)
    barrier.parity = barrier.transaction = 0


def mbarrier_invalidate(mbarrier: SharedMemory) -> None:
    """End the use of an mbarrier."""
    barrier_in(mbarrier).count = 0


def mbarrier_arrive(mbarrier: SharedMemory, *, count: int = 1, pred: Any = True) -> None:
    """Arrive `count` times: a partition is one arrival, whatever its threads."""
    if pred:
        barrier_in(mbarrier).arrive(int(count))
        here().scheduler.give_way()


def mbarrier_expect(mbarrier: SharedMemory, bytes: int, pred: Any = True) -> None:
    """Arrive once and make the phase wait for so many bytes too."""
    if pred:
        barrier_in(mbarrier).arrive(1, int(bytes))


def mbarrier_wait(mbarrier: SharedMemory, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    """Wait until the phase of a parity is over; that before the first counts as over."""
    if not pred:
        return
    barrier, parity = barrier_in(mbarrier), int(phase)
    if not barrier.count:
        raise EmulationError(f"{barrier.name} is used before mbarrier.init")
    if parity not in (0, 1):
        raise EmulationError(f"the parity of a phase is 0 or 1, got {parity} at {barrier.name}")

    def over() -> bool:
        return barrier.parity != parity

    def over_after_copies() -> bool:
        barrier.land()
        return over()

    if not over():
        here().scheduler.give_way(
            over, lambda: f"the end of parity {parity} of {barrier}", over_after_copies
        )
