"""The Hopper backward, executed on the CPU by test/gluon_emulator.py with the library's own tables.

As test_hopper_forward.py: what the emulator cannot know test_aot.py and a GPU must show.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import oracle
from gluon_emulator import EmulationError, load_module
from gluon_memory import TensorDescriptor
from ring_flash_attn.backends import hopper, hopper_backward
from ring_flash_attn.backends import triton as triton_backend
from ring_flash_attn.backends.base import GradTarget
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.layout import Layout
from ring_flash_attn.core.packed import Documents, on_device, plan_packed
from ring_flash_attn.core.plan import plan_ring
from ring_flash_attn.kernels.hopper.configs import BACKWARD
from simulated_ring import SCALE, Shape, inputs, mask_id, poisoned, state_and_result, truth, zero

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not hopper.SUPPORTED, reason="made for Triton 3.6"),
    # Triton's interpreter, which runs the kernels beside it.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

SOURCE = Path(hopper.__file__).parents[1] / "kernels" / "hopper" / "backward.py"
CAUSAL, FULL = (True, (-1, -1)), (False, (-1, -1))
GRADIENTS = ("dq", "dk", "dv")


@pytest.fixture
def emulated(monkeypatch):
    """Make a backend's backward run the Hopper kernel in the emulator; take a config to do so."""

    def start(config=None, bugs=None, seed=None):
        kernel = load_module(SOURCE, bugs, seed=seed)._hopper_bwd_kernel

        def launch(_, grid, arguments, **options):
            kernel[grid](**arguments, **options)

        monkeypatch.setattr(hopper, "launch", launch)
        monkeypatch.setattr(hopper, "TensorDescriptor", TensorDescriptor)
        monkeypatch.setattr(hopper, "unsupported_part", lambda *_: [])
        if config is not None:
            monkeypatch.setattr(triton_backend, "backward_config", lambda _: config)
        triton_backend._choices.cache_clear()
        return triton_backend.TritonBackend(hopper_forward=False, hopper_backward=True)

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
            backend.backward(attention, *arguments, lambda target=target: target, result)
            if landing:
                dks[source] = dk if step.first else dks[source] + dk
                dvs[source] = dv if step.first else dvs[source] + dv
    dqs = [result for _, result in states]
    return [oracle.unshard(x, layout) for x in (dqs, dks, dvs)]


def wrong(got, want, dense):
    """Return what is beyond the bound of 16-bit results, in words."""
    found = []
    for name, x in zip(GRADIENTS, got, strict=True):
        ours = oracle.errors(x, getattr(want, name))
        allowed = oracle.errors(getattr(dense, name), getattr(want, name))
        for measure in ("max_abs", "rmse"):
            error, bound = getattr(ours, measure), 2 * getattr(allowed, measure) + 1e-5
            if not error <= bound:
                found.append(f"{name} {measure} {error} > {bound}")
    return found


def check(backend, mask, layout, size, given, landing=False):
    got = gradients(backend, mask, layout, size, given, landing)
    want, seen = truth(mask, given)
    q, k, v, dout, dlse = given
    return wrong(got, want, oracle.dense_in_dtype(q, k, v, seen, dout, dlse, SCALE))


CASES = [
    # layout, P, mask, shape, dtype
    ("contiguous", 1, CAUSAL, Shape(300, 300, 2, 2, 1, 128), torch.bfloat16),
    ("contiguous", 2, FULL, Shape(140, 300, 1, 3, 3, 64), torch.float16),
    ("contiguous", 1, (False, (3, 2)), Shape(400, 150, 1, 2, 1, 64), torch.bfloat16),
    ("contiguous", 2, CAUSAL, Shape(300, 300, 1, 2, 1, 80), torch.bfloat16),
    ("contiguous", 1, (True, (40, 0)), Shape(520, 520, 1, 1, 1, 96), torch.float16),
    ("zigzag", 2, CAUSAL, Shape(600, 600, 1, 4, 2, 128), torch.bfloat16),
    ("zigzag", 2, (True, (200, 0)), Shape(1000, 1000, 1, 1, 1, 64), torch.bfloat16),
    ("zigzag", 2, (False, (-1, 4)), Shape(520, 520, 1, 2, 1, 40), torch.float16),
    ("stripe", 3, CAUSAL, Shape(630, 630, 1, 2, 2, 64), torch.bfloat16),
]


@pytest.mark.parametrize(
    ("layout", "size", "mask", "shape", "dtype"),
    CASES,
    ids=[f"{c[0]}-P{c[1]}-{mask_id(c[2])}-D{c[3].head_dim}" for c in CASES],
)
def test_rings_equal_dense(emulated, layout, size, mask, shape, dtype):
    broken = check(emulated(), mask, layout, size, inputs(shape, dtype))
    assert not broken, "\n".join(broken)
