"""The vision libraries' formulas in plain torch, and the comparison of a stand-in with a formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from published import F64, close, gradients


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def maps(layers=((4, 8), (6, 5)), seed=0, n=3):
    """Maps (n, C, H, H) for each (C, H)."""
    return [randn(n, c, h, h, seed=seed + k) for k, (c, h) in enumerate(layers)]


def same(function, published, *inputs, teachers=False):
    """Value, shape and gradients, float64 on the reference and float32 on the CPU's kernels; teachers' too if they learn."""
    students = len(inputs) if teachers else len(inputs) // 2
    fixed = inputs[students:]
    expected = gradients(lambda *s: published(*s, *fixed).sum(), *inputs[:students])
    close(gradients(lambda *s: function(*s, *fixed).sum(), *inputs[:students]), expected, 1e-9)
    short = [x.float() for x in fixed]
    got = gradients(lambda *s: function(*s, *short).sum(), *(x.float() for x in inputs[:students]))
    close(got, expected, 2e-5)
    assert function(*inputs).shape == published(*inputs).shape


def kd(s, t, temperature):
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum() / s.shape[0]


def dkd(s, t, target, alpha, beta, temperature):
    p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
    at = F.one_hot(target, s.shape[1]).bool()
    p_y, q_y = p[at], q[at]
    binary = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    rest_p, rest_q = (x.masked_select(~at).view(len(x), -1) for x in (p, q))
    rest_p, rest_q = rest_p / rest_p.sum(1, keepdim=True), rest_q / rest_q.sum(1, keepdim=True)
    others = (rest_p * (rest_p / rest_q).log()).sum(1)
    return temperature**2 * (alpha * binary + beta * others).mean()


def smaller(s, t):
    height = min(s.shape[2], t.shape[2])
    return [F.adaptive_avg_pool2d(x, (height, height)) for x in (s, t)]


def attention(s, t, p):
    a, b = (F.normalize(x.pow(p).mean(1).flatten(1)) for x in smaller(s, t))
    return (a - b).pow(2).mean()


def similarity(s, t):
    a, b = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (s, t))
    return ((a - b) ** 2).sum().view(1) / len(s) ** 2


def correlation(s, t):
    apart = (s - t).abs()
    return sum((apart[i] * apart[i + 1]).sum() for i in range(len(s) - 1)) / (len(s) - 1)


def relations(s, t, squared=False, distance_weight=25, angle_weight=50, eps=1e-12, beta=1.0):
    def distances(x):
        d2 = (x.unsqueeze(1) - x).pow(2).sum(2)
        least = d2.clamp_min(eps)
        d = torch.where(d2 > 0, least if squared else least.sqrt(), 0.0)
        return d / d[d > 0].mean()

    def angles(x):
        e = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        return torch.einsum("ijd,ikd->ijk", e, e)

    s, t = s.flatten(1), t.flatten(1).detach()
    by_distance = F.smooth_l1_loss(distances(s), distances(t), beta=beta)
    return distance_weight * by_distance + angle_weight * F.smooth_l1_loss(angles(s), angles(t), beta=beta)


def transfer(s, t, eps=1e-7):
    def probabilities(x):
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + eps)
        cos = (x @ x.T + 1) / 2
        return cos / cos.sum(1, keepdim=True)

    p, q = probabilities(t), probabilities(s)
    return (p * ((p + eps) / (q + eps)).log()).mean()


def selectivity(s, t):
    a, b = (F.normalize(x.flatten(2), dim=2) for x in smaller(s, t))

    def kernel(x, y):
        return torch.einsum("nip,njp->nij", x, y).pow(2).mean()

    return kernel(b, b).detach() + kernel(a, a) - 2 * kernel(a, b)


def flow(s1, s2, t1, t2):
    def products(x, y):
        x, y = smaller(x, y)
        return torch.einsum("nahw,nbhw->nab", x, y) / (x.shape[2] * x.shape[3])

    return (products(s1, s2) - products(t1, t2)).pow(2).mean()


def likelihood(regressor, raw, s, t, eps=1e-5):
    s, t = smaller(s, t)
    variance = ((1 + raw.exp()).log() + eps).view(1, -1, 1, 1)
    return (0.5 * ((regressor(s) - t) ** 2 / variance + variance.log())).mean()


def review(s, t):
    terms, weights = [F.mse_loss(s, t)], [1.0]
    for size in (4, 2, 1):
        if size < s.shape[2]:
            weights.append(weights[-1] / 2)
            terms.append(weights[-1] * F.mse_loss(*(F.adaptive_avg_pool2d(x, size) for x in (s, t))))
    return sum(terms) / sum(weights)
