"""The modules that a Gluon source file sees in the emulator, and kernels as one launches them."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch
import triton.language.core

import gluon_arrays as arrays
import gluon_hopper as hopper
import gluon_memory as memory
import gluon_shared as shared
from gluon_arrays import Tensor, scalar
from gluon_tasks import Program, Scheduler, Task, check_balance, here, warp_specialize
from gluon_types import DTYPES


@dataclass(frozen=True)
class Settings:
    """How kernels run, see gluon_emulator.load_module."""

    timeout_s: float
    seed: int | None
    programs_at_once: int


def _constexpr(value: Any) -> Any:
    """Stand for gl.constexpr, as a function and as an annotation."""
    return value


class Kernel:
    """A @gluon.jit function: called inside of kernels, launched as kernel[grid](..)."""

    def __init__(
        self, settings: Settings, function: Callable, do_not_specialize: Sequence[int | str] = ()
    ) -> None:
        self.fn, self._settings = function, settings
        self.__name__ = function.__name__
        self._signature = inspect.signature(function)
        self._kept = set(do_not_specialize)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(
        self,
        grid: Any,
        *args: Any,
        num_warps: int = 4,
        num_stages: int | None = None,
        num_ctas: int = 1,
        maxnreg: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_ctas != 1:
            raise NotImplementedError("the Gluon emulator runs clusters of one CTA")
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        grid = grid(bound.arguments) if callable(grid) else grid
        grid = (*map(int, grid), 1, 1)[:3]
        values = [
            self._argument(place, name, value)
            for place, (name, value) in enumerate(bound.arguments.items())
        ]
        programs = itertools.product(*map(range, grid))
        while group := list(itertools.islice(programs, self._settings.programs_at_once)):
            scheduler = Scheduler(self._settings.seed)
            for index in group:
                program = Program(index, grid)
                work = partial(self._run, program, values)
                scheduler.add(Task(scheduler, program, self.__name__, num_warps, work))
            scheduler.run(self._settings.timeout_s)

    def _run(self, program: Program, values: list) -> None:
        self.fn(*values)
        check_balance(program)

    def _argument(self, place: int, name: str, value: Any) -> Any:
        annotation = self._signature.parameters[name].annotation
        if annotation is _constexpr or annotation == "gl.constexpr":
            return value
        return _device_value(value, specialize=not self._kept & {place, name})


def _device_value(value: Any, specialize: bool) -> Any:
    """Return a launch's argument as the kernel sees it."""
    if isinstance(value, torch.Tensor):
        return memory.Pointer(memory.Memory(value))
    if isinstance(value, tuple):
        return tuple(_device_value(x, specialize) for x in value)
    if isinstance(value, int | float):
        # Triton makes an integer argument that is 1 a constant, which has no .to and no type.
        constant = specialize and type(value) is int and value == 1
        return value if constant else scalar(value)
    if type(value).__name__ == "TensorDescriptor" and not isinstance(
        value, memory.TensorDescriptor
    ):
        # Triton's own, made by a host file that the emulator has not loaded.
        fields = (value.base, value.shape, value.strides, value.block_shape, value.layout)
        return memory.TensorDescriptor(*fields, value.padding)
    return value


def _aggregate(cls: type) -> type:
    """Stand for triton's _aggregate: every annotated field is set, to a value of its type."""
    fields = inspect.get_annotations(cls)
    make = cls.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        missing = [name for name in fields if not hasattr(self, name)]
        if missing:
            raise AttributeError(f"{cls.__name__} did not initialize {missing}")

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name not in fields:
            raise AttributeError(f"{cls.__name__} has no attribute {name!r}")
        if isinstance(fields[name], type) and not isinstance(value, fields[name]):
            raise TypeError(f"{cls.__name__}.{name} must be {fields[name]}, got {value!r}")
        object.__setattr__(self, name, value)

    return type(cls.__name__, (cls,), {"__init__": __init__, "__setattr__": __setattr__})


class _Semantic:
    """What a function under Gluon's @builtin may do: issue TMA reductions, not public in 3.6."""

    @property
    def builder(self) -> "_Semantic":
        return self

    def _convert_to_ir_values(self, values: Any, require_i64: bool = True) -> Any:
        return values

    def create_async_tma_reduce(self, kind: Any, desc: Any, coord: Any, src: Any) -> None:
        if "ADD" not in str(kind):
            raise NotImplementedError(f"the Gluon emulator knows only ADD, got {kind}")
        hopper.tma_reduce_add(desc, coord, src)


