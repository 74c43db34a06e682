"""Each wait of the copy-engine exchange is needed: without it some order on emulated streams gives
wrong numbers, loses a signal or hangs.

Not here: that LAND_FREE comes behind the sum. A contributor pushes again when it has fetched this
rank's next k, v, which are staged behind the sum as well, so no order shows it missing today.
"""

import inspect
import types
from functools import partial

import pytest

from copy_engine_programs import MIXED, bad_luck, capture, execute, infer, pair, train, two_streams
from ring_flash_attn.core import copy_engine
from stream_emulator import IllegalCapture, LostSignal, Stuck

pytestmark = pytest.mark.usefixtures("empty_is_nan")


ZIGZAG, CONTIGUOUS = pair("zigzag"), pair("contiguous")
READY = "        transport.take(pull, owner, Channel.KV_READY)\n"
FETCH = "        self._copy_rows(pull, self._slot(index), self._buffers.staged[owner], rows)\n"
FREED = "        transport.signal(pull, owner, Channel.KV_FREE)\n"
PUSHED = "        self._copy_rows(push, self._buffers.landing[owner][step - 1], share, rows)\n"
ARRIVED = "        transport.signal(push, owner, Channel.ARRIVED)\n"
MUTATIONS = {
    # name: (what is in the source, what it becomes, a program that must notice, ranks)
    "nothing": ("", "", partial(train, ZIGZAG), 4),
    "nothing from a graph": ("", "", partial(capture, [ZIGZAG[0], CONTIGUOUS[0]]), 3),
    "K, V are staged": (READY, "", partial(train, ZIGZAG), 4),
    "staged K, V are fetched by all": (
        "            free(pull, self._traffic.reader(step), Channel.KV_FREE)\n",
        "            pass\n",
        partial(train, ZIGZAG),
        4,
    ),
    "staged K, V are fetched by those who read no more": (
        "            free(pull, self._traffic.reader(step), Channel.KV_FREE)\n",
        "            if step in readers:\n"
        "                free(pull, self._traffic.reader(step), Channel.KV_FREE)\n",
        partial(infer, MIXED),
        4,
    ),
    "K, V are fetched before they are freed": (
        FETCH + FREED,
        FREED + FETCH,
        partial(train, ZIGZAG),
        4,
    ),
    "a slot is read": (
        "            transport.wait(pull, self._read[index - slots])\n",
        "            pass\n",
        partial(train, ZIGZAG),
        4,
    ),
    "K, V have arrived": (
        "        self._transport.wait(self._compute, self._pulled[index])\n",
        "",
        partial(train, ZIGZAG),
        4,
    ),
    "the caller has written k, v": (
        "        transport.wait(transport.pull_stream, start)\n",
        "",
        partial(train, ZIGZAG),
        4,
    ),
    "the caller's k, v are staged": (
        "            self._join(self._transport.pull_stream)\n"
        "            if not self._backward:\n"
        "                self._end()\n",
        "            if not self._backward:\n                self._end()\n",
        partial(infer, CONTIGUOUS),
        4,
    ),
    "a share is pushed": (
        "            self._transport.wait(self._compute, "
        "self._pushed[index - len(self._buffers.shares)])\n",
        "            pass\n",
        partial(train, ZIGZAG),
        4,
    ),
    "a share is computed": (
        "        transport.wait(push, transport.record(self._compute))\n"
        "        transport.take(push, owner, Channel.LAND_FREE)\n",
        "        transport.take(push, owner, Channel.LAND_FREE)\n",
        partial(train, ZIGZAG),
        4,
    ),
    "a landing slot is summed": (
        "        transport.take(push, owner, Channel.LAND_FREE)\n",
        "",
        partial(train, ZIGZAG),
        4,
    ),
    "a share is pushed before it is announced": (
        PUSHED + ARRIVED,
        ARRIVED + PUSHED,
        partial(train, ZIGZAG),
        4,
    ),
    "a share has arrived": (
        "            transport.take(push, reader, Channel.ARRIVED)\n",
        "",
        partial(train, ZIGZAG),
        4,
    ),
    "the sum waits for what arrives": (
        "            self._join(push)\n            if own is not None:\n",
        "            if own is not None:\n",
        partial(train, ZIGZAG),
        4,
    ),
    "shares have left at the end": (
        "        self._join(push)\n        self._end()\n",
        "        self._end()\n",
        partial(train, CONTIGUOUS),
        4,
    ),
    "a graph that captures a push": (
        "            transport.wait(transport.push_stream, start)\n",
        "            pass\n",
        partial(capture, CONTIGUOUS),
        2,
    ),
    "a graph that captures a forward alone": (
        "        if self._backward:\n            transport.wait(transport.push_stream, start)\n",
        "        transport.wait(transport.push_stream, start)\n",
        partial(capture, ZIGZAG),
        2,
    ),
    "a graph that is not behind the last call": (
        "if transport.idle is not None and not transport.capturing():",
        "if transport.idle is not None:",
        partial(capture, ZIGZAG),
        2,
    ),
    "an event that only a graph has": (
        "        if not self._transport.capturing():\n            self._transport.idle",
        "        if True:\n            self._transport.idle",
        partial(capture, ZIGZAG),
        2,
    ),
    "passes on two streams": (
        "            transport.wait(self._compute, transport.idle)\n",
        "            pass\n",
        partial(two_streams, MIXED),
        3,
    ),
}


def mutant(old, new):
    """Return the exchange with one place of its source changed."""
    source = inspect.getsource(copy_engine)
    assert not old or source.count(old) == 1, f"{source.count(old)} places to change: {old!r}"
    module = types.ModuleType("ring_flash_attn.core.copy_engine")
    module.__package__ = "ring_flash_attn.core"
    exec(compile(source.replace(old, new) if old else source, "mutant", "exec"), module.__dict__)
    return module.CopyEngineExchange


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_missing_wait_is_noticed(name):
    old, new, program, size = MUTATIONS[name]
    exchange = mutant(old, new)
    found = []
    for seed, slow in enumerate(bad_luck(size) * 3):
        try:
            found += execute(program, size, seed, slow, exchange)
        except (Stuck, LostSignal, IllegalCapture, AssertionError) as error:
            found.append(repr(error))
        if found:
            break
    assert bool(found) == (not name.startswith("nothing")), found
