// Weighted differences of two feature maps, sums of powers of one, and second moments of a pair,
// with their gradients. See kdkernels/ops/weighted_match/README.md.
//
// A map is (batch, rows, lanes), lanes side by side in memory: (N, C, HW) of an NCHW tensor,
// (N, HW, C) of one whose channels come last. It is cut into tiles whose size the caller gives, so
// that what is added to what does not depend on the number of threads; a tile writes its own share
// of each sum.
#include "common/convert.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "weighted_match/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kMaxLanes = 1024;  // of a tile

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// n elements of row r of image b from lane l on, as floats: where they lie, or in the buffer.
const float* read_row(const Tensor& x, int64_t b, int64_t r, int64_t l, int64_t n, float* buffer) {
  const void* p = advance(x.data, x.dtype, b * x.stride[0] + r * x.stride[1] + l);
  return x.dtype == DType::f32 ? static_cast<const float*>(p) : load_tile(p, x.dtype, n, buffer);
}
// Rows of a result, built where they belong or in a buffer.
class Output {
 public:
  Output(const Tensor& x) : x_(x) {}
  explicit operator bool() const { return static_cast<bool>(x_); }

  // Where to build elements from this place on.
  float* target(int64_t b, int64_t r, int64_t l, float* buffer) const {
    return x_.dtype == DType::f32 ? static_cast<float*>(at(b, r, l)) : buffer;
  }
  void put(int64_t b, int64_t r, int64_t l, int64_t n, const float* made) const {
    store_tile(at(b, r, l), x_.dtype, n, made);
  }

 private:
  void* at(int64_t b, int64_t r, int64_t l) const {
    return advance(x_.data, x_.dtype, b * x_.stride[0] + r * x_.stride[1] + l);
  }
  Tensor x_;
};

struct Tile {
  int64_t batch, row_piece, lane_piece, row, rows, lane, lanes;
};

// Calls body(tile) for every tile of x.
template <typename Body>
void for_tiles(const Tensor& x, int64_t tile_rows, int64_t tile_lanes, int64_t threads,
               const Body& body) {
  const int64_t across = pieces(x.shape[2], tile_lanes), down = pieces(x.shape[1], tile_rows);
  parallel_for(x.shape[0] * down * across, x.numel(), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Tile t;
      t.lane_piece = i % across, t.row_piece = i / across % down, t.batch = i / across / down;
      t.row = t.row_piece * tile_rows, t.lane = t.lane_piece * tile_lanes;
      t.rows = least(tile_rows, x.shape[1] - t.row),
      t.lanes = least(tile_lanes, x.shape[2] - t.lane);
      body(t);
    }
  });
}

// Where the tile's share of `field` goes: `of_rows` is (pieces of lanes, fields, batch, rows) and
// `of_lanes` (pieces of rows, fields, batch, lanes), both contiguous.
template <typename Real>
Real* share_of_rows(const Tensor& out, const Tile& t, int64_t field) {
  const int64_t at = (t.lane_piece * out.shape[1] + field) * out.shape[2] + t.batch;
  return out.as<Real>() + at * out.shape[3] + t.row;
}
template <typename Real>
Real* share_of_lanes(const Tensor& out, const Tile& t, int64_t field) {
  const int64_t at = (t.row_piece * out.shape[1] + field) * out.shape[2] + t.batch;
  return out.as<Real>() + at * out.shape[3] + t.lane;
}

// ---- sums of powers ----

struct Exponent {
  float p;
  bool odd;
};

// Which sums are made, and whether lanes have weights in those of the rows.
enum Sums : int { kOfLanes = 1, kOfRows = 2, kWeighted = 4 };

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

struct PowerSums {
  Tensor x, row_weight, lane_weight, rows, lanes;
  Exponent exponent;
  int64_t tile_rows, tile_lanes, threads;
};

// How many short rows are read as one long one, of whole vectors if that can be: possible where
// they touch and nothing tells them apart but their lanes.
int64_t rows_at_once(const Tensor& x, const Tile& t) {
  const int64_t width = x.shape[2], most = least(kMaxLanes / width, t.rows);
  if (x.stride[1] != width || t.lanes != width || most < 2) return 1;
  for (int64_t n = most; n > most / 2; --n)
    if (n * width % kLanes == 0) return n;
  return most;
}

