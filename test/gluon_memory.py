"""Global memory as a Gluon kernel sees it: pointers into CPU tensors, TMA descriptors of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gluon_arrays import Tensor
from gluon_types import (
    BFLOAT16,
    FLOAT16,
    OF_TORCH,
    Dtype,
    EmulationError,
    PointerType,
    of_bits,
    poison,
    to_bits,
)

ADDRESSES = 2**64


class Memory:
    """The storage that a CPU tensor lies in, by element. `owned` marks the tensor's elements.

    So are those of other tensors in it that the tensor's attribute `reaches` lists.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.dtype not in OF_TORCH:
            raise TypeError(f"{tensor.dtype} is none of {[str(x) for x in OF_TORCH]}")
        self.dtype = OF_TORCH[tensor.dtype]
        self.shape, self.first = tuple(tensor.shape), tensor.storage_offset()
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        # numpy has no bfloat16: its bits.
        whole = whole.view(torch.int16) if self.dtype is BFLOAT16 else whole
        self._elements = whole.numpy()
        self.owned = np.zeros(len(self._elements), bool)
        for part in (tensor, *getattr(tensor, "reaches", ())):
            if part.numel():
                np.lib.stride_tricks.as_strided(
                    self.owned[part.storage_offset() :], part.shape, part.stride()
                )[...] = True

    def read(self, index: np.ndarray) -> np.ndarray:
        """Return the elements of the storage at `index`, in what numpy computes in."""
        elements = self._elements[index]
        if self.dtype is BFLOAT16:
            return of_bits(elements.view(np.uint16), BFLOAT16)
        return elements.astype(self.dtype.held_in)

    def write(self, index: np.ndarray, values: np.ndarray) -> None:
        """Round values of the memory's type and put them there."""
        if self.dtype is BFLOAT16:
            values = to_bits(values, BFLOAT16).view(np.int16)
        self._elements[index] = values

    def add(self, index: np.ndarray, values: np.ndarray) -> None:
        """Add in place; an element that occurs twice in `index` is added to twice."""
        if self.dtype in (BFLOAT16, FLOAT16):
            raise EmulationError(f"atomic_add on {self.dtype} is not modelled")
        np.add.at(self._elements, index, values)


class Pointer(Tensor):
    """A pointer, or a tensor of them: `values` counts elements from the start of the storage."""

    def __init__(self, memory: Memory, values: Any = None) -> None:
        self.memory, self.dtype = memory, PointerType(memory.dtype)
        self.values = np.asarray(memory.first if values is None else values, np.int64)

    def __add__(self, offset: Any) -> "Pointer":
        if isinstance(offset, Tensor):
            if isinstance(offset, Pointer) or offset.dtype.kind == "float":
                raise EmulationError(f"a pointer takes an integer, got {offset}")
            offset = offset.values.astype(np.int64)
        return Pointer(self.memory, self.values + offset)

    __radd__ = __add__

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.memory, self.values[index])


def load(
    pointer: Pointer,
    mask: Any = None,
    other: Any = None,
    cache_modifier: str = "",
    eviction_policy: str = "",
    volatile: bool = False,
) -> Tensor:
    """Return what lies at the pointers; `other`, or NaN without it, where the mask is False."""
    memory, dtype = pointer.memory, pointer.memory.dtype
    offsets, kept = _kept(pointer, mask, "gl.load")
    filling = poison(dtype) if other is None else getattr(other, "values", other)
    values = np.array(np.broadcast_to(np.asarray(filling, dtype.held_in), offsets.shape))
    values[kept] = memory.read(offsets[kept])
    return Tensor(values, dtype)


def store(
    pointer: Pointer,
    value: Any,
    mask: Any = None,
    cache_modifier: str = "",
    eviction_policy: str = "",
) -> None:
    """Round `value` to the pointers' type and store it where the mask is True."""
    dtype = pointer.memory.dtype
    offsets, kept = _kept(pointer, mask, "gl.store")
    value = value.to(dtype).values if isinstance(value, Tensor) else value
    values = np.broadcast_to(np.asarray(value, dtype.held_in), offsets.shape)
    pointer.memory.write(offsets[kept], values[kept])


def atomic_add(
    pointer: Pointer, value: Any, mask: Any = None, sem: str | None = None, scope: str | None = None
) -> Tensor:
    """Add to memory and return what was there before."""
    dtype = pointer.memory.dtype
    offsets, kept = _kept(pointer, mask, "gl.atomic_add")
    before = load(pointer, mask, 0)
    value = value.to(dtype).values if isinstance(value, Tensor) else value
    values = np.broadcast_to(np.asarray(value, dtype.held_in), offsets.shape)
    pointer.memory.add(offsets[kept], values[kept])
    return before


