"""The public surface of ring-flash-attn 0.1.8, as literals read from its wheel with `ast`.

Parameters are written as `inspect.signature` renders them without annotations, so one string holds
names, order, kinds and defaults. Private names are left out; no code of that library is in here.
"""

# Names that `import ring_flash_attn` offers, without the Hugging Face adapter's.
EXPORTS = (
    "llama3_flash_attn_prepare_cu_seqlens",
    "llama3_flash_attn_varlen_func",
    "llama3_flash_attn_varlen_kvpacked_func",
    "llama3_flash_attn_varlen_qkvpacked_func",
    "ring_flash_attn_func",
    "ring_flash_attn_kvpacked_func",
    "ring_flash_attn_qkvpacked_func",
    "ring_flash_attn_varlen_func",
    "ring_flash_attn_varlen_kvpacked_func",
    "ring_flash_attn_varlen_qkvpacked_func",
    "zigzag_ring_flash_attn_func",
    "zigzag_ring_flash_attn_kvpacked_func",
    "zigzag_ring_flash_attn_qkvpacked_func",
    "zigzag_ring_flash_attn_varlen_func",
    "zigzag_ring_flash_attn_varlen_kvpacked_func",
    "zigzag_ring_flash_attn_varlen_qkvpacked_func",
    "stripe_flash_attn_func",
    "stripe_flash_attn_kvpacked_func",
    "stripe_flash_attn_qkvpacked_func",
)

