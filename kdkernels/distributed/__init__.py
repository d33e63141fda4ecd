"""Losses over torch.distributed: vocabularies in shards, and tokens counted on all ranks."""

from kdkernels.distributed.tokens import count_items
from kdkernels.distributed.vocab_parallel import vocab_parallel_linear_loss, vocab_parallel_loss

__all__ = ["count_items", "vocab_parallel_linear_loss", "vocab_parallel_loss"]