def _kept(pointer: Pointer, mask: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets and which of them the mask keeps, all of which must be the tensor's."""
    mask = True if mask is None else getattr(mask, "values", mask)
    offsets, kept = np.broadcast_arrays(pointer.values, np.asarray(mask, bool))
    owned, touched = pointer.memory.owned, offsets[kept]
    inside = (touched >= 0) & (touched < len(owned))
    inside[inside] = owned[touched[inside]]
    if not inside.all():
        element = touched[~inside][0] - pointer.memory.first
        raise EmulationError(
            f"{what} outside the tensor: element {element} from the start of one of shape "
            f"{pointer.memory.shape} ({int((~inside).sum())} of {inside.size} accesses)"
        )
    return offsets, kept


@dataclass(frozen=True)
class BlockType:
    """What a descriptor's box is: its shape, and its size with what lies outside of bounds."""

    shape: list[int]
    element_ty: Dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.element_ty.primitive_bitwidth // 8


class TensorDescriptor:
    """A TMA descriptor, made as triton.experimental.gluon.nvidia.hopper.TensorDescriptor is.

    Element (c0, c1, ..) exists iff 0 <= ci < shape[i] for all i. It lies sum(ci * strides[i])
    elements after the base, in addresses that wrap at 2**64 bytes.
    """

    def __init__(
        self,
        base: torch.Tensor,
        shape: Sequence[int],
        strides: Sequence[int],
        block_shape: Sequence[int],
        layout: Any,
        padding: str = "zero",
    ) -> None:
        self.base, self.memory, self.layout = base, Memory(base), layout
        self.shape, self.strides = list(shape), list(strides)
        self.block_shape, self.padding = list(block_shape), padding
        self.dtype = self.memory.dtype
        self.block_type = BlockType(self.block_shape, self.dtype)
        self.handle = self
        self._element_bytes = self.dtype.primitive_bitwidth // 8
        self._validate()

    @staticmethod
    def from_tensor(
        tensor: torch.Tensor, block_shape: Sequence[int], layout: Any, padding: str = "zero"
    ) -> "TensorDescriptor":
        """Describe all of a tensor."""
        return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block_shape, layout, padding)

    def _validate(self) -> None:
        rank, size = len(self.shape), self._element_bytes
        wrong = []
        if not 1 <= rank <= 5 or {len(self.strides), len(self.block_shape)} != {rank}:
            wrong.append("shape, strides and block_shape must be of one rank, 1 to 5")
        if self.base.data_ptr() % 16:
            wrong.append("the base must be aligned to 16 bytes")
        steps = [stride * size for stride in self.strides[:-1]]
        if any(step % 16 or not 0 <= step < 2**40 for step in steps):
            wrong.append("strides must be multiples of 16 bytes below 2**40")
        if self.strides[-1] != 1:
            wrong.append("the last stride must be 1")
        if not all(0 < length <= 2**32 for length in self.shape):
            wrong.append("every length must be 1 to 2**32")
        if any(not 0 < box <= 256 or box & (box - 1) for box in self.block_shape):
            wrong.append("every length of a box must be a power of two up to 256")
        if self.padding not in ("zero", "nan"):
            wrong.append('padding must be "zero" or "nan"')
        if wrong:
            raise ValueError(
                f"no TMA descriptor for shape {self.shape}, strides {self.strides}, box "
                f"{self.block_shape} of {self.dtype}: {'; '.join(wrong)}"
            )

    def box(self, coordinates: Sequence[Any], what: str) -> tuple[np.ndarray, tuple[slice, ...]]:
        """Return where in memory the existing elements of a box lie, and where in the box.

        Raises:
            EmulationError: the coordinates are not those of a box, or an element that exists
                lies outside of the base tensor's storage.
        """
        start = [int(x) for x in coordinates]
        if len(start) != len(self.shape) or any(not -(2**31) <= x < 2**31 for x in start):
            raise EmulationError(f"{what} at {start}: {len(self.shape)} int32 coordinates needed")
        if start[-1] * self._element_bytes % 16:
            # Seen on an H100, 2026-11-22.
            raise EmulationError(f"{what} at {start}: the last must be a multiple of 16 bytes")
        address = np.uint64(self.memory.first * self._element_bytes)
        inside = []
        for first, box, length, stride in zip(
            start, self.block_shape, self.shape, self.strides, strict=True
        ):
            low, high = max(first, 0), max(min(first + box, length), max(first, 0))
            inside.append(slice(low - first, high - first))
            step = np.uint64(stride * self._element_bytes % ADDRESSES)
            # numpy's uint64 wraps as addresses do.
            address = np.asarray(address)[..., None] + np.arange(low, high, dtype=np.uint64) * step
        size = np.uint64(len(self.memory.owned) * self._element_bytes)
        if address.size and address.max() >= size:
            which = [int(i[0]) for i in np.nonzero(address >= size)]
            element = [max(x, 0) + i for x, i in zip(start, which, strict=True)]
            raise EmulationError(
                f"{what} outside the tensor: the box at {start} of a descriptor of shape "
                f"{self.shape}, strides {self.strides} has element {element}, which is no "
                f"part of the base tensor {tuple(self.base.shape)}"
            )
        return (address // np.uint64(self._element_bytes)).astype(np.int64), tuple(inside)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(block_type=self.block_type, layout=self.layout)
