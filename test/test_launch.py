"""A launch by key: what differs for the compiler is another key, and nothing else is."""

from types import SimpleNamespace

import pytest
import torch

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
