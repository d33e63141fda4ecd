// The divergences of one class, shared by the CPU and the CUDA kernels. The derivations are in
// kdkernels/ops/row_divergence/README.md.
#pragma once
#include <cmath>

#include "common/elementary.h"

namespace KDK_NAMESPACE {

// The numbers are kdkernels/ops/row_divergence/kinds.py's.
enum Kind : int {
  kForwardKL = 0,
  kReverseKL = 1,
  kJSD = 2,            // p0 = beta, the teacher's share of the mixture
  kSkewKL = 3,         // p0 = the teacher's share of the mixture
  kSkewReverseKL = 4,  // p0 = the student's share of the mixture
  kTotalVariation = 5,
  kAlphaBeta = 6,  // p0 = alpha, p1 = beta
  kSoftCE = 7,
  kSymmetricKL = 8,  // p0 = the forward KL's weight
  kKinds = 9,
};

// Places in the float32[8] tensors `scalars` and `stats`.
enum Scalar : int { kTs = 0, kTt = 1, kKdWeight = 2, kCeWeight = 3, kSmoothing = 4, kP0 = 5, kP1 = 6 };
enum Stat : int { kLseS = 0, kLseT = 1, kLse1 = 2, kGs = 3, kGt = 4, kDiv = 5, kCe = 6 };
constexpr int kScalars = 8, kStats = 8;

// One class's share of the divergence, and its derivatives by a = log p_s and b = log p_t.
struct Terms {
  float f, g_s, g_t;
};

// x * y where x is a probability: no mass, no contribution, also against an infinite y. A NaN in
// x makes its row's sums NaN through the log-sum-exp, so it may be dropped here.
KDK_HD float times(float x, float y) { return x > 0.f ? x * y : 0.f; }

KDK_HD Terms swapped(Terms x) { return {x.f, x.g_t, x.g_s}; }

KDK_HD Terms forward_kl(float a, float b, float ps, float pt) {
  (void)ps;
  const float f = times(pt, b - a);
  return {f, -pt, f + pt};
}

// log(w e^a + (1 - w) e^b) - max(a, b), which no underflow of e^a or e^b can spoil. a != -b = inf.
KDK_HD float log_mix(float a, float b, float w) {
  const float e = vexp(-fabsf(a - b));
  return vlog(a > b ? w + (1.f - w) * e : (1.f - w) + w * e);
}

// KL of the teacher from a mixture in which it has the given share.
KDK_HD Terms skew_kl(float a, float b, float ps, float pt, float share) {
  (void)ps;
  const float hi = fmaxf(a, b);
  if (!(hi > -INFINITY)) return {0.f, 0.f, 0.f};
  const float m = hi + log_mix(b, a, share);
  const float f = times(pt, b - m);
  const float r = pt > 0.f ? (1.f - share) * vexp(a - m) : 0.f;  // the student's part of the mixture
  return {f, -pt * r, f + pt * r};
}

KDK_HD Terms jsd(float a, float b, float ps, float pt, float beta) {
  if (beta <= 0.f) return forward_kl(a, b, ps, pt);
  if (beta >= 1.f) return swapped(forward_kl(b, a, pt, ps));
  const float hi = fmaxf(a, b);
  if (!(hi > -INFINITY)) return {0.f, 0.f, 0.f};
  const float m = hi + log_mix(b, a, beta);
  const float g_s = (1.f - beta) * times(ps, a - m), g_t = beta * times(pt, b - m);
  return {g_s + g_t, g_s, g_t};
}

KDK_HD Terms total_variation(float ps, float pt) {
  const float d = ps - pt, sign = d > 0.f ? 1.f : (d < 0.f ? -1.f : 0.f);
  return {0.5f * fabsf(d), 0.5f * sign * ps, -0.5f * sign * pt};
}

KDK_HD Terms soft_ce(float a, float pt) {
  const float f = times(pt, -a);
  return {f, -pt, f};
}

KDK_HD Terms symmetric_kl(float a, float b, float ps, float pt, float w) {
  const Terms x = forward_kl(a, b, ps, pt), y = swapped(forward_kl(b, a, pt, ps));
  const float v = 1.f - w;
  // A side of weight 0 must not bring in its infinities.
  if (w >= 1.f) return x;
  if (w <= 0.f) return y;
  return {w * x.f + v * y.f, w * x.g_s + v * y.g_s, w * x.g_t + v * y.g_t};
}

// (e^x - 1) / x.
KDK_HD float phi(float x) { return fabsf(x) < 1e-6f ? 1.f + 0.5f * x : vexpm1(x) / x; }

// The second divided difference of exp over three nodes: what alpha-beta's formula is once its
// divisions by alpha, beta and alpha + beta are carried out, so that no limit is a special case.
KDK_HD float exp_divided_difference(float x, float y, float z) {
  const float lo = fminf(x, fminf(y, z)), hi = fmaxf(x, fmaxf(y, z));
  const float mid = fmaxf(fminf(x, y), fminf(fmaxf(x, y), z));
  const float v = mid - lo, w = hi - lo;
  if (w > 1.f) return (vexp(mid) * phi(hi - mid) - vexp(lo) * phi(v)) / w;
  // sum_n h_n(v, w) / (n + 2)!, h_n = v h_(n-1) + w^n
  float h = 1.f, power = 1.f, inverse_factorial = 0.5f, sum = 0.5f;
  for (int n = 1; n <= 9; ++n) {
    power *= w;
    h = v * h + power;
    inverse_factorial /= static_cast<float>(n + 2);
    sum += h * inverse_factorial;
  }
  return vexp(lo) * sum;
}

// Cichocki, Cruces and Amari (2011), with P the teacher and Q the student.
KDK_HD Terms alpha_beta(float a, float b, float alpha, float beta) {
  const float u = b - a, sum = alpha + beta;
  if (fabsf(u) < INFINITY) {
    return {u * u * exp_divided_difference(sum * a, alpha * b + beta * a, sum * b),
            -vexp(sum * a) * u * phi(alpha * u), vexp(sum * b) * u * phi(-beta * u)};
  }
  if (!(fmaxf(a, b) > -INFINITY)) return {0.f, 0.f, 0.f};
  // One side has no mass. Where the limit is finite (alpha, beta > 0) the cross term is gone.
  const float es = vexp(sum * a), et = vexp(sum * b);
  if (alpha > 0.f && beta > 0.f)
    return {et / (beta * sum) + es / (alpha * sum), es / alpha, et / beta};
  const bool student_empty = a < b;
  // beta = 0 leaves Q's own mass, alpha = 0 leaves P's; everything else diverges.
  if (beta == 0.f && alpha > 0.f && !student_empty) return {es / (alpha * alpha), es / alpha, 0.f};
  if (alpha == 0.f && beta > 0.f && student_empty) return {et / (beta * beta), 0.f, et / beta};
  return {INFINITY, student_empty ? 0.f : es, student_empty ? et : 0.f};
}

KDK_HD Terms terms(int kind, float a, float b, float ps, float pt, float p0, float p1) {
  switch (kind) {
    case kForwardKL: return forward_kl(a, b, ps, pt);
    case kReverseKL: return swapped(forward_kl(b, a, pt, ps));
    case kJSD: return jsd(a, b, ps, pt, p0);
    case kSkewKL: return skew_kl(a, b, ps, pt, p0);
    case kSkewReverseKL: return swapped(skew_kl(b, a, pt, ps, p0));
    case kTotalVariation: return total_variation(ps, pt);
    case kAlphaBeta: return alpha_beta(a, b, p0, p1);
    case kSoftCE: return soft_ce(a, pt);
    default: return symmetric_kl(a, b, ps, pt, p0);
  }
}

}  // namespace KDK_NAMESPACE
