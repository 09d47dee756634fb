"""How the peers' scripts time an op on a GPU: between two events, as attention_bench does."""

import torch

FLUSH_BYTES = 256 << 20  # written, or read: more than any L2 cache holds
WARM_RUNS = 20


def seconds_of(function):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def seconds_alone(function, repeats):
    """Of each of so many runs behind those that warm up, the L2 cache flushed before."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    seconds = []
    for _ in range(WARM_RUNS + repeats):
        flush.zero_()
        seconds.append(seconds_of(function))
    return seconds[WARM_RUNS:]
