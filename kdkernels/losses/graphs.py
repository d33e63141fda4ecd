"""Losses between graphs: samples or nodes are vertices, and what relates two of them is an edge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from kdkernels import backends, checks, groups
from kdkernels.losses.module import LossModule
from kdkernels.losses.samples import EPS, mean_square, normalized, off_diagonal, squared_distances, wide
from kdkernels.ops.edge_relation import op as edge_relation
from kdkernels.ops.gram_match.kinds import Kind, Normalize
from kdkernels.ops.gram_match.op import gram_match
from kdkernels.ops.graph_closure import op as closure
from kdkernels.ops.pairwise_distance.reference import smooth_l1
from kdkernels.ops.scalars import Number, factor, readable

if TYPE_CHECKING:
    from kdkernels.distributed.batch import Samples

KERNELS = ("linear", "polynomial", "euclidean", "rbf")


# --------------------------------------------------------------------------------------------------- structure of nodes


def _kernel_matrix(
    x: torch.Tensor, backend: str, kernel: str, normalize: bool, gamma: float, degree: int, offset: float, squared: bool,
    samples: Samples | None = None,
) -> torch.Tensor:  # fmt: skip
    """Of all samples; with `samples`, this rank's rows of it, from this rank's x."""
    x = normalized(x) if normalize else wide(x)
    if samples is not None:
        from kdkernels.distributed import ring

        if kernel in ("linear", "polynomial"):
            product = ring.products(x, x, samples)
            return product if kernel == "linear" else (product + offset) ** degree
        d2, other = ring.squared_distances(x, samples), ring.others(samples, x.device)
    else:
        d2 = squared_distances(x, backend)
        other = off_diagonal(d2)
    if kernel == "rbf":
        return torch.exp(-gamma * d2)
    if kernel == "euclidean":
        kept = other & (d2 > EPS)
        return d2 if squared else d2.where(kept, 1.0).sqrt().where(kept, 0.0)
    # From distances, so that no user's allow_tf32 touches it.
    norms = wide(x).pow(2).sum(1)
    product = (norms[:, None] + norms[None] - d2) / 2
    return product if kernel == "linear" else (product + offset) ** degree


def _check_kernel(
    kernel: str, normalize: bool, gamma: float, degree: int, offset: float, squared: bool
) -> None:  # fmt: skip
    checks.choice("kernel", kernel, KERNELS)
    checks.plain_number("gamma", gamma, low=0, open_low=True)
    checks.plain_number("offset", offset, low=0)
    checks.integer("degree", degree, low=1)
    checks.flag("normalize", normalize)
    checks.flag("squared", squared)


def global_structure_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    kernel: str = "linear",
    normalize: bool = True,
    gamma: float = 0.5,
    degree: int = 2,
    offset: float = 0.0,
    squared: bool = False,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Global structure preserving (GSP): the mean squared difference of both models' kernel matrices of all nodes.

    mean_ij (k(x^s_i, x^s_j) - k(x^t_i, x^t_j))^2, i = j included, with k(x, y) = x.y ("linear"), (x.y + offset)^degree
    ("polynomial"), |x - y| ("euclidean"), or exp(-gamma |x - y|^2) ("rbf"). Joshi et al. (2021, arXiv:2111.04964).

    Args:
        student: nodes' features, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ.
        kernel: "linear", "polynomial", "euclidean" or "rbf".
        normalize: L2-normalise the features first, so that a linear kernel is the cosine.
        gamma, degree, offset, squared: of the kernels; squared makes "euclidean" |x - y|^2.
        reduction: "mean" divides by N^2, "sum" by nothing.
        group: the ranks whose nodes are one graph, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        ring: with a group, blocks of samples go from rank to rank and no rank has all of them: memory O(N_local N), each
            rank computes its own rows, by torch's operations whatever the backend.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0.

    Raises:
        ValueError: a different number of nodes, differing devices, no features, an unknown kernel or reduction, gamma or
            degree not positive.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: efficient-gnns calls them "cosine" and "poly" (normalised), "l2" and "rbf" (both with normalize=False),
    and draws 8192 nodes where there are more: do so before.
    """
    _check_kernel(kernel, normalize, gamma, degree, offset, squared)
    checks.choice("reduction", reduction, ("mean", "sum"))
    groups.ring(ring, group)
    student, teacher, samples = groups.batch("global_structure_loss", student, teacher, group, gather=not ring)
    backend = backends.resolve("global_structure_loss", (student, teacher), backend)
    options = kernel, normalize, gamma, degree, offset, squared
    if samples is not None and ring:
        s, t = (_kernel_matrix(x, backend, *options, samples) for x in (student, teacher))
        total = samples.total((s - t).pow(2).sum())
        return total if reduction == "sum" else total / max(samples.whole**2, 1)
    if kernel == "linear":
        n = student.shape[0]
        return gram_match(
            student, teacher, kind=Kind.LINEAR,
            normalize=Normalize.CLAMPED if normalize else Normalize.NONE,
            scale=1.0 / max(n * n, 1) if reduction == "mean" else 1.0, backend=backend,
        )  # fmt: skip
    s, t = (_kernel_matrix(x, backend, *options) for x in (student, teacher))
    return (s - t).pow(2).sum() if reduction == "sum" else mean_square(s - t)


