"""Bugs planted into the Hopper backward's source, each of which the emulator must see."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import InterpreterError

from gluon_emulator import EmulationError
from hopper_backward_cases import MARKS, check, emulation
from ring_flash_attn.kernels.hopper.configs import BACKWARD
from simulated_ring import Shape, inputs

pytestmark = MARKS


@pytest.fixture
def emulated(monkeypatch):
    yield from emulation(monkeypatch)


WAIT_DV = "    dv = warpgroup_mma_wait(1, [dv])\n"
RELEASE_DOUT = "    program.dout.release(dout_slot)\n"
WAIT_DK = "    dk = warpgroup_mma_wait(0, [dk])\n"
RELEASE_Q = "    program.q.release(q_slot)\n"
FENCE = "    fence_async_shared()\n"
HAND_ON, HAND_ON_LAST = (
    f"    _hand_on_dq(program, {t}, CONSUMER)\n" for t in ("t", "program.total")
)
BUGS = {
    "no wait for K": ("            await_full(program.k, c, 0)\n", "            pass\n"),
    "no wait for V": ("        await_full(program.v, CONSUMER, 0)\n", ""),
    "no wait for Q": ("    await_full(program.q, q_slot, t // Q_STAGES)\n", ""),
    "no wait for dout": ("    await_full(program.dout, dout_slot, t // DOUT_STAGES)\n", ""),
    "no wait for lse": ("q, box, FIRST_EMPTY, 2)", "q, box, FIRST_EMPTY)"),
    "phase of an empty slot": ("turn & 1 ^ 1)", "turn & 1)"),
    "phase of a full slot": ("full.index(slot), turn & 1)", "full.index(slot), 0)"),
    "dout released before its product": (WAIT_DV + RELEASE_DOUT, RELEASE_DOUT + WAIT_DV),
    "Q released before its product": (WAIT_DK + RELEASE_Q, RELEASE_Q + WAIT_DK),
    "Q never released": (RELEASE_Q, ""),
    "ds used before both have stored it": ("    meet(DS_FULL + turn)\n", ""),
    "dq used before it is there": ("    dq = warpgroup_mma_wait(0, [dq])\n", ""),
    "scores used before they are there": ("    s_t = warpgroup_mma_wait(1, [s_t])\n", ""),
    "dq stored where an older one is": (
        "    program.dq.await_empty(t % DQ_STAGES, t // DQ_STAGES)\n",
        "",
    ),
    "a slot of dq given back early": ("        tma.store_wait(DQ_STAGES - 1)\n", ""),
    "the wrong slot of dq given back": ("release((t + 1) % DQ_STAGES)", "release(t % DQ_STAGES)"),
    "a slot of dq given back before its time": ("t >= DQ_STAGES - 1:", "t >= 0:"),
    "the last dq not waited for": ("    tma.store_wait(0)\n", ""),
    "dq not waited for by the writer": ("        await_at(dq_full(program.options)", "# "),
    "a turn that is nobody's": ("    if turn == CONSUMER:\n", "    if turn > CONSUMER:\n"),
    "the other's turn": ("    if turn == CONSUMER:\n", "    if turn != CONSUMER:\n"),
    "ds announced by whose turn it is": ("turn != CONSUMER,", "turn == CONSUMER,"),
    "one barrier for both turns": {
        "arrive_if(DS_FULL + turn,": "arrive_if(DS_FULL,",
        "meet(DS_FULL + turn)": "meet(DS_FULL)",
    },
    "one slot of ds for both turns": {
        "ds.index(turn * CONSUMERS + CONSUMER)": "ds.index(turn * 0 + CONSUMER)",
        "ds.index(turn * CONSUMERS + c)": "ds.index(turn * 0 + c)",
    },
    "ds announced before it is fenced": (FENCE + HAND_ON, HAND_ON),
    "dq handed on by the other": ("(t - 1) % CONSUMERS == CONSUMER", "t % CONSUMERS == CONSUMER"),
    "dq handed on by whose turn it is, before it is there": {
        "(t - 1) % CONSUMERS == CONSUMER": "t % CONSUMERS == CONSUMER",
        "stage = (t - 1) %": "stage = t %",
    },
    "dq handed on where it is stored, without a fence": {
        "swapped).store(_swap_halves(dq))\n": "swapped).store(_swap_halves(dq))\n"
        "    arrive_if(dq_full(program.options) + t % DQ_STAGES, t >= 0, 128 + 32)\n",
        HAND_ON: "",
        FENCE + HAND_ON_LAST: "",
    },
    "the last dq not handed on": (HAND_ON_LAST, ""),
    "the last dq not fenced": (FENCE + HAND_ON_LAST, HAND_ON_LAST),
    "halves not swapped": ("gl.where(odd, low, high))", "high)"),
    "halves of even rows swapped": ("rows % 2 == 1", "rows % 2 == 0"),
    "a layout without the swap": ("[1, 4 ^ 16]", "[1, 4]"),
    "a layout without the swizzle": ("[2, 8], [4, 16]", "[2, 0], [4, 0]"),
    "keys of the first consumer for both": ("row = walk.row + c * ROWS", "row = walk.row"),
    "mask a row too wide": ("(hi - lo + 1)", "(hi - lo + 2)"),
    "no mask on the left": ("(start < last + lo) | ", ""),
    "no mask on the right": (" | (start + BLOCK_M - 1 > row + hi)", ""),
    "keys past the tile": ("offs_n < walk.row_end, ", "offs_n < walk.row_end + 64, "),
    "the band of a query": ("lo, hi = -hi, -lo", "lo, hi = -lo, -hi"),
    "the last block left out": ("(last - first + BLOCK - 1)", "(last - first)"),
    "one head of the group": (
        "        head += 1\n        if",
        "        head += walk.group\n        if",
    ),
    "one head, where they are apart": (
        "                head += 1\n",
        "                head += 0\n",
    ),
    "a later head's first entry": ("entry -= walk.end_entry - walk.first_entry", "pass"),
    "one batch": ("batch, key_head = head // heads,", "batch, key_head = head * 0,"),
    "a row too many stored": ("mask = (rows < row_end)", "mask = (rows < row_end + 1)"),
    "delta in another scale": ("            delta *= program.softmax_scale", "            pass"),
    "a row that saw nothing": ('lse == float("-inf"), float("inf"),', "lse != lse, 0.0,"),
}


# Slots of dq and of Q, whether heads are walked apart, seed.
ORDERS = [(1, 2, False, None), (2, 3, True, None), (1, 3, True, 0), (2, 2, False, 1)]


def planted(emulated, bugs=None):
    """Return what is wrong in a case that all above has a part in, in the first of ORDERS with."""
    given = inputs(Shape(280, 280, 2, 2, 1, 64), torch.bfloat16)
    for dq_stages, q_stages, apart, seed in ORDERS:
        slots = {"dq_stages": dq_stages, "q_stages": q_stages}
        config = replace(BACKWARD[64], **slots, heads_apart=apart)
        try:
            broken = check(emulated(config, bugs, seed), (True, (110, 0)), "zigzag", 2, given)
        except (EmulationError, InterpreterError, AssertionError) as failure:
            broken = [str(failure)]
        if broken:
            return broken
    return []


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_seen(emulated, name):
    bug = BUGS[name]
    assert planted(emulated, bug if isinstance(bug, dict) else dict([bug]))


def test_the_case_of_the_planted_bugs_is_right_without_one(emulated):
    assert not planted(emulated)


RELEASE_K = "        program.kv.release(k_slot)\n"
WAIT_DQ = "        dq = warpgroup_mma_wait(0, [dq])\n"
LAST_DK = "dk = warpgroup_mma(ds, _tile(program.q, last, BLOCK_D), dk, is_async=True)"
NEXT_DOUT = (
    "            program.dout.release(previous)\n",
    "            await_full(program.dout, slot, t // 2)\n",
)
DK_DONE = "        dk = warpgroup_mma_wait(1, [dk])\n"
RELEASE_Q = "        if t > 0:\n            program.q.release(previous)\n"
WIDE_BUGS = {
    "no wait for p": ("dkv", "        await_full(program.p, slot, t // 2)\n", ""),
    "p in another unit": ("dkv", "dv * P_UNIT", "dv"),
    "lse not shifted": ("dkv", "lse2 - program.options.P_SHIFT", "lse2"),
    "no wait for the next dout": ("dkv", NEXT_DOUT[0] + NEXT_DOUT[1], NEXT_DOUT[0]),
    "the last dk left out": ("dkv", LAST_DK, "dk = dk"),
    "Q never given back": (
        "dkv",
        "            program.q.release(previous)\n",
        "            pass\n",
    ),
    "Q given back before its product": (
        "dkv",
        DK_DONE + RELEASE_Q,
        RELEASE_Q + DK_DONE,
    ),
    "K given back before its product": ("dq", WAIT_DQ + RELEASE_K, RELEASE_K + WAIT_DQ),
    "V never given back": ("dq", "        program.kv.release(v_slot)\n", ""),
    "no wait for V": (
        "dq",
        "    await_full(program.kv, v_slot, (2 * t + 1) // STAGES)\n",
        "    pass\n",
    ),
    "no wait for dout": ("dq", "        await_full(program.dout, CONSUMER, 0)\n", ""),
    "keys past the entry": ("dq", "gl.minimum(offs_m + hi + 1, end)", "(offs_m + hi + 1)"),
    "the head of another group": ("dq", "head % heads // group", "head % heads * 0"),
    "old dq forgotten": ("dq", "x += gl.load(states,", "x *= 1.0 + 0.0 * gl.load(states,"),
    "finished rows in the state": ("dq", "gl.store(results, x.to(", "gl.store(states, x.to("),
}


def planted_wide(emulated, kernel=None, bugs=None):
    """Return what is wrong in a case of the wide kernels, in the first order of partitions with."""
    given = inputs(Shape(420, 420, 1, 2, 2, 136), torch.bfloat16)
    for seed in (None, 0, 1):
        try:
            backend = emulated(bugs=bugs, seed=seed, bugged=kernel)
            broken = check(backend, (True, (250, 0)), "zigzag", 2, given)
        except (EmulationError, InterpreterError, AssertionError) as failure:
            broken = [str(failure)]
        if broken:
            return broken
    return []


@pytest.mark.parametrize("name", WIDE_BUGS)
def test_planted_bugs_of_the_wide_kernels_are_seen(emulated, name):
    kernel, fragment, instead = WIDE_BUGS[name]
    assert planted_wide(emulated, f"_hopper_{kernel}_kernel", {fragment: instead})


def test_the_case_of_the_wide_kernels_bugs_is_right_without_one(emulated):
    assert not planted_wide(emulated)
