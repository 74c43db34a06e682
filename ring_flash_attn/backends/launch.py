"""Launch a Triton kernel again and again without binding its arguments anew.

Triton's own launch looks at each of an attention kernel's forty arguments, 100 us and more, and
encodes a descriptor of each tensor that the TMA reads. A `Launch` does that once, for tensors of
given shapes, strides and dtypes. After that it puts addresses and numbers into a list.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from ..kernels.tile import INTERPRETED
from .descriptors import Like

# Versions whose compiled kernels take their arguments as this file passes them.
_KNOWN = triton.__version__.startswith("3.6.")
# (kernel, device, options, what each argument was specialised on) -> the compiled kernel.
_compiled: dict[tuple, Any] = {}
_DTYPE = attrgetter("dtype")
_KEPT_MAPS = 1024  # addresses whose descriptors a launch keeps for each tensor


class _Given(NamedTuple):
    """Stands for an argument that every launch gives."""

    kind: str


ADDRESS = _Given("tensor")
NUMBER = _Given("int")  # among the kernel's do_not_specialize, below 2**31


class Described(NamedTuple):
    """Stands for a tensor that every launch gives, and that the kernel reads by descriptor.

    `make`: returns the descriptor of a tensor of the shape and strides that the launch is for.
    """

    make: Callable[[Tensor], Any]


class Launch:
    """A kernel with all of its arguments but those that every launch gives.

    Args:
        kernel: of Triton or Gluon.
        arguments: every parameter by name, constants included, or what stands for it: ADDRESS,
            NUMBER or a Described. Other ints that are no constants and not in a tuple must be among
            the kernel's do_not_specialize.
        options: Triton's, as num_warps.
    """

    def __init__(self, kernel: Any, arguments: dict[str, Any], **options: int) -> None:
        self.arguments = arguments
        self._kernel, self._options = kernel, options
        self._addresses = [name for name, x in arguments.items() if x is ADDRESS]
        self._numbers = [name for name, x in arguments.items() if x is NUMBER]
        self._described = [name for name, x in arguments.items() if isinstance(x, Described)]
        self._addressed_of, self._numbers_of = _picker(self._addresses), _picker(self._numbers)
        self._described_of = _picker(self._described)
        self._direct: dict[tuple, _Direct | None] = {}

    def __call__(self, programs: int, given: dict[str, Any], rows: int = 1) -> None:
        """Launch a grid of programs x rows on the current stream.

        Args:
            given: tensors and ints by the kernel's parameters. Names that are none are ignored.
                The tensors are on the current device.
        """
        grid = programs, rows, 1
        if INTERPRETED.value:
            self._bind(grid, given)
            return
        addressed, tensors = self._addressed_of(given), self._described_of(given)
        device = addressed[0].get_device()
        pointers = [x.data_ptr() for x in addressed]
        # Triton compiles anew for another dtype, and for addresses that are no multiples of 16.
        unaligned = [pointer % 16 != 0 for pointer in pointers]
        key = device, any(unaligned) and tuple(unaligned), *map(_DTYPE, (*addressed, *tensors))
        direct = self._direct.get(key)
        if direct is not None and _unwatched():
            direct(device, grid, (*pointers, *self._numbers_of(given)), tensors)
            return
        compiled = self._bind(grid, given)
        if key not in self._direct:
            self._direct[key] = self._lay_out(compiled, given)

    def _bind(self, grid: tuple[int, int, int], given: dict[str, Any]) -> Any:
        """Launch with every argument by name; return the compiled kernel if there is one."""
        arguments = self.arguments.copy()
        for name in (*self._addresses, *self._numbers):
            assert given[name] is not None, f"{name} is to be given by every launch"
            arguments[name] = given[name]
        for name in self._described:
            arguments[name] = arguments[name].make(given[name])
        return launch(self._kernel, grid, arguments, **self._options)

    def _lay_out(self, compiled: Any, given: dict[str, Any]) -> "_Direct | None":
        """Return how to launch without Triton's checks, None where its launcher is another one."""
        start = _c_launcher(compiled) if _KNOWN else None
        metas = getattr(compiled.metadata, "tensordesc_meta", None) or ()
        if start is None or len(metas) != len(self._described):
            return None
        in_order = [name for name in self._kernel.arg_names if name in self._described]
        maps = {
            name: _Maps(self.arguments[name].make, meta)
            for name, meta in zip(in_order, metas, strict=True)
        }
        flat: list[Any] = []
        places: dict[str, int] = {}
        for name in self._kernel.arg_names:
            places[name] = len(flat)
            flat += maps[name].flat(given[name]) if name in maps else [self.arguments[name]]
        return _Direct(
            compiled,
            start,
            flat,
            [places[name] for name in (*self._addresses, *self._numbers)],
            [(places[name], maps[name]) for name in self._described],
        )


class _Maps:
    """The TMA's descriptors (CUtensorMap) of tensors of one shape, by address."""

    def __init__(self, make: Callable[[Tensor], Any], meta: dict[str, Any]) -> None:
        self._make, self._meta = make, meta
        self._kept: dict[int, Any] = {}

    def flat(self, x: Tensor) -> list[Any]:
        """Return what stands for x in the C launcher's arguments: map, then shape and strides."""
        from triton.backends.nvidia.driver import make_tensordesc_arg

        return make_tensordesc_arg(self._make(x), self._meta)

    def of(self, x: Tensor) -> Any:
        address = x.data_ptr()
        if address not in self._kept:
            if len(self._kept) == _KEPT_MAPS:
                self._kept.clear()
            self._kept[address] = self.flat(x)[0]
        return self._kept[address]