def _edge_kernel(
    x: torch.Tensor, edges: edge_relation.Edges, backend: str, kernel: str, normalize: bool, gamma: float, degree: int,
    offset: float, squared: bool,
) -> torch.Tensor:  # fmt: skip
    """_kernel_matrix's elements along edges."""
    x = normalized(x) if normalize else wide(x)
    products = kernel in ("linear", "polynomial")
    value = edge_relation.edge_values(x, edges, products=products, backend=backend)
    if products:
        return value if kernel == "linear" else (value + offset) ** degree
    if kernel == "rbf":
        return torch.exp(-gamma * value)
    if squared:
        return value
    kept = value > EPS
    return value.where(kept, 1.0).sqrt().where(kept, 0.0)


_known_edges: Any = WeakIdKeyDictionary()  # edge_index -> (its version, nodes, the edges in order)


def _check_edges(edge_index: torch.Tensor, device: torch.device) -> None:
    if not isinstance(edge_index, torch.Tensor):
        raise TypeError(f"edge_index must be a tensor, got {type(edge_index).__name__}")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"edge_index must hold nodes (int64 or int32), got {str(edge_index.dtype).removeprefix('torch.')}"
        )
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, E), sources and targets; got {tuple(edge_index.shape)}")
    if edge_index.device != device:
        raise ValueError(f"edge_index must be on {device} with the features, got {edge_index.device}")
    checks.dense("edge_index", edge_index)


def _edges_in_order(edge_index: torch.Tensor, nodes: int) -> edge_relation.Edges:
    """Sorts the edges, and looks at them; those of a tensor that was here before, and has not changed, are remembered."""
    remember = readable(edge_index) and not edge_index.is_inference()
    if remember:
        version, of_nodes, found = _known_edges.get(edge_index, (None, None, None))
        if (version, of_nodes) == (edge_index._version, nodes):
            return found
    checks.indices("edge_index", edge_index, nodes)
    found = edge_relation.ordered(edge_index.long(), nodes)
    if remember:
        _known_edges[edge_index] = edge_index._version, nodes, found
    return found


