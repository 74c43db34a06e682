"""How the fused Hopper backward is cut: what was measured, and what lies around it."""

import pytest

from ring_flash_attn.backends.hopper_choice import Work, config_for, copies_for
from ring_flash_attn.kernels.hopper.configs import BACKWARD

H200 = 132  # multiprocessors


def work(length, heads, key_heads, full, head_dim=128, batch=1):
    """Return the work of queries and keys of one length."""
    programs = -(-length // 128) * key_heads * batch
    return Work(programs, heads // key_heads, full, length * head_dim)


@pytest.mark.parametrize(
    ("case", "slots"),
    [
        (work(8192, 32, 8, full=True), 1),
        (work(32767, 32, 8, full=True), 1),
        (work(32768, 32, 8, full=True), 2),
        (work(32768, 16, 16, full=True), 1),
        (work(8192, 16, 16, full=False), 1),
        (work(8192, 32, 8, full=False), 2),
        (work(1 << 20, 32, 8, full=True)._replace(head_numbers=0), 1),  # documents
    ],
    ids=str,
)
def test_slots_of_dq(case, slots):
    assert config_for(BACKWARD[128], case).dq_stages == slots
    assert config_for(BACKWARD[64], case) is BACKWARD[64]


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
