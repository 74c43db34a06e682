"""Tensors as a Gluon kernel computes with them, on numpy: the arithmetic of gluon_emulator.

Types follow Triton 3.6: integers are 32 bits wide and wrap, division truncates, mixed types promote
as in `triton.language`, bf16 and fp16 results are rounded to nearest even. Layouts are accepted
and ignored. A scalar of the kernel is a tensor of rank 0; a constant is a Python number.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from gluon_types import (
    FLOAT32,
    INT1,
    INT32,
    Dtype,
    EmulationError,
    Number,
    PointerType,
    cast,
    number_type,
    of_bits,
    promote,
    round_to,
    to_bits,
    type_with_number,
)


class Tensor:
    """Values of one element type; of a scalar if its rank is 0."""

    # __getitem__ alone would make Python iterate without end, and == gives a tensor.
    __iter__ = None
    __hash__ = None  # type: ignore[assignment]
    dtype: Any
    values: np.ndarray

    def __init__(self, values: Any, dtype: Dtype) -> None:
        self.values = np.asarray(values, dtype.held_in)
        self.dtype = dtype

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.shape, layout=None, scalar=self.dtype)

    def to(
        self, dtype: Dtype, fp_downcast_rounding: None = None, bitcast: bool = False
    ) -> "Tensor":
        """Return the same numbers in another type, or with `bitcast` the same bits but of NaNs."""
        if not bitcast:
            return Tensor(cast(self.values, dtype), dtype)
        if dtype.primitive_bitwidth != self.dtype.primitive_bitwidth:
            raise EmulationError(f"bitcast from {self.dtype} to {dtype}, which differ in size")
        return Tensor(of_bits(to_bits(self.values, self.dtype), dtype), dtype)

    def __getitem__(self, index: Any) -> "Tensor":
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is not None and part != slice(None) for part in parts):
            raise EmulationError(f"a tensor takes only None and : as index, got {index}")
        return Tensor(self.values[index], self.dtype)

    def __bool__(self) -> bool:
        if self.values.ndim:
            raise EmulationError(f"a condition must be a scalar, got a tensor {self.shape}")
        return bool(self.values)

    def __index__(self) -> int:
        if self.values.ndim or self.dtype.kind == "float":
            raise EmulationError(f"an integer is needed, got {self}")
        return int(self.values)

    def __neg__(self) -> "Tensor":
        return Tensor(-self.values, self.dtype)

    def __invert__(self) -> "Tensor":
        return Tensor(~self.values, self.dtype)

    def __repr__(self) -> str:
        return f"Tensor({self.values}, {self.dtype})"


def scalar(value: Number) -> Tensor:
    """Return a Python number as a scalar of the kernel."""
    return Tensor(value, number_type(value))


def _operands(left: Any, right: Any) -> tuple[np.ndarray, np.ndarray, Dtype]:
    """Return both in the type that Triton computes in, and that type."""
    if any(isinstance(getattr(x, "dtype", None), PointerType) for x in (left, right)):
        raise EmulationError("of arithmetic, pointers know only + with integers")
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        dtype = promote(left.dtype, right.dtype)
    elif isinstance(left, Tensor):
        dtype = type_with_number(left.dtype, right)
    elif isinstance(right, Tensor):
        dtype = type_with_number(right.dtype, left)
    else:
        dtype = promote(number_type(left), number_type(right))
    return _as(left, dtype), _as(right, dtype), dtype


def _as(value: Any, dtype: Dtype) -> np.ndarray:
    if not isinstance(value, Tensor):
        # Raises OverflowError for an integer that the type does not hold.
        return round_to(np.array(value, dtype.held_in), dtype)
    return value.values if value.dtype is dtype else cast(value.values, dtype)


def _arithmetic(function: Callable, left: Any, right: Any) -> Tensor:
    a, b, dtype = _operands(left, right)
    return Tensor(cast(function(a, b), dtype), dtype)


def _comparison(function: Callable, left: Any, right: Any) -> Tensor:
    a, b, _ = _operands(left, right)
    return Tensor(function(a, b), INT1)


def _division(function: Callable, left: Any, right: Any) -> Tensor:
    a, b, _ = _operands(left, right)
    return Tensor(function(a.astype(np.float32), b.astype(np.float32)), FLOAT32)


def _integer_division(function: Callable, left: Any, right: Any) -> Tensor:
    a, b, dtype = _operands(left, right)
    kinds = {x.dtype.kind for x in (left, right) if isinstance(x, Tensor)}
    if dtype.kind == "float" or len(kinds) > 1:
        raise EmulationError(f"// and % need integers of the same sign, got {left} and {right}")
    return Tensor(function(a, b), dtype)


def _truncated_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # fmod has the sign of a, as in C, so that what is left is a multiple of b.
    return (a - np.fmod(a, b)) // b


def truncated_divide(left: Any, right: Any) -> Any:
    """Return left // right as the GPU computes it, for Python integers too."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return _integer_division(_truncated_quotient, left, right)
    return int(_truncated_quotient(np.array(left), np.array(right)))


