"""Sequences that a teacher wrote, kept for its students."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kdkernels import checks
from kdkernels.typed import typed


class TeacherSequences:
    """What a teacher wrote, once, for its students to read many times: sequence-level distillation.

        written = TeacherSequences.write(teacher.generate, prompts, end=tokenizer.eos_token_id)
        for tokens, mask in written.batches(16, generator):
            loss = kdkernels.sequence_loss(student(tokens), tokens, mask)

    Kim and Rush (2016, arXiv:1606.07947).

    Args:
        tokens: (B, T), prompts and completions.
        completion_mask: (B, T), true where a token is the teacher's.

    Raises:
        ValueError: shapes that differ, or are not (B, T) with B at least 1.
    """

    @typed
    def __init__(self, tokens: torch.Tensor, completion_mask: torch.Tensor):
        if tokens.dim() != 2 or len(tokens) == 0 or tokens.shape != completion_mask.shape:
            raise ValueError(
                "tokens and completion_mask must both be (B, T) with at least one sequence, got "
                f"{tuple(tokens.shape)} and {tuple(completion_mask.shape)}"
            )
        self.tokens, self.completion_mask = tokens, completion_mask

    @classmethod
    @torch.no_grad()
    @typed
    def write(
        cls, generate: Callable[[torch.Tensor], torch.Tensor], prompts: torch.Tensor, *, end: int | None = None,
        padding: int = 0, batch_size: int = 64,
    ) -> TeacherSequences:  # fmt: skip
        """Has the teacher continue prompts.

        Args:
            generate: from prompts (b, P) to whole sequences (b, T), prompts first, as Hugging Face's generate; T may differ
                from batch to batch.
            prompts: integers (B, P).
            end: the token with which a sequence ends: it belongs to the completion, and what follows it does not.
            padding: fills up shorter batches, outside the completions.
            batch_size: prompts at a time.
        """
        batch_size = checks.integer("batch_size", batch_size, low=1)
        checks.integer("padding", padding)
        if end is not None:
            checks.integer("end", end)
        if prompts.dim() != 2:
            raise ValueError(f"prompts must be (B, P), got shape {tuple(prompts.shape)}")
        pieces = [generate(part) for part in prompts.split(batch_size)]
        longest = max(p.shape[1] for p in pieces)
        tokens = torch.cat([F.pad(p, (0, longest - p.shape[1]), value=padding) for p in pieces])
        written = torch.cat([F.pad(torch.ones_like(p, dtype=torch.bool), (0, longest - p.shape[1])) for p in pieces])
        written[:, : prompts.shape[1]] = False
        if end is not None:
            ended = ((tokens == end) & written).cumsum(1)
            written &= (ended - ((tokens == end) & written).long()) == 0
        return cls(tokens, written)

    def __len__(self) -> int:
        return len(self.tokens)

    @typed
    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, completion_mask) of `count` sequences at random."""
        checks.integer("count", count, low=0)
        chosen = torch.randint(len(self), (count,), generator=generator).to(self.tokens.device)
        return self.tokens[chosen], self.completion_mask[chosen]

    @typed
    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All sequences once in a random order; the last batch may be smaller."""
        size = checks.integer("size", size, low=1)
        for chosen in torch.randperm(len(self), generator=generator).to(self.tokens.device).split(size):
            yield self.tokens[chosen], self.completion_mask[chosen]
