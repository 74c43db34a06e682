"""What the hosts of several ranks do over the copy-engine exchange, and how it is run and judged.

A program takes a rank's `Member` and returns the calls whose results are to be compared.
"""

from copy_engine_ranks import CAUSAL, WINDOW, Layer, Member, wrong
from ring_flash_attn.core.copy_engine import CopyEngineExchange
from stream_emulator import World

SIDES = ("caller", "pull")
MIXED = [Layer("contiguous"), Layer("contiguous", WINDOW, sign=-1.0), Layer("zigzag", sign=0.5)]


def train(layers, member):
    """Forward through the layers, backward through them in reverse order, memory reused."""
    kept = []
    for layer in layers:
        kept.append(member.forward(layer))
        member.poison()
    for held in reversed(kept):
        member.backward(held)
        member.poison()
        member.free(held)
    return kept


def infer(layers, member):
    """Forward only, the keys overwritten as soon as a call has returned."""
    kept = []
    for layer in layers:
        kept.append(member.forward(layer))
        member.free(kept[-1])
    return kept


def interleave(layers, member):
    """Pipeline style: each backward comes between the forwards of the next ones."""
    a, b, c = layers
    first, second = member.forward(a), member.forward(b)
    member.backward(first)
    third = member.forward(c)
    member.free(first)
    member.backward(second)
    member.backward(third)
    for held in (second, third):
        member.free(held)
    return [first, second, third]


def recompute(layers, member):
    """Activation checkpoints: each backward begins with the forward again; and retain_graph."""
    kept = []
    for layer in layers:
        member.forward(layer)
    for layer in reversed(layers):
        held = member.forward(layer)
        member.backward(held)
        del held.results[2:]
        member.backward(held)
        kept.append(held)
    return kept


def two_streams(layers, member):
    """Call after call on another stream of the caller, ordered by nothing but the group."""
    kept, streams = [], [member.transport.caller, member.transport.another]
    for index, layer in enumerate(layers):
        member.transport.caller = streams[index % 2]
        kept.append(member.forward(layer))
        member.backward(kept[-1])
    return kept


def capture(layers, member):
    """Capture forwards alone and forwards with backwards, replay them, and call on without."""
    kept = train(layers, member)
    for layer in layers:
        for backward in (False, True):
            with member.transport.capture() as graph:
                held = member.forward(layer)
                if backward:
                    member.backward(held)
            graph.replay()
            graph.replay()
            kept.append(held)
    return kept + train(layers[:1], member)


def execute(program, size, seed, slow=(), exchange=CopyEngineExchange, merges=False):
    """Run a program on every rank; return the results that are wrong.

    slow: (rank, stream) pairs that go on only when nobody else can.
    """
    world = World(size)
    for rank in range(size):
        world.ranks[rank].another = world.stream(rank, "another")
    members = [Member(world, rank, exchange, merges=merges) for rank in range(size)]
    kept = [program(member) for member in members]
    world.run(seed, [stream for stream in world.streams if (stream.rank, stream.name) in slow])
    assert world.at_rest(), "mailboxes are not as they were"
    return [
        error
        for member, each in zip(members, kept, strict=True)
        for held in each
        for error in wrong(member, held)
    ]


def bad_luck(size):
    """Return what may be slow: nothing, every stream alone, every rank alone."""
    alone = [[(rank, side)] for rank in range(size) for side in SIDES]
    ranks = [[(rank, side) for side in SIDES] for rank in range(size)]
    return [[], *alone, *ranks]


def pair(layout, mask=CAUSAL, **sizes):
    return [Layer(layout, mask, **sizes), Layer(layout, mask, **sizes, sign=-0.7)]
