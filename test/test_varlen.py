"""Packed documents on native backends: one varlen call a step, over fakes of every version.

The fakes leave NaN wherever they are not asked for a result, as torch.empty would.
"""

from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

import oracle
import ring_flash_attn as rfa
from flash_fakes import CALLS, aten, install
from packed_cases import (
    GATHER,
    PACKINGS,
    PackedCase,
    edges_of,
    packed_grid,
    packed_tensors,
    rows_of,
    visible,
)
from ring_cases import MASKS
from ring_flash_attn.backends import flash, needs_lengths, varlen
from ring_flash_attn.backends.aten import AtenBackend
from ring_flash_attn.backends.base import GradTarget
from ring_flash_attn.backends.flash import Flash2Backend, Flash3Backend, Flash4Backend
from ring_flash_attn.backends.reference import ReferenceBackend
from ring_flash_attn.backends.varlen import inexpressible, part_of
from ring_flash_attn.core.attention import Attention
from ring_flash_attn.core.function import Call, run_backward, run_forward
from ring_flash_attn.core.packed import (
    Documents,
    on_device,
    on_host,
    plan_gathered,
    plan_packed,
)
from simulated_ring import check_exact, walk

VERSIONS = ("2.6", "2.8", "3", "aten")
SIZES = (1, 2, 3, 4)
SCALE = 16**-0.5
# Which masks are one call a step where the ring has more than one rank. Rows of a zigzag document
# lie in two places, which a window always tells apart.
ONE_CALL = {
    "contiguous": {"full", "causal"},
    "zigzag": {"full", "causal"},
    "stripe": set(MASKS),
    GATHER: {"full", "causal", "causal-window"},
}


@pytest.fixture(autouse=True)
def wanted(monkeypatch):
    monkeypatch.setattr(varlen, "WANTED", True)


def is_one_call(case: PackedCase, size: int) -> bool:
    """Alone, a rank holds documents whole and in order: one band, but for zigzag's two halves."""
    return case.mask in ONE_CALL[case.layout] or (size == 1 and case.layout != "zigzag")


@cache
def prepared(case: PackedCase, size: int, rank: int):
    edges = torch.tensor(edges_of(n * size for n in case.local_lengths), dtype=torch.int32)
    return rfa.llama3_flash_attn_prepare_cu_seqlens(edges, MASKS[case.mask][0], rank, size)


def attention_of(case: PackedCase) -> Attention:
    return Attention(SCALE, *MASKS[case.mask])


def placed(case: PackedCase, size: int, rank: int, device="cpu"):
    """Return (plan, documents) of a rank."""
    rows = sum(case.local_lengths)
    if case.layout != GATHER:
        cu = torch.tensor(edges_of(case.local_lengths), dtype=torch.int32, device=device)
        longest = max(case.local_lengths)
        plan = plan_packed(attention_of(case), case.layout, size, rank)
        return plan, Documents(cu, cu, rows, rows, longest, longest)
    cu_q, cu_k, max_q, max_k, keys = prepared(case, size, rank)
    plan = plan_gathered(attention_of(case), rank * rows - keys.start)
    given = cu_q.to(device), cu_k.to(device), rows, keys.stop - keys.start, max_q, max_k
    return plan, Documents(*given)


@cache
def truth(case: PackedCase, size: int, dtype=torch.float64):
    """Return q, k, v, dout, dlse of all rows as float64, and what dense attention makes of them.

    dtype: what the inputs are rounded to.
    """
    whole = packed_tensors(case, size, dtype, "cpu")
    q, k, v, dout, dlse = (x[None].double() for x in whole)
    seen = visible(case, size, "cpu")
    return (q, k, v, dout, dlse), oracle.dense(q, k, v, seen, dout, dlse)


