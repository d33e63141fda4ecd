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
  kAlphaBeta = 6,    // p0 = alpha, p1 = beta
  kSoftCE = 7,       // p0 = the uniform mass mixed into the student, p1 = p0 / V
  kSymmetricKL = 8,  // p0 = the forward KL's weight
  kKinds = 9,        // those above have terms(), class by class
  kDecoupledKL = 9,  // p0 = alpha of the label's binary KL, p1 = beta of the other classes' KL
};

// Places in the float32[8] tensors `scalars` and `stats`.
enum Scalar : int {
  kTs = 0,
  kTt = 1,
  kKdWeight = 2,
  kCeWeight = 3,
  kSmoothing = 4,
  kP0 = 5,
  kP1 = 6
};
// A side's log-sum-exp is its largest score `top` and z, the sum relative to that: together they
// lose nothing, also far from 0. kZ1 is the student's z at temperature 1. A decoupled KL's are of
// the classes other than the label's (z = 0: there is none), and relative to the label's score too
// in kZ1; its kGs is the KL among them and kGt the label's binary KL.
enum Stat : int { kTopS = 0, kTopT = 1, kZs = 2, kZt = 3, kZ1 = 4, kGs = 5, kGt = 6, kDiv = 7 };
constexpr int kScalars = 8, kStats = 8;

// One class's share of the divergence, and its derivatives by a = log p_s and b = log p_t.
struct Terms {
  float f, g_s, g_t;
};

// x * y where x is a probability: no mass, no contribution, also against an infinite y.
// Probabilities that users give may be NaN or negative: those must be seen.
KDK_HD float times(float x, float y) { return x == 0.f ? 0.f : x * y; }

KDK_HD Terms swapped(Terms x) { return {x.f, x.g_t, x.g_s}; }

KDK_HD Terms forward_kl(float a, float b, float ps, float pt) {
  (void)ps;
  const float f = times(pt, b - a);
  return {f, -pt, f + pt};
}

// The selects below are written so that a compiler can turn every divergence into straight-line
// code: nothing returns early, and what is computed for an empty class is thrown away.

// log(w e^a + (1 - w) e^b) - max(a, b), which no underflow of e^a or e^b can spoil. NaN where both
// are -inf, and then `times` throws it away.
KDK_HD float log_mix(float a, float b, float w) {
  const float e = vexp_nonpositive(-fabsf(a - b));
  return vlog_unit(a > b ? w + (1.f - w) * e : (1.f - w) + w * e);
}

// KL of the teacher from a mixture in which it has the given share.
KDK_HD Terms skew_kl(float a, float b, float ps, float pt, float share) {
  (void)ps;
  // Distances from the larger of the two first: small ones keep their digits.
  const float hi = a > b ? a : b, m = log_mix(b, a, share);
  const float f = times(pt, (b - hi) - m);
  const float r =
      pt > 0.f ? (1.f - share) * vexp((a - hi) - m) : 0.f;  // the student's part of the mixture
  return {f, -pt * r, f + pt * r};
}

KDK_HD Terms jsd_interior(float a, float b, float ps, float pt, float beta) {
  const float hi = a > b ? a : b, m = log_mix(b, a, beta);
  const float g_s = (1.f - beta) * times(ps, (a - hi) - m), g_t = beta * times(pt, (b - hi) - m);
  return {g_s + g_t, g_s, g_t};
}

KDK_HD Terms jsd(float a, float b, float ps, float pt, float beta) {
  if (beta <= 0.f) return forward_kl(a, b, ps, pt);
  if (beta >= 1.f) return swapped(forward_kl(b, a, pt, ps));
  return jsd_interior(a, b, ps, pt, beta);
}

KDK_HD Terms total_variation(float ps, float pt) {
  const float d = ps - pt, sign = d > 0.f ? 1.f : (d < 0.f ? -1.f : 0.f);
  return {0.5f * fabsf(d), 0.5f * sign * ps, -0.5f * sign * pt};
}

