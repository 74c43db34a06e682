"""Compile the kernels that fill tables, move rows and sum shares; print what does not compile.

Triton's interpreter runs Python, which takes what the compiler does not: a name that changes its
shape in a loop. Started by test_aot.py as a process of its own, which compiles.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ring_flash_attn.kernels.fill import _fill_kernel, _order_tiles_kernel
from ring_flash_attn.kernels.missed import _missed_kernel
from ring_flash_attn.kernels.rows import _rows_kernel
from ring_flash_attn.kernels.shares import _sum_kernel

STRIDES = ("i32",) * 3
INTS = {"tiles_ptr", "entries_ptr", "spec_ptr", "cu_ptr", "cu_q_ptr", "cu_k_ptr", "found_ptr"}
ROWS = {"HEAD_DIM": 80, "BLOCK": 32, "BLOCK_D": 128}


def cases():
    """Yield (kernel, its constants, types of arguments that are none of the usual)."""
    for parts, entries in ((2, 2), (4, 4), (4, 8)):
        yield _fill_kernel, {"PARTS": parts, "ENTRIES": entries, "BLOCK": 64}, {}
    yield _order_tiles_kernel, {"BLOCK": 64}, {}
    yield _missed_kernel, {"HEAD_DIM": 128, "BLOCK": 64, "BLOCK_D": 128}, {"rows_ptr": "*bf16"}
    for units in (0, 1, 2):
        sizes = {"UNITS": units, "SHARES": 3, "ROW": 1024, "ROWS": 4, "COLUMNS": 1024}
        ranges = {"begins": STRIDES, "ends": STRIDES, "result_ptr": "*bf16"}
        yield _sum_kernel, sizes | ({} if units else {"cu_ptr": None}), ranges
    for copies, add, merged in ((1, False, False), (4, True, False), (2, False, True)):
        constants = ROWS | {"COPIES": copies, "ADD": add, "FINISHED": not merged}
        offsets = {"offsets_ptr": "*i64"} if merged else {}
        yield _rows_kernel, constants | ({} if merged else {"offsets_ptr": None}), offsets


def type_of(name: str, constants: dict, types: dict) -> str | tuple[str, ...]:
    if name in constants:
        return "constexpr"
    if name in types:
        return types[name]
    if name.endswith("_ptr"):
        return "*i32" if name in INTS else "*fp32"
    return STRIDES if name.endswith("_strides") else "i32"


for kernel, constants, types in cases():
    signature = {name: type_of(name, constants, types) for name in kernel.arg_names}
    try:
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        print(f"{kernel.fn.__name__} {constants}: {' '.join(str(error).split())}")
print("done")
