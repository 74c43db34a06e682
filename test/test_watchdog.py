"""`Watchdog`: which passes are late, what it says, and that its thread holds nothing alive."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ranks import run_ranks
from ring_flash_attn.core import watchdog
from ring_flash_attn.core.watchdog import NUMBERS, Watchdog, answer, group_timeout_s, start

TIMEOUT_S = 30.0


class Scene:
    """A watchdog with a clock and a memory that the test turns."""

    def __init__(self, tell=lambda: "Mailboxes empty: K, V of rank 2."):
        self.now, self.memory, self.errors = 100.0, 0, []
        self.watchdog = Watchdog(
            "global rank 1, group of 4",
            TIMEOUT_S,
            lambda: self.memory,
            tell,
            self.errors.append,
            lambda: self.now,
        )

    def wait(self, seconds):
        """Look once a second."""
        for _ in range(seconds):
            self.now += 1.0
            self.watchdog.look()


def test_a_pass_that_does_not_end_is_late_after_the_timeout_and_not_before():
    scene = Scene()
    scene.wait(100)
    scene.watchdog.open("forward")
    scene.wait(int(TIMEOUT_S) - 1)
    assert scene.errors == []
    scene.wait(1)
    assert len(scene.errors) == 1


def test_the_error_names_rank_pass_timeout_and_what_it_waits_for():
    scene = Scene()
    scene.memory = scene.watchdog.open("forward")
    scene.watchdog.open("backward")
    scene.wait(int(TIMEOUT_S) + 1)
    [error] = scene.errors[:1]
    for part in (
        "ring attention: global rank 1, group of 4: pass 2 (backward)",
        "not ended for 30 s, the group's timeout is 30 s",
        "Mailboxes empty: K, V of rank 2.",
    ):
        assert part in error


def test_passes_that_end_are_never_late_however_many_are_open():
    scene = Scene()
    numbers = [scene.watchdog.open("forward") for _ in range(50)]
    for number in numbers:
        scene.wait(int(TIMEOUT_S) - 1)
        scene.memory = number
        scene.wait(1)
    scene.wait(1000)
    assert scene.errors == []


def test_the_time_before_a_pass_does_not_count():
    scene = Scene()
    scene.memory = scene.watchdog.open("forward")
    scene.wait(1000)
    scene.watchdog.open("forward")
    scene.wait(int(TIMEOUT_S) - 1)
    assert scene.errors == []


def test_one_late_pass_among_ended_ones_is_found():
    scene = Scene()
    numbers = [scene.watchdog.open("forward") for _ in range(3)]
    scene.memory = numbers[1]
    scene.wait(int(TIMEOUT_S) + 1)
    assert "pass 3 (forward)" in scene.errors[0]


def test_a_process_that_was_stopped_has_not_waited_meanwhile():
    scene = Scene()
    scene.watchdog.open("forward")
    scene.now += 10_000.0
    scene.watchdog.look()
    scene.wait(10)
    assert scene.errors == []


def test_numbers_begin_anew_when_they_are_used_up_and_leave_out_0():
    scene = Scene()
    scene.watchdog._number = scene.memory = NUMBERS - 3
    numbers = [scene.watchdog.open("forward") for _ in range(4)]
    assert numbers == [NUMBERS - 2, NUMBERS - 1, 1, 2]
    for number in numbers:
        scene.wait(int(TIMEOUT_S) - 1)
        scene.memory = number
        scene.wait(1)
    assert scene.errors == []
    scene.watchdog.open("forward")
    scene.wait(int(TIMEOUT_S))
    assert len(scene.errors) == 1


def test_a_gpu_that_does_not_answer_or_fails_does_not_keep_the_error_back():
    over = threading.Event()
    assert "did not say within 0 s" in answer(lambda: str(over.wait(60)), 0.05)
    over.set()

    def fail():
        raise RuntimeError("illegal access")

    assert "RuntimeError: illegal access" in answer(fail, 5.0)


def test_the_thread_looks_and_ends_with_the_watchdog():
    looks = threading.Semaphore(0)

    class Counted(Watchdog):
        def look(self):
            looks.release()

    threads = threading.active_count()
    watched = Counted("rank", TIMEOUT_S, lambda: 0)
    over = start(watched, 0.01)
    assert all(looks.acquire(timeout=10) for _ in range(3))
    gone = weakref.ref(watched)
    del watched
    begin = time.monotonic()
    # The thread holds it for the moment of a look.
    while gone() is not None or threading.active_count() > threads:
        gc.collect()
        assert time.monotonic() - begin < 10
        time.sleep(0.01)
    assert over.is_set()


SCRIPT = """
import threading, time
from ring_flash_attn.core.watchdog import Watchdog, start
watched = Watchdog("global rank 1, group of 4", {timeout_s}, lambda: 0, lambda: "K, V of rank 2.")
start(watched, 0.05)
watched.open("forward")
threading.Event().wait({main_s})
"""


def script(timeout_s: float, main_s: float) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(timeout_s=timeout_s, main_s=main_s)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )


def test_a_late_pass_aborts_the_process_with_its_error_and_stacks():
    ended = script(timeout_s=0.2, main_s=60)
    assert ended.returncode == -6
    assert "global rank 1, group of 4: pass 1 (forward)" in ended.stderr
    assert "K, V of rank 2." in ended.stderr
    assert 'File "<string>"' in ended.stderr, "no stack of the main thread"


def test_a_process_that_ends_first_ends_as_it_would_without():
    ended = script(timeout_s=60, main_s=0.2)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("value, wanted", [(None, True), ("1", True), ("3", True), ("0", False)])
def test_who_turns_nccls_watchdog_off_turns_this_off(monkeypatch, value, wanted):
    monkeypatch.delenv(watchdog.HANDLING, raising=False)
    if value is not None:
        monkeypatch.setenv(watchdog.HANDLING, value)
    assert watchdog.is_wanted() == wanted


def timeouts(rank: int) -> list[float]:
    group = dist.new_group(timeout=timedelta(seconds=7))
    world = dist.group.WORLD
    return [group_timeout_s(x, torch.device("cpu")) for x in (group, world)]


def test_the_timeout_is_the_groups_own():
    assert run_ranks(1, timeouts) == [[7.0, 120.0]]


def test_a_word_holds_an_unsigned_number():
    memory = watchdog.word()
    assert watchdog.read(memory) == 0
    memory.fill_(-1)  # what a stream writes is not signed
    assert watchdog.read(memory) == NUMBERS - 1
