"""What may be tuned: the kernels, their checked-in rows, and the configurations to try instead."""

import itertools
from dataclasses import fields, replace
from typing import NamedTuple

import timing  # noqa: F401  makes the library and the compiler's reports importable
import torch

from aot import HOPPER_BACKWARD, Job
from ring_flash_attn.backends import hopper
from ring_flash_attn.kernels import configs
from ring_flash_attn.kernels.configs import LaunchConfig, launch_config
from ring_flash_attn.kernels.hopper.configs import (
    BackwardConfig,
    ForwardConfig,
    WideConfig,
    backward_config,
    forward_config,
)

Config = LaunchConfig | ForwardConfig | BackwardConfig | WideConfig

# Kernel -> the types of its rows.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(configs.PASSES, (LaunchConfig,)),
    "hopper-forward": (ForwardConfig,),
    "hopper-backward": (BackwardConfig, WideConfig),
}
KERNELS = tuple(KINDS)
HEAD_DIMS = (16, 32, 64, 128, 256)
HOPPER_HEAD_DIMS = (64, 128, 256)
# Fields of a row -> values to try, in the order in which a candidate is written.
GRIDS: dict[type, dict[str, tuple[int, ...]]] = {
    LaunchConfig: {
        "block_m": (32, 64, 128),
        "block_n": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "tma": (True,),
    },
    ForwardConfig: {
        "consumers": (2, 3),
        "block_n": (64, 128),
        "k_stages": (1, 2),
        "v_stages": (2, 3),
        "ping_pong": (False, True),
        "rescale_late": (False, True),
        "q_columns": (0, 128),
        "shuffles": (False, True),
    },
    BackwardConfig: {
        "block_m": (64, 128),
        "q_stages": (1, 2),
        "dout_stages": (1, 2),
        "dq_stages": (1, 2),
        "rotate": (False, True),
    },
    WideConfig: {"stages": (2, 3, 4), "query_columns": (0, 64)},
}


class Candidate(NamedTuple):
    """A configuration of one kernel."""

    kernel: str
    config: Config

    @property
    def text(self) -> str:
        """As `parsed` reads it: kernel:field=value,..."""
        values = (f"{x}={int(getattr(self.config, x))}" for x in GRIDS[type(self.config)])
        return f"{self.kernel}:{','.join(values)}"


class Target(NamedTuple):
    """One row to tune.

    Attributes:
        row: the checked-in configuration, what this part runs now.
    """

    kernel: str
    head_dim: int
    arch: int
    row: Candidate

    @property
    def name(self) -> str:
        return f"{self.kernel} D {self.head_dim}"


def target(kernel: str, head_dim: int, arch: int) -> Target:
    """Return the row of a kernel.

    Raises:
        ValueError: there is none; the message says why.
    """
    if kernel in configs.PASSES:
        config: Config | None = launch_config(arch, head_dim, "bfloat16", kernel).config
    elif reasons := hopper.unsupported_part(arch, torch.bfloat16):
        raise ValueError(f"{kernel}: {'; '.join(reasons)}")
    elif kernel == "hopper-forward":
        config = forward_config(head_dim)
    else:
        config = backward_config(head_dim)
    if config is None or (kernel not in configs.PASSES and head_dim not in HOPPER_HEAD_DIMS):
        raise ValueError(f"{kernel} has no row for head dim {head_dim}")
    return Target(kernel, head_dim, arch, Candidate(kernel, config))


def grid(of: Target) -> list[Candidate]:
    """Return the configurations to try, the checked-in row first."""
    choices = dict(GRIDS[type(of.row.config)])
    if "tma" in choices:
        choices["tma"] = (of.arch >= 90,)  # test_aot.py asks for the TMA where there is one
    return _products(of, choices)


def parsed(of: Target, lines: list[str]) -> list[Candidate]:
    """Return the checked-in row, then those that lines kernel:field=value/value,... ask of it.

    Fields that are not named are the row's. Lines of other kernels, or of the kernel's rows of
    another type, are passed over.

    Raises:
        ValueError: a line that is not of this form, or a field that is not tuned.
    """
    found = {of.row: None}
    grid_of_row = GRIDS[type(of.row.config)]
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text:
            continue
        kernel, choices = _parsed_line(text)
        if kernel == of.kernel and choices.keys() <= grid_of_row.keys():
            found |= dict.fromkeys(_products(of, choices))
    return list(found)


def jobs(of: Target, candidate: Candidate) -> list[Job]:
    """Return every form of a candidate that test_aot.py asks of a row: what is to be compiled."""
    config = candidate.config
    common = {"arch": of.arch, "head_dim": of.head_dim, "dtype": "bfloat16"}
    forms = [(False, False), (True, False), (True, True)]  # adds, documents
    if isinstance(config, LaunchConfig):
        tile = {x: getattr(config, x) for x in GRIDS[LaunchConfig]}
        own_row = configs._DOCUMENT_ROWS.get((of.arch, of.head_dim, "bfloat16", of.kernel))
        return [
            Job(of.kernel, **common, **tile, adds=adds, documents=documents)
            for adds, documents in (forms[:2] if own_row else forms)
        ]
    common |= {"num_warps": 4, "num_stages": getattr(config, "stages", 2), "tma": True}
    changes = tuple(
        (x, getattr(config, x))
        for x in GRIDS[type(config)]
        if getattr(config, x) != getattr(of.row.config, x)
    )
    if isinstance(config, ForwardConfig):
        tile = {"block_m": config.block_m, "block_n": config.block_n}
        return [
            Job("forward", **common, **tile, adds=a, documents=d, one_entry=not d, changes=changes)
            for a, d in forms
        ]
    tile = {"block_m": getattr(config, "block_m", 128), "block_n": config.key_rows}
    names = HOPPER_BACKWARD[1:] if isinstance(config, WideConfig) else HOPPER_BACKWARD[:1]
    return [
        Job(name, **common, **tile, adds=a, documents=d, changes=changes)
        for name in names
        for a, d in (forms[0], forms[2])
    ]


def _parsed_line(line: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Return the kernel and the values of each field that is named."""
    kernel, _, values = line.partition(":")
    if kernel not in KINDS:
        raise ValueError(f"configuration: got {line!r}, expected kernel:field=value/value,...")
    known = {name: values[0] for kind in KINDS[kernel] for name, values in GRIDS[kind].items()}
    choices = {}
    for part in values.split(","):
        field, _, listed = part.partition("=")
        if field not in known or not all(x.isdigit() for x in listed.split("/")):
            raise ValueError(f"configuration: got {part!r} in {line!r}, fields are {[*known]}")
        choices[field] = tuple(type(known[field])(int(x)) for x in listed.split("/"))
    return kernel, choices


def _products(of: Target, choices: dict[str, tuple[int, ...]]) -> list[Candidate]:
    """Return the checked-in row, then it with every combination of the choices."""
    # What was measured, and what the compiler said, is of the checked-in row alone.
    measured = {"spills": 0, "tflops": None, "gpu": None, "date": None}
    config = of.row.config
    cleared = {x.name: measured[x.name] for x in fields(config) if x.name in measured}
    found = {of.row: None}
    for values in itertools.product(*choices.values()):
        other = replace(config, **cleared, **dict(zip(choices, values, strict=True)))
        candidate = Candidate(of.kernel, other)
        if candidate.text != of.row.text:
            found[candidate] = None
    return list(found)