template <int kPower, int kSums>
void power_tile(const PowerSums& of, const Tile& t) {
  alignas(64) float buffer[4][kMaxLanes], folded[kMaxLanes];
  const int64_t width = of.x.shape[2], height = of.x.shape[1];
  const float* row_weight = of.row_weight ? of.row_weight.as<float>() + t.batch * height : nullptr;
  const float* lane_weight =
      of.lane_weight ? of.lane_weight.as<float>() + t.batch * width + t.lane : nullptr;
  float* const to_rows = kSums & kOfRows ? share_of_rows<float>(of.rows, t, 0) : nullptr;
  float* const to_lanes = kSums & kOfLanes ? share_of_lanes<float>(of.lanes, t, 0) : nullptr;
  const int64_t group = kSums == kOfLanes && !row_weight ? rows_at_once(of.x, t) : 1;
  float* const sums_of_lanes = group > 1 ? folded : to_lanes;
  if constexpr (kSums & kOfLanes)
    for (int64_t i = 0; i < group * t.lanes; ++i) sums_of_lanes[i] = 0.f;
  for (int64_t r = 0; r < t.rows;) {
    const int64_t count = t.rows - r >= 4 * group ? 4 : 1;
    const int64_t own = least(group, t.rows - r);  // rows in each of these
    const float* rows[4];
    float weight[4] = {1.f, 1.f, 1.f, 1.f}, sums[4];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = t.row + r + k * own;
      rows[k] = read_row(of.x, t.batch, row, t.lane, own * t.lanes, buffer[k]);
      if (row_weight) weight[k] = row_weight[row];
    }
    (count == 4 ? add_powers<kPower, 4, kSums>
                : add_powers<kPower, 1, kSums>)(rows, own * t.lanes, of.exponent, weight,
                                                lane_weight, sums_of_lanes, sums);
    if constexpr (kSums & kOfRows)
      for (int64_t k = 0; k < count; ++k) to_rows[r + k] = sums[k];
    r += count * own;
  }
  if (group > 1) {
    for (int64_t i = 0; i < width; ++i) to_lanes[i] = folded[i];
    for (int64_t g = 1; g < group; ++g)
      for (int64_t i = 0; i < width; ++i) to_lanes[i] += folded[g * width + i];
  }
}

template <int kPower>
void power_sums(const PowerSums& of) {
  const auto run = !of.rows   ? power_tile<kPower, kOfLanes>
                   : of.lanes ? (of.lane_weight ? power_tile<kPower, 7> : power_tile<kPower, 3>)
                   : of.lane_weight ? power_tile<kPower, kOfRows + kWeighted>
                                    : power_tile<kPower, kOfRows>;
  for_tiles(of.x, of.tile_rows, of.tile_lanes, of.threads, [&](const Tile& t) { run(of, t); });
}