def _builtin(function: Callable) -> Callable:
    return partial(function, _semantic=_Semantic())


def _atomic_add(*args: Any, **kwargs: Any) -> Tensor:
    before = memory.atomic_add(*args, **kwargs)
    here().scheduler.give_way()
    return before


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def _language() -> dict[str, Any]:
    """Return the names of triton.experimental.gluon.language."""
    layouts = "AutoLayout BlockedLayout SliceLayout DotOperandLayout DistributedLinearLayout "
    layouts += "NVMMADistributedLayout NVMMASharedLayout SwizzledSharedLayout PaddedSharedLayout"
    same = "where minimum maximum exp2 log2 reshape permute split join convert_layout arange full "
    same += "zeros cdiv"
    return {
        **{dtype.name: dtype for dtype in DTYPES},
        **{name: type(name, (shared.Layout,), {}) for name in layouts.split()},
        **{name: getattr(arrays, name) for name in same.split()},
        "constexpr": _constexpr,
        "SharedLinearLayout": shared.SharedLinearLayout,
        "tensor": Tensor,
        "shared_memory_descriptor": shared.SharedMemory,
        "max": arrays.reduce_max,
        "sum": arrays.reduce_sum,
        "load": memory.load,
        "store": memory.store,
        "atomic_add": _atomic_add,
        "program_id": lambda axis: scalar(here().program.index[axis]),
        "num_programs": lambda axis: scalar(here().program.grid[axis]),
        "static_range": range,
        "static_assert": _static_assert,
        "thread_barrier": lambda: None,
        "allocate_shared_memory": shared.allocate_shared_memory,
        "inline_asm_elementwise": hopper.inline_asm_elementwise,
        "warp_specialize": warp_specialize,
    }


def gluon_modules(settings: Settings) -> dict[str, ModuleType]:
    """Return, by name, the modules that a loaded file imports in place of Gluon's."""

    def jit(function: Callable | None = None, *, do_not_specialize: Any = (), **_: Any) -> Any:
        if function is None:
            return partial(Kernel, settings, do_not_specialize=do_not_specialize or ())
        return Kernel(settings, function)

    gluon, language = "triton.experimental.gluon", "triton.experimental.gluon.language"
    mbarrier = _module(
        f"{language}.nvidia.hopper.mbarrier",
        init=shared.mbarrier_init,
        invalidate=shared.mbarrier_invalidate,
        arrive=shared.mbarrier_arrive,
        expect=shared.mbarrier_expect,
        wait=shared.mbarrier_wait,
        MBarrierLayout=shared.MBarrierLayout,
    )
    tma = _module(
        f"{language}.nvidia.hopper.tma",
        async_copy_global_to_shared=hopper.tma_load,
        async_copy_shared_to_global=hopper.tma_store,
        store_wait=hopper.store_wait,
    )
    on_device = _module(
        f"{language}.nvidia.hopper",
        mbarrier=mbarrier,
        tma=tma,
        fence_async_shared=shared.fence_async_shared,
        warpgroup_mma=hopper.warpgroup_mma,
        warpgroup_mma_init=hopper.warpgroup_mma_init,
        warpgroup_mma_wait=hopper.warpgroup_mma_wait,
    )
    on_host = _module(f"{gluon}.nvidia.hopper", TensorDescriptor=memory.TensorDescriptor)
    core = _module(f"{language}._core", builtin=_builtin, _unwrap_if_constexpr=_constexpr)
    nvidia = _module(f"{language}.nvidia", hopper=on_device)
    gl = _module(language, **_language(), nvidia=nvidia, _core=core)
    host = _module(f"{gluon}.nvidia", hopper=on_host)
    top = _module(gluon, jit=jit, constexpr_function=_constexpr, language=gl, nvidia=host)
    experimental = _module("triton.experimental", gluon=top)
    plain = _module(
        "triton.language.core", **{**vars(triton.language.core), "_aggregate": _aggregate}
    )
    modules = (experimental, top, gl, nvidia, on_device, mbarrier, tma, core, host, on_host, plain)
    return {module.__name__: module for module in modules}


def _module(module_name: str, /, **names: Any) -> ModuleType:
    module = ModuleType(module_name)
    module.__dict__.update({**names, "__name__": module_name})
    return module
