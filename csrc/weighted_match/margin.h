// max(0, margin + wrong - right) over the wrong classes of a row of scores, and its gradient.
#pragma once
#include <cmath>

#include "weighted_match/tiles.h"

namespace KDK_NAMESPACE {
namespace {

// Sum and number of the hinges that are open, of n scores. NaN stays NaN.
KDK_ONE_COPY inline void add_hinges(const float* x, int64_t n, float right, float margin,
                                    double* sum, int64_t* open) {
  float some = 0.f;
  int count = 0;
#pragma omp simd reduction(+ : some, count)
  for (int64_t i = 0; i < n; ++i) {
    const float over = (x[i] - right) + margin;
    some += over < 0.f ? 0.f : over;
    count += over >= 0.f;
  }
  *sum += static_cast<double>(some), *open += count;
}

// The highest of n values over the margin and how many share it; NaN where any is.
KDK_ONE_COPY inline void add_highest(const float* x, int64_t n, float right, float margin,
                                     double* best, int64_t* ties) {
  float high = -INFINITY;
  int broken = 0, count = 0;
#pragma omp simd reduction(max : high) reduction(+ : broken)
  for (int64_t i = 0; i < n; ++i) {
    const float over = (x[i] - right) + margin;
    high = over > high ? over : high;
    broken += over != over;
  }
  if (broken) high = NAN;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += (x[i] - right) + margin == high;
  const double wide = static_cast<double>(high);
  if (wide > *best || wide != wide) *best = wide, *ties = 0;
  if (wide == *best) *ties += count;
}

KDK_ONE_COPY inline void open_hinges(const float* x, int64_t n, float right, float margin,
                                     float least, float g, float* dx) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dx[i] = (x[i] - right) + margin >= least ? g : 0.f;
}

struct Margin {
  Tensor x, dx;  // (1, rows, classes)
  float margin;
  bool hardest;
};

// The loss of row r, whose class y is right; its gradient times upstream, if that is wanted.
inline float margin_row(const Margin& of, int64_t r, int64_t y, float upstream) {
  alignas(64) float in[kLanesInFloat], out[kLanesInFloat];
  const int64_t classes = of.x.shape[2];
  const float right = load_one(of.x.data, of.x.dtype, r * of.x.stride[1] + y);
  double value = of.hardest ? -INFINITY : 0.0;
  int64_t open = 0;  // hinges, or those that share the highest place
  const int64_t ends[][2] = {{0, y}, {y + 1, classes}};
  for (const auto& [begin, end] : ends) {
    for (int64_t l = begin; l < end; l += kLanesInFloat) {
      const int64_t n = least(kLanesInFloat, end - l);
      (of.hardest ? add_highest : add_hinges)(read_row(of.x, 0, r, l, n, in), n, right, of.margin,
                                              &value, &open);
    }
  }
  const Output dx(of.dx);
  if (dx) {
    const bool counts = of.hardest ? value >= 0 : true;
    const int64_t share = of.hardest ? open : classes - 1;
    const float g = counts && open ? upstream / static_cast<float>(share) : 0.f;
    const float from = of.hardest ? static_cast<float>(value) : 0.f;
    for (int64_t l = 0; l < classes; l += kLanesInFloat) {
      const int64_t n = least(kLanesInFloat, classes - l);
      const float* x = read_row(of.x, 0, r, l, n, in);
      float* made = dx.target(0, r, l, n, out);
      open_hinges(x, n, right, of.margin, from, g, made);
      if (y >= l && y < l + n) made[y - l] = -g * static_cast<float>(open);
      dx.put(0, r, l, n, made);
    }
  }
  if (classes == 1) return right * 0.f;
  if (of.hardest) return static_cast<float>(value < 0 ? 0.0 : value);
  return static_cast<float>(value / static_cast<double>(classes - 1));
}

// A row that has no right class: left out, or with a label that is none.
inline float empty_row(const Margin& of, int64_t r, float fill) {
  alignas(64) float out[kLanesInFloat];
  const Output dx(of.dx);
  for (int64_t l = 0; dx && l < of.x.shape[2]; l += kLanesInFloat) {
    const int64_t n = least(kLanesInFloat, of.x.shape[2] - l);
    float* made = dx.target(0, r, l, n, out);
    for (int64_t i = 0; i < n; ++i) made[i] = fill;
    dx.put(0, r, l, n, made);
  }
  return fill;
}

}  // namespace
}  // namespace KDK_NAMESPACE