# module path below ring_flash_attn -> function -> parameters
FUNCTIONS = {
    "llama3_flash_attn_varlen": {
        "llama3_flash_attn_prepare_cu_seqlens": "cu_seqlens, causal, rank, world_size",
        "llama3_flash_attn_varlen_forward": (
            "process_group, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
            "heads_k_stride, local_k_slice, softmax_scale, dropout_p=0, causal=True, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False"
        ),
        "llama3_flash_attn_varlen_backward": (
            "process_group, dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, "
            "max_seqlen_q, max_seqlen_k, heads_k_stride, local_k_slice, softmax_scale, "
            "dropout_p=0, causal=True, window_size=(-1, -1), alibi_slopes=None, "
            "deterministic=False"
        ),
        "llama3_flash_attn_varlen_qkvpacked_func": (
            "qkv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, "
            "local_k_slice, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
        "llama3_flash_attn_varlen_kvpacked_func": (
            "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, "
            "local_k_slice, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
        "llama3_flash_attn_varlen_func": (
            "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, heads_k_stride, "
            "local_k_slice, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
    },
    "ring_flash_attn": {
        "ring_flash_attn_forward": (
            "process_group, q, k, v, softmax_scale, dropout_p=0, causal=True, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False"
        ),
        "ring_flash_attn_backward": (
            "process_group, dout, q, k, v, out, softmax_lse, softmax_scale, dropout_p=0, "
            "causal=True, window_size=(-1, -1), alibi_slopes=None, deterministic=False"
        ),
        "ring_flash_attn_qkvpacked_func": (
            "qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
        "ring_flash_attn_kvpacked_func": (
            "q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
        "ring_flash_attn_func": (
            "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
    },
    "ring_flash_attn_varlen": {
        "ring_flash_attn_varlen_forward": (
            "process_group, q, k, v, cu_seqlens, max_seqlen, softmax_scale, dropout_p=0, "
            "causal=True, window_size=(-1, -1), alibi_slopes=None, deterministic=False"
        ),
        "ring_flash_attn_varlen_backward": (
            "process_group, dout, q, k, v, out, softmax_lse, cu_seqlens, max_seqlen, "
            "softmax_scale, dropout_p=0, causal=True, window_size=(-1, -1), alibi_slopes=None, "
            "deterministic=False"
        ),
        "ring_flash_attn_varlen_qkvpacked_func": (
            "qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
            "return_attn_probs=False, group=None"
        ),
        "ring_flash_attn_varlen_kvpacked_func": (
            "q, kv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
            "return_attn_probs=False, group=None"
        ),
        "ring_flash_attn_varlen_func": (
            "q, k, v, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
            "return_attn_probs=False, group=None"
        ),
    },
    "stripe_flash_attn": {
        "stripe_flash_attn_forward": (
            "process_group, q, k, v, softmax_scale, dropout_p=0, causal=True, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False"
        ),
        "stripe_flash_attn_backward": (
            "process_group, dout, q, k, v, out, softmax_lse, softmax_scale, dropout_p=0, "
            "causal=True, window_size=(-1, -1), alibi_slopes=None, deterministic=False"
        ),
        "stripe_flash_attn_qkvpacked_func": (
            "qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
        "stripe_flash_attn_kvpacked_func": (
            "q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
        "stripe_flash_attn_func": (
            "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
    },
    "triton_utils": {
        "flatten_kernel": (
            "OUT, LSE, CU_SEQLENS, stride_out_nheads, stride_out_seqlen, stride_lse_batch, "
            "stride_lse_nheads, stride_lse_seqlen, BLOCK_M"
        ),
        "flatten_varlen_lse": "lse, cu_seqlens",
        "unflatten_kernel": (
            "OUT, LSE, CU_SEQLENS, stride_out_batch, stride_out_nheads, stride_out_seqlen, "
            "stride_lse_seqlen, stride_lse_nheads, BLOCK_M"
        ),
        "unflatten_varlen_lse": "lse, cu_seqlens, max_seqlen",
    },
    "utils": {
        "get_default_args": "func",
        "update_out_and_lse": "out, lse, block_out, block_lse, slice_=None",
        "flatten_varlen_lse": "lse, cu_seqlens",
        "unflatten_varlen_lse": "lse, cu_seqlens, max_seqlen",
    },
    "zigzag_ring_flash_attn": {
        "zigzag_ring_flash_attn_forward": (
            "process_group, q, k, v, softmax_scale, dropout_p=0, causal=True, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False"
        ),
        "zigzag_ring_flash_attn_backward": (
            "process_group, dout, q, k, v, out, softmax_lse, softmax_scale, dropout_p=0, "
            "causal=True, window_size=(-1, -1), alibi_slopes=None, deterministic=False"
        ),
        "zigzag_ring_flash_attn_qkvpacked_func": (
            "qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
        "zigzag_ring_flash_attn_kvpacked_func": (
            "q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
        "zigzag_ring_flash_attn_func": (
            "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False, return_attn_probs=False, group=None"
        ),
    },
    "zigzag_ring_flash_attn_varlen": {
        "get_half_index": "cu_seqlens, *, front",
        "get_half_lse": "lse, cu_seqlens, *, front",
        "zigzag_ring_flash_attn_varlen_forward": (
            "process_group, q, k, v, cu_seqlens, max_seqlen, half_index0, half_index1, "
            "softmax_scale, dropout_p=0, causal=True, window_size=(-1, -1), alibi_slopes=None, "
            "deterministic=False"
        ),
        "zigzag_ring_flash_attn_varlen_backward": (
            "process_group, dout, q, k, v, out, softmax_lse, cu_seqlens, max_seqlen, half_index0, "
            "half_index1, softmax_scale, dropout_p=0, causal=True, window_size=(-1, -1), "
            "alibi_slopes=None, deterministic=False"
        ),
        "zigzag_ring_flash_attn_varlen_qkvpacked_func": (
            "qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
            "return_attn_probs=False, group=None"
        ),
        "zigzag_ring_flash_attn_varlen_kvpacked_func": (
            "q, kv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
            "return_attn_probs=False, group=None"
        ),
        "zigzag_ring_flash_attn_varlen_func": (
            "q, k, v, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, "
            "window_size=(-1, -1), alibi_slopes=None, deterministic=False, "
            "return_attn_probs=False, group=None"
        ),
    },
}

# module path below ring_flash_attn -> class -> method -> parameters
CLASSES = {
    "llama3_flash_attn_varlen": {
        "Llama3FlashAttnVarlenFunc": {
            "forward": (
                "ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
                "heads_k_stride, local_k_slice, dropout_p, softmax_scale, causal, window_size, "
                "alibi_slopes, deterministic, return_softmax, group"
            ),
            "backward": "ctx, dout, *args",
        },
    },
    "ring_flash_attn": {
        "RingFlashAttnFunc": {
            "forward": (
                "ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, "
                "deterministic, return_softmax, group"
            ),
            "backward": "ctx, dout, *args",
        },
    },
    "ring_flash_attn_varlen": {
        "RingFlashAttnVarlenFunc": {
            "forward": (
                "ctx, q, k, v, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, "
                "window_size, alibi_slopes, deterministic, return_softmax, group"
            ),
            "backward": "ctx, dout, *args",
        },
    },
    "stripe_flash_attn": {
        "StripeFlashAttnFunc": {
            "forward": (
                "ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, "
                "deterministic, return_softmax, group"
            ),
            "backward": "ctx, dout, *args",
        },
    },
    "utils": {
        "RingComm": {
            "__init__": "self, process_group",
            "send_recv": "self, to_send, recv_tensor=None",
            "commit": "self",
            "wait": "self",
            "send_recv_kv": "self, k, v, k_buffer=None, v_buffer=None",
        },
        "AllGatherComm": {
            "__init__": "self, group=None",
            "all_gather": "self, output_tensor, input_tensor",
            "wait": "self",
        },
    },
    "zigzag_ring_flash_attn": {
        "ZigZagRingFlashAttnFunc": {
            "forward": (
                "ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes, "
                "deterministic, return_softmax, group"
            ),
            "backward": "ctx, dout, *args",
        },
    },
    "zigzag_ring_flash_attn_varlen": {
        "ZigZagRingFlashAttnVarlenFunc": {
            "forward": (
                "ctx, q, k, v, cu_seqlens, max_seqlen, dropout_p, softmax_scale, causal, "
                "window_size, alibi_slopes, deterministic, return_softmax, group"
            ),
            "backward": "ctx, dout, *args",
        },
    },
}

# The Hugging Face adapter, apart: `exports` are top-level names of ring_flash_attn too.
ADAPTERS = {
    "exports": (
        "substitute_hf_flash_attn",
        "update_ring_flash_attn_params",
    ),
    "functions": {
        "adapters.hf_adapter": {
            "check_params": "f1, f2",
            "update_ring_flash_attn_params": "cu_seqlens, process_group",
            "use_ring_attn": "flag",
            "create_ring_flash_attention_forward": "process_group, heads_k_stride",
            "flash_attention_forward": (
                "module, query, key, value, attention_mask, dropout=0.0, scaling=None, "
                "sliding_window=None, softcap=None, **kwargs"
            ),
            "substitute_hf_flash_attn": "process_group, heads_k_stride",
        },
    },
    "variables": {
        "adapters.hf_adapter": (
            "DATA_PARAMS",
            "RING_ATTN_SWITCH",
        ),
    },
}
