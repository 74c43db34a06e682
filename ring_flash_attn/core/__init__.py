"""The one core under every public name.

Shape legend, used in every docstring: B batch, L local rows, T packed local rows, N sequences,
H query heads, Hk key/value heads (Hk divides H), D head dim, P ranks.

q, out, dout, dq are [B, L, H, D]; k, v, dk, dv are [B, L, Hk, D]; lse, delta are [B, H, L]. lse is
the natural logarithm. The state (out, lse, dq, dk, dv while they accumulate) is float32, float64
for float64 inputs.
"""
