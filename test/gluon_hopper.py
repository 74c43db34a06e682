"""What runs beside a Gluon program's threads on Hopper, on numpy: TMA copies, wgmma; inline asm.

Everything asynchronous happens as late as the kernel allows, so that what relies on an earlier
end shows. A TMA load destroys its target when it is issued, and its data arrive at a wait for its
mbarrier. A TMA store reads, and a wgmma computes, at its wait. Before that all others may go on.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gluon_arrays import Tensor
from gluon_memory import TensorDescriptor
from gluon_shared import SharedMemory, barrier_in
from gluon_tasks import here, named_barrier
from gluon_types import BFLOAT16, FLOAT16, FLOAT32, INT32, Dtype, EmulationError, poison, to_bits


def tma_load(
    tensor_desc: TensorDescriptor,
    coord: Sequence[Any],
    barrier: SharedMemory,
    result: SharedMemory,
    pred: Any = True,
) -> None:
    """Fill shared memory with a box; outside of the descriptor's bounds with zeros."""
    if not pred:
        return
    _check_box(tensor_desc, result, "TMA load")
    index, inside = tensor_desc.box(coord, "TMA read")
    filling = 0 if tensor_desc.padding == "zero" else np.nan

    def land() -> None:
        result.values[...] = filling
        result.values[inside] = tensor_desc.memory.read(index)

    result.check_read("TMA load")
    result.spoil_overlapping()
    result.values[...] = poison(result.dtype)
    barrier_in(barrier).in_flight.append((land, tensor_desc.block_type.nbytes))


def tma_store(tensor_desc: TensorDescriptor, coord: Sequence[Any], src: SharedMemory) -> None:
    """Write a box to global memory, but for what lies outside of the descriptor's bounds."""
    _check_box(tensor_desc, src, "TMA store")
    src.check_fenced("TMA store")
    index, inside = tensor_desc.box(coord, "TMA write")
    here().stores.append(lambda: tensor_desc.memory.write(index, src.values[inside]))


def tma_reduce_add(tensor_desc: TensorDescriptor, coord: Sequence[Any], src: SharedMemory) -> None:
    """Add a box to global memory, but for what lies outside of the descriptor's bounds."""
    _check_box(tensor_desc, src, "TMA reduction")
    src.check_fenced("TMA reduction")
    index, inside = tensor_desc.box(coord, "TMA write")
    memory = tensor_desc.memory
    here().stores.append(lambda: memory.write(index, memory.read(index) + src.values[inside]))


def store_wait(pendings: int) -> None:
    """Wait until at most so many TMA stores and reductions of the partition are in flight."""
    stores = here().stores
    if len(stores) > pendings:
        here().scheduler.give_way_to_all("TMA stores", last=True)
    while len(stores) > pendings:
        stores.pop(0)()


def _check_box(desc: TensorDescriptor, memory: SharedMemory, what: str) -> None:
    if memory.shape != desc.block_shape or memory.dtype is not desc.dtype:
        raise EmulationError(
            f"{what}: shared memory is {memory.shape} {memory.dtype}, the box {desc.block_shape} "
            f"{desc.dtype}"
        )


class Accumulator(Tensor):
    """The result of a wgmma in flight: a tensor whose values may not be looked at."""

    def __init__(self, compute: Callable[[], np.ndarray], shape: list[int]) -> None:
        self.dtype, self._shape, self._compute = FLOAT32, shape, compute
        self.result: np.ndarray | None = None

    def run(self) -> None:
        self.result = self._compute()

    @property
    def values(self) -> np.ndarray:
        raise EmulationError("a wgmma's result is used before warpgroup_mma_wait")

    @property
    def shape(self) -> list[int]:
        return list(self._shape)


