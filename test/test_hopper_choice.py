"""How the fused Hopper backward is cut: what was measured, and what lies around it."""

import pytest

from ring_flash_attn.backends.hopper_backward import _windowed
from ring_flash_attn.backends.hopper_choice import Work, config_for, copies_for
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.plan import plan_local
from ring_flash_attn.kernels.hopper.configs import BACKWARD

H200 = 132  # multiprocessors


def work(length, heads, key_heads, full, head_dim=128, batch=1, windowed=False):
    """Return the work of queries and keys of one length."""
    programs = -(-length // 128) * key_heads * batch
    return Work(programs, heads // key_heads, full, windowed, length * head_dim)


@pytest.mark.parametrize(
    ("case", "slots", "apart"),
    [
        (work(8192, 32, 8, full=True), 1, False),
        (work(32767, 32, 8, full=True), 1, False),
        (work(32768, 32, 8, full=True), 2, False),
        (work(32768, 16, 16, full=True), 1, False),
        (work(8192, 16, 16, full=False), 1, False),
        (work(8192, 32, 8, full=False), 1, True),
        (work(8193, 32, 8, full=False), 2, False),
        (work(8192, 32, 8, full=False, windowed=True), 2, True),
        (work(65536, 16, 4, full=False, windowed=True), 2, True),
        # Documents.
        (work(1 << 20, 32, 8, full=True)._replace(head_numbers=0), 1, False),
        (work(1 << 20, 32, 8, full=False)._replace(head_numbers=0), 2, False),
    ],
    ids=str,
)
def test_slots_of_dq_and_order_of_heads(case, slots, apart):
    config = config_for(BACKWARD[128], case)
    assert (config.dq_stages, config.heads_apart) == (slots, apart)
    assert config_for(BACKWARD[64], case) is BACKWARD[64]


@pytest.mark.parametrize(
    ("mask", "windowed"),
    [
        ((False, (-1, -1)), False),
        ((True, (-1, -1)), False),
        ((True, (20, 0)), True),
        ((False, (20, 7)), True),
        ((False, (20, -1)), False),
        ((True, (100, 0)), False),  # as long as the rows
    ],
)
def test_which_steps_are_windowed(mask, windowed):
    assert _windowed(plan_local(Attention(1.0, *mask), 100, 100)) == windowed


@pytest.mark.parametrize(
    ("case", "copies"),
    [
        (work(8192, 32, 8, full=True), 1),
        (work(8192, 32, 8, full=False), 1),
        (work(16384, 16, 16, full=True), 1),
        (work(16384, 16, 16, full=False), 1),
        (work(32768, 32, 8, full=True), 1),
        (work(32768, 32, 8, full=False), 1),
        (work(1 << 20, 32, 8, full=False), 1),
        # Few programs: below half a multiprocessor's, under a mask below two.
        (work(2048, 32, 8, full=False), 4),
        (work(2048, 32, 8, full=True), 1),
        (work(8192, 4, 1, full=True), 2),
        (work(8192, 4, 1, full=False), 4),
        (work(2048, 24, 8, full=False), 1),  # an odd group
        (work(4096, 32, 32, full=False, head_dim=64, batch=4), 1),
    ],
    ids=str,
)
def test_copies(case, copies):
    assert copies_for(case, H200) == copies
    assert case.group % copies == 0