// A row's sum has the lanes' weights (batch, lanes), a lane's the rows' (batch, rows); all 1 where
// they are left out. `rows` and `lanes` receive the tiles' shares; either may be left out.
void feature_power_sums(Tensor x, Tensor row_weight, Tensor lane_weight, Tensor scalars,
                        Tensor rows, Tensor lanes, int64_t exponent, bool odd, int64_t tile_rows,
                        int64_t tile_lanes, int64_t threads) {
  constexpr decltype(&power_sums<0>) kRun[] = {power_sums<0>, power_sums<1>, power_sums<2>,
                                               power_sums<3>, power_sums<4>};
  kRun[exponent]({x,
                  row_weight,
                  lane_weight,
                  rows,
                  lanes,
                  {*scalars.as<float>(), odd},
                  tile_rows,
                  tile_lanes,
                  threads});
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

template <int kPower>
void power_gradients(const PowerSums& of, const Output& dx) {
  const Tensor& x = of.x;
  const auto run = of.lane_weight ? power_gradient<kPower, kOfLanes + kWeighted>
                   : of.lanes     ? power_gradient<kPower, kOfLanes>
                                  : power_gradient<kPower, kOfRows>;
  for_tiles(x, of.tile_rows, of.tile_lanes, of.threads, [&](const Tile& t) {
    alignas(64) float in[kMaxLanes], out[kMaxLanes], lanes[kMaxLanes], weight[kMaxLanes];
    const int64_t lane = t.batch * x.shape[2] + t.lane;
    const int64_t group = of.rows || of.row_weight ? 1 : rows_at_once(x, t);
    for (int64_t g = 0; g < group * t.lanes; g += t.lanes) {
      for (int64_t i = 0; i < t.lanes; ++i) {
        lanes[g + i] = of.lanes ? of.lanes.as<float>()[lane + i] : 0.f;
        weight[g + i] = of.lane_weight ? of.lane_weight.as<float>()[lane + i] : 1.f;
      }
    }
    for (int64_t r = t.row; r < t.row + t.rows; r += group) {
      const int64_t at = t.batch * x.shape[1] + r, n = least(group, t.row + t.rows - r) * t.lanes;
      const float* values = read_row(x, t.batch, r, t.lane, n, in);
      const float row = of.rows ? of.rows.as<float>()[at] : 0.f;
      const float row_weight = of.row_weight ? of.row_weight.as<float>()[at] : 1.f;
      float* made = dx.target(t.batch, r, t.lane, out);
      run(values, n, of.exponent, row, row_weight, lanes, weight, made);
      dx.put(t.batch, r, t.lane, n, made);
    }
  });
}

// `rows` (batch, rows) and `lanes` (batch, lanes) hold upstream gradients; either may be left out.
void feature_power_gradient(Tensor x, Tensor row_weight, Tensor lane_weight, Tensor scalars,
                            Tensor rows, Tensor lanes, Tensor dx, int64_t exponent, bool odd,
                            int64_t tile_rows, int64_t tile_lanes, int64_t threads) {
  constexpr decltype(&power_gradients<0>) kRun[] = {power_gradients<0>, power_gradients<1>,
                                                    power_gradients<2>, power_gradients<3>,
                                                    power_gradients<4>};
  kRun[exponent]({x,
                  row_weight,
                  lane_weight,
                  rows,
                  lanes,
                  {*scalars.as<float>(), odd},
                  tile_rows,
                  tile_lanes,
                  threads},
                 dx);
}

// ---- weighted differences ----

// What a row or a lane contributes to d = s - t + offset and to its weight.
struct Side {
  float weight = 1.f, offset = 0.f;
};
// Which of these the lanes have. An array that is not needed is not read: each is one more stream.
enum LaneSides : int { kAlike = 0, kWeights = 1, kWeightsAndOffsets = 3 };
struct Lanes {
  const float *weight, *offset;
};
struct Scale {
  float beta, inverse_beta;
};

// A row's sums of lane weight x (measure, slope).
template <int kMeasure, int kSides>
KDK_ONE_COPY void row_sums(const float* s, const float* t, int64_t n, float offset, Lanes lanes,
                           Scale by, float* value, float* slopes) {
  float a = 0.f, b = 0.f;
#pragma omp simd reduction(+ : a, b)
  for (int64_t i = 0; i < n; ++i) {
    const float d = s[i] - t[i] + offset + (kSides & 2 ? lanes.offset[i] : 0.f);
    const float w = kSides & 1 ? lanes.weight[i] : 1.f;
    a += w * measure<kMeasure>(d, by.beta, by.inverse_beta);
    b += w * slope<kMeasure>(d, by.inverse_beta);
  }
  *value = a, *slopes = b;
}

// The same with the student's gradient.
template <int kMeasure, int kSides>
KDK_ONE_COPY void row_gradient(const float* s, const float* t, int64_t n, Side row, Lanes lanes,
                               Scale by, float* value, float* slopes, float* ds) {
  float a = 0.f, b = 0.f;
#pragma omp simd reduction(+ : a, b)
  for (int64_t i = 0; i < n; ++i) {
    const float d = s[i] - t[i] + row.offset + (kSides & 2 ? lanes.offset[i] : 0.f);
    const float w = kSides & 1 ? lanes.weight[i] : 1.f;
    const float c = w * slope<kMeasure>(d, by.inverse_beta);
    a += w * measure<kMeasure>(d, by.beta, by.inverse_beta);
    b += c;
    ds[i] = row.weight * c;
  }
  *value = a, *slopes = b;
}

// Adds row weight x (measure, slope) to the lanes' sums.
template <int kMeasure>
KDK_ONE_COPY void lane_sums(const float* s, const float* t, int64_t n, Side row, Lanes lanes,
                            Scale by, float* values, float* slopes) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float d = s[i] - t[i] + row.offset + lanes.offset[i];
    values[i] += row.weight * measure<kMeasure>(d, by.beta, by.inverse_beta);
    slopes[i] += row.weight * slope<kMeasure>(d, by.inverse_beta);
  }
}

