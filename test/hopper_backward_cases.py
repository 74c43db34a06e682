"""The Hopper backward in test/gluon_emulator.py: how tests start it, and what they compare."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import oracle
from gluon_emulator import load_module
from gluon_memory import TensorDescriptor
from ring_flash_attn.backends import hopper, hopper_backward
from ring_flash_attn.backends import launch as launching
from ring_flash_attn.backends import triton as triton_backend
from ring_flash_attn.backends.base import GradTarget, TargetOnRequest
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.plan import plan_ring
from ring_flash_attn.kernels.hopper.configs import BackwardConfig, backward_config
from simulated_ring import SCALE, poisoned, state_and_result, truth, zero

MARKS = [
    pytest.mark.kernel,
    pytest.mark.skipif(not hopper.SUPPORTED, reason="made for Triton 3.6"),
    # Triton's interpreter, which runs the kernels beside it.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
FOLDER = Path(hopper.__file__).parents[1] / "kernels" / "hopper"
FILES = {
    "_hopper_bwd_kernel": "backward.py",
    "_hopper_dkv_kernel": "backward_wide.py",
    "_hopper_dq_kernel": "backward_wide_dq.py",
}
CAUSAL, FULL = (True, (-1, -1)), (False, (-1, -1))
GRADIENTS = ("dq", "dk", "dv")


def winning(head_dim):
    """Return a head dim's row as if it were the faster one."""
    row = backward_config(head_dim)
    return replace(row, wins=True) if isinstance(row, BackwardConfig) else row


def emulation(monkeypatch):
    """Yield what makes a backend whose backward runs the Hopper kernels in the emulator.

    It takes a config, as `TritonBackend` does; `bugs` go into all kernels, or into the one named
    `bugged`.
    """

    def start(config=None, bugs=None, seed=None, bugged=None):
        @cache
        def kernel(name):
            planted = bugs if bugged in (None, name) else None
            return getattr(load_module(FOLDER / FILES[name], planted, seed=seed), name)

        def launch(given, grid, arguments, **options):
            name = given.fn.__name__
            runs = kernel(name) if name in FILES else given
            runs[grid](**arguments, **options)

        monkeypatch.setattr(launching, "launch", launch)
        monkeypatch.setattr(hopper, "TensorDescriptor", TensorDescriptor)
        monkeypatch.setattr(hopper, "unsupported_part", lambda *_: [])
        monkeypatch.setattr(hopper_backward, "backward_config", winning)
        triton_backend._choices.cache_clear()
        return triton_backend.TritonBackend(hopper_forward=False, hopper_backward=config or True)

    yield start
    triton_backend._choices.cache_clear()


def gradients(backend, mask, layout, size, given, landing=False):
    """Run every step of every rank backward, on the true out and lse; return dq, dk, dv.

    landing: as in simulated_ring.ring.
    """
    attention = Attention(SCALE, *mask)
    want, _ = truth(mask, given)
    out, lse = want.out.to(given.q.dtype), want.lse.float()

    def shards(x, dim=1):
        return [oracle.shard(x, layout, size, rank, dim) for rank in range(size)]

    q, k, v, dout, outs = (shards(x) for x in (*given[:4], out))
    lses, dlses = shards(lse, 2), shards(given.dlse, 2)
    layouts = [Layout(layout, x[0].shape[1], size) for x in (q, k)]
    plans = [plan_ring(attention, *layouts, rank) for rank in range(size)]
    states = [state_and_result(plan, x) for plan, x in zip(plans, q, strict=True)]
    saved = [backend.prepare_backward(*x) for x in zip(dout, outs, lses, dlses, strict=True)]
    dks, dvs = ([poisoned(x, torch.float32) for x in xs] for xs in (k, v))
    for hop in range(len(plans[0].steps)):
        for rank, plan in enumerate(plans):
            step = plan.steps[hop]
            source = step.source
            dk, dv = dks[source], dvs[source]
            if landing:
                dk, dv = poisoned(dk, torch.float32), poisoned(dv, torch.float32)
            target = GradTarget(dk, dv, add=not (landing or step.first))
            if not target.add:
                zero(dk, step.unseen_k())
                zero(dv, step.unseen_k())
            dq, result = states[rank]
            arguments = step, saved[rank], q[rank], k[source], v[source], dq
            ask = TargetOnRequest(lambda target=target: target, late=not landing)
            backend.backward(attention, *arguments, ask, result)
            if landing:
                dks[source] = dk if step.first else dks[source] + dk
                dvs[source] = dv if step.first else dvs[source] + dv
    dqs = [result for _, result in states]
    return [oracle.unshard(x, layout) for x in (dqs, dks, dvs)]


def wrong(got, want, dense):
    """Return what is beyond the bound of 16-bit results, in words."""
    got = want._replace(**dict(zip(GRADIENTS, got, strict=True)))
    return oracle.beyond_bound(got, want, dense, GRADIENTS)


def check(backend, mask, layout, size, given, landing=False):
    got = gradients(backend, mask, layout, size, given, landing)
    want, seen = truth(mask, given)
    q, k, v, dout, dlse = given
    return wrong(got, want, oracle.dense_in_dtype(q, k, v, seen, dout, dlse, SCALE))