def truncated_modulo(left: Any, right: Any) -> Any:
    """Return left % right with the sign of left, for Python integers too."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return _integer_division(np.fmod, left, right)
    return int(np.fmod(left, right))


_OPERATORS = {
    "add": (_arithmetic, np.add),
    "sub": (_arithmetic, np.subtract),
    "mul": (_arithmetic, np.multiply),
    "and": (_arithmetic, np.bitwise_and),
    "or": (_arithmetic, np.bitwise_or),
    "xor": (_arithmetic, np.bitwise_xor),
    "lshift": (_arithmetic, np.left_shift),
    "rshift": (_arithmetic, np.right_shift),
    "truediv": (_division, np.divide),
    "floordiv": (_integer_division, _truncated_quotient),
    "mod": (_integer_division, np.fmod),
    "lt": (_comparison, np.less),
    "le": (_comparison, np.less_equal),
    "gt": (_comparison, np.greater),
    "ge": (_comparison, np.greater_equal),
    "eq": (_comparison, np.equal),
    "ne": (_comparison, np.not_equal),
}


def _define(name: str, compute: Callable, function: Callable) -> None:
    def straight(self: Tensor, other: Any) -> Tensor:
        return compute(function, self, other)

    def reflected(self: Tensor, other: Any) -> Tensor:
        return compute(function, other, self)

    setattr(Tensor, f"__{name}__", straight)
    if compute is not _comparison:
        setattr(Tensor, f"__r{name}__", reflected)


for _name, (_compute, _function) in _OPERATORS.items():
    _define(_name, _compute, _function)


def where(condition: Any, x: Any, y: Any) -> Tensor:
    """Return x where the condition holds, else y, like gl.where."""
    a, b, dtype = _operands(x, y)
    chosen = condition.values if isinstance(condition, Tensor) else condition
    return Tensor(np.where(chosen, a, b), dtype)


def minimum(x: Any, y: Any) -> Tensor:
    """Return the smaller; of a NaN and a number the number, as min.f32 does."""
    return _arithmetic(np.fmin, x, y)


def maximum(x: Any, y: Any) -> Tensor:
    """Return the larger; of a NaN and a number the number, as max.f32 does."""
    return _arithmetic(np.fmax, x, y)


def exp2(x: Tensor) -> Tensor:
    """Return 2**x of float32 x."""
    return _float32_function(np.exp2, x)


def log2(x: Tensor) -> Tensor:
    """Return the logarithm to base 2 of float32 x."""
    return _float32_function(np.log2, x)


def _float32_function(function: Callable, x: Tensor) -> Tensor:
    if x.dtype is not FLOAT32:
        raise EmulationError(f"{function.__name__} needs float32, got {x.dtype}")
    return Tensor(function(x.values), FLOAT32)


def reduce_max(x: Tensor, axis: int | None = None) -> Tensor:
    """Return the maximum along an axis or of all, like gl.max; a NaN counts only where all are."""
    return Tensor(np.fmax.reduce(x.values, axis), x.dtype)


def reduce_sum(x: Tensor, axis: int | None = None) -> Tensor:
    """Return the sum along an axis or of all, like gl.sum."""
    dtype = INT32 if x.dtype is INT1 else x.dtype
    return Tensor(cast(x.values.sum(axis, dtype=dtype.held_in), dtype), dtype)


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x in another shape of as many elements."""
    return Tensor(x.values.reshape([int(size) for size in shape]), x.dtype)


def permute(x: Tensor, order: Sequence[int]) -> Tensor:
    """Return x with its axes in another order."""
    return Tensor(x.values.transpose(tuple(order)), x.dtype)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two parts of x [..., 2]."""
    if x.shape[-1:] != [2]:
        raise EmulationError(f"split needs a last axis of 2, got shape {x.shape}")
    return Tensor(x.values[..., 0], x.dtype), Tensor(x.values[..., 1], x.dtype)


def join(x: Tensor, y: Tensor) -> Tensor:
    """Return [..., 2] of which `split` gives x and y."""
    a, b, dtype = _operands(x, y)
    return Tensor(np.stack([a, b], -1), dtype)


def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    """Return x: layouts are not modelled."""
    return x


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    """Return start .. end - 1 as int32."""
    return Tensor(np.arange(start, end), INT32)


def full(shape: Sequence[int], value: Any, dtype: Dtype, layout: Any = None) -> Tensor:
    """Return a tensor that holds one value everywhere."""
    return Tensor(np.full([int(size) for size in shape], _as(value, dtype)), dtype)


def zeros(shape: Sequence[int], dtype: Dtype, layout: Any = None) -> Tensor:
    """Return a tensor of zeros."""
    return full(shape, 0, dtype)


def cdiv(x: Any, y: Any) -> Any:
    """Return x / y rounded up, for x >= 0 and y > 0."""
    return truncated_divide(x + y - 1, y)
