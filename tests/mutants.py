"""The mutants of mutate.py: lines broken as people break them, by the family whose kernels they are in."""

from __future__ import annotations

import posixpath
from typing import NamedTuple


class Mutant(NamedTuple):
    family: str
    backend: str
    about: str
    file: str  # in csrc/<family>, or in kdkernels/ops/<family> if it is Python
    old: str  # must occur; the first occurrence is replaced
    new: str
    tests: str = ""  # that are to notice: "file::name", or the beginning of the family's cases; else mutate.py's choice

    @property
    def path(self) -> str:
        folder = "kdkernels/ops" if self.file.endswith(".py") else "csrc"
        return posixpath.normpath(f"{folder}/{self.family}/{self.file}")


def family(name: str, *rows: tuple[str, ...]) -> tuple[Mutant, ...]:
    return tuple(Mutant(name, *row) for row in rows)


MUTANTS = (
    *family(
        "row_divergence",
        ("cpu", "sign of the gradient", "cpu_lanes.h", "wq[l] * eq[l] - wp[l] * ep[l]", "wp[l] * ep[l] - wq[l] * eq[l]"),
        ("cpu", "no 1/T in the gradient", "cpu_lanes.h", "per_q = static_cast<float>(kd_[l] * q.scale)", "per_q = kd_[l]"),
        ("cpu", "student and teacher swapped", "cpu_lanes.h", "kl_sums<false>(teacher_, student_);", "kl_sums<false>(student_, teacher_);"),
        ("cpu", "no target in the cross-entropy's gradient", "cpu_lanes.h", "with - own[l]", "with"),
        ("cpu", "row weight left out of the loss", "cpu_lanes.h", "kd_[l] = job_.kd * weight_[l] * up;", "kd_[l] = job_.kd * up;"),
        ("cpu", "rows of a block not turned back", "cpu_block.h", "x[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);", "x[1] = x[0];"),
        ("cpu", "the last classes of a block not copied", "cpu_block.h", "for (int64_t c = r < r4 ? c4 : 0; c < columns; ++c)", "for (int64_t c = r < r4 ? columns : 0; c < columns; ++c)"),
        ("cpu", "sign of a long row's gradient", "cpu_row.h", "wq * eq[i] - wp * ep[i]", "wp * ep[i] - wq * eq[i]"),
        ("cpu", "student and teacher of a long row swapped", "cpu_row.h", ": kl_sums(teacher_, student_", ": kl_sums(student_, teacher_"),
        ("cpu", "earlier tiles not rescaled", "../common/softmax.h", "    z *= factor;\n", ""),
        ("cpu", "labels not applied to the divisor", "cpu.cpp", "const double w = job.row_weight(r);", "const double w = 1;"),
        ("cpu", "T^2 on the loss but not on its gradient's temperature", "op.py", "2.0 * kd / scalars", "0.0 * kd / scalars"),
        ("triton", "sign of the divergence's two sides", "triton_looped.py", "tl.where(kind == 0, 1.0, -1.0)", "tl.where(kind == 0, -1.0, 1.0)"),
        ("triton", "no 1/T in the gradient", "triton_looped.py", "kw[:, None] * (g * inv_s)", "kw[:, None] * g"),
        ("triton", "earlier tiles not rescaled", "triton_looped.py", "z_s = z_s * c_s + ex", "z_s = z_s + ex"),
        ("cuda_on_cpu", "sign of the gradient", "cuda_row.cuh", "k_s * fmaf(-et, t_to_s, fast_exp2(us))", "k_s * fmaf(et, t_to_s, fast_exp2(us))"),
        ("cuda_on_cpu", "no 1/T in the gradient", "cuda_row.cuh", "r.kd_s = kd * q.inv_ts", "r.kd_s = kd"),
        ("cuda_on_cpu", "a barrier missing in the block's reduction", "../common/cuda.cuh", "    __syncthreads();\n", ""),
    ),
    *family(
        "scale",
        ("cpu", "a stored gradient handed out twice", "op.py", "get_current_graph_task_keep_graph():", "get_current_graph_task_keep_graph() and False:", "test_traps.py::test_retained"),
        ("cpu", "only the first tile scaled", "cpu.cpp", "out[i] = in[i] * by;", "out[i] = tile ? in[i] : in[i] * by;", "test_ops.py::test_scale_keeps"),
        ("triton", "not scaled at all", "triton.py", ".to(tl.float32) * f", ".to(tl.float32)", "test_ops.py::test_scale_keeps"),
        ("cuda_on_cpu", "what is before whole vectors left out", "cuda.cu", "thread < head ? x + thread", "thread < head ? body", "test_ops.py::test_scale_keeps"),
    ),
    *family(
        "weighted_match",
        ("cpu", "sign of the teacher's gradient", "cpu.cpp", "out[i] = -made[i];", "out[i] = made[i];", "hint"),
        ("cpu", "the rest of a long line left out", "cpu.cpp", "if (rest) part(whole * kMaxLanes, 1, rest);", "", "hint"),
        ("cpu", "the norm is no part of the gradient", "attention.h", "divisor / norm : long_enough;", "divisor / norm : 0.0;", "attention_transfer"),
        ("cpu", "a norm below eps not raised to it", "attention.h", "long_enough ? norm : by.eps;", "norm;", "test_options.py::test_kernels_take_rare_options and attention"),
        ("cpu", "the sign of a signed power lost", "powers.h", "power_slope<kPower>(x[i], e.p, e.odd)", "power_slope<kPower>(x[i], e.p, false)", "test_features.py::test_signed_powers"),
        ("cpu", "the label's own hinge counted", "margin.h", "{y + 1, classes}", "{y, classes}", "margin_ranking"),
        ("cpu", "windows that overlap cut short", "context.h", "((i + 1) * n + cells - 1) / cells", "((i + 1) * n) / cells", "hierarchical_context"),
        ("cpu", "a softmax's sum left out of FGD's slope", "focal.h", "sign_of(d)) - mean)", "sign_of(d)))", "test_detection.py::test_fgd_gradient"),
        ("cpu", "a box without its last row", "focal.h", "clipped(at[3] + 1.f, height)", "clipped(at[3], height)", "test_detection.py::test_boxes_beyond"),
        ("cpu", "attentions' slope without its upstream", "cpu.cpp", "weight * by / (static_cast<double>(over)", "weight / (static_cast<double>(over)", "test_detection.py::test_fgd_gradient"),
        ("triton", "no sign of the student in FGD's slope", "triton_kernels.py", "[None, :]) * _sign(x)", "[None, :])", "test_detection.py::test_fgd_gradient"),
        ("triton", "sign of the teacher's gradient", "triton_kernels.py", "cast(-g, dt.dtype.element_ty)", "cast(g, dt.dtype.element_ty)", "hint"),
        ("triton", "squares of the other model", "triton_kernels.py", "at + (first + 2) * field", "at + 2 * field", "pearson_feature"),
        ("triton", "ties not counted", "triton_margin.py", "tl.where(best >= 0.0, opened, 0)", "tl.where(best >= 0.0, 1, 0)", "test_options.py::test_ties"),
    ),
    *family(
        "gram_match",
        ("cpu", "part of a line not stored past the caches", "gemm.h", "x.dtype, kPanel, panel + r * kPanel)", "x.dtype, kPanel - 4, panel + r * kPanel)", "test_similarity.py::test_gradients_that_go_past"),
        ("cpu", "a row's length not in the gradient", "cpu.cpp", "if (through != 0.f)", "if (through > 1e30f)", "cosine_matrix"),
        ("cpu", "a series one term short", "math.h", "p <= order", "p < order", "correlation_congruence"),
        ("cpu", "groups of products overwrite each other", "gemm.h", "(first && k == 0 ? 0.f : *to)", "(first ? 0.f : *to)", "test_similarity.py::test_a_long_reduction"),
        ("cpu", "a row's gradient not taken along its direction", "math.h", "quotient(own, of_own) * of_own.dot", "0.f", "similarity_preserving"),
        ("triton", "eps left out of the slope", "triton_terms.py", "tl.div_rn(p - q + eps, p + eps)", "tl.div_rn(p - q, p)", "test_options.py::test_kernels_take_rare_options and pkt"),
        ("triton", "a series one term short", "triton_terms.py", "tl.static_range(1, ORDER + 1)", "tl.static_range(1, ORDER)", "correlation_congruence"),
        ("cuda_on_cpu", "the mirror image of a tile not written", "cuda.cu", "if (p.symmetric && ti != tj) out[j * p.columns + i] = sums[u][v];", "", "test_similarity.py::test_matrices_of_many_tiles"),
        ("cuda_on_cpu", "a barrier missing after a tile", "cuda.cu", "    __syncthreads();\n    float part[kMicro][kMicro] = {};  // a few", "    float part[kMicro][kMicro] = {};  // a few", "similarity_preserving"),
    ),
    *family(
        "pairwise_distance",
        ("cpu", "the mean is no part of the graph", "cpu_match.h", "- own.through_mean", "- 0.f * own.through_mean", "rkd_distance"),
        ("cpu", "partners' weights in one direction only", "cpu_distances.h", "2.f * (v[i] + other)", "4.f * v[i]", "rkd_distance-masked"),
        ("triton", "the mean is no part of the graph", "triton.py", "slope -= _through_mean(sums, values, 1, 1.0)", "slope -= 0.0", "rkd_distance"),
        ("triton", "the diagonal has a weight", "triton.py", "live = inside & (at // n != at % n)", "live = inside", "rkd_distance-classes"),
        ("cuda_on_cpu", "the mean's weight forgotten", "cuda.cu", "sums[1] += p.weight * p.s;", "sums[1] += p.s;", "rkd_distance-masked"),
        ("cuda_on_cpu", "sign of the teacher's gradient", "cuda.cu", "factor * (-c * by_t - mean_t)", "factor * (c * by_t + mean_t)", "rkd_distance"),
    ),
    *family(
        "triplet_angle",
        ("cpu", "sides that coincide in one model left out", "cpu_triplets.h", "(s[i] > 0.f) != (t[i] > 0.f)", "false", "rkd_angle-duplicates"),
        ("cpu", "the second part of a distance forgotten", "math.h", " + ((a_lo + b_lo) - c_lo)", " + 0.f * ((a_lo + b_lo) - c_lo)", "rkd_angle"),
        ("cpu", "each triplet once", "cpu_triplets.h", "sum = 2.0 * sum +", "sum = sum +", "rkd_angle"),
        ("cpu", "sides in ranges of an odd length", "cpu_triplets.h", "kCached / lanes / 2 * 2;", "kCached / lanes;", "test_relational.py::test_many_samples"),
        ("cpu", "two games of a round alike", "cpu_triplets.h", "y = (round - game + teams) % teams", "y = (round - game + teams - (game > 0)) % teams", "test_relational.py::test_many_samples"),
        ("cpu", "more vertices than are packed at once", "cpu_triplets.h", "pack<Form>(job, j, start + b * kManyLanes,", "pack<Form>(job, j, b * kManyLanes,", "test_relational.py::test_many_samples"),
        ("triton", "the opposite side's role forgotten", "triton.py", "ia_s * ia_s * sum_q)) - sum_o", "ia_s * ia_s * sum_q))", "rkd_angle"),
        ("cuda_on_cpu", "sides that coincide in one model left out", "cuda.cu", "(own[u][v].t_hi > 0.f ? 1.f : 0.f)", "(own[u][v].s_hi > 0.f ? 1.f : 0.f)", "rkd_angle-duplicates"),
        ("cuda_on_cpu", "the opposite side's role forgotten", "cuda.cu", "                        sums[u][v].opposite;", "                        0.f;", "rkd_angle"),
    ),
    *family(
        "dist",
        ("cpu", "columns not weighted", "cpu.cpp", "a[v] += w * (ps[v] - shift_s_[v]);", "a[v] += ps[v] - shift_s_[v];", "dist_loss-weight"),
        ("cpu", "a clamped norm without its derivative", "math.h", "return {rho, a, rho / (cx * nx), rho / (cy * ny)};", "return {rho, a, rho / (cx * cx), rho / (cy * cy)};", "test_dist.py::test_clamp_is_torchs"),
        ("triton", "columns' means of both models exchanged", "triton_kernels.py", "delta_t = _shares(scratch, 1,", "delta_t = _shares(scratch, 0,", "dist_loss-columns"),
        ("cuda_on_cpu", "the softmax's own slope forgotten", "cuda.cu", "g = {q.s * (dot.s - g.s) / temperature", "g = {q.s * -g.s / temperature", "dist_loss"),
        ("cuda_on_cpu", "one share of the rows only", "cuda.cu", "for (int k = 1; k < kSlices; ++k)", "for (int k = 2; k < kSlices; ++k)", "dist_loss-columns"),
    ),
    *family(
        "peer_divergence",
        ("cpu", "one learner's upstream for all", "cpu.cpp", "learner * rows + r : 0]", "r : 0]", "mutual_kl_div-none"),
        ("cpu", "a learner among its own peers", "cpu.cpp", "const float peers = static_cast<float>(learners);", "const float peers = static_cast<float>(learners - 1);", "mutual_kl_div"),
        ("triton", "a learner among its own peers", "triton.py", "(learners * p - total[None, :, :])", "((learners - 1) * p - total[None, :, :])", "mutual_kl_div"),
        ("cuda_on_cpu", "one learner's upstream for all", "cuda.cu", "k * p.rows + row : 0] : 1.f;", "row : 0] : 1.f;", "mutual_kl_div-none"),
    ),
    *family(
        "row_gather",
        ("cpu", "a class that occurs twice outside but once", "cpu.cpp", "while (j < k && row.index[j] == v) own += up.gathered[j++];", "while (j < k && row.index[j] == v) ++j;", "test_sparse.py::test_duplicates"),
        ("cpu", "the others' mass without those given", "math.h", "rest * stats[kInverseZOut]", "0.f * stats[kInverseZOut]", "topk_div-tail"),
        ("triton", "the others' mass without those given", "triton.py", "r * tl.load(stat + 3)", "0.0 * r", "topk_div-tail"),
        ("cuda_on_cpu", "the others' number wrong", "cuda.cu", "count = static_cast<float>(p.classes - unique);", "count = static_cast<float>(p.classes);", "topk_div-uniform"),
    ),
    *family(
        "edge_relation",
        ("cpu", "edges that leave a node forgotten", "cpu.cpp", "k < away[1]", "k < away[0]", "local_structure"),
        ("cpu", "factor 2 of a squared distance", "cpu.cpp", "products ? 1.f : 2.f", "1.f", "local_structure"),
        ("triton", "edges that leave a node out of order", "triton.py", "x, own, weights, target, by_source, begin", "x, own, weights, target, None, begin", "local_structure"),
    ),
    *family(
        "graph_closure",
        ("cpu", "returns to a vertex forgotten", "cpu.cpp", "to[i] = p[i * kBlock + k] + returns;", "to[i] = p[i * kBlock + k];", "graph_structure"),
        ("cpu", "walks after the arrival kept", "cpu.cpp", "- passing[j]);", ");", "graph_structure"),
        ("triton", "walks after the arrival kept", "triton.py", "- passing[:, None, :]), 1)", "), 1)", "graph_structure"),
    ),
)  # fmt: skip
