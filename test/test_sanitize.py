"""What is made of compute-sanitizer's reports, and, where there is one, what it reports."""

import pytest
import torch

import sanitize
from gluon_emulator import load_module
from sanitize import DONE, HANDED, KNOWN, RIGHT, STARTED, WRONG, Pair

HOPPER = sanitize.SOURCES / "hopper"
FORWARD = HOPPER / "forward.py", HOPPER / "forward_consumer.py"
CONTROLS = sanitize.ROOT / "test" / "sanitize_controls.py"


def line_of(path, function: str) -> str:
    """Return FILE:LINE of a function's last line."""
    [line] = {end for _, end, name in sanitize._functions(path) if name == function}
    return f"{path.name}:{line}"


def race(kernel: str, place: str, other: str, hazards: int = 4) -> str:
    return f"""\
========= Error: Race reported between Read access at {kernel}+0xdcf0 in {place}
=========     and Write access at {kernel}+0xab10 in {other} [{hazards} hazards]
=========     and Write access at {kernel}+0xab40 in {other} [{hazards} hazards]
=========
"""


TOLD = race("_hopper_fwd_kernel", line_of(FORWARD[1], "_field"), line_of(FORWARD[0], "_publish"))
HANDED_RIGHT, HANDED_WRONG = (
    race(kernel, line_of(CONTROLS, "_read"), line_of(CONTROLS, "_write"))
    for kernel in (RIGHT, WRONG)
)
ENDED = f"{DONE}\n========= RACECHECK SUMMARY: 9 hazards displayed (9 errors, 0 warnings)\n"


def test_races_are_pairs_of_functions():
    kernel = "_hopper_bwd_kernel"
    backward = line_of(HOPPER / "backward.py", kernel)
    report = TOLD + TOLD + race(kernel, backward, "backward.py:1") + HANDED_WRONG
    assert sanitize.pairs(report) == {
        Pair("_hopper_fwd_kernel", frozenset(("_field", "_publish"))): 16,
        Pair(kernel, frozenset((kernel, "backward.py:1"))): 8,
        Pair(WRONG, HANDED): 8,
    }
    with pytest.raises(ValueError, match="no access with its place"):
        sanitize.pairs("========= Error: Race reported between Read access at 0x570 in a kernel")


def test_a_kernel_is_looked_for_where_it_lies():
    begin, end, _ = next(x for x in sanitize._functions(FORWARD[0]) if x[2] == "_publish")
    lines = {sanitize.function_at("_hopper_fwd_kernel", "forward.py", str(x)) for x in (begin, end)}
    assert lines == {"_publish"}
    assert sanitize.function_at("_fwd_kernel", "forward.py", str(end)) != "_publish"
    assert sanitize.function_at("_fwd_kernel", "nowhere.py", "7") == "nowhere.py:7"


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (TOLD + HANDED_RIGHT + HANDED_WRONG, ""),
        (HANDED_WRONG, ""),
        (TOLD + HANDED_WRONG, "follows the like where it is right"),
        (TOLD + HANDED_RIGHT, "misses a hand-over that nobody waits for"),
        (HANDED_WRONG + race("_fwd_kernel", "dq.py:1", "dq.py:1"), "not known: _fwd_kernel"),
    ],
)
def test_a_known_pair_is_excused_beside_the_same_of_a_kernel_that_is_right(report: str, said: str):
    reasons = sanitize.judge(report + ENDED)
    assert len(reasons) == bool(said) and said in "".join(reasons)


def test_a_report_is_judged_by_its_end(tmp_path, capsys):
    clean = f"{DONE}\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.judge(clean) == []
    assert sanitize.judge(clean.replace("0 errors", "3 errors")) == ["memcheck reports 3 errors"]
    assert "did not run to their end" in sanitize.judge("========= ERROR SUMMARY: 0 errors")[0]
    assert sanitize.judge(DONE) == ["no summary in the report"]
    files = tmp_path / "mem.txt", tmp_path / "race.txt"
    files[0].write_text(clean)
    files[1].write_text(TOLD + HANDED_WRONG + ENDED)
    assert sanitize.main(["--reports", str(files[0])]) == 0
    assert sanitize.main(["--reports", *map(str, files)]) == 1
    assert "race.txt: not in order" in capsys.readouterr().out


def test_known_pairs_are_of_functions_that_are_there():
    names = {name for path in HOPPER.glob("*.py") for _, _, name in sanitize._functions(path)}
    assert names >= {function for functions in KNOWN for function in functions}
    assert {known.control for known in KNOWN.values()} == {HANDED, STARTED}


def test_of_the_controls_one_is_right_and_one_wrong():
    emulated = load_module(CONTROLS)
    out = torch.full((2, 64), torch.nan)
    emulated._right_kernel[(2,)](out, 6, num_warps=4, maxnreg=168)
    assert torch.equal(out, emulated.expected(6).expand(2, 64))
    # The emulator runs the reader first, which finds what nobody has written.
    emulated._wrong_kernel[(2,)](out, 2, num_warps=4, maxnreg=168)
    assert out.isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(sanitize.compute_sanitizer() is None, reason="needs compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_nothing_is_reported_but_what_is_known(tool: str):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90, which the Hopper kernels are for")
    report = sanitize.sanitized(tool, (128,))
    assert not sanitize.judge(report), report