template <int kMeasure>
void match(const Tensor& s, const Tensor& t, const Tensor* sides, float beta, float factor,
           const Tensor& rows, const Tensor& lanes, const Output& ds, const Output& dt,
           int64_t tile_rows, int64_t tile_lanes, int64_t threads) {
  const Scale by{beta, 1.f / beta};
  const Tensor &row_weight = sides[0], &lane_weight = sides[1], &row_offset = sides[2],
               &lane_offset = sides[3];
  const bool offsets = lane_offset || lanes, weights = lane_weight || offsets;
  const auto sums = offsets   ? row_sums<kMeasure, kWeightsAndOffsets>
                    : weights ? row_sums<kMeasure, kWeights>
                              : row_sums<kMeasure, kAlike>;
  const auto gradient = offsets   ? row_gradient<kMeasure, kWeightsAndOffsets>
                        : weights ? row_gradient<kMeasure, kWeights>
                                  : row_gradient<kMeasure, kAlike>;
  for_tiles(s, tile_rows, tile_lanes, threads, [&](const Tile& tile) {
    alignas(64) float in_s[kMaxLanes], in_t[kMaxLanes], out[kMaxLanes], weight[kMaxLanes],
        offset[kMaxLanes];
    const int64_t n = tile.lanes, lane = tile.batch * s.shape[2] + tile.lane;
    for (int64_t i = 0; weights && i < n; ++i) {
      weight[i] = lane_weight ? lane_weight.as<float>()[lane + i] : 1.f;
      offset[i] = lane_offset ? lane_offset.as<float>()[lane + i] : 0.f;
    }
    const Lanes of_lanes{weight, offset};
    float *lane_values = nullptr, *lane_slopes = nullptr, value, slopes;
    if (lanes) {
      lane_values = share_of_lanes<float>(lanes, tile, 0);
      lane_slopes = share_of_lanes<float>(lanes, tile, 1);
      for (int64_t i = 0; i < n; ++i) lane_values[i] = lane_slopes[i] = 0.f;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = tile.batch * s.shape[1] + tile.row + r;
      Side own;
      if (row_weight) own.weight = row_weight.as<float>()[at];
      if (row_offset) own.offset = row_offset.as<float>()[at];
      const float* x = read_row(s, tile.batch, tile.row + r, tile.lane, n, in_s);
      const float* y = read_row(t, tile.batch, tile.row + r, tile.lane, n, in_t);
      if (ds || dt) {
        Side scaled = own;
        scaled.weight *= factor;
        float* made = ds ? ds.target(tile.batch, tile.row + r, tile.lane, out) : out;
        gradient(x, y, n, scaled, of_lanes, by, &value, &slopes, made);
        if (ds) ds.put(tile.batch, tile.row + r, tile.lane, n, made);
        if (dt) {
          for (int64_t i = 0; i < n; ++i) out[i] = -made[i];
          dt.put(tile.batch, tile.row + r, tile.lane, n, out);
        }
      } else {
        sums(x, y, n, own.offset, of_lanes, by, &value, &slopes);
      }
      if (rows) {
        share_of_rows<float>(rows, tile, 0)[r] = value;
        share_of_rows<float>(rows, tile, 1)[r] = slopes;
      }
      if (lanes) lane_sums<kMeasure>(x, y, n, own, of_lanes, by, lane_values, lane_slopes);
    }
  });
}

// Weights and offsets are (batch, rows) and (batch, lanes), contiguous. The gradients are those of
// the weighted sum times the factor, and times `upstream` where that is given.
void feature_match(Tensor s, Tensor t, Tensor row_weight, Tensor lane_weight, Tensor row_offset,
                   Tensor lane_offset, Tensor scalars, Tensor upstream, Tensor rows, Tensor lanes,
                   Tensor ds, Tensor dt, int64_t measure, int64_t tile_rows, int64_t tile_lanes,
                   int64_t threads) {
  const float* given = scalars.as<float>();  // beta, factor
  const float factor = upstream ? given[1] * *upstream.as<float>() : given[1];
  const Tensor sides[] = {row_weight, lane_weight, row_offset, lane_offset};
  const auto run = measure == kSquared    ? match<kSquared>
                   : measure == kAbsolute ? match<kAbsolute>
                                          : match<kSmoothL1>;
  run(s, t, sides, given[0], factor, rows, lanes, ds, dt, tile_rows, tile_lanes, threads);
}

// ---- second moments of a pair ----

constexpr int kMoments =
    5;  // sums of s, t, s^2, t^2, s t: doubles, so that no mean need be taken off

KDK_ONE_COPY void row_moments(const float* s, const float* t, int64_t n, double* out) {
  double a = 0, b = 0, aa = 0, bb = 0, ab = 0;
#pragma omp simd reduction(+ : a, b, aa, bb, ab)
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(s[i]), y = static_cast<double>(t[i]);
    a += x, b += y, aa += x * x, bb += y * y, ab += x * y;
  }
  out[0] = a, out[1] = b, out[2] = aa, out[3] = bb, out[4] = ab;
}