def warpgroup_mma(
    a: Any,
    b: SharedMemory,
    acc: Tensor,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Tensor:
    """Issue a @ b, plus acc if `use_acc`. Shared memory is read when it is waited for."""
    if a.dtype not in (BFLOAT16, FLOAT16) or b.dtype is not a.dtype or acc.dtype is not FLOAT32:
        raise EmulationError(f"wgmma of {a.dtype} and {b.dtype} into {acc.dtype} is not modelled")
    if not isinstance(b, SharedMemory) or isinstance(a, Accumulator):
        raise EmulationError("wgmma takes a from registers or shared memory, b from shared memory")
    (rows, inner), (b_inner, columns) = a.shape, b.shape
    if inner != b_inner or acc.shape != [rows, columns]:
        raise EmulationError(f"wgmma of {a.shape} and {b.shape} into {acc.shape}")
    for operand in (a, b):
        if isinstance(operand, SharedMemory):
            operand.check_fenced("wgmma")
    add = bool(use_acc)

    def compute() -> np.ndarray:
        product = a.values @ b.values
        if not add:
            return product
        before = acc.result if isinstance(acc, Accumulator) else acc.values
        assert before is not None  # The chain runs oldest first.
        return before + product

    issued = Accumulator(compute, acc.shape)
    here().products.append(issued)
    return issued if is_async else warpgroup_mma_wait(0, [issued])


def warpgroup_mma_init(value: Tensor) -> Accumulator:
    """Return a tensor as a wgmma's accumulator."""
    ready = Accumulator(lambda: value.values, value.shape)
    ready.run()
    return ready


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Tensor] | None = None) -> Any:
    """Wait until at most so many wgmmas of the partition are in flight; return what deps hold."""
    if deps is None:
        raise ValueError("warpgroup_mma_wait deps must be given")
    products = here().products
    if len(products) > num_outstanding:
        here().scheduler.give_way_to_all("wgmma")
    while len(products) > num_outstanding:
        products.pop(0).run()
    results = tuple(_landed(dep, num_outstanding) for dep in deps)
    return results[0] if len(results) == 1 else results


def _landed(dep: Tensor, num_outstanding: int) -> Tensor:
    if not isinstance(dep, Accumulator):
        return dep
    if dep.result is None:
        raise EmulationError(f"warpgroup_mma_wait({num_outstanding}) does not cover a dependency")
    return Tensor(dep.result, FLOAT32)


_NAMED = re.compile(r"bar\.(sync|arrive) (\d+|\$1), (\d+);(\s*mov\.b32 \$0, \$1;)?")
_IF = re.compile(r"\{\.reg \.pred p; setp\.ne\.b32 p, \$2, 0; @p (.*) mov\.b32 \$0, \$1;\}")
_PACK = re.compile(r"cvt\.rn\.(bf16|f16)x2\.f32 \$0, \$([12]), \$([12]);")


def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Tensor], dtype: Dtype, is_pure: bool, pack: int
) -> Tensor:
    """Run named barriers (bar.sync, bar.arrive), also if an operand is not 0, and the packing of
    two floats in an int32.

    Raises:
        NotImplementedError: the asm is another one.
    """
    conditional = _IF.fullmatch(asm)
    if conditional:
        x, condition = args
        met = condition.values.flat[0]
        assert (condition.values == met).all(), "every thread must arrive, or none"
        if not met:
            return x
        asm, args = conditional.group(1), [x]
    named, packing = _NAMED.fullmatch(asm.strip()), _PACK.fullmatch(asm.strip())
    if named:
        kind, index, threads = named.group(1), named.group(2), named.group(3)
        if index == "$1":
            index = args[0].values.flat[0]
            assert (args[0].values == index).all(), "every thread must name one barrier"
        named_barrier(int(index), int(threads), wait=kind == "sync")
        return args[0]
    if packing:
        kind = BFLOAT16 if packing.group(1) == "bf16" else FLOAT16
        # PTX names the upper half first.
        upper, lower = (
            to_bits(args[int(packing.group(i)) - 1].values, kind).astype(np.uint32) for i in (2, 3)
        )
        return Tensor((upper << 16 | lower).view(np.int32), INT32)
    raise NotImplementedError(f"the Gluon emulator does not know the asm {asm!r}")
