"""Read from PTX whether the threads that an arrival speaks for have met before it."""

import re

_MEETS = re.compile(r"^\s*(bar|barrier)\.(warp\.)?sync\b")
_BETWEEN = re.compile(
    r"\b(ld|st|atom)\.shared|(ld|st)matrix|wgmma\.|mbarrier\.try_wait|bar\.arrive|\bbra\b|^\$L__BB"
)


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
