// Sums of |x|^p over the lanes of every row or the rows of every lane of a map, and their gradient.
#pragma once
#include "weighted_match/math.h"
#include "weighted_match/tiles.h"

namespace KDK_NAMESPACE {
namespace {

struct Exponent {
  float p;
  bool odd;
};

// Which sums are made, and whether lanes have weights in those of the rows.
enum Kinds : int { kOfLanes = 1, kOfRows = 2, kWeighted = 4 };

// Adds weight x power of kRows rows to the lanes' sums, and sums each row.
template <int kPower, int kRows, int kSums>
KDK_ONE_COPY void add_powers(const float* const* x, int64_t n, Exponent e, const float* weight,
                             const float* lane_weight, float* lanes, float* rows) {
  const float *a = x[0], *b = x[kRows > 1], *c = x[kRows > 1 ? 2 : 0], *d = x[kRows > 1 ? 3 : 0];
  const float wa = weight[0], wb = weight[1], wc = weight[2], wd = weight[3];
  float sum_a = 0.f, sum_b = 0.f, sum_c = 0.f, sum_d = 0.f;
#pragma omp simd reduction(+ : sum_a, sum_b, sum_c, sum_d)
  for (int64_t i = 0; i < n; ++i) {
    const float w = kSums & kWeighted ? lane_weight[i] : 1.f;
    const float fa = power<kPower>(a[i], e.p, e.odd);
    if (kSums & kOfRows) sum_a += w * fa;
    if (kRows == 1) {
      if (kSums & kOfLanes) lanes[i] += wa * fa;
      continue;
    }
    const float fb = power<kPower>(b[i], e.p, e.odd), fc = power<kPower>(c[i], e.p, e.odd),
                fd = power<kPower>(d[i], e.p, e.odd);
    if (kSums & kOfRows) sum_b += w * fb, sum_c += w * fc, sum_d += w * fd;
    if (kSums & kOfLanes) lanes[i] += (wa * fa + wb * fb) + (wc * fc + wd * fd);
  }
  rows[0] = sum_a;
  if (kRows > 1) rows[1] = sum_b, rows[2] = sum_c, rows[3] = sum_d;
}

// How many short rows are read as one long one, of whole vectors if that can be: possible where
// they touch and nothing tells them apart but their lanes.
inline int64_t rows_at_once(const Tensor& x, const Tile& t) {
  const int64_t width = x.shape[2], most = least(kMaxLanes / width, t.rows);
  if (x.stride[1] != width || t.lanes != width || most < 2) return 1;
  for (int64_t n = most; n > most / 2; --n)
    if (n * width % kLanes == 0) return n;
  return most;
}

// Where sums and their gradients come from.
struct Powers {
  Tensor x, row_weight, lane_weight;  // (batch, rows) and (batch, lanes); all 1 where left out
  Exponent exponent;
};

// The share of one tile in the sums of the rows and of the lanes, whichever are wanted.
template <int kPower, int kSums>
void power_tile(const Powers& of, const Tile& t, Sums<float>& to_rows, Sums<float>& to_lanes) {
  alignas(64) float buffer[4][kMaxLanes];
  LaneSums lanes;
  const int64_t width = of.x.shape[2], height = of.x.shape[1];
  const float* row_weight = of.row_weight ? of.row_weight.as<float>() + t.batch * height : nullptr;
  const float* lane_weight =
      of.lane_weight ? of.lane_weight.as<float>() + t.batch * width + t.lane : nullptr;
  const int64_t group = kSums == kOfLanes && !row_weight ? rows_at_once(of.x, t) : 1;
  // Rows that follow each other are fetched ahead best one by one; others, and sums along rows,
  // gain from going over several side by side.
  const bool one_by_one = kSums == kOfLanes && of.x.stride[1] == t.lanes;
  int64_t added = 0;
  if (kSums & kOfLanes) lanes.clear(group * t.lanes);
  for (int64_t r = 0; r < t.rows;) {
    const int64_t count = one_by_one || t.rows - r < 4 * group ? 1 : 4;
    const int64_t own = least(group, t.rows - r), n = own * t.lanes;  // rows in each of these
    const float* rows[4];
    float weight[4] = {1.f, 1.f, 1.f, 1.f};
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = t.row + r + k * own;
      rows[k] = read_row(of.x, t.batch, row, t.lane, n, buffer[k]);
      if (row_weight) weight[k] = row_weight[row];
    }
    const auto add = count == 4 ? add_powers<kPower, 4, kSums> : add_powers<kPower, 1, kSums>;
    const int64_t step = kSums & kOfRows ? kLanesInFloat : n;
    double sums[4] = {0, 0, 0, 0};
    for (int64_t l = 0; l < n; l += step) {
      float some[4];
      add(rows, least(step, n - l), of.exponent, weight,
          kSums & kWeighted ? lane_weight + l : nullptr, lanes.few + l, some);
      for (int64_t k = 0; k < count; ++k) rows[k] += step, sums[k] += static_cast<double>(some[k]);
    }
    if (kSums & kOfRows) to_rows.put(t.lane_piece, 0, t.batch, t.row + r, count, sums);
    r += count * own;
    if ((kSums & kOfLanes) && (added += count) >= kRowsInFloat) lanes.flush(n), added = 0;
  }
  if (!(kSums & kOfLanes)) return;
  lanes.flush(group * t.lanes);
  for (int64_t g = 1; g < group; ++g)
    for (int64_t i = 0; i < width; ++i) lanes.all[i] += lanes.all[g * width + i];
  to_lanes.put(t.row_piece, 0, t.batch, t.lane, t.lanes, lanes.all);
}

using PowerTile = void (*)(const Powers&, const Tile&, Sums<float>&, Sums<float>&);

template <int kPower>
PowerTile power_tile_of(bool rows, bool lanes, bool weighted) {
  return !rows ? power_tile<kPower, kOfLanes>
         : lanes
             ? (weighted ? power_tile<kPower, 7> : power_tile<kPower, 3>)
             : (weighted ? power_tile<kPower, kOfRows + kWeighted> : power_tile<kPower, kOfRows>);
}
inline PowerTile power_tile_of(int64_t exponent, bool rows, bool lanes, bool weighted) {
  constexpr decltype(&power_tile_of<0>) kOf[] = {
      power_tile_of<0>, power_tile_of<1>, power_tile_of<2>, power_tile_of<3>, power_tile_of<4>};
  return kOf[exponent](rows, lanes, weighted);
}

// dx = (lane weight x the row's upstream + row weight x the lane's) x the power's derivative.
template <int kPower, int kSums>
KDK_ONE_COPY void power_gradient(const float* x, int64_t n, Exponent e, float row, float weight,
                                 const float* lanes, const float* lane_weight, float* dx) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    dx[i] = ((kSums & kWeighted ? row * lane_weight[i] : row) +
             (kSums & kOfLanes ? weight * lanes[i] : 0.f)) *
            power_slope<kPower>(x[i], e.p, e.odd);
}

