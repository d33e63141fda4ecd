"""Options that are rarely used: against formulas in float64, and the kernels that take them against the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from published import close, gradients, same
from standins import relations
from sweep import CASES, F32, F64, check, runs_on
from targets import TARGETS, Target

import kdkernels as kd
from kdkernels.ops.graph_closure.op import soft_shortest_paths


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ------------------------------------------------------------------------------------------------------------- formulas


def test_channel_attention_with_eps_added() -> None:
    s, t = randn(3, 5, 4, 4), randn(3, 5, 4, 4, seed=1)
    a, b = (x.pow(2).mean((2, 3)) for x in (s, t))
    a, b = (x / (x.norm(dim=1, keepdim=True) + 0.5) for x in (a, b))
    same(kd.channel_attention_transfer_loss(s, t, eps=0.5, add_eps=True), (a - b).pow(2).mean())
    same(kd.channel_attention_transfer_loss(s, t, eps=0.5, add_eps=True, distance="norm"), (a - b).norm(dim=1).mean())


@pytest.mark.parametrize("linear", [False, True])
def test_an_adapter_has_one_bias(linear: bool) -> None:
    assert kd.Adapter(3, 4, linear=linear).project.bias is not None
    assert kd.Adapter(3, 4, linear=linear, batch_norm=True).project.bias is None


def test_least_variance() -> None:
    s, t, raw = randn(3, 5, 4), randn(3, 5, 4, seed=1), randn(5, seed=2)
    variance = (F.softplus(raw) + 0.5)[:, None]
    each = 0.5 * ((s - t) ** 2 / variance + variance.log())
    for reduction, expected in (("mean", each.mean()), ("batchmean", each.sum() / 3), ("sum", each.sum())):
        same(kd.variational_information_loss(s, t, raw, eps=0.5, reduction=reduction), expected)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_maps_of_another_size_are_interpolated(which: str) -> None:
    s, t = randn(2, 3, 4, 5), randn(2, 3, 6, 7, seed=1)
    x, y = (
        (F.interpolate(s, (6, 7), mode="bilinear"), t)
        if which == "student"
        else (s, F.interpolate(t, (4, 5), mode="bilinear"))
    )
    same(kd.pearson_feature_loss(s, t, resize=which), kd.pearson_feature_loss(x, y))


def test_sums_over_rows() -> None:
    s, t, y = randn(6, 5), randn(6, 5, seed=1), torch.tensor([1, 4, -100, 0, 2, 2])
    same(kd.cosine_loss(s, t, reduction="sum"), (1 - F.cosine_similarity(s, t)).sum())
    over = (0.3 + s - s.gather(1, y.clamp_min(0)[:, None])).scatter(1, y.clamp_min(0)[:, None], 0.0).clamp_min(0)
    for wrong, rows in (("all", over.sum(1) / 4), ("hardest", over.amax(1))):
        kept = rows[y >= 0]
        for reduction, expected in (("sum", kept.sum()), ("mean", kept.mean())):
            same(kd.margin_ranking_loss(s, y, margin=0.3, wrong=wrong, reduction=reduction), expected)


@pytest.mark.backends("cpu", "triton", "reference")
def test_ties_for_the_hardest_class_share_its_gradient(target: Target) -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]], device=target.device, requires_grad=True)
    y = torch.tensor([3], device=target.device)
    kd.margin_ranking_loss(x, y, wrong="hardest", backend=target.backend).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 1 / 3, 1 / 3, -1.0, 1 / 3]], device=target.device))


def test_temperature_of_both_attentions() -> None:
    s, t = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    nothing = [torch.empty(0, 4)] * 2
    expected = 0.0
    for axes in ((1,), (2, 3)):
        a, b = (x.abs().mean(axes).flatten(1) for x in (s, t))
        expected += (a.shape[1] * ((a / 2).softmax(1) - (b / 2).softmax(1))).abs().sum() / 2
    alone = {"foreground_weight": 0.0, "background_weight": 0.0, "temperature": 2.0}
    same(kd.fgd_loss(s, t, nothing, **alone, attention_weight=1.0), expected)
    context = kd.GlobalContext(3).double()
    losses = [
        kd.fgd_loss(s, t, nothing, **alone, attention_weight=0.0, global_context=context, global_weight=w)
        for w in (0.3, torch.tensor(0.3, dtype=F64))
    ]
    same(losses[0], 0.3 * (s - t).pow(2).sum() / 2)  # a context that has learned nothing adds nothing
    same(losses[1], losses[0])


def test_weighted_detections() -> None:
    scores = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    boxes = 3 * randn(2, 3, 4, seed=2), 3 * randn(2, 3, 4, seed=3)
    valid = torch.tensor([[1.0, 0.0, 0.5], [2.0, 0.25, 0.0]], dtype=F64)
    each = F.smooth_l1_loss(*boxes, beta=0.3, reduction="none").sum(2)
    log_s, log_t = (x.log_softmax(2) for x in scores)
    rows = (log_t.exp() * (log_t - log_s)).sum(2)
    got = kd.detection_distillation_loss(*scores, *boxes, valid=valid, beta=0.3, class_weight=3.0)
    same(got, (valid * (3 * rows + each)).sum() / valid.sum())


def test_temperature_of_ranks() -> None:
    s, t = randn(4, 5), randn(4, 5, seed=1)
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    rows = (p * (p / q).log()).sum(1)
    same(kd.rank_mimicking_loss(s, t, temperature=3.0), rows.mean())
    same(kd.rank_mimicking_loss(s, t, temperature=3.0, scale_by_t2=True), 9 * rows.mean())


def test_relations_with_a_least_distance() -> None:
    s, t = randn(6, 3), randn(6, 4, seed=1)
    same(kd.rkd_loss(s, t, eps=6.0, beta=0.3), relations(s, t, False, 1, 2, 6.0, 0.3))
    same(kd.rkd_distance_loss(s, t, eps=6.0, beta=0.3), relations(s, t, False, 1, 0, 6.0, 0.3))
    d_s, d_t = (torch.cdist(x, x) for x in (s, t))
    nearest = d_t.fill_diagonal_(torch.inf).topk(4, largest=False).indices
    scores = -3 * d_s.pow(2).clamp_min(6.0).pow(1.5).gather(1, nearest)
    rows = sum(scores[:, m:].logsumexp(1) - scores[:, m] for m in range(4))
    same(kd.hard_dark_rank_loss(s, t, eps=6.0), rows.mean())


def test_similarities_with_a_least_length() -> None:
    s, t = randn(6, 3), randn(6, 4, seed=1)

    def unit(x: torch.Tensor, eps: float) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)

    def gram(x: torch.Tensor) -> torch.Tensor:
        return x @ x.mT

    same(kd.similarity_preserving_loss(s, t, eps=6.0), F.mse_loss(unit(gram(s), 6.0), unit(gram(t), 6.0)))
    rows = [gram(x) / gram(x).abs().sum(1, keepdim=True).clamp_min(9.0) for x in (s, t)]
    same(kd.similarity_preserving_loss(s, t, norm="l1", eps=9.0), F.mse_loss(*rows))
    cosines = gram(unit(s, 1.7)), gram(unit(t, 1.7))
    same(kd.cosine_similarity_matrix_loss(s, t, eps=1.7), F.mse_loss(*cosines))
    same(kd.correlation_congruence_loss(s, t, kernel="bilinear", eps=1.7), F.mse_loss(*cosines))
    correlations = torch.corrcoef(s), torch.corrcoef(t)
    for normalize in (False, True):
        got = kd.correlation_congruence_loss(s, t, kernel="correlation", normalize=normalize)
        same(got, F.mse_loss(*correlations), 1e-10)
    apart = (s - 2 * s.flip(0)).abs()
    products = (apart[:-1] * apart[1:]).sum()
    for reduction, divisor in (("mean", 5), ("sum", 1)):
        same(
            kd.correlation_congruence_loss(s, 2 * s.flip(0), kernel="neighbours", reduction=reduction),
            products / divisor,
        )


@pytest.mark.parametrize("size", [(2, 6, 3), (2, 2, 9)], ids=["columns", "rows"])
@pytest.mark.parametrize("detach", [False, True])
def test_channels_with_a_least_length(size: tuple[int, ...], detach: bool) -> None:
    s, t = randn(*size), randn(*size, seed=1)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=2, keepdim=True).clamp_min(1.8)

    def published(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, b = unit(s), unit(t)
        of_t = (b @ b.mT).pow(2).mean((1, 2))
        return (
            (a @ a.mT).pow(2).mean((1, 2)) + (of_t.detach() if detach else of_t) - 2 * (a @ b.mT).pow(2).mean((1, 2))
        ).sum()

    ours = gradients(kd.nst_loss, s, t, eps=1.8, detach_teacher_term=detach, reduction="sum")
    close(ours, gradients(published, s, t), 1e-10)
    larger = randn(size[0], size[1], 7, seed=2)
    same(kd.gram_loss(s, larger), F.mse_loss(*(x @ x.mT / x[0].numel() for x in (s, larger))))
    a, b = (x @ x.mT for x in (s, t))
    a, b = (g / g.norm(dim=2, keepdim=True).clamp_min(5.0) for g in (a, b))
    same(kd.ickd_loss(s, t, eps=5.0, reduction="sum"), (a - b).pow(2).sum())


def test_pixels_across_images_summed() -> None:
    s, t = randn(2, 3, 2, 3), randn(2, 4, 2, 3, seed=1)
    a, b = (F.normalize(x.flatten(2), dim=1).mT for x in (s, t))
    logs = [(torch.einsum("ipc,jqc->ijpq", x, x) / 0.3).log_softmax(3) for x in (a, b)]
    total = (logs[1].exp() * (logs[1] - logs[0])).sum()
    for reduction, divisor in (("sum", 1), ("mean", 2 * 2 * 6)):
        same(kd.cross_image_relation_loss(s, t, temperature=0.3, reduction=reduction), total / divisor, 1e-10)


def test_a_softcap_alone(target: Target) -> None:
    x, head, t = (randn(*size, seed=k).to(target.device, F32) for k, size in enumerate(((4, 3), (7, 3), (7, 3))))
    options = {"student_softcap": 1.5, "teacher_softcap": 0.5, "backend": target.backend}
    got = gradients(lambda x, w: kd.linear_kl_div(x, w, x.detach(), t, **options), x, head)
    capped = 0.5 * torch.tanh(x @ t.T / 0.5)
    close(got, gradients(lambda x, w: kd.kl_div(1.5 * torch.tanh(x @ w.T / 1.5), capped), x, head), 1e-5)


def test_a_mask_beside_classes() -> None:
    s, t, y, mask = randn(6, 3), randn(6, 4, seed=1), torch.arange(6) // 2, randn(6, 6, seed=2).abs()
    together = mask * (y[:, None] == y)
    same(kd.rkd_distance_loss(s, t, mask=mask, labels=y), kd.rkd_distance_loss(s, t, mask=together))
    same(kd.rkd_loss(s, t, mask=mask, labels=y), kd.rkd_loss(s, t, mask=together))


def test_weights_of_pairs() -> None:
    s, t, w = randn(6, 3), randn(6, 4, seed=1), randn(6, 6, seed=2).abs().fill_diagonal_(0.0)
    a, b = (torch.cdist(x, x) for x in (s, t))
    a, b = (d / ((w * d).sum() / w.sum()) for d in (a, b))
    total = (w * F.smooth_l1_loss(a, b, reduction="none")).sum()
    for reduction, divisor in (("mean", 36), ("pairs", w.sum()), ("sum", 1)):
        same(kd.rkd_distance_loss(s, t, mask=w, reduction=reduction), total / divisor)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_instance_relations_of_layers(squared: bool, detach: bool) -> None:
    layers = [[randn(5, 2, 6, 6, seed=k), randn(5, 4, 4, 4, seed=k + 1), randn(5, 8, 2, 2, seed=k + 2)] for k in (0, 9)]

    def over_maximum(d2: torch.Tensor) -> torch.Tensor:
        d = d2 if squared else d2.where(d2 > 0, 1.0).sqrt().where(d2 > 0, 0.0)
        return d / (d.detach() if detach else d).max()

    def edges(x: torch.Tensor) -> torch.Tensor:
        return over_maximum((x.flatten(1)[:, None] - x.flatten(1)).pow(2).sum(2))

    def moved(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(x, y.shape[2:])
        return over_maximum((x - y.unflatten(1, (x.shape[1], 2)).mean(2)).flatten(1).pow(2).sum(1))

    def published(*s: torch.Tensor) -> torch.Tensor:
        of_edges = [F.mse_loss(edges(x), edges(y)) for x, y in zip(s, layers[1], strict=True)]
        of_moves = [F.mse_loss(moved(*s[k : k + 2]), moved(*layers[1][k : k + 2])) for k in (0, 1)]
        return 2 * sum(of_edges) / 3 + 3 * sum(of_moves) / 2

    def ours(*s: torch.Tensor) -> torch.Tensor:
        return kd.instance_relation_graph_loss(
            s, layers[1], edge_weight=2.0, transformation_weight=3.0, squared=squared, detach_maximum=detach
        )

    close(gradients(ours, *layers[0]), gradients(published, *layers[0]), 1e-10)


KERNELS: dict[str, tuple[dict[str, Any], Any]] = {
    "polynomial": ({"kernel": "polynomial", "offset": 0.5, "degree": 3}, lambda x: (x @ x.T + 0.5) ** 3),
    "euclidean": ({"kernel": "euclidean", "squared": False}, lambda x: torch.cdist(x, x)),
    "squared": ({"kernel": "euclidean", "squared": True}, lambda x: torch.cdist(x, x) ** 2),
    "rbf": ({"kernel": "rbf", "gamma": 0.2}, lambda x: torch.exp(-0.2 * torch.cdist(x, x) ** 2)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_between_nodes(name: str) -> None:
    options, kernel = KERNELS[name]
    s, t = randn(6, 3), randn(6, 4, seed=1)
    same(kd.global_structure_loss(s, t, normalize=False, **options), F.mse_loss(kernel(s), kernel(t)), 1e-10)
    edges = torch.tensor([[1, 2, 3, 0, 4, 5, 2], [0, 0, 0, 1, 1, 2, 5]])  # 3 and 4 have no neighbours
    expected = torch.zeros((), dtype=F64)
    for node in range(6):
        a, b = (kernel(x)[edges[0, edges[1] == node], node].log_softmax(0) for x in (s, t))
        expected += (b.exp() * (b - a)).sum()
    for reduction, divisor in (("nodes", 6), ("edges", 7), ("sum", 1)):
        same(kd.local_structure_loss(s, t, edges, reduction=reduction, **options), expected / divisor, 1e-10)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_soft_graphs_of_any_scale(kernel: str) -> None:
    s, t = randn(5, 3), randn(5, 4, seed=1)
    options = {"threshold": 0.3, "sharpness": 0.4, "temperature": 0.7, "hop": 0.6}

    def graphs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        similarity = (
            F.normalize(x) @ F.normalize(x).T if kernel == "linear" else torch.exp(-0.2 * torch.cdist(x, x) ** 2)
        )
        costs = -torch.log(torch.sigmoid((similarity - 0.3) / 0.4))
        paths = [soft_shortest_paths(c[None], 0.7, backend="reference")[0] for c in (costs, costs + 0.6)]
        return torch.exp(-paths[0]), paths[1]

    (r_s, p_s), (r_t, p_t) = graphs(s), graphs(t)
    total = 2 * (r_s - r_t).pow(2).sum() + 3 * F.smooth_l1_loss(p_s, p_t, beta=0.05, reduction="sum")
    options |= {"connectivity_weight": 2.0, "path_weight": 3.0, "beta": 0.05, "kernel": kernel, "gamma": 0.2}
    for reduction, divisor in (("mean", 20), ("sum", 1)):
        got = kd.graph_structure_loss(s, t, **options, normalize=kernel == "linear", reduction=reduction)
        same(got, total / divisor, 1e-9)


def test_contrast() -> None:
    s, t, queue = (F.normalize(randn(n, 4, seed=k)) for k, n in enumerate((5, 5, 7)))
    own = torch.arange(5)
    z = s @ t.T / 0.2
    both = (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2
    same(kd.info_nce_distillation_loss(s, t, temperature=0.2), F.cross_entropy(z, own))
    for chunk_bytes in (None, 1 << 20):
        same(kd.info_nce_distillation_loss(s, t, temperature=0.2, symmetric=True, chunk_bytes=chunk_bytes), both)
    scores = [torch.cat([(x * t).sum(1, keepdim=True), x @ queue.T], 1) for x in (s, t)]
    expected = F.cross_entropy(scores[0] / 0.2, 0 * own)
    same(kd.info_nce_distillation_loss(s, t, queue=queue, temperature=0.2), expected)
    log_q, p = (scores[0] / 0.5).log_softmax(1), (scores[1] / 0.1).softmax(1)
    for scaled, factor in ((False, 1.0), (True, 0.25)):
        got = kd.seed_loss(s, t, queue, temperature=0.5, teacher_temperature=0.1, scale_by_t2=scaled)
        same(got, -factor * (p * log_q).sum(1).mean())
        log_q_, log_p = ((x @ queue.T / 0.5).log_softmax(1) for x in (s, t))
        got = kd.compress_loss(s, t, queue, temperature=0.5, scale_by_t2=scaled)
        same(got, factor * (log_p.exp() * (log_p - log_q_)).sum(1).mean())


@pytest.mark.parametrize("dense", [False, True])
def test_contrast_with_noise(dense: bool) -> None:
    s, t, bank_s, bank_t = (F.normalize(randn(n, 4, seed=k)) for k, n in enumerate((3, 3, 9, 9)))
    indices = torch.tensor([[0, 5, 6, 6], [4, 1, 2, 3], [8, 8, 7, 0]])

    def nce(x: torch.Tensor, bank: torch.Tensor, z: float | None) -> torch.Tensor:
        scores, c = ((bank[indices] @ x[:, :, None]).squeeze(2) / 0.3).exp(), 3 / 9
        p = scores / (scores.mean() * 9 if z is None else z)
        return -(p[:, 0] / (p[:, 0] + c + 0.1)).log() - (c / (p[:, 1:] + c + 0.1)).log().sum(1)

    options: dict[str, Any] = {"temperature": 0.3, "eps": 0.1, "dense": dense}
    for given in (None, (5.0, 11.0)):
        z_s, z_t = given or (None, None)
        rows = nce(s, bank_t, z_s) + nce(t, bank_s, z_t)
        got = kd.crd_loss(s, t, bank_s, bank_t, indices, normalizers=given, reduction="none", **options)
        same(got, rows, 1e-10)
        same(
            kd.crd_loss(s, t, bank_s, bank_t, indices, normalizers=given, reduction="batchmean", **options),
            rows.mean(),
            1e-10,
        )


def test_a_teachers_own_temperature() -> None:
    s, t, options = randn(4, 7), randn(4, 7, seed=1), {"temperature": 2.0, "teacher_temperature": 3.0}
    values, indices = t.topk(3)
    log_q, log_p = (values / 3).log_softmax(1), (s / 2).log_softmax(1).gather(1, indices)
    rows = (log_q.exp() * (log_q - log_p)).sum(1)
    same(kd.topk_div(s, values, indices, **options), 4 * rows.mean())
    same(kd.topk_div(s, values, indices, **options, scale_by_t2=False, reduction="sum"), rows.sum())
    p, q = ((x / by).softmax(1).sort(1, descending=True).values for x, by in ((s, 2), (t[:, :5], 3)))
    rows = (p - F.pad(q, (0, 2))).abs().sum(1)
    same(kd.uld_loss(s, t[:, :5], **options), rows.mean())
    same(kd.uld_loss(s, t[:, :5], **options, scale_by_t2=True, reduction="none"), 4 * rows)


def test_a_tail_below_rounding_is_none() -> None:
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    options = {"missing": "tail", "teacher_values_are": "log_probs"}
    for value, finite in ((-6e-8, True), (-6e-7, False)):
        loss = kd.topk_div(certain, torch.tensor([[value]]), torch.tensor([[0]]), **options)
        assert loss.isfinite() == finite and loss >= -1e-6


def test_peers_of_two_dtypes(target: Target) -> None:
    wide, half = (randn(4, 5, seed=k).to(target.device, dtype) for k, dtype in enumerate((F32, torch.bfloat16)))
    expected = kd.mutual_kl_div([wide, half.float()], backend=target.backend)
    for peers in ([wide, half], [half, wide]):
        torch.testing.assert_close(kd.mutual_kl_div(peers, backend=target.backend), expected)


def test_items_of_peers(target: Target) -> None:
    peers = [randn(4, 5, seed=k).to(target.device, F32) for k in range(3)]
    total = kd.mutual_kl_div(peers, reduction="sum", backend=target.backend)
    for items in (7, torch.tensor(7), torch.tensor([7.0], device=target.device)):
        torch.testing.assert_close(kd.mutual_kl_div(peers, num_items=items, backend=target.backend), total / 7)


def test_a_tensor_with_one_element_gives_the_loss_no_axis(target: Target) -> None:
    s, t = (randn(4, 5, seed=k).to(target.device, F32) for k in range(2))
    labels, one = torch.arange(4, device=target.device), torch.tensor([2.0])
    for loss in (
        kd.kl_div(s, t, num_items=one, backend=target.backend),
        kd.distillation_loss(s, t, labels, num_items=one, backend=target.backend),
        kd.dist_loss(s, t, temperature=one, beta=one, gamma=one, scale_by_t2=True, backend=target.backend),
        kd.rkd_loss(s, t, distance_weight=one, angle_weight=one, backend=target.backend),
    ):
        assert loss.shape == ()


# -------------------------------------------------------------------------------------------------------------- kernels

# Options that no case of the registry has, of one that has the others: an eps that counts, mostly.
RARE: dict[str, tuple[str, dict[str, Any]]] = {
    "attention-eps": ("attention_transfer", {"eps": 20.0, "channels": "sum"}),
    "attention-norm-eps": ("attention_transfer", {"eps": 0.5, "add_eps": True, "distance": "norm", "p": 3.0}),
    "channel-attention": ("channel_attention_transfer", {"distance": "norm", "p": 3.0, "signed": True}),
    "cosine-eps": ("cosine", {"eps": 2.0, "reduction": "sum"}),
    "margin": ("margin_ranking", {"margin": -0.3, "reduction": "sum"}),
    "margin-hardest": ("margin_ranking-hardest", {"margin": 0.2, "reduction": "none"}),
    "variational": ("variational_information", {"eps": 0.5, "reduction": "batchmean"}),
    "pearson-eps": ("pearson_feature", {"eps": 0.5}),
    "similarity-eps": ("similarity_preserving", {"eps": 10.0}),
    "similarity-l1-eps": ("similarity_preserving-l1", {"eps": 20.0}),
    "pkt-eps": ("pkt", {"eps": 0.3}),
    "congruence-eps": ("correlation_congruence", {"eps": 2.5}),
    "gram-sum": ("gram", {"reduction": "sum"}),
    "nst-eps": ("nst", {"eps": 2.5}),
    "nst-channels-eps": ("nst-channels", {"eps": 3.0}),
    "ickd-eps": ("ickd", {"eps": 6.0, "reduction": "sum"}),
    "fsp-norm-sum": ("fsp-norm", {"reduction": "sum"}),
    "rkd-eps": ("rkd", {"eps": 8.0, "beta": 0.3, "mean_normalize": False, "reduction": "sum"}),
    "rkd-distance-eps": ("rkd_distance", {"eps": 8.0, "reduction": "pairs"}),
    "dark-rank-eps": ("hard_dark_rank", {"eps": 1.0}),
    "global-structure": ("global_structure", {"kernel": "polynomial", "offset": 0.5, "degree": 3}),
    "dist-eps": ("dist_loss-clamp", {"eps": 0.3}),
    "decoupled": ("decoupled_kd_loss", {"temperature": 2.0, "teacher_temperature": 3.0, "alpha": 0.5, "beta": 2.0}),
    "skew": ("skew_kl_div", {"skew": 0.4}),
    "skew-reverse": ("skew_reverse_kl_div", {"skew": 0.4}),
    "lwf": ("lwf_loss", {"uniform": 0.1, "temperature": 3.0}),
}  # fmt: skip


TAKEN = [
    pytest.param(target, name, id=f"{target}-{name}")
    for target in TARGETS if target.fused for name, (known, _) in RARE.items() if runs_on(CASES[known], target)
]  # fmt: skip


@pytest.mark.parametrize("fused, name", TAKEN)
def test_kernels_take_rare_options(fused: Target, name: str, generator: torch.Generator) -> None:
    known, options = RARE[name]
    case = dataclasses.replace(CASES[known], name=name, options={**CASES[known].options, **options})
    shape = min(case.shapes, key=lambda s: abs(torch.Size(s).numel() - 60))
    CASES[name] = case  # where sweep.levels looks it up
    inputs = case.make(shape, generator)
    usual, rare = (c.function(**inputs, **c.options, backend="reference").mean() for c in (CASES[known], case))
    assert not torch.isclose(usual, rare)  # else it is none of these
    check(case, inputs, fused, shape, (F32,) * len(case.grads), unit=False)
