"""What scripts written for ring-flash-attn 0.1.8 import and call gives dense float64 attention.

Names, the order of arguments and the values passed are those that such scripts use, so that a
change of a signature, a default or an import path fails here.
"""

from functools import cache
from itertools import pairwise

import pytest
import torch

import oracle
from ranks import run_ranks
from ring_flash_attn import (
    llama3_flash_attn_prepare_cu_seqlens,
    llama3_flash_attn_varlen_qkvpacked_func,
    ring_flash_attn_qkvpacked_func,
    ring_flash_attn_varlen_qkvpacked_func,
    stripe_flash_attn_qkvpacked_func,
    zigzag_ring_flash_attn_qkvpacked_func,
    zigzag_ring_flash_attn_varlen_qkvpacked_func,
)
from ring_flash_attn.utils import (
    AllGatherComm,
    RingComm,
    flatten_varlen_lse,
    get_default_args,
    unflatten_varlen_lse,
    update_out_and_lse,
)

P = 2
BATCH, ROWS, HEADS, HEAD_DIM = 1, 48, 4, 16
CU_SEQLENS = [0, 12, 44, 48, 64]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What the scripts pass: dropout_p is an int.
OPTIONS = {
    "dropout_p": 0,
    "causal": True,
    "window_size": (-1, -1),
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": True,
}


