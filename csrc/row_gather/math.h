// What a row of row_gather leaves for its gradient, and the gradient's coefficients.
#pragma once
#include <cstdint>

#include "common/elementary.h"

namespace KDK_NAMESPACE {

// The places of a row's statistics. The reference is the largest score; `outside` are the classes
// that are not among the indices, or all of them where the caller did not ask for the others' mass.
enum GatherStat : int {
  kRef,          // reference of all classes
  kInverseZ,     // 1 / sum 2^((x - ref) c), c = log2(e) / T
  kRefOutside,   //
  kInverseZOut,  // 0 where nothing is outside
  kMassOut,      // p = 2^((x - ref_outside) c) kMassOut
  kCountOut,     // how many classes are outside
  kGatherStats = 8
};

enum Outside : int { kNoOutside = 0, kRest = 1, kRestAndTotal = 2 };

// ds = outside e + constant for classes that are not among the indices, where e is relative to
// ref_outside, and inside p + their own gradients / T for those that are.
struct GatherCoefficients {
  float outside, constant, inside;
};

// sum: of the gathered log-probabilities' gradients; rest, total: those of the other two outputs.
KDK_HD GatherCoefficients gather_coefficients(const float* stats, float sum, float rest,
                                              float total, float inverse_t) {
  const float inside = -(sum + rest + total * stats[kCountOut]);
  return {(inside * stats[kMassOut] + rest * stats[kInverseZOut]) * inverse_t, total * inverse_t,
          inside * inverse_t};
}

}  // namespace KDK_NAMESPACE
