"""Cases of the losses from hidden states and heads for tests, bench and check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import contrastive, crd, linear, linear_sparse, sequence
from kdkernels.ops.linear_divergence.gemm import Products
from kdkernels.ops.registry import Case, Inputs, Shape, Spec
from kdkernels.ops.row_divergence.spec import eager_distillation, eager_js, eager_kl, eager_reverse_kl
from kdkernels.ops.row_gather.spec import eager_renormalize

# (tokens, vocabulary, hidden); of the teacher's hidden sizes, HIDDEN_MORE wider.
SHAPES: tuple[Shape, ...] = ((5, 4, 2), (1, 1, 1), (6, 40, 4), (2, 3, 33, 5))
SMALL = SHAPES[:1]
BENCH = {"llm-32k": (256, 32000, 512)}
BENCH_GPU = {"llm-128k": (8192, 128256, 4096), "llm-32k": (8192, 32000, 2048)}
HIDDEN_MORE = 3
STUDENT = ("student_hidden", "student_weight")
TEACHER = ("teacher_hidden", "teacher_weight")


def make_hidden(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Hidden states and heads whose logits have the spread of trained models."""
    *tokens, classes, width = shape
    made = {}
    for model, h in (("student", width), ("teacher", width + HIDDEN_MORE)):
        made[f"{model}_hidden"] = torch.randn(*tokens, h, generator=generator)
        made[f"{model}_weight"] = 3 / h**0.5 * torch.randn(classes, h, generator=generator)
    return made