def computed(
    backend, case: PackedCase, size: int, dtype=torch.float64, device="cpu", place=on_device
) -> oracle.Result:
    """Return what the ranks compute, put together."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    *given, dlse = truth(case, size, dtype)[0]
    given = [*(x.to(device, dtype) for x in given), dlse.to(device, state)]
    rows = [torch.tensor(rows_of(case, size, rank), device=device) for rank in range(size)]
    plans = [place(*placed(case, size, rank, device)) for rank in range(size)]
    run = gathered if case.layout == GATHER else ring
    ranks = run(backend, case, plans, given, rows)
    order = torch.cat(rows).argsort()
    return oracle.Result(
        *(
            torch.cat(parts, dim).index_select(dim, order)
            for parts, dim in zip(ranks, (1, 2, 1, 1, 1), strict=True)
        )
    )


def ring(backend, case, plans, given, rows):
    shards = [[x.index_select(1, mine) for mine in rows] for x in given[:4]]
    shards.append([given[4].index_select(2, mine) for mine in rows])
    return walk(backend, attention_of(case), plans, shards)


def gathered(backend, case, plans, given, rows):
    """Slice by slice of heads, as core/gather.py, without the messages."""
    q, k, v, dout, dlse = given
    outs, lses, dqs = [], [], []
    dk, dv = (torch.zeros_like(x, dtype=dlse.dtype) for x in (k, v))
    group = case.heads // case.key_heads
    for rank, mine in enumerate(rows):
        [step] = plans[rank].steps
        keys = prepared(case, len(plans), rank)[4]
        out, dq = (torch.full_like(q[:, mine], torch.nan) for _ in range(2))
        lse = torch.full_like(dlse[:, :, mine], torch.nan)
        for head in range(case.key_heads):
            of_q, of_k = slice(head * group, (head + 1) * group), slice(head, head + 1)
            source = q[:, mine][:, :, of_q], k[:, keys, of_k], v[:, keys, of_k]
            mine_of = out[:, :, of_q], lse[:, of_q]
            attention = attention_of(case)
            backend.forward(attention, step, *source, None, mine_of[1], mine_of[0])
            own = dout[:, mine][:, :, of_q], *mine_of, dlse[:, of_q][:, :, mine]
            saved = backend.prepare_backward(*own)
            landed = [torch.full_like(x, torch.nan, dtype=dlse.dtype) for x in source[1:]]
            backend.backward(
                attention,
                step,
                saved,
                *source,
                None,
                lambda landed=landed: GradTarget(*landed, add=False),
                dq[:, :, of_q],
            )
            dk[:, keys, of_k] += landed[0]
            dv[:, keys, of_k] += landed[1]
        outs.append(out)
        lses.append(lse)
        dqs.append(dq)
    return outs, lses, dqs, *([x[:, mine] for mine in rows] for x in (dk, dv))


def cases_of(version: str) -> list[tuple[PackedCase, int]]:
    """The whole grid in one version; in the others what their code could get wrong."""
    grid = [(case, size) for case in packed_grid() for size in SIZES if is_one_call(case, size)]
    if version == "2.8":
        return grid
    return [(case, size) for case, size in grid if case.packing == "tiny" and size == 3]


@pytest.mark.parametrize("layout", ONE_CALL)
@pytest.mark.parametrize("version", VERSIONS)
def test_documents_equal_dense(version, layout, monkeypatch):
    backend = install(version, monkeypatch)
    for case, size in cases_of(version):
        if case.layout == layout:
            check_exact(computed(backend, case, size), truth(case, size)[1])


class OneRow(PackedCase):
    """Documents of one row a rank: as in decoding, but for the empty one."""

    local_lengths = (1, 1, 0, 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_documents_of_one_row(version, monkeypatch):
    backend = install(version, monkeypatch)
    for layout in ("contiguous", "stripe", GATHER):
        for mask in ONE_CALL[layout]:
            case = OneRow(layout, "", mask)
            check_exact(computed(backend, case, 3), truth(case, 3)[1])


@pytest.mark.parametrize("case", packed_grid(), ids=str)
def test_what_is_one_call_a_step_and_what_is_not(case):
    for size in SIZES:
        refused = [inexpressible(*placed(case, size, rank)) for rank in range(size)]
        if is_one_call(case, size):
            assert not any(refused), refused
        elif case.layout == GATHER:
            # Only where the rank's last document goes on behind its rows.
            for rank, reasons in enumerate(refused):
                ends = edges_of(n * size for n in case.local_lengths)
                last = (rank + 1) * sum(case.local_lengths)
                assert bool(reasons) == (last not in ends), reasons
        else:
            assert any(refused), "the table is out of date"
            text = str(refused)
            assert "blocks, which may share rows" in text or "differs with a document's" in text


def seeing_steps(plan) -> int:
    return sum(bool(step.blocks) for step in plan.steps)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_one_call_a_step_in_place_of_one_a_document(layout, monkeypatch):
    backend = install("2.8", monkeypatch)
    case, size = PackedCase(layout, "tiny", "causal"), 4
    given, _ = truth(case, size)
    rows = [torch.tensor(rows_of(case, size, rank)) for rank in range(size)]
    shards = [[x.index_select(1, mine) for mine in rows] for x in given[:4]] + [[None] * size]
    for place, a_step in ((on_device, 1), (on_host, 6)):
        # Six of the seven documents have rows; in stripe, one row of a document may meet nothing.
        CALLS.clear()
        plans = [place(*placed(case, size, rank)) for rank in range(size)]
        walk(backend, attention_of(case), plans, shards)
        steps = sum(seeing_steps(placed(case, size, rank)[0]) for rank in range(size))
        passes = [call["pass"] for call in CALLS]
        assert passes.count("forward") == passes.count("backward") == steps * a_step


def test_keys_that_go_on_behind_causal_queries_are_cut_off(monkeypatch):
    """llama3 prepared without `causal`, then called with it: positions count, not the ends."""
    backend = install("2.8", monkeypatch)
    case, size = PackedCase(GATHER, "several", "causal"), 3
    monkeypatch.setitem(globals(), "prepared", lambda *args: open_ended(*args))
    assert not any(inexpressible(*placed(case, size, rank)) for rank in range(size))
    check_exact(computed(backend, case, size), truth(case, size)[1])


def open_ended(case, size, rank):
    edges = torch.tensor(edges_of(n * size for n in case.local_lengths), dtype=torch.int32)
    return rfa.llama3_flash_attn_prepare_cu_seqlens(edges, False, rank, size)


class OneRank:
    """Documents of one rank alone, called with whatever is said of them."""

    def __init__(
        self, lengths, layout="stripe", spare=0, longest=None, device="cpu", dtype=torch.float64
    ):
        self.edges = edges_of(lengths)
        rows, longest = self.edges[-1] + spare, longest or max(lengths)
        generator = torch.Generator().manual_seed(0)
        self.tensors = [
            torch.randn(1, rows, heads, 16, generator=generator).to(device, dtype)
            for heads in (4, 2, 2, 4)
        ]
        self.attention = Attention(SCALE, causal=True)
        self.plan = plan_packed(self.attention, layout, 1, 0)
        cu = torch.tensor(self.edges, dtype=torch.int32, device=device)
        self.documents = Documents(cu, cu, rows, rows, longest, longest)

    def run(self, backend, tensors=None):
        q, k, v, dout = self.tensors if tensors is None else tensors
        call = Call(self.attention, on_device(self.plan, self.documents), backend)
        out, lse = run_forward(call, q, k, v)
        dlse = torch.ones_like(lse)
        dlse[:, :, self.edges[-1] :] = torch.nan
        return oracle.Result(out, lse, *run_backward(call, dout, q, k, v, out, lse, dlse))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_rows_of_no_document_are_zero(version, layout, monkeypatch):
    backend = install(version, monkeypatch)
    lengths = (12, 0, 20, 0)
    clean = OneRank(lengths, layout).run(backend)
    given = OneRank(lengths, layout, spare=7)
    more = [x.clone() for x in given.tensors]
    for x, y in zip(more, OneRank(lengths, layout).tensors, strict=True):
        x[:, :32], x[:, 32:] = y, torch.nan
    got = given.run(backend, more)
    for name, x, y in zip(oracle.Result._fields, got, clean, strict=True):
        x, y = (z.transpose(1, 2) if name == "lse" else z for z in (x, y))
        assert torch.equal(x[:, :32], y), name
        assert (x[:, 32:] == (-torch.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize(
    ("layout", "longest"), [("zigzag", 20), ("stripe", 8)], ids=["odd", "longer than said"]
)
def test_a_broken_promise_that_nobody_checked_is_loud(layout, longest, monkeypatch):
    """On a GPU the numbers are not read: such a document gets NaN in its last row."""
    install("2.8", monkeypatch)
    backend = ReferenceVarlen()
    lengths = (8, 0, 7, 20) if layout == "zigzag" else (8, 0, 12, 6)
    got = OneRank(lengths, layout, longest=longest).run(backend)
    last = edges_of(lengths)[3] - 1
    assert got.out[:, last].isnan().all() and got.lse[:, :, last].isnan().all()
    assert got.dq[:, last].isnan().all()
    rows = torch.ones(sum(lengths), dtype=torch.bool)
    rows[last] = False
    assert got.out[:, rows].isfinite().all() and got.dq[:, rows].isfinite().all()


class ReferenceVarlen(Flash2Backend):
    """Takes sequences longer than it was told, of which a kernel leaves rows out."""

    def kernel_forward(self, attention, block, q, k, v):
        return super().kernel_forward(attention, unbounded(block), q, k, v)

    def kernel_backward(self, attention, block, saved, q, k, v):
        return super().kernel_backward(attention, unbounded(block), saved, q, k, v)


def unbounded(block):
    return block._replace(sequences=block.sequences | {"max_seqlen_q": 99, "max_seqlen_k": 99})


@pytest.mark.parametrize("case", [x for x in packed_grid() if x.packing == "several"], ids=str)
def test_nothing_is_read_on_the_host(case):
    """On the meta device, where a tensor has no numbers, with torch's own shapes of the ops."""
    if not is_one_call(case, 3):
        return
    rows, backend = sum(case.local_lengths), AtenBackend()
    for rank in range(3):
        plan, documents = placed(case, 3, rank, "meta")
        keys = documents.k_len

        def half(n, heads):
            return torch.empty(1, n, heads, 16, dtype=torch.float16, device="meta")

        q, k, dout = half(rows, 4), half(keys, 2), half(rows, 4)
        lse = torch.empty(1, 4, rows, device="meta")
        out, dq = (torch.empty(q.shape, device="meta") for _ in range(2))
        dkv = [torch.empty(k.shape, device="meta") for _ in range(2)]
        for step in on_device(plan, documents).steps:
            backend.forward(attention_of(case), step, q, k, k, out, lse, out.half())
            saved = backend.prepare_backward(dout, out.half(), lse, lse)
            target = GradTarget(*dkv, add=not step.first)
            given = attention_of(case), step, saved, q, k, k, dq
            backend.backward(*given, lambda target=target: target, dq.half())
        assert documents._edges is None


