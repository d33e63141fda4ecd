// The log-sum-exp of a row that is read in tiles, and what turns its exponentials into
// probabilities.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/elementary.h"
#include "common/stream.h"

namespace KDK_NAMESPACE {

// A number in two floats. A temperature rounded to one would be off by as much in every class, and
// errors that agree do not average out.
struct Pair {
  float hi, lo;
};
inline Pair split(double x) {
  const float hi = static_cast<float>(x);
  return {hi, static_cast<float>(x - hi)};
}
// A positive factor, both of whose parts are positive: -inf times them is -inf twice.
inline Pair split_factor(double x) {
  float hi = static_cast<float>(x);
  if (hi > x) hi = bits_to_float(float_to_bits(hi) - 1);  // the next one towards 0
  return {hi, static_cast<float>(std::max(x - hi, x * 0x1p-40))};
}

// Sums are kept in float over this many classes; above that, in double.
constexpr int64_t kBlock = 256;

template <typename Body>
void for_blocks(int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += kBlock) body(i, std::min(n, i + kBlock));
}

// z = sum of 2^((x - ref) c), c = log2(e) / T, where ref is the largest score so far (0 while all
// are -inf). The difference is taken before the scaling, so that a constant added to a row changes
// nothing.
struct RunningSoftmax {
  double c = 1.4426950408889634;
  float top = -INFINITY, ref = 0.f;
  double z = 0.0;

  RunningSoftmax() = default;
  explicit RunningSoftmax(double inverse_t) { c *= inverse_t; }

  // Makes room for a tile whose largest score is `t`; returns what earlier sums are multiplied by.
  float raise(float t) {
    if (!(t > top)) return 1.f;
    const float factor =
        top == -INFINITY ? 0.f : static_cast<float>(std::exp2((double{ref} - t) * c));
    top = ref = t;
    z *= factor;
    return factor;
  }
  // What turns exponentials relative to an earlier top into probabilities.
  float to_probability(float earlier_top) const {
    if (earlier_top == top) return static_cast<float>(1.0 / z);
    return earlier_top == -INFINITY
               ? 0.f
               : static_cast<float>(std::exp2((double{earlier_top} - ref) * c) / z);
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
inline double exponentials_of(const float* x, int64_t n, const RunningSoftmax& run, float* e,
                              const Ahead& ahead = {}) {
  const float ref = run.ref;
  const Pair c = split_factor(run.c);
  double sum = 0.0;
  for_blocks(n, [&](int64_t begin, int64_t end) {
    ahead.ask(begin, end);
    float z = 0.f;
#pragma omp simd reduction(+ : z)
    for (int64_t i = begin; i < end; ++i) {
      const float d = x[i] - ref;
      e[i] = vexp2_nonpositive(d * c.hi + d * c.lo);
      z += e[i];
    }
    sum += z;
  });
  return sum;
}

}  // namespace KDK_NAMESPACE
