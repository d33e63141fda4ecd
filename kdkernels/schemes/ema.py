"""Teachers that are averages over time: of a student's weights, or of its predictions."""

from __future__ import annotations

import torch
from torch import nn

from kdkernels import checks
from kdkernels.features.capture import unwrapped
from kdkernels.schemes.copies import FrozenCopy
from kdkernels.typed import typed

HALVES = (torch.float16, torch.bfloat16)


class EMATeacher(FrozenCopy):
    """A teacher whose weights are the exponential moving average of a student's.

        teacher = EMATeacher(student)
        loss = cross_entropy(student(x), y) + kdkernels.kl_div(student(x_1), teacher(x_2))
        loss.backward(); optimizer.step(); teacher.update(student)

    Tarvainen and Valpola, mean teacher (2017, arXiv:1703.01780): t <- d t + (1 - d) s after every step, in one
    `torch._foreach_lerp_` over all parameters. Averages of float16 and bfloat16 weights are kept in float32: near
    d = 0.999 a step is smaller than half a rounding of those types, and the average would stand still.

    Args:
        student: the model, copied here; it may be wrapped in DistributedDataParallel or compiled.
        decay: d, between 0 and 1.
        warmup: the n-th update (from 0) has decay min(d, (1 + n) / (warmup + n)), so that the first weights, which
            are random, are soon forgotten. 2 is the authors' code's, 10 is TensorFlow's; None: none.
        buffers: "copy" takes the student's (running means and variances as they are), "average" averages those that
            are floating-point and copies the others.

    The teacher is always in eval mode, its parameters require no gradient, and its forward builds no graph. Saving
    it saves the number of updates too.

    Raises:
        ValueError: a decay outside 0 to 1, a warmup that is not above 1, an unknown `buffers`; in update, a student
            whose parameters or buffers have other names or shapes than the one that was copied.
    """

    @typed
    def __init__(self, student: nn.Module, decay: float = 0.999, *, warmup: float | None = 2.0, buffers: str = "copy"):
        checks.plain_number("decay", decay, low=0, high=1)
        checks.plain_number("warmup", warmup, low=1, open_low=True, optional=True)
        checks.choice("buffers", buffers, ("copy", "average"))
        super().__init__(student)
        self.decay, self.warmup, self.updates = decay, warmup, 0
        state = self._state(self.model)
        averages = [
            n
            for n, x in state.items()
            if x.is_floating_point() and (buffers == "average" or isinstance(x, nn.Parameter))
        ]
        self._copied = [n for n in state if n not in averages]
        self._direct = [n for n in averages if state[n].dtype not in HALVES]
        self._wide = {n: f"average_{k}" for k, n in enumerate(averages) if state[n].dtype in HALVES}
        for name, slot in self._wide.items():
            self.register_buffer(slot, state[name].detach().float())

    @staticmethod
    def _state(model: nn.Module) -> dict[str, torch.Tensor]:
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def current_decay(self) -> float:
        """The decay of the next update."""
        if self.warmup is None:
            return self.decay
        return min(self.decay, (1 + self.updates) / (self.warmup + self.updates))

    @torch.no_grad()
    @typed
    def update(self, student: nn.Module) -> None:
        """One step towards the student; call it after the optimizer's."""
        mine, theirs = self._state(self.model), self._state(unwrapped(student))
        if {n: x.shape for n, x in mine.items()} != {n: x.shape for n, x in theirs.items()}:
            odd = sorted(
                n for n in {*mine, *theirs} if n not in mine or n not in theirs or mine[n].shape != theirs[n].shape
            )
            raise ValueError(f"student must be the model that was copied; they differ in {', '.join(odd[:4])}")
        averages = [mine[n] for n in self._direct] + [getattr(self, slot) for slot in self._wide.values()]
        if averages:
            names = [*self._direct, *self._wide]
            targets = [theirs[n].to(a) for n, a in zip(names, averages, strict=True)]
            torch._foreach_lerp_(averages, targets, 1 - self.current_decay())
        for name, slot in self._wide.items():
            mine[name].copy_(getattr(self, slot))
        for name in self._copied:
            mine[name].copy_(theirs[name])
        self.updates += 1

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


class TemporalEnsemble(nn.Module):
    """Every sample's own teacher: the moving average of what was predicted for it in earlier epochs.

    Laine and Aila (2017, arXiv:1610.02242): Z <- a Z + (1 - a) z, and the target is Z / (1 - a^t) after t updates of
    the sample, which takes out the zeros that Z started with. Give it logits, or probabilities as the paper does.

    Args:
        samples, classes: the size of the table, one float32 row a sample.
        momentum: a, at least 0 and below 1.
    """

    predictions: torch.Tensor
    updates: torch.Tensor

    @typed
    def __init__(self, samples: int, classes: int, momentum: float = 0.6):
        super().__init__()
        checks.integer("samples", samples, low=0)
        checks.integer("classes", classes, low=1)
        checks.plain_number("momentum", momentum, low=0, high=1)
        if momentum == 1:
            raise ValueError("momentum must be below 1: nothing would ever be learnt")
        self.momentum = momentum
        self.register_buffer("predictions", torch.zeros(samples, classes))
        self.register_buffer("updates", torch.zeros(samples))

    def _check(self, indices: torch.Tensor) -> None:
        if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"indices must be integers (N,), got {indices.dtype} {tuple(indices.shape)}")
        if indices.device.type not in ("cpu", self.predictions.device.type):
            raise ValueError(f"indices must be on {self.predictions.device}, got {indices.device}")
        checks.indices("indices", indices, len(self.predictions))

    @torch.no_grad()
    @typed
    def update(self, indices: torch.Tensor, predictions: torch.Tensor) -> None:
        """Adds the predictions (N, classes) of the samples `indices` (N,), each of which occurs once."""
        self._check(indices)
        checks.float_tensor("predictions", predictions)
        if predictions.shape != (len(indices), self.predictions.shape[1]):
            raise ValueError(
                f"predictions must be ({len(indices)}, {self.predictions.shape[1]}), got {tuple(predictions.shape)}"
            )
        new = self.predictions[indices].lerp(predictions.to(self.predictions), 1 - self.momentum)
        self.predictions[indices] = new
        self.updates[indices] += 1

    @typed
    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The targets (N, classes) of these samples; zeros for those never seen, which `seen` tells."""
        self._check(indices)
        corrected = 1 - self.momentum ** self.updates[indices]
        return self.predictions[indices] / corrected.clamp_min(torch.finfo(corrected.dtype).tiny).unsqueeze(-1)

    def seen(self, indices: torch.Tensor) -> torch.Tensor:
        """Booleans (N,): a row weight for a loss."""
        return self.updates[indices] > 0