KDK_HD Terms soft_ce(float a, float ps, float pt, float uniform, float uniform_each) {
  const bool mixed = uniform_each > 0.f;
  const float f = times(pt, mixed ? -vlog((ps + uniform_each) / (1.f + uniform)) : -a);
  return {f, mixed ? -pt * ps / (ps + uniform_each) : -pt, f};
}

// The label's half of a decoupled KL: KL between two Bernoulli variables, from their log-odds.
struct Binary {
  float value, by_s, by_t;  // and its derivatives by the log-odds
};
KDK_HD float log_sigmoid(float u) {
  const float e = vexp(-fabsf(u)), one = 1.f + e;
  const float tail =
      one == 1.f ? e : vlog(one) * (e / (one - 1.f));  // log(1 + e), also of a small e
  return u < 0.f ? u - tail : -tail;
}
KDK_HD Binary binary_kl(float u_s, float u_t) {
  const float yes_s = log_sigmoid(u_s), no_s = log_sigmoid(-u_s);
  const float yes_t = log_sigmoid(u_t), no_t = log_sigmoid(-u_t);
  const float p = vexp(yes_t), q = vexp(no_t);
  // The derivative is the difference of whichever probabilities are small.
  return {times(p, yes_t - yes_s) + times(q, no_t - no_s),
          u_s < 0.f ? vexp(yes_s) - p : q - vexp(no_s), times(p * q, u_t - u_s)};
}

KDK_HD Terms symmetric_kl(float a, float b, float ps, float pt, float w) {
  const Terms x = forward_kl(a, b, ps, pt), y = swapped(forward_kl(b, a, pt, ps));
  const float v = 1.f - w;
  // A side of weight 0 must not bring in its infinities.
  const float f = w <= 0.f ? y.f : w * x.f + v * y.f;
  const float g_s = w <= 0.f ? y.g_s : w * x.g_s + v * y.g_s;
  const float g_t = w <= 0.f ? y.g_t : w * x.g_t + v * y.g_t;
  return {w >= 1.f ? x.f : f, w >= 1.f ? x.g_s : g_s, w >= 1.f ? x.g_t : g_t};
}

// A softmax behind the scores ignores multiples of the probabilities in a gradient, and they only
// round: this takes out those of a symmetric KL.
KDK_HD Terms behind_softmax(int kind, Terms x, float ps, float pt, float p0) {
  if (kind == kSymmetricKL) {
    x.g_s -= (1.f - p0) * ps;
    x.g_t -= p0 * pt;
  }
  return x;
}

// (e^x - 1) / x.
KDK_HD float phi(float x) { return fabsf(x) < 1e-6f ? 1.f + 0.5f * x : vexpm1(x) / x; }

// sum over n of h_n(v, w) / (n + 2)!, where h_n = v h_(n-1) + w^n: a recursion, not a loop, since a
// loop inside would keep the loop over classes from being vectorised.
template <int n>
KDK_HD float divided_series(float v, float w, float h, float power, float inverse_factorial) {
  if constexpr (n <= 9) {
    const float next = inverse_factorial / static_cast<float>(n + 2);
    return h * inverse_factorial + divided_series<n + 1>(v, w, v * h + power * w, power * w, next);
  } else {
    return h * inverse_factorial;
  }
}

// The second divided difference of exp over three nodes: what alpha-beta's formula is once its
// divisions by alpha, beta and alpha + beta are carried out, so that no limit is a special case.
KDK_HD float exp_divided_difference(float x, float y, float z) {
  const float low_xy = x < y ? x : y, high_xy = x < y ? y : x;
  const float lo = low_xy < z ? low_xy : z, hi = high_xy > z ? high_xy : z;
  const float inner = high_xy < z ? high_xy : z, mid = low_xy > inner ? low_xy : inner;
  const float v = mid - lo, w = hi - lo;
  const float far = (vexp(mid) * phi(hi - mid) - vexp(lo) * phi(v)) / w;
  return w > 1.f ? far : vexp(lo) * divided_series<1>(v, w, 1.f, 1.f, 0.5f);
}