class _Direct:
    """A compiled kernel's C launcher with its arguments laid out as it takes them.

    Args:
        start: the launcher. flat: its arguments, what stands at the places below is overwritten.
        places: of the addresses and then the numbers. maps: place and descriptors of each tensor.
    """

    def __init__(
        self,
        compiled: Any,
        start: Callable,
        flat: list[Any],
        places: list[int],
        maps: list[tuple[int, _Maps]],
    ) -> None:
        self._start, self._flat, self._places, self._maps = start, flat, places, maps
        run = compiled.run
        # No scratch memory, no metadata for hooks, no hooks.
        self._head = (
            compiled.function,
            run.launch_cooperative_grid,
            run.launch_pdl,
            None,
            None,
            compiled.packed_metadata,
            None,
            None,
            None,
        )

    def __call__(
        self,
        device: int,
        grid: tuple[int, int, int],
        values: tuple[int, ...],
        tensors: tuple[Tensor, ...],
    ) -> None:
        arguments = self._flat.copy()
        for place, value in zip(self._places, values, strict=True):
            arguments[place] = value
        for (place, maps), tensor in zip(self._maps, tensors, strict=True):
            arguments[place] = maps.of(tensor)
        self._start(*grid, current_stream(device), *self._head, *arguments)


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], **options: int
) -> Any:
    """Launch `kernel` on the current device and stream; return the compiled kernel.

    Args:
        arguments: every parameter of the kernel by name, constants included. Ints that are not
            constants and not in a tuple must be among its `do_not_specialize`.
        options: Triton's, as num_warps.
    """
    if INTERPRETED.value or not _KNOWN:
        return kernel[grid](**arguments, **options)
    constants, others = _names(kernel)
    key = (
        kernel,
        torch.cuda.current_device(),
        *options.values(),
        *[arguments[name] for name in constants],
        *[_specialised(arguments[name]) for name in others],
    )
    compiled = _compiled.get(key)
    if compiled is None:
        for name in others:
            plain = isinstance(arguments[name], int)
            assert not plain or name in kernel.do_not_specialize, f"{name} would be compiled in"
        _compiled[key] = compiled = kernel[grid](**arguments, **options)
    else:
        compiled[grid](*[arguments[name] for name in kernel.arg_names])
    return compiled


def strides(x: Like) -> tuple[int, int, int]:
    """Return the strides of x [B, L, H, D] in the kernels' order: batch, head, row."""
    assert x.strides[3] == 1, f"rows must be contiguous, got strides {x.strides}"
    return x.strides[0], x.strides[2], x.strides[1]


def targets(state: Tensor | None, result: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a state and a result of the same strides; they are one where there is but one."""
    state, result = result if state is None else state, state if result is None else result
    assert state is not None and result is not None, "without a state there must be a result"
    assert state.stride() == result.stride(), "state and result share one set of strides"
    return state, result


def on(device: torch.device) -> AbstractContextManager:
    """Make `device` current: Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def current_stream(device: int) -> int:
    """Return the handle of a device's current stream, without a torch.cuda.Stream around it."""
    driver: Any = triton.runtime.driver.active
    return driver.get_current_stream(device)


def _picker(names: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Return what takes the values of these names from a dict."""
    if len(names) > 1:
        return itemgetter(*names)  # in C, where the host's time counts
    return lambda given: tuple(given[name] for name in names)


def _c_launcher(compiled: Any) -> Callable | None:
    """Return the C function that starts a compiled kernel, None where there is more to do first."""
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    # Around it lies a Python function that encodes the descriptors, if the kernel takes any.
    code = getattr(run.launch, "__code__", None)
    if code is None:
        return run.launch
    held = dict(zip(code.co_freevars, run.launch.__closure__ or (), strict=True))
    return held["launcher"].cell_contents if "launcher" in held else None


def _unwatched() -> bool:
    """Return whether nobody wants to be told of launches, as Triton's profiler does."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return not ((enter is not None and enter.calls) or (leave is not None and leave.calls))


@cache
def _names(kernel: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of a kernel's constants, which are in capitals, and of all else."""
    others = tuple(name for name in kernel.arg_names if name.islower())
    return tuple(name for name in kernel.arg_names if name not in others), others


def _specialised(value: Any) -> Any:
    """Return what Triton compiles an argument that is no constant into the kernel by."""
    if isinstance(value, int):
        return -(1 << 31) <= value < 1 << 31
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return None
    if isinstance(value, tuple):
        return _of_strides(value)
    if value is None:
        return ()
    return value.base.dtype, tuple(value.block_shape)  # a descriptor, Triton's or Gluon's


@lru_cache(maxsize=4096)
def _of_strides(strides: tuple[int, ...]) -> tuple[tuple[bool, bool, bool], ...]:
    return tuple((x == 1, x % 16 == 0, x < 1 << 31) for x in strides)
