"""Short Gluon sources for the emulator's tests: how they are loaded, and numbers for them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from gluon_emulator import load_module

IMPORTS = """
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate
"""

Load = Callable[..., ModuleType]


def loader(folder: Path) -> Load:
    """Return what loads Gluon source, with arguments of load_module; it is kept in a folder."""

    def load_source(source: str, *args, **kwargs) -> ModuleType:
        file = folder / "kernel.py"
        file.write_text(IMPORTS + source)
        return load_module(file, *args, **kwargs)

    return load_source


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
