"""A launch by key: what differs for the compiler is another key, and nothing else is."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from triton import knobs
from triton.backends.nvidia import driver

from ring_flash_attn.backends import launch as module

ARGUMENTS = {
    "q": None,
    "out_ptr": torch.zeros(64, dtype=torch.bfloat16),
    "out_strides": (4096, 128, 1024),
    "n_tiles": 7,
    "softmax_scale": 0.5,
    "BLOCK_M": 64,
    "CARRY": False,
}


class Kernel:
    """A kernel that counts how often Triton would bind its arguments, and notes direct launches."""

    arg_names = (*ARGUMENTS,)
    do_not_specialize = ("n_tiles",)

    def __init__(self):
        self.bound, self.launched = 0, []

    def __getitem__(self, grid):
        def bind(**arguments):
            self.bound += 1
            return Compiled(self.launched.append)

        return bind


class Compiled:
    def __init__(self, note):
        self._note = note

    def __getitem__(self, grid):
        return lambda *values: self._note((grid, values))


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(module, "_KNOWN", True)
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def call(kernel, grid=(3, 1, 1), num_warps=4, **changed):
        module.launch(kernel, grid, {**ARGUMENTS, **changed}, num_warps=num_warps)

    return call


@pytest.mark.parametrize(
    "changed",
    [
        {"out_ptr": torch.zeros(64, dtype=torch.bfloat16)},
        {"out_strides": (8192, 128, 2048)},
        {"n_tiles": 16},
        {"n_tiles": 1},
        {"softmax_scale": 0.25},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_the_compiler_does_not_see_is_launched_directly(launch, changed):
    kernel = Kernel()
    launch(kernel)
    launch(kernel, (5, 1, 1), **changed)
    assert kernel.bound == 1
    assert kernel.launched == [((5, 1, 1), tuple({**ARGUMENTS, **changed}.values()))]


@pytest.mark.parametrize(
    "changed",
    [
        {"out_ptr": torch.zeros(64)},
        {"out_ptr": torch.zeros(64, dtype=torch.bfloat16)[1:]},
        {"out_strides": (4096, 120, 1024)},
        {"out_strides": (4096, 1, 1024)},
        {"out_strides": (1 << 31, 128, 1024)},
        {"n_tiles": 1 << 31},
        {"BLOCK_M": 128},
        {"CARRY": True},
        {"num_warps": 8},
        {"q": SimpleNamespace(base=torch.zeros(1), block_shape=[1, 1, 64, 64])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_the_compiler_sees_is_bound_anew(launch, changed):
    kernel = Kernel()
    launch(kernel)
    launch(kernel, **changed)
    assert kernel.bound == 2 and not kernel.launched


def test_an_int_that_would_be_compiled_in_is_refused(launch, monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(kernel, "do_not_specialize", (), raising=False)
    with pytest.raises(AssertionError, match="n_tiles would be compiled in"):
        launch(kernel)


class Descriptor(NamedTuple):
    base: torch.Tensor
    block_shape: list


class Fast:
    """A compiled kernel as Triton 3.6 has it: a C launcher inside a function, if it must encode."""

    function, packed_metadata = "function", "packed"

    def __init__(self, metas):
        self.started, self.encoded = [], 0
        self.metadata = SimpleNamespace(tensordesc_meta=metas)

        def launcher(*values):
            self.started.append(values)

        def inner(*values):
            return launcher(*values)

        self.run = SimpleNamespace(
            global_scratch_size=0,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=False,
            launch=inner if metas else launcher,
        )


HEAD = (False, False, None, None, "packed", None, None, None)
NAMES = ("out_ptr", "q", "BLOCK", "n_tiles", "k", "lse_ptr", "scale")


@pytest.fixture
def prepared(monkeypatch):
    """Return a Launch, its compiled kernel, and the names bound so far."""
    compiled, bound = Fast([{"of": "q"}, {"of": "k"}]), []

    def bind(kernel, grid, arguments, **options):
        assert options == {"num_warps": 4}
        bound.append((grid, arguments))
        return compiled

    def encode(descriptor, meta):
        compiled.encoded += 1
        return [(descriptor.base.data_ptr(), meta["of"]), 10, 20]

    monkeypatch.setattr(module, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(module, "_KNOWN", True)
    monkeypatch.setattr(module, "launch", bind)
    monkeypatch.setattr(module, "current_stream", lambda device: 77)
    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    described = module.Described(lambda base: Descriptor(base, [64]))
    arguments = {
        # In another order than the kernel's.
        "scale": 0.5,
        "k": described,
        "lse_ptr": module.ADDRESS,
        "n_tiles": module.NUMBER,
        "q": described,
        "BLOCK": 64,
        "out_ptr": module.ADDRESS,
    }
    kernel = SimpleNamespace(arg_names=NAMES)
    return module.Launch(kernel, arguments, num_warps=4), compiled, bound


def given(**changed):
    x = {name: torch.zeros(64) for name in ("q", "k", "out_ptr", "lse_ptr")}
    return {**x, "n_tiles": 3, "not_a_parameter": None, **changed}


def test_a_launch_binds_by_name_once_and_then_fills_in_addresses_and_numbers(prepared):
    start, compiled, bound = prepared
    first, second = given(), given(n_tiles=5)
    start(12, first)
    [(grid, arguments)] = bound
    assert grid == (12, 1, 1) and arguments["scale"] == 0.5 and arguments["n_tiles"] == 3
    assert arguments["out_ptr"] is first["out_ptr"] and arguments["k"].base is first["k"]
    start(20, second)
    assert len(bound) == 1
    address = {name: second[name].data_ptr() for name in ("q", "k", "out_ptr", "lse_ptr")}
    values = address["out_ptr"], (address["q"], "q"), 10, 20, 64, 5
    values += (address["k"], "k"), 10, 20, address["lse_ptr"], 0.5
    assert compiled.started == [(20, 1, 1, 77, "function", *HEAD, *values)]


def test_a_descriptor_is_encoded_once_an_address(prepared):
    start, compiled, _ = prepared
    x = given()
    start(1, x)
    start(1, x)
    encoded = compiled.encoded
    start(1, x)
    assert compiled.encoded == encoded
    start(1, x | {"k": torch.zeros(64)})
    assert compiled.encoded == encoded + 1


def test_a_crooked_address_is_bound_by_itself(prepared):
    start, compiled, bound = prepared
    start(1, given())
    start(1, given(out_ptr=torch.zeros(65)[1:]))
    assert len(bound) == 2 and not compiled.started
    start(1, given(out_ptr=torch.zeros(65)[1:]))
    assert len(bound) == 2 and len(compiled.started) == 1


@pytest.mark.parametrize("name", ["out_ptr", "lse_ptr", "q"])
def test_another_dtype_is_bound_by_itself(prepared, name):
    start, compiled, bound = prepared
    start(1, given())
    start(1, given(**{name: torch.zeros(64, dtype=torch.bfloat16)}))
    assert len(bound) == 2 and not compiled.started
    start(1, given())
    assert len(bound) == 2 and len(compiled.started) == 1


def test_another_device_is_bound_by_itself(prepared, monkeypatch):
    start, _, bound = prepared
    start(1, given())
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 1)
    start(1, given())
    assert len(bound) == 2


def test_a_hook_of_tritons_sees_every_launch(prepared, monkeypatch):
    start, compiled, bound = prepared
    start(1, given())
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    start(1, given())
    assert len(bound) == 2 and not compiled.started


@pytest.mark.parametrize("change", ["scratch", "launcher", "metas", "version"])
def test_what_this_file_does_not_know_is_launched_by_triton(prepared, monkeypatch, change):
    start, compiled, bound = prepared
    if change == "scratch":
        compiled.run.global_scratch_size = 128
    elif change == "launcher":
        compiled.run.launch = lambda *values: None  # a function around something else
    elif change == "metas":
        compiled.metadata.tensordesc_meta = None  # before sm_90 descriptors are encoded otherwise
    else:
        monkeypatch.setattr(module, "_KNOWN", False)
    for _ in range(3):
        start(1, given())
    assert len(bound) == 3 and not compiled.started
