"""Read from what was compiled whether a kernel uses its barriers as the hardware asks."""

import re

_MEETS = re.compile(r"^\s*(bar|barrier)\.(warp\.)?sync\b")
_BETWEEN = re.compile(
    r"\b(ld|st|atom)\.shared|(ld|st)matrix|wgmma\.|mbarrier\.try_wait|bar\.arrive|\bbra\b|^\$L__BB"
)


_BARS = re.compile(r"(%\S+) = ttg\.local_alloc\b.*memdesc<\d+x1xi64,")
_PART = re.compile(r"(%\S+) = ttg\.memdesc_index (%\S+?)\[")


def idle_barriers(ttgir: str) -> tuple[str, ...]:
    """Return the barriers that nothing but their initialisation uses.

    Triton lays something else over their memory, which the hardware goes on to take for a barrier:
    when another process has had the GPU for a while it comes back changed. dq was wrong for that.
    """
    lines = ttgir.splitlines()
    parts = {found[1]: found[2] for found in map(_PART.search, lines) if found}
    used = set()
    for line in lines:
        if _BARS.search(line) or _PART.search(line) or "ttng.init_barrier" in line:
            continue
        for name in re.findall(r"%[\w$.-]+", line):
            used |= {name, parts.get(name, name)}
    return tuple(found[1] for found in map(_BARS.search, lines) if found and found[1] not in used)


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
