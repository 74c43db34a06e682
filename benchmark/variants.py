"""What a comparison times in turn: one implementation of one layout, for one packing."""

from dataclasses import dataclass

import timing
from kernels import Inputs
from packed_rings import LLAMA3, packed_inputs, packed_ring, packed_shard
from packing import BATCH, Packing
from rings import Ring, RingErrors, Shard, batch_shard, forward_only, ring, ring_errors, step

import oracle
from comparison import Place


@dataclass(frozen=True, eq=False)
class Variant:
    """A ring with what it is timed on.

    Attributes:
        inputs: this rank's rows, [B, L, ...], or [T, ...] if packed.
        ring: q, k, v of that shape -> out.
        shard: global [B, S, ...] -> this rank's rows.
        exchange: how K and V travel: ring, copy-engine or, for llama3, gather.
    """

    impl: str
    layout: str
    packing: Packing
    inputs: Inputs
    ring: Ring
    shard: Shard
    exchange: str

    def call(self, pass_: str) -> timing.Run:
        """Return forward, or forward and backward, as one call."""
        return (forward_only if pass_ == "fwd" else step)(self.ring, self.inputs)

    def errors(self, whole: Inputs, want: oracle.Result, place: Place) -> RingErrors:
        """Return the errors over global inputs and what they should give, [B, S, ...]."""
        return ring_errors(self.ring, self.shard, whole, want, place)


def variant(
    impl: str,
    layout: str,
    packing: Packing,
    inputs: Inputs,
    place: Place,
    heads_k_stride: int,
    exchange: str = "ring",
) -> Variant:
    """Return a variant that ran forward and backward once.

    Args:
        inputs: this rank's rows, [B, L, ...]; B is 1 if packed.

    Raises:
        NotImplementedError: it cannot run here or not on these inputs; the message says why.
    """
    if packing.name == BATCH:
        run, shard = ring(impl, layout, inputs, exchange), batch_shard(layout, place)
    else:
        inputs = packed_inputs(inputs)
        run = packed_ring(impl, layout, packing, inputs, place, heads_k_stride, exchange)
        shard = packed_shard(layout, packing, place)
    exchange = "gather" if layout == LLAMA3 else exchange
    found = Variant(impl, layout, packing, inputs, run, shard, exchange)
    found.call("fwd_bwd")()
    return found