def make_labelled(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The same with labels, about a quarter of them ignored (never all)."""
    *tokens, classes, _ = shape
    labels = torch.randint(0, classes, tokens, generator=generator)
    ignored = torch.rand(tokens, generator=generator) < 0.25
    ignored.view(-1)[0] = False
    return {**make_hidden(shape, generator), "labels": labels.masked_fill(ignored, -100)}


def make_everything(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Biases, token weights and class weights too."""
    *tokens, classes, _ = shape
    return {
        **make_labelled(shape, generator),
        "student_bias": torch.randn(classes, generator=generator),
        "teacher_bias": torch.randn(classes, generator=generator),
        "weight": torch.rand(tokens, generator=generator),
        "class_weight": 0.5 + torch.rand(classes, generator=generator),
    }


def make_padded(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Heads padded by one class and by three."""
    made = make_labelled(shape, generator)
    made["labels"] = made["labels"].clamp(max=shape[-2] - 2)
    made["teacher_weight"] = torch.cat([made["teacher_weight"], made["teacher_weight"][:1].expand(2, -1)])
    return made


def make_sparse(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A student, and the largest logits of a teacher."""
    made = make_hidden(shape, generator)
    teacher = made.pop("teacher_hidden") @ made.pop("teacher_weight").T
    top = teacher.topk(min(64, (shape[-2] + 1) // 2), -1)
    return {**made, "teacher_values": top.values, "teacher_indices": top.indices}


def make_sparse_everything(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Log-probabilities with a mass outside that float32 can tell from none; a bias, token weights and labels."""
    made, others = make_sparse(shape, generator), make_everything(shape, generator)
    values, at = torch.randn(shape[:-1], generator=generator).log_softmax(-1).topk(made["teacher_values"].shape[-1], -1)
    made |= {"teacher_values": values, "teacher_indices": at}
    return {**made, **{name: others[name] for name in ("student_bias", "weight", "labels")}}


def eager_sparse(
    student_hidden: torch.Tensor, student_weight: torch.Tensor, teacher_values: torch.Tensor,
    teacher_indices: torch.Tensor, **options: Any,
) -> torch.Tensor:  # fmt: skip
    scores = F.linear(student_hidden, student_weight).float()
    return eager_renormalize(scores, teacher_values.float(), teacher_indices, **options)


def _with_logits(eager: Any) -> Any:
    """As people write it: whole logits of both models, then the loss."""

    def loss(
        student_hidden: torch.Tensor, student_weight: torch.Tensor, teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        with torch.no_grad():
            teacher = F.linear(teacher_hidden, teacher_weight)
        return eager(F.linear(student_hidden, student_weight).float(), teacher.float(), **options)

    return loss


def make_queue(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Embeddings (N, D) and a queue (K, D), from shape (N, K, D)."""
    n, k, d = shape
    made = {name: torch.randn(n, d, generator=generator) for name in ("student", "teacher")}
    return {**made, "queue": F.normalize(torch.randn(k, d, generator=generator), dim=1)}


def make_embeddings(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = make_queue(shape, generator)
    del made["queue"]
    return made


def make_banks(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = make_queue(shape, generator)
    made["student_bank"] = made.pop("queue")
    made["teacher_bank"] = made["student_bank"].flip(0)
    made["indices"] = torch.randint(0, shape[1], (shape[0], 1 + shape[1] // 2), generator=generator)
    return made


def make_sequences(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A teacher's sequences (B, T) behind prompts of one token, from shape (B, T, V, H)."""
    b, t, classes, width = shape
    mask = torch.ones(b, t)
    mask[:, 0] = 0
    return {
        "student_hidden": torch.randn(b, t, width, generator=generator),
        "student_weight": 3 / width**0.5 * torch.randn(classes, width, generator=generator),
        "tokens": torch.randint(0, classes, (b, t), generator=generator),
        "completion_mask": mask,
        "sequence_weight": torch.rand(b, generator=generator),
    }


def make_sequence_logits(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = make_sequences(shape, generator)
    return {"student_logits": made.pop("student_hidden") @ made.pop("student_weight").T, **made}


def eager_compress(
    student: torch.Tensor, teacher: torch.Tensor, queue: torch.Tensor, temperature: float = 0.04, **_: Any
) -> torch.Tensor:
    s = F.normalize(student.float(), dim=1) @ queue.T / temperature
    t = F.normalize(teacher.float(), dim=1) @ queue.T / temperature
    return F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")


def eager_seed(
    student: torch.Tensor, teacher: torch.Tensor, queue: torch.Tensor, temperature: float = 0.2,
    teacher_temperature: float = 1e-4, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """As the authors: the teacher's embeddings stand before the queue, everybody's scores against all are made."""
    s, t = (F.normalize(x.float(), dim=1) for x in (student, teacher))
    own = (t * t).sum(1, keepdim=True)
    of_teacher = torch.cat([own, t @ queue.T], 1) / teacher_temperature
    of_student = torch.cat([(s * t).sum(1, keepdim=True), s @ queue.T], 1) / temperature
    return -(F.softmax(of_teacher, 1) * F.log_softmax(of_student, 1)).sum(1).mean()


def eager_info_nce(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 0.07, symmetric: bool = False, **_: Any
) -> torch.Tensor:
    scores = F.normalize(student.float(), dim=1) @ F.normalize(teacher.float(), dim=1).T / temperature
    labels = torch.arange(len(scores), device=scores.device)
    if not symmetric:
        return F.cross_entropy(scores, labels)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def eager_crd(
    student: torch.Tensor, teacher: torch.Tensor, student_bank: torch.Tensor, teacher_bank: torch.Tensor,
    indices: torch.Tensor, temperature: float = 0.07, eps: float = 1e-7, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """As the authors: a copy of the bank's entries for each sample."""

    def side(x: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        n, k = len(bank), indices.shape[1] - 1
        p = torch.exp(torch.einsum("nkd,nd->nk", bank[indices], F.normalize(x.float(), dim=1)) / temperature)
        p = p / (p.detach().mean() * n)
        noise = k / n
        log_positive = torch.log(p[:, 0] / (p[:, 0] + noise + eps))
        return -(log_positive.sum() + torch.log(noise / (p[:, 1:] + noise + eps)).sum()) / len(x)

    return side(student, teacher_bank) + side(teacher, student_bank)


def _scores(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """The product as the kernels make it where it is quicker than in one piece, which a floor should not be."""
    if hidden.dtype == torch.float32:
        Products(hidden, weight).scores(slice(None), out)
    else:
        torch.mm(hidden, weight.T, out=out)


def products(inputs: Inputs, backward: bool) -> Callable[[], Any]:
    """The matrix products alone, on whole tensors that exist already, in the inputs' dtype."""
    h_s, w_s, h_t, w_t = (inputs[n].detach() for n in STUDENT + TEACHER)
    student, teacher = h_s @ w_s.T, h_t @ w_t.T
    d_hidden, d_weight = torch.empty_like(h_s), torch.empty_like(w_s)

    def run() -> None:
        _scores(h_s, w_s, student)
        _scores(h_t, w_t, teacher)
        if backward:
            torch.mm(student, w_s, out=d_hidden)
            torch.mm(student.T, h_s, out=d_weight)

    return run


def student_products(inputs: Inputs, backward: bool) -> Callable[[], Any]:
    """The same of the student alone."""
    hidden, weight = (inputs[n].detach() for n in STUDENT)
    scores, d_hidden, d_weight = hidden @ weight.T, torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        _scores(hidden, weight, scores)
        if backward:
            torch.mm(scores, weight, out=d_hidden)
            torch.mm(scores.T, hidden, out=d_weight)

    return run


def queue_products(inputs: Inputs, backward: bool) -> Callable[[], Any]:
    """The same of embeddings and a queue, which does not learn."""
    s, t, queue = (inputs[n].detach().float() for n in ("student", "teacher", "queue"))
    student, teacher, d_student = s @ queue.T, t @ queue.T, torch.empty_like(s)

    def run() -> None:
        _scores(s, queue, student)
        _scores(t, queue, teacher)
        if backward:
            torch.mm(student, queue, out=d_student)

    return run


def batch_products(inputs: Inputs, backward: bool) -> Callable[[], Any]:
    """The same of two models' embeddings with each other, of which the first learns."""
    s, t = (inputs[n].detach().float() for n in ("student", "teacher"))
    scores, d_student = s @ t.T, torch.empty_like(s)

    def run() -> None:
        _scores(s, t, scores)
        if backward:
            torch.mm(scores, t, out=d_student)

    return run


def bank_products(inputs: Inputs, backward: bool) -> Callable[[], Any]:
    """The same of both models' embeddings with each other's bank."""
    pairs = [(inputs[x].detach(), inputs[f"{y}_bank"]) for x, y in (("student", "teacher"), ("teacher", "student"))]
    scores, d_student = pairs[0][0] @ pairs[0][1].T, torch.empty_like(pairs[0][0])

    def run() -> None:
        for x, bank in pairs:
            _scores(x, bank, scores)
        if backward:
            torch.mm(scores, pairs[0][1], out=d_student)

    return run


QUEUE = {"queue-16k": (256, 16384, 128)}


def _contrastive(
    name: str, function: Any, eager: Any, make: Any = make_queue, floor: Any = queue_products,
    grads: tuple[str, ...] = ("student",), bench: Mapping[str, Shape] = QUEUE, bench_gpu: Mapping[str, Shape] | None = None, **options: Any,
) -> Case:  # fmt: skip
    return Case(
        name, function, make, options, eager, grads=grads, shapes=((5, 4, 2), (3, 50, 6)), bench=bench,
        bench_gpu={"queue-128k": (256, 131072, 512)} if bench_gpu is None else bench_gpu,
        floor_work=floor, headline=True,
    )  # fmt: skip


def _case(
    name: str, function: Any, make: Any = make_hidden, eager: Any = None, grads: tuple[str, ...] = STUDENT,
    shapes: tuple[Shape, ...] = SHAPES, **options: Any,
) -> Case:  # fmt: skip
    return Case(
        name, function, make, options, None if eager is None else _with_logits(eager), grads=grads, shapes=shapes,
        bench={} if eager is None else BENCH, bench_gpu={} if eager is None else BENCH_GPU, bench_grads=STUDENT,
        bench_dtypes=(torch.float32, torch.bfloat16), floor_work=products, headline=eager is not None,
    )  # fmt: skip


SPEC = Spec(
    family="linear_divergence",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _case("linear_kl_div", linear.linear_kl_div, eager=eager_kl, temperature=2.0),
        _case("linear_js_div", linear.linear_js_div, eager=eager_js),
        _case("linear_distillation_loss", linear.linear_distillation_loss, make_labelled, eager_distillation),
        _case("linear_kl_div-both", linear.linear_kl_div, grads=STUDENT + TEACHER, temperature=2.0),
        _case("linear_reverse_kl_div", linear.linear_reverse_kl_div, eager=eager_reverse_kl, temperature=2.0),
        _case("linear_reverse_kl_div-labels", linear.linear_reverse_kl_div, make_labelled, shapes=SMALL, temperature=2.0),
        _case("linear_generalized_js_div", linear.linear_generalized_js_div, eager=eager_js, shapes=SMALL, beta=0.1),
        _case("linear_generalized_js_div-none", linear.linear_generalized_js_div, make_labelled, beta=0.2, reduction="none"),
        # Two chunks and a shorter one.
        _case(
            "linear_distillation_loss-everything", linear.linear_distillation_loss, make_everything,
            grads=(*STUDENT, "student_bias", *TEACHER, "teacher_bias"), shapes=SMALL, divergence="js",
            label_smoothing=0.1, chunk_bytes=140, student_softcap=4.0, teacher_softcap=5.0, student_logit_scale=1.5,
            teacher_logit_scale=0.5,
        ),
        _case(
            "linear_distillation_loss-decoupled", linear.linear_distillation_loss, make_padded, shapes=SMALL,
            divergence="decoupled_kl", vocab_size=3, compact=True, chunk_bytes=80,
        ),
        Case(
            "linear_topk_div", linear_sparse.linear_topk_div, make_sparse, {"temperature": 2.0}, eager_sparse,
            grads=(*STUDENT, "teacher_values"), shapes=SHAPES, bench=BENCH, bench_gpu=BENCH_GPU, bench_grads=STUDENT,
            bench_dtypes=(torch.float32, torch.bfloat16), floor_work=student_products, headline=True,
        ),
        _case(
            "linear_topk_div-uniform", linear_sparse.linear_topk_div, make_sparse_everything,
            grads=(*STUDENT, "student_bias", "teacher_values"), shapes=SHAPES[-1:], missing="uniform",
            teacher_values_are="log_probs", student_softcap=4.0, student_logit_scale=1.5, chunk_bytes=600, compact=True,
        ),
        _case(
            "linear_topk_div-tail-js-none", linear_sparse.linear_topk_div, make_sparse_everything, shapes=SMALL,
            missing="tail", divergence="js", teacher_values_are="log_probs", reduction="none", chunk_bytes=70,
        ),
        _contrastive("compress_loss", contrastive.compress_loss, eager_compress),
        _contrastive("seed_loss", contrastive.seed_loss, eager_seed, teacher_temperature=0.1),
        _contrastive(
            "info_nce_distillation_loss", contrastive.info_nce_distillation_loss, eager_info_nce, make_embeddings,
            batch_products, ("student", "teacher"), {"batch-256": (256, 1, 128), "batch-4k": (4096, 1, 128)},
            {"batch-32k": (32768, 1, 512)}, temperature=0.2, symmetric=True,
        ),
        Case(
            "linear_sequence_loss", sequence.linear_sequence_loss, make_sequences, grads=STUDENT,
            shapes=((2, 3, 4, 2), (2, 3, 33, 5)),
        ),
        Case(
            "sequence_loss", sequence.sequence_loss, make_sequence_logits, grads=("student_logits",),
            shapes=((2, 3, 4, 2), (2, 3, 33, 5)),
        ),
        _contrastive(
            "crd_loss", crd.crd_loss, eager_crd, make_banks, bank_products, ("student", "teacher"),
            {"bank-16k": (64, 16384, 128)}, {"bank-50k": (64, 50000, 128)}, temperature=0.2,
        ),
    ),
)  # fmt: skip