def test_the_fakes_of_aten_have_its_names():
    for fake in aten():
        op = getattr(torch.ops.aten, fake.__name__).default
        names = [x.name for x in op._schema.arguments]
        code = fake.__code__
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        assert list(given) == names[: len(given)]


def test_documents_run_one_by_one_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(varlen, "WANTED", False)
    plan, documents = placed(PackedCase("zigzag", "several", "causal"), 2, 0)
    reasons = needs_lengths(install("2.8", monkeypatch), plan, documents)
    assert reasons == ["RING_FLASH_ATTN_VARLEN is 0"]


def old_flash(name):
    def padded(q, k, v, cu_seqlens_q, window_size=(-1, -1)):
        raise AssertionError

    module = type(flash)("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = padded
    return module


def test_who_reads_lengths_says_why(monkeypatch):
    plan, documents = placed(PackedCase("zigzag", "several", "causal"), 2, 0)
    assert needs_lengths(install("2.8", monkeypatch), plan, documents) == []
    assert needs_lengths(install("3", monkeypatch), plan, documents) == []
    for backend, reason in (
        (ReferenceBackend(), "reference computes blocks of rows"),
        (AtenBackend(), "on cuda only, got cpu"),
        (Flash4Backend(), "not known to take sequences"),
    ):
        assert reason in str(needs_lengths(backend, plan, documents))
    monkeypatch.setattr(flash, "load", old_flash)
    assert "lse of packed rows is padded" in str(needs_lengths(Flash2Backend(), plan, documents))
    many = torch.empty(40000, dtype=torch.int32, device="meta")
    assert "too many for one call" in str(inexpressible(plan, Documents(many, many, 8, 8)))


def test_a_version_that_pads_lse_raises(monkeypatch):
    install("2.8", monkeypatch)
    monkeypatch.setattr(
        Flash2Backend, "_forward", lambda self, *args, **_: (args[3], torch.zeros(2, 4, 12))
    )
    with pytest.raises(RuntimeError, match=r"flash2 must return lse .* this version pads it"):
        OneRank((12, 20)).run(Flash2Backend())


def test_windows_are_those_of_the_blocks():
    """Every part is its block, in documents of 0 to 9 rows a unit, cell by cell."""
    for layout in oracle.LAYOUTS:
        for mask in [*MASKS.values(), (True, (0, 0)), (False, (0, -1)), (False, (4, 0))]:
            for size in SIZES:
                for rank in range(size):
                    plan = plan_packed(Attention(SCALE, *mask), layout, size, rank)
                    for step in plan.steps:
                        for block in step.blocks:
                            check_part(block, plan)


def check_part(block, plan):
    part = part_of(block, plan)
    for unit in range(10) if part is not None else ():
        want = torch.zeros(2 * unit * plan.units + 1, 2 * unit * plan.units + 1, dtype=torch.bool)
        got = want.clone()
        rows = (0, unit * plan.units)
        if found := block.at(plan.units, rows, rows):
            for i in range(found.q_begin, found.q_end):
                begin, end = found.seen_by(i)
                want[i, begin:end] = True
        q, q_end = part.q_begin.at(unit), max(part.q_begin.at(unit), part.q_end.at(unit))
        k, k_end = part.k_begin.at(unit), max(part.k_begin.at(unit), part.k_end.at(unit))
        n, m = q_end - q, k_end - k
        window = part.left, part.right
        got[q:q_end, k:k_end] = oracle.visible(range(m - n, m), range(m), False, window)
        assert torch.equal(got, want), (block, unit)
        assert torch.equal(
            got[q + part.skipped : q_end].any(1), want[q + part.skipped : q_end].any(1)
        )
        sees = torch.zeros(len(got), dtype=torch.bool)
        if m:
            sees[q + part.skipped : q_end] = True
        assert torch.equal(sees, want.any(1)), "rows that see a key"


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", [*oracle.LAYOUTS, GATHER])
def test_the_public_call_takes_this_path(layout, one_rank, monkeypatch):
    install("2.8", monkeypatch)
    monkeypatch.setattr(Flash2Backend, "unsupported", lambda *args: [])
    case = PackedCase(layout, "several", "causal", heads_k_stride=2)
    q, k, v, dout, dlse = packed_tensors(case, 1, torch.float64, "cpu")
    local = [x.requires_grad_() for x in (q, k, v)]
    options = {"backend": "flash2", "causal": True}
    if layout == GATHER:
        *documents, rows = prepared(case, 1, 0)
        out, lse = rfa.gathered_attention(*local, *documents, 2, rows, **options)
    else:
        cu = torch.tensor(edges_of(case.local_lengths), dtype=torch.int32)
        longest = max(case.local_lengths)
        out, lse = rfa.packed_attention(*local, cu, longest, layout=layout, **options)
    grads = torch.autograd.grad((out, lse), local, (dout, dlse))
    got = oracle.Result(*(x.detach()[None] for x in (out, lse, *grads)))
    check_exact(got, truth(case, 1)[1])
    # The gradient of lse takes a forward of k as v, and a backward of its own.
    assert [call["pass"] for call in CALLS] == ["forward", "backward"] * 2
    assert [call["rows"] for call in CALLS] == [len(q)] * 4


def test_packings_hold_what_is_hard():
    """Else the grids above prove less than they say."""
    assert 0 in PACKINGS["tiny"], "an empty document"
    assert 1 in PACKINGS["odd"], "a row alone, whose stripe meets nothing"
    starts = [end for _, end in pairwise(edges_of(PACKINGS["several"]))]
    assert len(starts) > 2


class LongCase(PackedCase):
    """Documents over several tiles of a kernel, and short and empty ones."""

    local_lengths = (300, 2, 0, 130, 64)


def on_this_gpu(case: PackedCase) -> list:
    """Return the backends that run here, and take the documents as they are."""
    q = torch.empty(1, 8, 4, 16, dtype=torch.bfloat16, device="cuda")
    plan, documents = placed(case, 2, 0, "cuda")
    return [
        backend
        for backend in (Flash3Backend(), Flash2Backend(), AtenBackend())
        if not backend.unsupported(attention_of(case), q, q[:, :, :2], q[:, :, :2])
        and not needs_lengths(backend, plan, documents)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ONE_CALL)
def test_on_a_gpu_it_errs_as_document_by_document(layout):
    for mask in sorted(ONE_CALL[layout]):
        case = LongCase(layout, "", mask)
        want = truth(case, 3, torch.bfloat16)[1]
        for backend in on_this_gpu(case):
            got, yardstick = (
                computed(backend, case, 3, torch.bfloat16, "cuda", place)
                for place in (on_device, on_host)
            )
            broken = oracle.beyond_bound(got, want, yardstick)
            assert not broken, (backend.name, mask, broken)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_packed_call_never_waits_for_the_gpu(layout):
    for backend in on_this_gpu(LongCase(layout, "", "causal")):
        given = OneRank((300, 2, 0, 130), layout, 5, device="cuda", dtype=torch.bfloat16)
        first = given.run(backend)  # loads kernels
        given.documents.tables.clear()
        torch.cuda.set_sync_debug_mode("error")  # from here on torch raises where the host waits
        try:
            again = given.run(backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # dq is added up with atomics, in any order.
        for name in ("out", "lse"):
            assert torch.equal(getattr(again, name), getattr(first, name)), name
        assert all(x[:, :432].isfinite().all() for x in again[2:])
