"""Instance relationship graphs: samples are vertices, distances edges, and layers move the vertices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kdkernels import backends, checks, groups
from kdkernels.losses.module import LossModule
from kdkernels.losses.samples import EPS, mean_square, off_diagonal, squared_distances, wide
from kdkernels.ops.scalars import Number, factor


def _over_maximum(d2: torch.Tensor, kept: torch.Tensor | None, squared: bool, detach: bool) -> torch.Tensor:
    """Distances over the greatest of them; those that are 0 have no gradient."""
    kept = d2 > EPS if kept is None else kept & (d2 > EPS)
    d = d2.where(kept, 1.0)
    d = (d if squared else d.sqrt()).where(kept, 0.0)
    if d.numel() == 0:
        return d
    greatest = d.detach().amax() if detach else d.amax()
    return d / greatest.where(greatest > 0, 1.0)


def _edges(x: torch.Tensor, backend: str, squared: bool, detach: bool) -> torch.Tensor:
    d2 = squared_distances(x, backend)
    return _over_maximum(d2, off_diagonal(d2), squared, detach)


def _moved(name: str, before: torch.Tensor, after: torch.Tensor, squared: bool, detach: bool) -> torch.Tensor:
    """How far each sample moves from one map to the next, in the coarser map and the fewer channels."""
    if before.shape[2:] != after.shape[2:]:
        height, width = after.shape[2:]
        if before.shape[2] % height == 0 == before.shape[3] % width:  # adaptive pooling's backward adds in any order
            before = F.avg_pool2d(before, (before.shape[2] // height, before.shape[3] // width))
        else:
            before = F.adaptive_avg_pool2d(before, (height, width))
    channels = before.shape[1]
    if after.shape[1] % channels:
        raise ValueError(
            f"{name}: a transformation leads to a multiple of the channels it comes from, got {channels} and {after.shape[1]}"
        )
    after = after.unflatten(1, (channels, -1)).mean(2)
    return _over_maximum((before - after).pow(2).flatten(1).sum(1), None, squared, detach)


def _layers(
    student: torch.Tensor | Sequence[torch.Tensor], teacher: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Both as lists of one length, the same samples in all layers."""
    students, teachers = checks.tensors("student_features", student), checks.tensors("teacher_features", teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(
            f"student_features and teacher_features must be equally many layers, at least one; got {len(students)} and {len(teachers)}"
        )
    for i, (s, t) in enumerate(zip(students, teachers)):
        checks.embeddings(s, t, (f"student_features[{i}]", f"teacher_features[{i}]"))
        if s.shape[0] != students[0].shape[0]:
            raise ValueError(f"all layers must hold the same samples, got {students[0].shape[0]} and {s.shape[0]}")
    return students, teachers


def _everybodys(
    group: torch.distributed.ProcessGroup, student: list[torch.Tensor], teacher: list[torch.Tensor],
    student_logits: torch.Tensor | None, teacher_logits: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """The same for the samples of all ranks."""
    from kdkernels.distributed.batch import meet

    name = f"instance_relation_graph_loss of {len(student)} layers"
    samples = meet(
        name, group, student_features=student[0], teacher_features=teacher[0], student_logits=student_logits,
        teacher_logits=teacher_logits,
    )  # fmt: skip
    for of_student, of_teacher in zip(student[1:], teacher[1:]):
        meet(name, group, student_features=of_student, teacher_features=of_teacher)
    s, t = (None if x is None else samples.gather(x) for x in (student_logits, teacher_logits))
    return [samples.gather(x) for x in student], [samples.gather(x) for x in teacher], s, t


def instance_relation_graph_loss(
    student_features: torch.Tensor | Sequence[torch.Tensor],
    teacher_features: torch.Tensor | Sequence[torch.Tensor],
    student_logits: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    *,
    vertex_weight: Number = 0.1,
    edge_weight: Number = 5.0,
    transformation_weight: Number = 5.0,
    transformations: Sequence[tuple[int, int]] | None = None,
    squared: bool = True,
    detach_maximum: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Instance relationship graphs (IRG): vertices, edges, and how edges' ends move from layer to layer.

    w_v MSE(logits) + w_e mean over layers of MSE(E^s, E^t) + w_t mean over transformations of MSE(M^s, M^t), where
    E_ij = |x_i - x_j|^2 over the greatest of them, and M_i = |pool(f_i) - g_i|^2 over the greatest of them for a sample's
    map f in one layer and g in a later one, groups of whose channels are averaged to f's number. Liu et al. (CVPR 2019,
    Knowledge Distillation via Instance Relationship Graph).

    Args:
        student_features: a layer's features, (N, D) or (N, C, H, W), or a list of layers, in order; float16, bfloat16,
            float32 or float64.
        teacher_features: as many layers of the same N samples; dtypes and features may differ.
        student_logits, teacher_logits: the vertices, of one shape; without them there is no such term.
        vertex_weight, edge_weight, transformation_weight: numbers or tensors with one element.
        transformations: pairs (from, to) of layers; default: each map (N, C, H, W) and the next one.
        squared: squared distances.
        detach_maximum: the greatest distance is a constant.
        group: the ranks whose samples are one batch, of which the layers and logits hold this rank's; default: this
            process's alone. Values and gradients: kdkernels/distributed/README.md.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs). Where all distances are 0 they stay 0, without gradient.

    Raises:
        ValueError: layers that do not match in number, samples or device, or have no features; logits of different
            shapes or of one model only; a transformation between layers that are not maps, or to a number of channels
            that is no multiple.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: Knowledge-Distillation-Zoo has these defaults, with two maps and an embedding; the authors' Caffe code
    takes the greatest distance as a constant.
    """
    for name, value in (
        ("vertex_weight", vertex_weight), ("edge_weight", edge_weight), ("transformation_weight", transformation_weight),
    ):  # fmt: skip
        checks.number(name, value, like=student_features if isinstance(student_features, torch.Tensor) else None)
    checks.flag("squared", squared)
    checks.flag("detach_maximum", detach_maximum)
    with groups.refusing(group):
        student, teacher = _layers(student_features, teacher_features)
        if (student_logits is None) != (teacher_logits is None):
            raise ValueError("student_logits and teacher_logits go together: one of them is missing")
        if student_logits is not None and teacher_logits is not None:
            checks.scores("student_logits", student_logits, "teacher_logits", teacher_logits, -1)
            if group is not None:
                groups.of_samples("student_logits", student_logits, student[0])
    if group is not None:
        student, teacher, student_logits, teacher_logits = _everybodys(
            group, student, teacher, student_logits, teacher_logits
        )
    if transformations is None:
        maps = [i for i, x in enumerate(student) if x.dim() == 4 == teacher[i].dim()]
        transformations = list(itertools.pairwise(maps))
    if not isinstance(transformations, (list, tuple)):
        raise TypeError(f"transformations must be a sequence of pairs of layers, got {type(transformations).__name__}")
    for i, pair in enumerate(transformations):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(checks.whole, pair)):
            raise TypeError(f"transformations[{i}] must be a pair of layers' numbers, got {pair!r:.80}")
        if any(not 0 <= i < len(student) or student[i].dim() != 4 or teacher[i].dim() != 4 for i in pair):
            raise ValueError(f"transformations must join layers that are maps (N, C, H, W), got {tuple(pair)}")
    backend = backends.resolve("instance_relation_graph_loss", (*student, *teacher), backend)

    # Before anything else: a layer gets gradients from several terms, which are to be rounded once.
    student, teacher = [wide(x) for x in student], [wide(x) for x in teacher]

    def edges(x: torch.Tensor) -> torch.Tensor:
        return _edges(x.flatten(1), backend, squared, detach_maximum)

    terms = [mean_square(edges(s) - edges(t)) for s, t in zip(student, teacher)]
    loss = factor(edge_weight) * (sum(terms[1:], terms[0]) / len(terms))
    for a, b in transformations:
        moved = [
            _moved(name, x[a], x[b], squared, detach_maximum)
            for name, x in (("student", student), ("teacher", teacher))
        ]
        loss = loss + factor(transformation_weight) / len(transformations) * mean_square(moved[0] - moved[1])
    if student_logits is not None and teacher_logits is not None:
        loss = loss + factor(vertex_weight) * mean_square(wide(student_logits) - wide(teacher_logits))
    return loss


class InstanceRelationGraphLoss(LossModule):
    """`instance_relation_graph_loss` as a module: InstanceRelationGraphLoss()(student_layers, teacher_layers)."""

    function = staticmethod(instance_relation_graph_loss)
