"""The embeddings of earlier batches, for losses that compare with them."""

from __future__ import annotations

import torch
import torch.distributed

from kdkernels import checks, groups
from kdkernels.losses.samples import normalized
from kdkernels.typed import typed


class Queue(torch.nn.Module):
    """The last `size` embeddings, normalised, in a buffer that never moves: the oldest are overwritten in place.

    Queue(65536, 128); loss = seed_loss(s, t, queue.entries); queue.enqueue(t). It starts with random directions. Nothing
    waits for the device; all of it is in the state_dict, and may be compiled.

    Args:
        size: how many embeddings it holds.
        features: their size.
        dtype: of the entries.
        generator: of the random directions.
    """

    entries: torch.Tensor
    position: torch.Tensor

    @typed
    def __init__(
        self, size: int, features: int, *, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
    ):
        super().__init__()
        if size < 1 or features < 1:
            raise ValueError(f"size and features must be at least 1, got {size} and {features}")
        start = torch.nn.functional.normalize(torch.randn(size, features, generator=generator), dim=1)
        self.register_buffer("entries", start.to(dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, embeddings: torch.Tensor, *, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Normalises embeddings (N, features) and puts them over the oldest entries.

        Args:
            embeddings: at most `size`; not written to.
            group: those of all its ranks, in the order of ranks, so that every rank keeps the same queue; each must bring
                as many.

        Raises:
            ValueError: another number of features, or more embeddings than fit.
        """
        size, features = self.entries.shape
        checks.float_tensor("embeddings", embeddings)
        if group is not None:
            groups.process_group(group)
        if embeddings.dim() != 2 or embeddings.shape[1] != features:
            raise ValueError(f"embeddings must have shape (N, {features}), got {tuple(embeddings.shape)}")
        x = normalized(embeddings).to(self.entries)
        if group is not None:
            from kdkernels.distributed.batch import all_gather

            ranks = torch.distributed.get_world_size(group)
            everyone = x.new_empty(ranks * x.shape[0], features)
            all_gather(everyone, x.contiguous(), group=group)
            x = everyone
        if x.shape[0] > size:
            raise ValueError(f"{x.shape[0]} embeddings do not fit a queue of {size}")
        places = torch.arange(x.shape[0], device=x.device).add_(self.position).remainder_(size)
        self.entries.index_copy_(0, places, x)
        self.position.add_(x.shape[0]).remainder_(size)

    def extra_repr(self) -> str:
        return f"{self.entries.shape[0]}, {self.entries.shape[1]}"