def local_structure_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    edge_index: torch.Tensor,
    *,
    kernel: str = "rbf",
    normalize: bool = False,
    gamma: float = 0.005,
    degree: int = 2,
    offset: float = 0.0,
    squared: bool = True,
    divergence: str = "kl",
    reduction: str = "nodes",
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Local structure preserving (LSP): how similar each node is to its neighbours in a given graph.

    For each node i, p_j = softmax over its neighbours j (edges j -> i) of k(x_j, x_i), with the kernels of
    global_structure_loss; the loss is the mean over nodes of KL(p^t, p^s). Yang et al. (CVPR 2020, arXiv:2003.10477).

    Args:
        student: nodes' features, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ.
        edge_index: source and target of every edge, int64 or int32, (2, E), in any order. Its order is worked out once
            for a tensor that stays and is not written to.
        kernel: "rbf", exp(-gamma |x - y|^2); "euclidean", |x - y|^2; "linear", x.y; "polynomial", (x.y + offset)^degree.
        normalize: L2-normalise the features first, so that a linear kernel is the cosine.
        gamma, degree, offset: of the kernels.
        squared: False makes "euclidean" |x - y|.
        divergence: "kl", or "mse" for squared differences of the probabilities.
        reduction: "nodes" divides by N (the paper), "edges" by E, "sum" by nothing.
        group: the ranks whose nodes are one graph, in the order of ranks, `student` and `teacher` having this rank's. Its
            edges are any part of the graph's, and number the nodes of all ranks. Default: this process's alone. Values
            and gradients: kdkernels/distributed/README.md.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs). Nodes without edges add nothing. Memory: O(E + N D), never E D.

    Raises:
        ValueError: a different number of nodes, differing devices, no features, edges that are not (2, E), an unknown
            kernel, divergence or reduction, gamma or degree not positive.
        TypeError: features that are not floating point, edges that are not integers.
        IndexError: an edge to a node that is not there (on a GPU: NaN, unless KDKERNELS_DEBUG=1).
        BackendError: the backend asked for cannot run here.

    Against others: the paper's kernels have gamma = 1/(2 * 100) and degree 2. efficient-gnns has reduction="edges" and
    calls them "cosine" (linear, normalize=True), "poly" (polynomial, normalize=True), "l2" (euclidean, squared=False) and
    "rbf" (gamma=0.5), its criterion "mse" included.
    """
    _check_kernel(kernel, normalize, gamma, degree, offset, squared)
    checks.choice("divergence", divergence, ("kl", "mse"))
    checks.choice("reduction", reduction, ("nodes", "edges", "sum"))
    student, teacher, samples = groups.batch("local_structure_loss", student, teacher, group)
    if samples is None:
        _check_edges(edge_index, student.device)
    else:
        from kdkernels.distributed.batch import meet

        with groups.refusing(group):
            _check_edges(edge_index, student.device)
        mine = edge_index.T
        edge_index = meet("local_structure_loss", group, edge_index=mine).gather(mine).T
    nodes = student.shape[0]
    edges = _edges_in_order(edge_index, nodes)
    backend = backends.resolve("local_structure_loss", (student, teacher), backend, edge_relation.BACKENDS)
    s, t = (
        _edge_kernel(x, edges, backend, kernel, normalize, gamma, degree, offset, squared) for x in (student, teacher)
    )
    total = edge_relation.edge_divergence(s, t, edges, squares=divergence == "mse", backend=backend)
    return total if reduction == "sum" else total / max(nodes if reduction == "nodes" else edge_index.shape[1], 1)


# ------------------------------------------------------------------------------- soft graphs: connectivity and distances


def _soft_closures(
    x: torch.Tensor,
    threshold: Number,
    sharpness: Number,
    hop: Number,
    temperature: Number,
    options: tuple,
    backend: str,
) -> torch.Tensor:
    """Soft shortest paths by -log adjacency, and by that plus a length for each edge: (2, N, N)."""
    similarity = _kernel_matrix(x, backend, *options)
    to_edge = F.softplus((threshold - similarity) / sharpness)
    return closure.soft_shortest_paths(torch.stack([to_edge, to_edge + hop]), temperature, backend=backend)


def graph_structure_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    threshold: Number = 0.5,
    sharpness: Number = 0.1,
    temperature: Number = 0.1,
    hop: Number = 1.0,
    connectivity_weight: Number = 1.0,
    path_weight: Number = 1.0,
    kernel: str = "linear",
    normalize: bool = True,
    gamma: float = 0.5,
    beta: float = 1.0,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The structure of two soft graphs over the same samples: who reaches whom, and how far it is.

    Samples are vertices, and the soft adjacency of two of them is A_ij = sigmoid((k(x_i, x_j) - threshold) / sharpness).
    d(l) being the length of the shortest path by edge lengths l, the loss is

        w_c mean_(i != j) (R^s_ij - R^t_ij)^2 + w_p mean_(i != j) smooth-L1(P^s_ij - P^t_ij),
        R = exp(-d(-log A)),   the best path's product of adjacencies: connectivity,
        P = d(hop - log A),    edges on the shortest path, absent ones being long.

    As sharpness and temperature go to 0, R becomes whether i and j are connected in the graph of the pairs above the
    threshold, and P / hop the number of edges between them. d itself is soft: the free energy of a random walk from i
    to its arrival at j (Kivimaki, Shimbo and Saerens 2014, arXiv:1212.1666), at least the shortest path's length and at
    most that plus `temperature log N` for each of its edges. It sums over walks, so the order of the samples does not
    matter, its gradients to lengths are not negative, and different soft graphs have different d.
    Structural distillation by connectivity and shortest paths is described in the literature without code; this is
    our definition of it.

    Args:
        student: embeddings, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ.
        threshold: the similarity at which two samples are half adjacent.
        sharpness: how fast adjacency changes there, positive.
        temperature: of the soft shortest paths, positive, in units of length.
        hop: the length of an edge whose adjacency is 1, not negative.
        connectivity_weight, path_weight: numbers or tensors with one element.
        kernel: the similarity: "linear" (the cosine, with `normalize`) or "rbf", exp(-gamma |x - y|^2).
        normalize: L2-normalise the embeddings first.
        gamma: see kernel.
        beta: where smooth-L1 turns linear.
        reduction: "mean" over ordered pairs, or "sum".
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N < 2. Memory and time are O(N^2) and O(N^3).

    Raises:
        ValueError: a different number of samples, differing devices, no features, sharpness, temperature, gamma or beta
            not positive, an unknown kernel or reduction.
        TypeError: embeddings that are not floating point.
        BackendError: the backend asked for cannot run here.
    """
    for name, value in (("sharpness", sharpness), ("temperature", temperature)):
        checks.number(name, value, low=0, open_low=True, like=student)
    checks.number("hop", hop, low=0, like=student)
    for name, value in (
        ("threshold", threshold), ("connectivity_weight", connectivity_weight), ("path_weight", path_weight),
    ):  # fmt: skip
        checks.number(name, value, like=student)
    checks.flag("normalize", normalize)
    checks.choice("kernel", kernel, ("linear", "rbf"))
    checks.plain_number("gamma", gamma, low=0, open_low=True)
    checks.plain_number("beta", beta, low=0, open_low=True)
    checks.choice("reduction", reduction, ("mean", "sum"))
    student, teacher, _ = groups.batch("graph_structure_loss", student, teacher, group)
    backend = backends.resolve("graph_structure_loss", (student, teacher), backend, closure.BACKENDS)
    options = kernel, normalize, gamma, 1, 0.0, False
    (r_s, p_s), (r_t, p_t) = (
        _soft_closures(x, threshold, sharpness, hop, temperature, options, backend) for x in (student, teacher)
    )
    # Distances from a vertex to itself are 0 in both.
    connectivity = (torch.exp(-r_s) - torch.exp(-r_t)).pow(2).sum()
    paths = smooth_l1(p_s - p_t, beta).sum()
    total = factor(connectivity_weight) * connectivity + factor(path_weight) * paths
    n = student.shape[0]
    return total if reduction == "sum" else total / max(n * (n - 1), 1)


class GlobalStructureLoss(LossModule):
    """`global_structure_loss` as a module: GlobalStructureLoss(kernel="rbf")(student, teacher)."""

    function = staticmethod(global_structure_loss)


class GraphStructureLoss(LossModule):
    """`graph_structure_loss` as a module: GraphStructureLoss(threshold=0.3)(student, teacher)."""

    function = staticmethod(graph_structure_loss)


class LocalStructureLoss(LossModule):
    """`local_structure_loss` as a module: LocalStructureLoss(kernel="linear")(student, teacher, edge_index)."""

    function = staticmethod(local_structure_loss)
