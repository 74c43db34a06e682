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
    ("full", "group", "slots"),
    [(True, 4, 1), (True, 1, 1), (False, 1, 1), (False, 2, 2), (False, 4, 2)],
)
def test_slots_of_dq(full, group, slots):
    assert config_for(BACKWARD[128], full, group).dq_stages == slots
    assert config_for(BACKWARD[64], full, group) is BACKWARD[64]


@pytest.mark.parametrize(
    ("case", "copies"),
    [
        (work(8192, 32, 8, full=True), 1),
        (work(8192, 32, 8, full=False), 1),
        (work(16384, 16, 16, full=True), 1),
        (work(16384, 16, 16, full=False), 1),
        (work(32768, 32, 8, full=True), 1),
        (work(32768, 32, 8, full=False), 4),
        (work(32767, 32, 8, full=False), 1),
        (work(32768, 12, 2, full=False), 6),  # no power of two
        (work(32768, 32, 8, full=False, head_dim=64), 1),
        (work(65536, 32, 8, full=False, head_dim=64), 4),
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


def test_documents_are_not_cut_for_their_length():
    long = work(1 << 20, 32, 8, full=False)
    assert copies_for(long, H200) == 4
    assert copies_for(long._replace(head_numbers=0), H200) == 1
