// What FGD makes of two models' sums of magnitudes: the weights of the squared differences, the
// distance of the attentions, and its gradient by the student's sums. Also the masks of boxes.
#pragma once
#include <cmath>
#include <vector>

#include "common/softmax.h"
#include "weighted_match/tiles.h"

namespace KDK_NAMESPACE {
namespace {

// n softmax(sums / (over T)) in place of the sums; what it is a mean over is `over`.
inline void to_attention(float* sums, int64_t n, int64_t over, double temperature) {
  RunningSoftmax run(1.0 / (static_cast<double>(over) * temperature));
  run.raise(largest_of(sums, n));
  run.z = exponentials_of(sums, n, run, sums);
  const float share = static_cast<float>(static_cast<double>(n) / run.z);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] *= share;
}

// sum |s - t| of two attentions over n places. The student's becomes `scale` times the gradient by
// its sums.
inline double attentions_apart(float* s, const float* t, int64_t n, double scale) {
  double apart = 0.0, along = 0.0;
#pragma omp simd reduction(+ : apart, along)
  for (int64_t i = 0; i < n; ++i) {
    const float d = s[i] - t[i];
    apart += static_cast<double>(fabsf(d));
    along += static_cast<double>(sign_of(d) * s[i]);
  }
  const float mean = static_cast<float>(along / static_cast<double>(n)),
              by = static_cast<float>(scale);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float d = s[i] - t[i];
    s[i] = by * s[i] * ((d != d ? d : sign_of(d)) - mean);
  }
  return apart;
}

// One image's mask, (height, width): `front` / (its area) in each box, the least area where boxes
// overlap, and `back` / (their number) in the pixels of none. A box covers the pixels from its
// floored to its ceiled corners, both included; one with a side below 0, or NaN, is none.
inline void mask_of_boxes(const float* boxes, const float* scale, int64_t count, int64_t height,
                          int64_t width, float front, float back, float* out) {
  const int64_t pixels = height * width;
  for (int64_t i = 0; i < pixels; ++i) out[i] = 0.f;
  const auto clipped = [](float x, int64_t size) {  // before it becomes an integer
    const float most = static_cast<float>(size);
    return static_cast<int64_t>(x < 0.f ? 0.f : x > most ? most : x);
  };
  for (int64_t k = 0; k < count; ++k) {
    const float* box = boxes + 4 * k;
    if (!(box[2] >= box[0] && box[3] >= box[1])) continue;
    float at[4];
    for (int i = 0; i < 4; ++i) {
      const float corner = scale ? box[i] * scale[i] : box[i];
      at[i] = i < 2 ? std::floor(corner) : std::ceil(corner);
    }
    const float wide = at[2] - at[0] + 1.f, high = at[3] - at[1] + 1.f;
    const float weight = 1.f / ((wide > 1.f ? wide : 1.f) * (high > 1.f ? high : 1.f));
    const int64_t left = clipped(at[0], width), right = clipped(at[2] + 1.f, width);
    const int64_t bottom = clipped(at[3] + 1.f, height);
    for (int64_t y = clipped(at[1], height); y < bottom; ++y)
      for (int64_t x = left; x < right; ++x) {
        float& p = out[y * width + x];
        p = p > weight ? p : weight;
      }
  }
  int64_t uncovered = 0;
  for (int64_t i = 0; i < pixels; ++i) uncovered += !(out[i] > 0.f);
  const float share = back / static_cast<float>(uncovered > 0 ? uncovered : 1);
  for (int64_t i = 0; i < pixels; ++i) out[i] = out[i] > 0.f ? front * out[i] : share;
}

}  // namespace
}  // namespace KDK_NAMESPACE
