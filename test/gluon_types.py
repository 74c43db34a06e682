"""Element types as Triton 3.6 has them, and how numpy holds them, for the Gluon emulator."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Number = bool | int | float


class EmulationError(RuntimeError):
    """What the kernel did is wrong on a GPU too."""


@dataclass(frozen=True)
class Dtype:
    """An element type. `held_in` is what numpy computes in: float32 for the 16-bit floats."""

    name: str
    primitive_bitwidth: int
    kind: str  # "unsigned", "signed" or "float"
    held_in: Any

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PointerType:
    """The type of a pointer to `element_ty`."""

    element_ty: Dtype


INT1 = Dtype("int1", 1, "unsigned", np.dtype(np.bool_))
INT8 = Dtype("int8", 8, "signed", np.dtype(np.int8))
INT16 = Dtype("int16", 16, "signed", np.dtype(np.int16))
INT32 = Dtype("int32", 32, "signed", np.dtype(np.int32))
INT64 = Dtype("int64", 64, "signed", np.dtype(np.int64))
UINT8 = Dtype("uint8", 8, "unsigned", np.dtype(np.uint8))
UINT16 = Dtype("uint16", 16, "unsigned", np.dtype(np.uint16))
UINT32 = Dtype("uint32", 32, "unsigned", np.dtype(np.uint32))
UINT64 = Dtype("uint64", 64, "unsigned", np.dtype(np.uint64))
FLOAT16 = Dtype("float16", 16, "float", np.dtype(np.float32))
BFLOAT16 = Dtype("bfloat16", 16, "float", np.dtype(np.float32))
FLOAT32 = Dtype("float32", 32, "float", np.dtype(np.float32))
DTYPES = (INT1, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64)
DTYPES += (FLOAT16, BFLOAT16, FLOAT32)
OF_TORCH = {
    getattr(torch, dtype.name): dtype
    for dtype in (INT8, INT16, INT32, INT64, UINT8, FLOAT16, BFLOAT16, FLOAT32)
}


def round_to(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return float32 values rounded to nearest even in a float type, still float32."""
    if dtype is FLOAT16:
        return values.astype(np.float16).astype(np.float32)
    if dtype is BFLOAT16:
        return of_bits(to_bits(values, BFLOAT16), BFLOAT16)
    return values


def poison(dtype: Dtype) -> Number:
    """Return what memory that nobody wrote holds: NaN, or the least integer."""
    return np.nan if dtype.kind == "float" else np.iinfo(dtype.held_in).min


def to_bits(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return the bit patterns of values held for `dtype`, rounding to it."""
    values = np.asarray(values, dtype.held_in, order="C")
    if dtype is FLOAT16:
        return values.astype(np.float16).view(np.uint16)
    if dtype is BFLOAT16:
        bits = values.view(np.uint32)
        # Half of the last place, less one bit where that would round an even number up. It may
        # carry into the exponent, and past the largest number into infinity, as it should.
        upper = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(values), np.uint32(0x7FC0), upper).astype(np.uint16)
    return values.view(f"u{dtype.held_in.itemsize}")


def of_bits(bits: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return the values of what `to_bits` gives."""
    if dtype is FLOAT16:
        return bits.view(np.float16).astype(np.float32)
    if dtype is BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype.held_in)


def cast(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return held values in another type; integers wrap, floats are rounded."""
    if dtype is INT1:
        return values != 0
    return round_to(np.asarray(values).astype(dtype.held_in), dtype)


def number_type(value: Number) -> Dtype:
    """Return the type of a constant: int32 if it fits, else int64; float32."""
    if isinstance(value, bool | np.bool_):
        return INT1
    if isinstance(value, float):
        return FLOAT32
    return INT32 if -(2**31) <= value < 2**31 else INT64


def promote(left: Dtype, right: Dtype) -> Dtype:
    """Return the type in which Triton computes with two tensors of these types."""
    if left is right:
        return left
    floats = [dtype for dtype in (left, right) if dtype.kind == "float"]
    if floats:
        if FLOAT32 in floats:
            return FLOAT32
        if FLOAT16 in floats:
            return FLOAT16
        return FLOAT32
    if left.kind != right.kind:
        unsigned, signed = (left, right) if left.kind == "unsigned" else (right, left)
        return unsigned if unsigned.primitive_bitwidth >= signed.primitive_bitwidth else signed
    return left if left.primitive_bitwidth > right.primitive_bitwidth else right


def type_with_number(dtype: Dtype, value: Number) -> Dtype:
    """Return the type of a tensor and a constant: the tensor's, unless its kind is the lower."""
    number = number_type(value)
    ranks = [(x.kind == "float") + (x is not INT1) for x in (number, dtype)]
    return dtype if ranks[0] <= ranks[1] else promote(number, dtype)
