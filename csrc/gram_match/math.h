// One element of the match of two Gram matrices: its share of the loss and the slope there. The
// derivations are in kdkernels/ops/gram_match/README.md.
#pragma once
#include <cmath>

#include "common/elementary.h"

namespace KDK_NAMESPACE {

// What is compared; the numbers are those of kdkernels/ops/gram_match/op.py.
enum Kind : int {
  kLinear = 0,         // the matrices themselves
  kSeries = 1,         // a Gaussian kernel's Taylor series of every element
  kRows = 2,           // rows of Euclidean length 1
  kRowsL1 = 3,         // rows whose absolute values sum to 1
  kProbabilities = 4,  // KL of rows of (c + 1) / 2 that sum to 1
  kSigned = 5,         // squares of one matrix, weighted by the rows' weights
  kLengths = 6,        // the Euclidean length of each row of the difference
};
enum Normalize : int {
  kAsTheyAre = 0,
  kClamped = 1,  // rows over max(length, eps)
  kShifted = 2,  // rows over length + eps
  kColumns = 3,  // columns over max(length, eps)
};
// Places in the float32 tensor `scalars`.
enum Scalar : int { kScale = 0, kStudentFactor = 1, kTeacherFactor = 2, kEps = 3, kGamma = 4 };

// What a row's normalisation needs: its length and the inverse (1 and 0 for a row of zeros, which
// stays so), and what comes back through it.
struct Side {
  float length, dot, inverse;
};

// x over the row's length as if it were divided, so that a row of one element is exactly 1.
KDK_HD float quotient(float x, Side side) {
#if defined(__CUDACC__) || defined(KDK_CUDA_ON_CPU) || defined(__FMA__) || defined(__aarch64__)
  const float q = x * side.inverse;
  return fmaf(fmaf(-q, side.length, x), side.inverse, q);
#else
  return x / side.length;
#endif
}

// e^z cut off after z^order / order!, less the constant 1, and its derivative by z.
KDK_HD void series(float z, int order, float& value, float& slope) {
  float term = 1.f;
  value = 0.f, slope = 0.f;
  for (int p = 1; p <= order; ++p) {
    slope += term;
    term *= z / static_cast<float>(p);
    value += term;
  }
}

struct Epilogue {
  int kind, order;
  float eps, gamma;
  float decay;  // e^(-2 gamma)

  KDK_HD float probability(float c, Side side) const { return quotient(0.5f * c + 0.5f, side); }
  // Whether elements are compared within rows that are normalised.
  KDK_HD bool by_row() const { return kind == kRows || kind == kRowsL1 || kind == kProbabilities; }

  // The element's share of the loss.
  KDK_HD float value(float s, Side of_s, float t, Side of_t) const {
    switch (kind) {
      case kSeries: {
        float vs, vt, unused;
        series(2.f * gamma * s, order, vs, unused);
        series(2.f * gamma * t, order, vt, unused);
        const float e = decay * (vs - vt);
        return e * e;
      }
      case kRows:
      case kRowsL1: {
        const float e = quotient(s, of_s) - quotient(t, of_t);
        return e * e;
      }
      case kProbabilities: {
        const float p = probability(s, of_s), q = probability(t, of_t);
        // Both sum to 1: with p - q added the rounding of a row's sum has no share in its terms.
        return q * vlog_normal((q + eps) / (p + eps)) + (p - q);
      }
      case kSigned: return s * s;
      default: return apart(s, t) * apart(s, t);
    }
  }

  // The loss's slope by a normalised element, which the row's `dot` sums times the element itself.
  // Of probabilities, which sum to 1, any constant may be taken off it: here what makes it small.
  KDK_HD float outer_slope(bool student, float own, Side of_own, float other, Side of_other) const {
    if (kind == kProbabilities) {
      const float p = probability(own, of_own), q = probability(other, of_other);
      if (student) return (p - q + eps) / (p + eps);
      return vlog_normal((p + eps) / (q + eps)) - eps / (p + eps);
    }
    return quotient(own, of_own) - quotient(other, of_other);  // rows; half of it
  }
  KDK_HD float outer_value(float own, Side of_own) const {
    return kind == kProbabilities ? probability(own, of_own) : quotient(own, of_own);
  }

  // The loss's slope by element c_ij of one model as an element of row i.
  KDK_HD float slope(bool student, float own, Side of_own, float other, Side of_other) const {
    switch (kind) {
      case kSeries: {
        float v, d, w, unused;
        series(2.f * gamma * own, order, v, d);
        series(2.f * gamma * other, order, w, unused);
        return 4.f * gamma * decay * decay * (v - w) * d;
      }
      case kRows:
        return 2.f * of_own.inverse *
               (outer_slope(student, own, of_own, other, of_other) -
                quotient(own, of_own) * of_own.dot);
      case kRowsL1: {
        const float sign = own > 0.f ? 1.f : own < 0.f ? -1.f : 0.f;
        return 2.f * of_own.inverse *
               (outer_slope(student, own, of_own, other, of_other) - sign * of_own.dot);
      }
      case kProbabilities:
        return 0.5f * of_own.inverse *
               (outer_slope(student, own, of_own, other, of_other) - of_own.dot);
      case kSigned: return 2.f * own;
      case kLengths: return apart(own, other) * of_own.inverse;
      default: return 2.f * apart(own, other);
    }
  }
};

// What rows of this squared length are multiplied by, and what the diagonal of the gradient's
// matrix gets for the sum over j of slope_ij c_ij. A row of zeros is out of it.
struct Unit {
  float scale, through;
};
template <typename Real>
KDK_HD Unit unit_of(Real square, int normalize, Real eps) {
  if (normalize != kClamped && normalize != kShifted) return {1.f, 0.f};
  if (!(square > 0)) return {0.f, 0.f};
  const Real length = sqrt(square), one = 1;
  if (normalize == kShifted)
    return {static_cast<float>(one / (length + eps)),
            static_cast<float>(one / ((length + eps) * length))};
  if (length > eps) return {static_cast<float>(one / length), static_cast<float>(one / square)};
  return {static_cast<float>(one / eps), 0.f};
}

}  // namespace KDK_NAMESPACE
