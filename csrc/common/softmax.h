// The log-sum-exp of a row that is read in tiles, and what turns its exponentials into
// probabilities.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/elementary.h"

namespace KDK_NAMESPACE {

// z = sum of 2^((x - ref) c), c = log2(e) / T, where ref is the largest score so far (0 while all
// are -inf). The difference is taken before the scaling, so that a constant added to a row changes
// nothing.
struct RunningSoftmax {
  float c = kLog2E;
  float top = -INFINITY, ref = 0.f;
  double z = 0.0;

  // Makes room for a tile whose largest score is `t`.
  void raise(float t) {
    if (!(t > top)) return;
    z *= top == -INFINITY ? 0.f : std::exp2((ref - t) * c);
    top = ref = t;
  }
  // What turns exponentials relative to an earlier top into probabilities.
  float to_probability(float earlier_top) const {
    if (earlier_top == top) return static_cast<float>(1.0 / z);
    return earlier_top == -INFINITY ? 0.f
                                    : static_cast<float>(std::exp2((earlier_top - ref) * c) / z);
  }
  double log_z() const { return std::log(z); }
};

inline float largest_of(const float* x, int64_t n) {
  float m = -INFINITY;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// e = 2^((x - ref) c), and their sum.
inline float exponentials_of(const float* x, int64_t n, float ref, float c, float* e) {
  float z = 0.f;
#pragma omp simd reduction(+ : z)
  for (int64_t i = 0; i < n; ++i) {
    e[i] = vexp2_nonpositive((x[i] - ref) * c);
    z += e[i];
  }
  return z;
}

}  // namespace KDK_NAMESPACE