// What is the same in all classes. On its own, for GCC does not vectorise a loop with a select
// whose condition does not change in it.
struct AlphaBeta {
  float alpha, beta, sum;
  // A class that one side leaves empty: with alpha, beta > 0 the cross term is gone; beta = 0
  // leaves the student's own mass and alpha = 0 the teacher's; anything else diverges.
  float own_s, own_t, edge_s, edge_t;
};
KDK_HD AlphaBeta alpha_beta_constants(float alpha, float beta) {
  const float sum = alpha + beta;
  const bool finite_s = alpha > 0.f && beta >= 0.f, finite_t = beta > 0.f && alpha >= 0.f;
  return {alpha,
          beta,
          sum,
          finite_s ? 1.f / (alpha * sum) : INFINITY,
          finite_t ? 1.f / (beta * sum) : INFINITY,
          finite_s ? 1.f / alpha : 0.f,
          finite_t ? 1.f / beta : 0.f};
}

// Cichocki, Cruces and Amari (2011), with P the teacher and Q the student.
KDK_HD Terms alpha_beta(float a, float b, const AlphaBeta& c) {
  const float alpha = c.alpha, beta = c.beta, sum = c.sum;
  // Selects of numbers, not of truth values, which GCC does not vectorise. NaN passes them all.
  const float x_or = b == -INFINITY ? 0.f : a, y_or = a == -INFINITY ? 0.f : b;
  const float x = a == -INFINITY ? 0.f : x_or, y = b == -INFINITY ? 0.f : y_or, d = y - x;
  const float f = d * d * exp_divided_difference(sum * x, alpha * y + beta * x, sum * y);
  const float g_s = -vexp(sum * x) * d * phi(alpha * d), g_t = vexp(sum * y) * d * phi(-beta * d);
  const float es = a == -INFINITY ? 0.f : vexp(sum * a), et = b == -INFINITY ? 0.f : vexp(sum * b);
  const float edge = times(es, c.own_s) + times(et, c.own_t);
  const float edge_s = es * c.edge_s, edge_t = et * c.edge_t;
  const Terms ordinary = {b == -INFINITY ? edge : f, b == -INFINITY ? edge_s : g_s,
                          b == -INFINITY ? edge_t : g_t};
  return {a == -INFINITY ? edge : ordinary.f, a == -INFINITY ? edge_s : ordinary.g_s,
          a == -INFINITY ? edge_t : ordinary.g_t};
}

KDK_HD Terms finite_terms(int kind, float a, float b, float ps, float pt, float p0, float p1) {
  switch (kind) {
    case kForwardKL: return forward_kl(a, b, ps, pt);
    case kReverseKL: return swapped(forward_kl(b, a, pt, ps));
    case kJSD: return jsd(a, b, ps, pt, p0);
    case kSkewKL: return skew_kl(a, b, ps, pt, p0);
    case kSkewReverseKL: return swapped(skew_kl(b, a, pt, ps, p0));
    case kTotalVariation: return total_variation(ps, pt);
    case kAlphaBeta: return alpha_beta(a, b, alpha_beta_constants(p0, p1));
    case kSoftCE: return soft_ce(a, ps, pt, p0, p1);
    default: return symmetric_kl(a, b, ps, pt, p0);
  }
}

// A NaN score is seen even where the other side has no mass: log-probabilities do not pass through
// a log-sum-exp that would carry it.
KDK_HD Terms with_nan(float a, Terms x) {
  x.f = a == a ? x.f : a;
  return x;
}

// One class's share.
KDK_HD Terms terms(int kind, float a, float b, float ps, float pt, float p0, float p1) {
  return with_nan(a, finite_terms(kind, a, b, ps, pt, p0, p1));
}

}  // namespace KDK_NAMESPACE