// One tile of it. `rows` (batch, rows) and `lanes` (batch, lanes) are upstream gradients; either
// may be left out.
template <int kPower>
void power_gradient_tile(const Powers& of, const Tile& t, const Tensor& rows, const Tensor& lanes,
                         const Output& dx) {
  const Tensor& x = of.x;
  const auto run = of.lane_weight ? power_gradient<kPower, kOfLanes + kWeighted>
                   : lanes        ? power_gradient<kPower, kOfLanes>
                                  : power_gradient<kPower, kOfRows>;
  alignas(64) float in[kMaxLanes], out[kMaxLanes], of_lanes[kMaxLanes], weight[kMaxLanes];
  const int64_t lane = t.batch * x.shape[2] + t.lane;
  const int64_t group = rows || of.row_weight ? 1 : rows_at_once(x, t);
  for (int64_t g = 0; g < group * t.lanes; g += t.lanes) {
    for (int64_t i = 0; i < t.lanes; ++i) {
      of_lanes[g + i] = lanes ? lanes.as<float>()[lane + i] : 0.f;
      weight[g + i] = of.lane_weight ? of.lane_weight.as<float>()[lane + i] : 1.f;
    }
  }
  for (int64_t r = t.row; r < t.row + t.rows; r += group) {
    const int64_t at = t.batch * x.shape[1] + r, n = least(group, t.row + t.rows - r) * t.lanes;
    const float* values = read_row(x, t.batch, r, t.lane, n, in);
    const float row = rows ? rows.as<float>()[at] : 0.f;
    const float row_weight = of.row_weight ? of.row_weight.as<float>()[at] : 1.f;
    const int64_t step = dx.step(n);
    for (int64_t l = 0; l < n; l += step) {
      const int64_t some = least(step, n - l);
      float* made = dx.target(t.batch, r, t.lane + l, some, out);
      run(values + l, some, of.exponent, row, row_weight, of_lanes + l, weight + l, made);
      dx.put(t.batch, r, t.lane + l, some, made);
    }
  }
}

using PowerGradientTile = void (*)(const Powers&, const Tile&, const Tensor&, const Tensor&,
                                   const Output&);

inline PowerGradientTile power_gradient_tile_of(int64_t exponent) {
  constexpr PowerGradientTile kOf[] = {power_gradient_tile<0>, power_gradient_tile<1>,
                                       power_gradient_tile<2>, power_gradient_tile<3>,
                                       power_gradient_tile<4>};
  return kOf[exponent];
}

}  // namespace
}  // namespace KDK_NAMESPACE