KDK_ONE_COPY void lane_moments(const float* s, const float* t, int64_t n, double* const* out) {
  double *a = out[0], *b = out[1], *aa = out[2], *bb = out[3], *ab = out[4];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>(s[i]), y = static_cast<double>(t[i]);
    a[i] += x, b[i] += y, aa[i] += x * x, bb[i] += y * y, ab[i] += x * y;
  }
}

// The moments of each row, or of each lane, whichever is given.
void feature_moments(Tensor s, Tensor t, Tensor rows, Tensor lanes, int64_t tile_rows,
                     int64_t tile_lanes, int64_t threads) {
  for_tiles(s, tile_rows, tile_lanes, threads, [&](const Tile& tile) {
    alignas(64) float in_s[kMaxLanes], in_t[kMaxLanes];
    double sums[kMoments], *columns[kMoments];
    for (int m = 0; lanes && m < kMoments; ++m) {
      columns[m] = share_of_lanes<double>(lanes, tile, m);
      for (int64_t i = 0; i < tile.lanes; ++i) columns[m][i] = 0.0;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* x = read_row(s, tile.batch, tile.row + r, tile.lane, tile.lanes, in_s);
      const float* y = read_row(t, tile.batch, tile.row + r, tile.lane, tile.lanes, in_t);
      if (lanes) lane_moments(x, y, tile.lanes, columns);
      if (rows) {
        row_moments(x, y, tile.lanes, sums);
        for (int m = 0; m < kMoments; ++m) share_of_rows<double>(rows, tile, m)[r] = sums[m];
      }
    }
  });
}

// dx = g + gx x + gy y, for one row's coefficients or for those of each lane.
KDK_ONE_COPY void row_combination(const float* x, const float* y, int64_t n, double g, double gx,
                                  double gy, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    out[i] =
        static_cast<float>(g + gx * static_cast<double>(x[i]) + gy * static_cast<double>(y[i]));
}
KDK_ONE_COPY void lane_combination(const float* x, const float* y, int64_t n, const double* g,
                                   const double* gx, const double* gy, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<float>(g[i] + gx[i] * static_cast<double>(x[i]) +
                                gy[i] * static_cast<double>(y[i]));
}

// `upstream` is (5, batch, rows) or (5, batch, lanes), the gradients of the moments.
void feature_moments_gradient(Tensor s, Tensor t, Tensor upstream, Tensor ds, Tensor dt,
                              bool of_lanes, int64_t tile_rows, int64_t tile_lanes,
                              int64_t threads) {
  const int64_t kept = upstream.shape[2], field = upstream.shape[1] * kept;
  for_tiles(s, tile_rows, tile_lanes, threads, [&](const Tile& tile) {
    alignas(64) float in_s[kMaxLanes], in_t[kMaxLanes], out[kMaxLanes];
    alignas(64) double twice[kMaxLanes];
    for (int side = 0; side < 2; ++side) {
      const Output dx(side == 0 ? ds : dt);
      if (!dx) continue;
      const double* g = upstream.as<double>() + tile.batch * kept;
      const double *sum = g + side * field, *square = g + (2 + side) * field,
                   *mixed = g + 4 * field;
      for (int64_t i = 0; of_lanes && i < tile.lanes; ++i) twice[i] = 2.0 * square[tile.lane + i];
      for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
        const float* x = read_row(side == 0 ? s : t, tile.batch, r, tile.lane, tile.lanes, in_s);
        const float* y = read_row(side == 0 ? t : s, tile.batch, r, tile.lane, tile.lanes, in_t);
        float* made = dx.target(tile.batch, r, tile.lane, out);
        if (of_lanes)
          lane_combination(x, y, tile.lanes, sum + tile.lane, twice, mixed + tile.lane, made);
        else
          row_combination(x, y, tile.lanes, sum[r], 2.0 * square[r], mixed[r], made);
        dx.put(tile.batch, r, tile.lane, tile.lanes, made);
      }
    }
  });
}

KDK_EXPORT(feature_power_sums)
KDK_EXPORT(feature_power_gradient)
KDK_EXPORT(feature_match)
KDK_EXPORT(feature_moments)
KDK_EXPORT(feature_moments_gradient)

}  // namespace
}  // namespace KDK_NAMESPACE
