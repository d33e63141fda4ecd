// A Pearson correlation from its moments, and the coefficients of its gradient.
#pragma once
#include <cmath>

#include "common/elementary.h"

namespace KDK_NAMESPACE {

// d rho / d x = a y - bx x and d rho / d y = a x - by y, for x and y already centred.
struct Pearson {
  float rho, a, bx, by;
};

// xy, xx, yy: the sums of products of the centred values. Where either is constant: rho and
// gradient 0.
KDK_HD Pearson pearson(float xy, float xx, float yy, float eps, bool clamp) {
  if (xx == 0.f || yy == 0.f) return {0.f, 0.f, 0.f, 0.f};
  const float nx = sqrtf(xx), ny = sqrtf(yy);
  if (clamp) {
    // As torch's cosine_similarity: a norm that is raised to eps keeps its derivative.
    const float cx = nx < eps ? eps : nx, cy = ny < eps ? eps : ny;
    const float a = 1.f / (cx * cy), rho = xy * a;
    return {rho, a, rho / (cx * nx), rho / (cy * ny)};
  }
  const float a = 1.f / (nx * ny + eps), rho = xy * a;
  return {rho, a, rho * a * (ny / nx), rho * a * (nx / ny)};
}

}  // namespace KDK_NAMESPACE
