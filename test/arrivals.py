"""Read from what was compiled whether a kernel uses its barriers as the hardware asks."""

import re

_MEETS = re.compile(r"^\s*(bar|barrier)\.(warp\.)?sync\b")
_BETWEEN = re.compile(
    r"\b(ld|st|atom)\.shared|(ld|st)matrix|wgmma\.|mbarrier\.try_wait|bar\.arrive|\bbra\b|^\$L__BB"
)


_BARS = re.compile(r"(%\S+) = ttg\.local_alloc\b.*memdesc<\d+x1xi64,")
_CAPTURES = re.compile(r"ttg\.warp_specialize\(([^)]*)\)")


def uncaptured_barriers(ttgir: str) -> tuple[str, ...]:
    """Return the barriers that no partition but the first uses, so that their memory has no owner.

    Triton lays something else over it after their last use, the captured arguments for example,
    and the hardware goes on to take it for a barrier: when another process has had the GPU for a
    while it comes back changed. dq was wrong for that once, and once an address.
    """
    captured = set()
    for found in _CAPTURES.finditer(ttgir):
        captured |= set(re.findall(r"%[\w$.-]+", found[1]))
    return tuple(found[1] for found in _BARS.finditer(ttgir) if found[1] not in captured)


def early_arrivals(ptx: str) -> tuple[str, ...]:
    """Return the first thing found between a meeting of threads and an arrival that needs it.

    Triton arrives at an mbarrier as one thread for its whole partition. So what the others have
    read, written or waited for must lie before a barrier of them all, and nothing of it between
    that barrier and the arrival. `bar.arrive`, where every warp arrives for itself, needs none.
    """
    lines = ptx.splitlines()
    found = []
    for index, line in enumerate(lines):
        if "mbarrier.arrive.shared" not in line:
            continue
        for before in reversed(lines[:index]):
            if _MEETS.search(before):
                break
            if _BETWEEN.search(before):
                found.append(before.strip())
                break
    return tuple(found)
