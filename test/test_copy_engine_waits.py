"""Each wait of the copy-engine exchange is needed: without it some order on emulated streams gives
wrong numbers, loses a signal or hangs.
"""

import inspect
import types
from functools import partial

import pytest

from copy_engine_programs import MIXED, bad_luck, capture, execute, infer, pair, train, two_streams
from ring_flash_attn.core import copy_engine, merge
from stream_emulator import IllegalCapture, LostSignal, Stuck

pytestmark = pytest.mark.usefixtures("empty_is_nan")


ZIGZAG, CONTIGUOUS = pair("zigzag"), pair("contiguous")
READY = "        transport.take(pull, fetch.owners, Channel.KV_READY)\n"
FETCH = (
    "        for target, source in fetch.copies:\n"
    "            transport.copy(pull, target, source)\n"
)
FREED = "        transport.signal(pull, fetch.owners, Channel.KV_FREE)\n"
SUM = "        self._transport.compute(lambda: sum_shares(result, own, shares))\n"
MUTATIONS = {
    # name: (what is in the source, what it becomes, a program that must notice, ranks, whether
    # launches are over two sources)
    "nothing": ("", "", partial(train, ZIGZAG), 4),
    "nothing from a graph": ("", "", partial(capture, [ZIGZAG[0], CONTIGUOUS[0]]), 3),
    "K, V are staged": (READY, "", partial(train, ZIGZAG), 4),
    "staged K, V are fetched by all": (
        "        self._transport.take(pull, readers, Channel.KV_FREE)\n",
        "",
        partial(train, ZIGZAG),
        4,
    ),
    "staged K, V are fetched by those who read no more": (
        "        self._transport.look(pull, traffic.bystanders, Channel.KV_FREE)\n",
        "",
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
        "            transport.wait(pull, self._read[index - AHEAD])\n",
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
    "K, V of every source of a launch are staged": (
        READY,
        READY.replace("owners", "owners[:1]"),
        partial(train, ZIGZAG),
        5,
        True,
    ),
    "several sources have arrived": (
        "        self._transport.wait(self._compute, self._pulled[index])\n",
        "",
        partial(train, ZIGZAG),
        5,
        True,
    ),
    "the slots of a launch are read": (
        "            transport.wait(pull, self._read[index - AHEAD])\n",
        "            pass\n",
        partial(train, ZIGZAG),
        6,
        True,
    ),
    "nothing from launches over several sources": ("", "", partial(train, ZIGZAG), 6, True),
    "the caller has written k, v": (
        "        transport.wait(transport.pull_stream, transport.record(self._compute))\n",
        "",
        partial(train, ZIGZAG),
        4,
    ),
    "the caller's k, v are staged": (
        "        transport.wait(self._compute, transport.record(transport.pull_stream))\n",
        "",
        partial(infer, CONTIGUOUS),
        4,
    ),
    "a share is announced when it is written": (
        "self._transport.signal(self._compute, owners, Channel.ARRIVED)\n",
        "self._transport.signal(self._transport.pull_stream, owners, Channel.ARRIVED)\n",
        partial(train, ZIGZAG),
        4,
    ),
    "a landing slot is summed": (
        # K, V are staged behind the last pass, so a reader who has them may write his share.
        SUM + "        self._end()\n",
        "        self._end()\n" + SUM,
        partial(two_streams, MIXED),
        3,
    ),
    "a share has arrived": (
        "        self._transport.take(self._compute, self._traffic.readers, Channel.ARRIVED)\n",
        "",
        partial(train, ZIGZAG),
        4,
    ),
    "shares are taken where they are summed": (
        "        self._transport.take(self._compute, self._traffic.readers, Channel.ARRIVED)\n",
        "        pull = self._transport.pull_stream\n"
        "        self._transport.take(pull, self._traffic.readers, Channel.ARRIVED)\n",
        partial(train, ZIGZAG),
        4,
    ),
    "passes on two streams": (
        "        self._transport.close_pass(self._compute)\n",
        "",
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
def test_a_missing_wait_is_noticed(name, monkeypatch):
    old, new, program, size, *merges = MUTATIONS[name]
    monkeypatch.setattr(merge, "SOURCES", 2 if merges else 1)
    exchange = mutant(old, new)
    found = []
    for seed, slow in enumerate(bad_luck(size) * 3):
        try:
            found += execute(program, size, seed, slow, exchange, bool(merges))
        except (Stuck, LostSignal, IllegalCapture, AssertionError) as error:
            found.append(repr(error))
        if found:
            break
    assert bool(found) == (not name.startswith("nothing")), found
