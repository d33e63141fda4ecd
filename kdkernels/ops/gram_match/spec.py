"""Cases of the losses between Gram matrices for tests, bench and check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import channels, similarity
from kdkernels.ops.registry import Case, Shape, Spec

Inputs = dict[str, torch.Tensor]

# (N, D of the student), with D = 1 the normalised gradient is 0; the teacher's D is 1.5 times that and 1 more.
SAMPLES: tuple[Shape, ...] = ((1, 3), (3, 3), (5, 7), (9, 2), (17, 64), (33, 20), (67, 530))
# (N, C, H, W); the teacher's map is a row larger where the loss allows.
MAPS: tuple[Shape, ...] = ((1, 1, 1, 1), (2, 3, 2, 3), (2, 5, 1, 7), (3, 17, 4, 3), (1, 33, 5, 5), (2, 40, 3, 11))
LONG: tuple[Shape, ...] = ((1, 2, 3, 5), (2, 3, 2, 7), (1, 5, 17, 3))  # fewer channels than positions
BENCH = {
    "cifar": (64, 128), "metric": (128, 512), "imagenet": (256, 512), "1k": (1024, 512), "maps": (64, 256 * 8 * 8),
}  # fmt: skip
BENCH_GPU = {"metric": (128, 512), "imagenet": (256, 512), "1k": (1024, 512), "4k": (4096, 512)}
BENCH_MAPS = {
    "small": (4, 256, 8, 8),
    "cifar": (64, 256, 8, 8),
    "cifar-wide": (64, 128, 16, 16),
    "imagenet": (32, 512, 7, 7),
}
BENCH_NST = {name: BENCH_MAPS[name] for name in ("small", "cifar", "imagenet")}  # seconds and GiB in its published form
BENCH_FSP = {"cifar": (64, 128, 16, 16), "cifar-early": (64, 64, 32, 32)}


def make_embeddings(shape: Shape, generator: torch.Generator) -> Inputs:
    n, features = shape
    return {
        "student": torch.randn(n, features, generator=generator),
        "teacher": torch.randn(n, features * 3 // 2 + 1, generator=generator),
    }


def make_activations(shape: Shape, generator: torch.Generator) -> Inputs:
    """What leaves a ReLU, with a sample of zeros in either model."""
    made = {name: x.relu() for name, x in make_embeddings(shape, generator).items()}
    made["student"][-1] = 0
    made["teacher"][shape[0] // 2] = 0
    return made


def make_unit(shape: Shape, generator: torch.Generator) -> Inputs:
    """Samples of about length 1."""
    return {name: x / x.shape[1] ** 0.5 for name, x in make_embeddings(shape, generator).items()}


def make_maps(shape: Shape, generator: torch.Generator) -> Inputs:
    n, channels, height, width = shape
    return {
        "student": torch.randn(shape, generator=generator),
        "teacher": torch.randn(n, channels, height + 1, width, generator=generator),
    }


def make_selective(shape: Shape, generator: torch.Generator) -> Inputs:
    """Maps of one size, the teacher's with half as many channels again, and a dead channel in either model."""
    n, channels, *size = shape
    made = {
        "student": torch.randn(shape, generator=generator).relu(),
        "teacher": torch.randn(n, channels * 3 // 2, *size, generator=generator),
    }
    if channels > 1:
        made["student"][:, -1] = 0
        made["teacher"][:, 0] = 0
    return made


def make_layers(shape: Shape, generator: torch.Generator) -> Inputs:
    """Two layers of both models, the second with half as many channels again."""
    n, channels, height, width = shape
    more = channels * 3 // 2
    return {
        "student_first": torch.randn(shape, generator=generator),
        "student_second": torch.randn(n, more, height, width, generator=generator),
        "teacher_first": torch.randn(n, channels, height + 1, width, generator=generator),
        "teacher_second": torch.randn(n, more, height + 1, width, generator=generator),
    }


def eager_similarity_preserving(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    n = student.shape[0]
    s, t = student.view(n, -1), teacher.view(n, -1)
    g_s = F.normalize(torch.mm(s, s.t()))
    g_t = F.normalize(torch.mm(t, t.t()))
    diff = g_t - g_s
    return (diff * diff).sum() / (n * n)


def eager_cosine(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    s, t = F.normalize(student), F.normalize(teacher)
    return F.mse_loss(s @ s.t(), t @ t.t())


def eager_congruence(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    """The published form: powers added one by one."""

    def kernel(x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(x)
        similar = torch.matmul(x, x.t())
        total = torch.zeros_like(similar)
        for p in range(3):
            total += math.exp(-0.8) * 0.8**p / math.factorial(p) * torch.pow(similar, p)
        return total

    return F.mse_loss(kernel(student), kernel(teacher))


def eager_pkt(student: torch.Tensor, teacher: torch.Tensor, eps: float = 1e-7, **_: Any) -> torch.Tensor:
    def probabilities(x: torch.Tensor) -> torch.Tensor:
        x = x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + eps)
        x[x != x] = 0
        p = (torch.mm(x, x.t()) + 1) / 2
        return p / p.sum(1, keepdim=True)

    p, q = probabilities(student), probabilities(teacher)
    return torch.mean(q * torch.log((q + eps) / (p + eps)))


def eager_gram(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    def gram(x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        f = x.view(n, channels, height * width)
        return f.bmm(f.transpose(1, 2)) / (channels * height * width)

    return F.mse_loss(gram(student), gram(teacher))


def eager_nst(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    """The published form: all products of all pairs of channels."""
    s, t = (F.normalize(x.view(*x.shape[:2], -1), dim=2) for x in (student, teacher))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2)

    with torch.no_grad():
        between = kernel(t, t).mean()
    return between + kernel(s, s).mean() - 2 * kernel(s, t).mean()


def eager_nst_products(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    """The same from matrix products, as careful people write it."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    with torch.no_grad():
        between = torch.bmm(t, t.mT).pow(2).mean()
    return between + torch.bmm(s, s.mT).pow(2).mean() - 2 * torch.bmm(s, t.mT).pow(2).mean()


def eager_fsp(
    student_first: torch.Tensor, student_second: torch.Tensor, teacher_first: torch.Tensor,
    teacher_second: torch.Tensor, **_: Any,
) -> torch.Tensor:  # fmt: skip

    def flow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.flatten(2), b.flatten(2)
        return torch.bmm(a, b.mT) / a.shape[2]

    return (flow(student_first, student_second) - flow(teacher_first, teacher_second)).pow(2).mean()


def eager_ickd(student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
    n, channels = student.shape[:2]

    def gram(x: torch.Tensor) -> torch.Tensor:
        f = x.view(n, channels, -1)
        return F.normalize(torch.bmm(f, f.permute(0, 2, 1)), dim=2)

    diff = gram(student) - gram(teacher)
    return (diff * diff).view(n, -1).sum() / (channels * n * n)


def samples_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read both models' features, write the student's gradient: where N is small. The arithmetic is N^2 D."""
    n, features = shape
    return n * itemsize * (features * (2 if backward else 1) + features * 3 // 2 + 1)


def maps_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read both models' maps, write the student's gradient."""
    return math.prod(shape) * itemsize * (3 if backward else 2)


def flows_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    return math.prod(shape) * itemsize * (7 if backward else 5)


Eager = Callable[..., torch.Tensor] | None


def _samples(
    name: str, function: Any, make: Any = make_embeddings, eager: Eager = None, headline: bool = False, **options: Any
) -> Case:
    return Case(
        name, function, make, options, eager, grads=("student", "teacher"), shapes=SAMPLES, bench=BENCH if eager else {},
        bench_gpu=BENCH_GPU if eager else {}, floor_bytes=samples_bytes, bench_dtypes=(torch.float32, torch.bfloat16),
        headline=headline,
    )  # fmt: skip


def _maps(
    name: str, function: Any, make: Any = make_maps, eager: Eager = None, headline: bool = False,
    shapes: tuple[Shape, ...] = MAPS, grads: tuple[str, ...] = ("student", "teacher"), bench: dict[str, Shape] = BENCH_MAPS,
    floor: Any = maps_bytes, **options: Any,
) -> Case:  # fmt: skip
    bench = bench if eager else {}
    return Case(
        name, function, make, options, eager, grads=grads, shapes=shapes, bench=bench, bench_gpu=bench, floor_bytes=floor,
        headline=headline,
    )  # fmt: skip


LAYERS = ("student_first", "student_second", "teacher_first", "teacher_second")
sp, cosine, cc = (
    similarity.similarity_preserving_loss,
    similarity.cosine_similarity_matrix_loss,
    similarity.correlation_congruence_loss,
)
SPEC = Spec(
    family="gram_match",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _samples("similarity_preserving", sp, eager=eager_similarity_preserving, headline=True),
        _samples("similarity_preserving-l1", sp, norm="l1", reduction="sum"),
        _samples("similarity_preserving-zeros", sp, make_activations),
        _samples("cosine_matrix", cosine, eager=eager_cosine),
        _samples("cosine_matrix-zeros", cosine, make_activations, eps=0.5, reduction="sum"),
        _samples("correlation_congruence", cc, eager=eager_congruence, headline=True),
        _samples("correlation_congruence-3", cc, make_unit, order=3, gamma=0.7, normalize=False),
        _samples("correlation_congruence-5", cc, make_activations, order=5, reduction="sum"),
        _samples("correlation_congruence-bilinear", cc, make_unit, kernel="bilinear", normalize=False, distance="frobenius"),
        _samples("correlation_congruence-correlation", cc, kernel="correlation"),
        _samples("pkt", similarity.pkt_loss, eager=eager_pkt, headline=True),
        _samples("pkt-zeros", similarity.pkt_loss, make_activations, eps=1e-6, reduction="sum"),
        _maps("gram", channels.gram_loss, eager=eager_gram, headline=True),
        _maps("gram-batchmean", channels.gram_loss, shapes=LONG, reduction="batchmean"),
        _maps("nst", channels.nst_loss, make_selective, eager_nst, True, bench=BENCH_NST, detach_teacher_term=False),
        _maps("nst-large", channels.nst_loss, make_selective, eager_nst_products, shapes=MAPS[1:3], detach_teacher_term=False),
        _maps("nst-channels", channels.nst_loss, make_selective, shapes=LONG, detach_teacher_term=False, reduction="sum"),
        _maps("nst-student", channels.nst_loss, make_selective, shapes=LONG, grads=("student",)),
        _maps("fsp", channels.fsp_loss, make_layers, eager_fsp, True, grads=LAYERS, bench=BENCH_FSP, floor=flows_bytes),
        _maps("fsp-norm", channels.fsp_loss, make_layers, shapes=LONG, grads=LAYERS, distance="norm"),
        _maps("ickd", channels.ickd_loss, eager=eager_ickd),
        _maps("ickd-batchmean", channels.ickd_loss, shapes=LONG, reduction="batchmean"),
    ),
)  # fmt: skip
