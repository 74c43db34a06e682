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


class SharedLinearLayout(Layout):
    """Says where in shared memory each element lies, by the bits of the place."""

    def __init__(self, offset_bases: Sequence[Sequence[int]], alignment: int = 16) -> None:
        super().__init__(offset_bases, alignment=alignment)
        self.offset_bases = offset_bases

    def places(self) -> np.ndarray:
        """Return [n, rank]: what lies at each place."""
        found = np.zeros((1, len(self.offset_bases[0])), int)
        for base in self.offset_bases:
            found = np.concatenate([found, found ^ np.array(base)])
        return found


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
        """Return the same bytes as another type: what one view holds, writing the other spoils.

        With a SharedLinearLayout they are those of a float32 box of the TMA, in other places.
        """
        shape = [int(size) for size in shape]
        sizes = [
            int(np.prod(n)) * x.primitive_bitwidth
            for n, x in ((self.shape, self.dtype), (shape, dtype))
        ]
        if sizes[0] != sizes[1]:
            raise EmulationError(
                f"shared memory {self.shape} {self.dtype} is not as large as {shape} {dtype}"
            )
        if isinstance(layout, SharedLinearLayout):
            return Rearranged(self, dtype, shape, layout)
        values = self._overlaps.other(self, dtype, shape)
        return SharedMemory(values, dtype, layout, self._overlaps)

    def spoil_overlapping(self) -> None:
        """Destroy what views of another type hold of these bytes, which are about to change."""
        self._overlaps.spoil(self.values)

    def _view(self, values: np.ndarray) -> "SharedMemory":
        return SharedMemory(values, self.dtype, self.layout, self._overlaps)

    def load(self, layout: Any) -> Tensor:
        self._overlaps.note_load(self.values)
        return Tensor(self.values.copy(), self.dtype)

    def store(self, value: Tensor) -> None:
        if value.dtype is not self.dtype or value.shape != self.shape:
            raise EmulationError(
                f"store of {value.shape} {value.dtype} into shared memory {self.shape} {self.dtype}"
            )
        self.spoil_overlapping()
        self.values[...] = value.values
        self._overlaps.note_store(self.values)

    def check_fenced(self, what: str) -> None:
        """Raise if TMA or wgmma are to read what a partition has stored and not fenced since."""
        self._overlaps.check_fenced(self.values, what)

    def check_read(self, what: str) -> None:
        """Raise if the TMA is to overwrite what a partition has loaded and not fenced since."""
        self._overlaps.check_read(self.values, what)


class Rearranged(SharedMemory):
    """A float32 box of the TMA, [.., rows, columns], seen through a SharedLinearLayout."""

    def __init__(
        self, box: SharedMemory, dtype: Dtype, shape: list[int], layout: SharedLinearLayout
    ) -> None:
        if box.dtype is not dtype or dtype.primitive_bitwidth != 32:
            raise NotImplementedError(f"a linear layout of {dtype} in place of {box.dtype}")
        super().__init__(box.values.reshape(shape), dtype, layout, box._overlaps)
        rows, columns = shape
        if getattr(box.layout, "swizzle_byte_width", 128) != 128 or columns % 32:
            raise NotImplementedError(f"a linear layout in place of {box.layout}")
        # The TMA's places: 32 columns of every row, then the next 32, in parts of 16 bytes.
        block, row, column = np.unravel_index(np.arange(rows * columns), (columns // 32, rows, 32))
        self._box = row, block * 32 + (column ^ row % 8 * 4)
        self._seen = tuple(layout.places().T)

    def load(self, layout: Any) -> Tensor:
        self._overlaps.note_load(self.values)
        values = np.empty_like(self.values)
        values[self._seen] = self.values[self._box]
        return Tensor(values, self.dtype)

    def store(self, value: Tensor) -> None:
        box = np.empty_like(self.values)
        box[self._box] = value.values[self._seen]
        super().store(Tensor(box, value.dtype))


class Overlaps:
    """Views of the same bytes as different types: each in an array of its own.

    And which of them partitions have stored, or loaded, and not fenced since.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple, tuple[np.ndarray, Dtype, np.ndarray, Dtype]] = {}
        self._stored: dict[tuple, np.ndarray] = {}
        self._loaded: dict[tuple, np.ndarray] = {}

    def note_store(self, values: np.ndarray) -> None:
        """Note that the running partition has stored, until its fence."""
        _note(self._stored, values)

    def note_load(self, values: np.ndarray) -> None:
        """Note that the running partition has loaded, until its fence."""
        _note(self._loaded, values)

    def check_fenced(self, values: np.ndarray, what: str) -> None:
        """Raise if a partition has stored any of these bytes and not fenced since."""
        for (task, *_), stored in self._stored.items():
            if np.shares_memory(stored, values):
                raise EmulationError(f"{what} reads what {task.name} has stored without a fence")

    def check_read(self, values: np.ndarray, what: str) -> None:
        """Raise if a partition has loaded any of these bytes, as any type, and not fenced since."""
        changed = [values]
        for one, _, two, _ in self._pairs.values():
            changed += [b for a, b in ((one, two), (two, one)) if np.shares_memory(a, values)]
        for (task, *_), loaded in self._loaded.items():
            if any(np.shares_memory(loaded, x) for x in changed):
                raise EmulationError(
                    f"{what} writes over what {task.name} has read without a fence"
                )

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


def _note(noted: dict[tuple, np.ndarray], values: np.ndarray) -> None:
    """Keep what the running partition has touched, until its fence."""
    task = here()
    key = task, values.__array_interface__["data"][0], values.shape, values.strides
    if key not in noted:
        noted[key] = values
        task.unfenced.append(lambda: noted.pop(key))


def fence_async_shared(cluster: bool = False) -> None:
    """Let TMA and wgmma see what this partition has stored, and write over what it has loaded."""
    unfenced = here().unfenced
    while unfenced:
        unfenced.pop()()


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
