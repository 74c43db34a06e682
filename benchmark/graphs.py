"""A call of a ring as a CUDA graph."""

import timing
import torch
import torch.distributed as dist


def replay(call: timing.Run) -> timing.Run:
    """Capture a call that ran before, on every rank, and return what replays it.

    Raises:
        RuntimeError: it cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The process group's watchdog goes on asking the GPU about its own events.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    return graph.replay
