// One angle of a triplet of samples, from the squared distances alone. The derivations are in
// kdkernels/ops/triplet_angle/README.md.
#pragma once
#include "pairwise_distance/math.h"

namespace KDK_NAMESPACE {

// d2_ij + d2_ik - d2_jk, a and b being the squared sides at the vertex and c the opposite one,
// each in two parts. Near a small side the other two cancel, so that difference is taken first.
template <typename F>
KDK_HD F numerator(F a, F b, F c, F a_lo, F b_lo, F c_lo) {
  return (lesser(a, b) + (greater(a, b) - c)) + ((a_lo + b_lo) - c_lo);
}

// 1 / (d sqrt(2 beta)), so that the product of two of them turns a numerator into cos / beta;
// 0 where samples coincide, which makes the cosine and all its derivatives 0.
KDK_HD float inverse_distance(float d2, float beta) {
  return d2 > 0.f ? 1.f / sqrtf(2.f * beta * d2) : 0.f;
}

}  // namespace KDK_NAMESPACE
