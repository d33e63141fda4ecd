"""Peak memory of one call.

On CUDA the allocator's own peak. On other devices torch's allocations as its profiler reports them:
exact for tensors, and blind to what a kernel takes from malloc itself (ours: some kilobytes a thread).
Resident-set size would see that too, but it also sees what the allocator keeps, and moves in steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that was allocated at once during the call beyond what was before, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it chats on stderr
    with torch.autograd.profiler.profile(use_device=None, profile_memory=True) as profile:
        result = call()
    del result
    try:
        events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    except AttributeError:
        return None  # a torch that keeps them elsewhere
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