def contiguous(x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    return x.chunk(P, dim=dim)[rank].detach().clone()


def zigzag(x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    chunks = x.chunk(2 * P, dim=dim)
    return torch.cat([chunks[rank], chunks[2 * P - 1 - rank]], dim=dim).detach().clone()


def striped(x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    return torch.stack(x.split(P, dim=dim), dim=dim).select(dim + 1, rank).detach().clone()


def by_document(extract):
    """Return the extraction that applies `extract` to each document of packed rows."""

    def local(x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        lengths = [end - begin for begin, end in pairwise(CU_SEQLENS)]
        return torch.cat([extract(y, rank, dim) for y in x.split(lengths, dim=dim)], dim=dim)

    return local


BATCH_SCRIPTS = {
    "ring": (ring_flash_attn_qkvpacked_func, contiguous),
    "zigzag": (zigzag_ring_flash_attn_qkvpacked_func, zigzag),
    "stripe": (stripe_flash_attn_qkvpacked_func, striped),
}
VARLEN_SCRIPTS = {
    "ring-varlen": (ring_flash_attn_varlen_qkvpacked_func, by_document(contiguous)),
    "zigzag-varlen": (zigzag_ring_flash_attn_varlen_qkvpacked_func, by_document(zigzag)),
}
SCRIPTS = (*BATCH_SCRIPTS, *VARLEN_SCRIPTS, "llama3-varlen")


def draw(script: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return qkv [B, S, 3, H, D] and dout [B, S, H, D], or [S, 3, H, D] and [S, H, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, ROWS) if script in BATCH_SCRIPTS else (CU_SEQLENS[-1],)
    qkv = torch.randn(*shape, 3, HEADS, HEAD_DIM, generator=generator)
    dout = torch.randn(*shape, HEADS, HEAD_DIM, generator=generator)
    return qkv.to(dtype), dout.to(dtype)


def run_script(rank: int, script: str, dtype: torch.dtype, causal: bool):
    """Call the library as a script does; return this rank's out, lse, dqkv."""
    options = OPTIONS | {"causal": causal}
    qkv, dout = draw(script, dtype)
    _, extract = (BATCH_SCRIPTS | VARLEN_SCRIPTS).get(script, (None, contiguous))
    dim = 1 if script in BATCH_SCRIPTS else 0
    local_qkv, local_dout = extract(qkv, rank, dim), extract(dout, rank, dim)
    local_qkv.requires_grad = True
    cu_seqlens_tensor = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    max_seqlen = (cu_seqlens_tensor[1:] - cu_seqlens_tensor[:-1]).max().item()
    if script in BATCH_SCRIPTS:
        out, lse, _ = BATCH_SCRIPTS[script][0](local_qkv, **options)
    elif script in VARLEN_SCRIPTS:
        local_cu_seqlens_tensor = cu_seqlens_tensor // P
        out, lse, _ = VARLEN_SCRIPTS[script][0](
            local_qkv, local_cu_seqlens_tensor, max_seqlen // P, **options
        )
    else:
        (
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            local_k_slice,
        ) = llama3_flash_attn_prepare_cu_seqlens(
            cu_seqlens_tensor, causal=causal, rank=rank, world_size=P
        )
        out, lse, _ = llama3_flash_attn_varlen_qkvpacked_func(
            local_qkv,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            heads_k_stride=HEADS // 2,
            local_k_slice=local_k_slice,
            **options,
        )
    out.backward(local_dout)
    return out.detach(), lse.detach(), local_qkv.grad


def run_all(rank: int, dtype: torch.dtype, causal: bool) -> dict:
    return {script: run_script(rank, script, dtype, causal) for script in SCRIPTS}


@cache
def results(dtype: torch.dtype, causal: bool) -> list[dict]:
    return run_ranks(P, run_all, dtype, causal)


def dense(script: str, dtype: torch.dtype, causal: bool, compute, wide: torch.dtype):
    """Return out, lse and dqkv of all rows, by one of the oracle's functions."""
    qkv, dout = (x.to(wide) for x in draw(script, dtype))
    length = qkv.shape[-4]
    if script in BATCH_SCRIPTS:
        seen = oracle.visible(range(length), range(length), causal)
    else:
        qkv, dout = qkv[None], dout[None]
        seen = torch.zeros(length, length, dtype=torch.bool)
        for begin, end in pairwise(CU_SEQLENS):
            rows = range(end - begin)
            seen[begin:end, begin:end] = oracle.visible(rows, rows, causal)
    out, lse, *grads = compute(*qkv.unbind(2), seen, dout)
    dqkv = torch.stack(grads, 2)
    return (out, lse, dqkv) if script in BATCH_SCRIPTS else (out[0], lse[0], dqkv[0])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_call_gives_dense_attention(script: str, dtype: str, causal: bool):
    kind = DTYPES[dtype]
    truth = dense(script, kind, causal, oracle.dense, torch.float64)
    in_dtype = dense(script, kind, causal, oracle.dense_in_dtype, kind)
    _, extract = (BATCH_SCRIPTS | VARLEN_SCRIPTS).get(script, (None, contiguous))
    for rank in range(P):
        got = results(kind, causal)[rank][script]
        assert [x.dtype for x in got] == [kind, torch.float32, kind]
        for name, x, y, z in zip(("out", "lse", "dqkv"), got, truth, in_dtype, strict=True):
            rows_at = y.ndim - 1 if name == "lse" else int(script in BATCH_SCRIPTS)
            target, yardstick = extract(y, rank, rows_at), extract(z, rank, rows_at)
            for measure in ("max_abs", "rmse"):
                error = getattr(oracle.errors(x, target), measure)
                bound = 2 * getattr(oracle.errors(yardstick, target), measure) + 1e-5
                assert error <= bound, f"{name} on rank {rank}: {measure} {error}, bound {bound}"


def run_helpers(rank: int) -> dict:
    """Compute attention by hand with what `ring_flash_attn.utils` exports, as scripts do."""
    qkv, _ = draw("ring", torch.float32)
    q, k, v = (x.contiguous() for x in contiguous(qkv, rank, 1).unbind(2))
    comm = RingComm(None)
    out = lse = None
    for step in range(comm.world_size):
        if step + 1 != comm.world_size:
            next_k, next_v = comm.send_recv_kv(k, v)
        full = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        block_out, block_lse = oracle.attention(q, k, v, full)
        out, lse = update_out_and_lse(out, lse, block_out, block_lse)
        if step + 1 != comm.world_size:
            comm.wait()
            k, v = next_k, next_v
    gathered = torch.empty(P * q.shape[0], *q.shape[1:])
    all_gather = AllGatherComm(None)
    all_gather.all_gather(gathered, q)
    all_gather.wait()
    return {"out": out, "lse": lse.squeeze(-1).transpose(1, 2), "q": torch.cat([*gathered], 0)}


def test_a_ring_written_with_the_utilities_gives_dense_attention():
    truth = dense("ring", torch.float32, False, oracle.dense, torch.float64)
    q = draw("ring", torch.float32)[0][0, :, 0]
    for rank, got in enumerate(run_ranks(P, run_helpers)):
        assert oracle.errors(got["out"], contiguous(truth[0], rank, 1)).max_abs < 1e-5
        assert oracle.errors(got["lse"], contiguous(truth[1], rank, 2)).max_abs < 1e-5
        assert oracle.errors(got["q"], q).max_abs == 0


def flatten_and_unflatten(flatten, unflatten) -> None:
    cu_seqlens = torch.tensor([0, 15, 156, 529], dtype=torch.int32)
    max_seqlen = (cu_seqlens[1:] - cu_seqlens[:-1]).max().item()
    lengths = cu_seqlens.diff().tolist()
    padded = torch.randn(3, 5, max_seqlen, generator=torch.Generator().manual_seed(0))
    for document, length in zip(padded, lengths, strict=True):
        document[:, length:] = 0
    documents = [x[:, :length] for x, length in zip(padded, lengths, strict=True)]
    flat = flatten(padded, cu_seqlens=cu_seqlens)
    assert torch.equal(flat, torch.cat(documents, 1))
    again = unflatten(flat.transpose(-2, -1).unsqueeze(dim=-1), cu_seqlens, max_seqlen)
    assert torch.equal(again, padded)


def test_flatten_and_unflatten_of_utils_are_inverse():
    flatten_and_unflatten(flatten_varlen_lse, unflatten_varlen_lse)


@pytest.mark.kernel
def test_flatten_and_unflatten_of_triton_utils_are_inverse():
    from ring_flash_attn.triton_utils import flatten_varlen_lse, unflatten_varlen_lse

    flatten_and_unflatten(flatten_varlen_lse, unflatten_varlen_lse)


def test_get_default_args_of_a_public_function():
    defaults = get_default_args(ring_flash_attn_qkvpacked_func)
    assert defaults["qkv"] is None
    assert defaults["window_size"] == (-1, -1)
    assert defaults["dropout_p"] == 0.0
