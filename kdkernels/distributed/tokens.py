"""How many tokens all ranks have, where each sees its own (data or sequence parallel)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from kdkernels import checks, groups


@torch.no_grad()
def count_items(
    tokens: torch.Tensor,
    *,
    ignore_index: int = -100,
    weighted: bool = False,
    average: bool = False,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The `num_items` with which a loss of one rank's tokens is its share of the mean over all ranks' tokens.

    loss = kl_div(s, t, labels=labels, num_items=count_items(labels)): the sum of the ranks' losses is the global mean, and
    the sum of their gradients its gradient. One collective, no synchronisation with the host.

    Args:
        tokens: labels, of which those equal to `ignore_index` do not count; or row weights.
        ignore_index: the label that leaves a token out.
        weighted: `tokens` are weights (or a boolean mask): their sum.
        average: for gradients that are averaged over the ranks and not added up, as DDP and FSDP do: divides by their
            number, so that every loss is that many times as large.
        group: the ranks that the tokens are spread over; default: all.

    Returns:
        A float32 tensor with one element on the tokens' device. 0 where no rank has any, which every loss takes.
    """
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}")
    checks.dense("tokens", tokens)
    if tokens.is_complex():
        raise TypeError(f"tokens must be real numbers, got {tokens.dtype}")
    checks.integer("ignore_index", ignore_index)
    checks.flag("weighted", weighted)
    checks.flag("average", average)
    groups.meeting(group)
    mass = tokens.sum(dtype=torch.float32) if weighted else (tokens != ignore_index).sum(dtype=torch.float32)
    dist.all_reduce(mass, group=group)
    return mass / dist.get_world_size(group) if average else mass
