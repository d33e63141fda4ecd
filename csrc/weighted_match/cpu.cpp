// Weighted differences of two feature maps, sums of powers of one, the distance between two models'
// attention, and second moments of a pair, with their gradients. See
// kdkernels/ops/weighted_match/README.md.
#include "common/pages.h"
#include "common/registry.h"
#include "weighted_match/attention.h"
#include "weighted_match/context.h"
#include "weighted_match/focal.h"
#include "weighted_match/margin.h"

namespace KDK_NAMESPACE {
namespace {

// ---- sums of powers ----

// `rows` (batch, rows) and `lanes` (batch, lanes) receive the sums; either may be left out. A row's
// has the lanes' weights (batch, lanes), a lane's the rows' (batch, rows).
void feature_power_sums(Tensor x, Tensor row_weight, Tensor lane_weight, Tensor scalars,
                        Tensor rows, Tensor lanes, int64_t exponent, bool odd, int64_t threads) {
  const Powers of{x, row_weight, lane_weight, {*scalars.as<float>(), odd}};
  const Grid grid(x);
  Sums<float> to_rows(rows, 1, x.shape[0], x.shape[1], grid.across);
  Sums<float> to_lanes(lanes, 1, x.shape[0], x.shape[2], grid.down);
  const auto run = power_tile_of(exponent, rows.data, lanes.data, lane_weight.data);
  grid.each(threads, [&](const Tile& t, int64_t) { run(of, t, to_rows, to_lanes); });
  to_rows.join(), to_lanes.join();
}

// `rows` (batch, rows) and `lanes` (batch, lanes) hold upstream gradients; either may be left out.
void feature_power_gradient(Tensor x, Tensor row_weight, Tensor lane_weight, Tensor scalars,
                            Tensor rows, Tensor lanes, Tensor dx, int64_t exponent, bool odd,
                            int64_t threads) {
  const Powers of{x, row_weight, lane_weight, {*scalars.as<float>(), odd}};
  const auto run = power_gradient_tile_of(exponent);
  prefer_large_pages(dx);
  Grid(x).each(threads, [&](const Tile& t, int64_t) { run(of, t, rows, lanes, dx); });
}

// by_s and by_t (batch, kept) receive the gradients by the sums of powers, of a loss that is not
// scaled by its upstream; ds and dt those by the maps, where they are wanted.
void feature_attention(Tensor s, Tensor t, Tensor scalars, Tensor total, Tensor by_s, Tensor by_t,
                       Tensor ds, Tensor dt, int64_t exponent, bool odd, bool rows_of_s,
                       bool rows_of_t, bool mean, bool squared, bool add_eps, int64_t threads) {
  const float* given = scalars.as<float>();  // p, eps
  const Exponent e{given[0], odd};
  prefer_large_pages(ds), prefer_large_pages(dt);
  Attended of_s(s, by_s, ds, e, exponent, rows_of_s), of_t(t, by_t, dt, e, exponent, rows_of_t);
  const double batch = static_cast<double>(s.shape[0]), kept = static_cast<double>(of_s.kept);
  const Comparison by{given[1], 1.0 / (squared ? batch * kept : batch), add_eps, squared};
  *total.as<float>() = static_cast<float>(attention_loss(of_s, of_t, mean, by, threads));
}

// ---- weighted differences ----

// What a row or a lane contributes to d = s - t + offset, to its weight, and to what |s| counts in
// the student's gradient.
struct Side {
  float weight = 1.f, offset = 0.f, magnitude = 0.f;
};
// Which of these the lanes have, and whether slopes are summed. An array that is not needed is not
// read: each is one more stream.
enum LaneSides : int { kAlike = 0, kWeights = 1, kOffsets = 2, kSlopes = 4, kAllSides = 7 };
constexpr int kMagnitudes = 8;
struct Lanes {
  const float *weight, *offset, *magnitude;
};
struct Scale {
  float beta, inverse_beta;
};

// Adds lane weight x (measure, slope) of a row to `sums`, and makes the student's gradient if that
// is wanted.
template <int kMeasure, int kSides, bool kGradient>
KDK_ONE_COPY void match_row(const float* s, const float* t, int64_t n, Side row, Lanes lanes,
                            Scale by, double* sums, float* ds) {
  for (int64_t l = 0; l < n; l += kLanesInFloat) {
    const int64_t end = least(n, l + kLanesInFloat);
    float a = 0.f, b = 0.f;
#pragma omp simd reduction(+ : a, b)
    for (int64_t i = l; i < end; ++i) {
      const float d = s[i] - t[i] + row.offset + (kSides & kOffsets ? lanes.offset[i] : 0.f);
      const float w = kSides & kWeights ? lanes.weight[i] : 1.f;
      const float c = w * slope<kMeasure>(d, by.inverse_beta);
      a += w * measure<kMeasure>(d, by.beta, by.inverse_beta);
      if (kSides & kSlopes) b += c;
      float g = row.weight * c;
      if (kSides & kMagnitudes)
        g += (row.magnitude + lanes.magnitude[i]) * power_slope<kFirst>(s[i], 1.f, false);
      if (kGradient) ds[i] = g;
    }
    sums[0] += static_cast<double>(a);
    if (kSides & kSlopes) sums[1] += static_cast<double>(b);
  }
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

// What one call is about.
struct Match {
  Tensor s, t, row_weight, lane_weight, row_offset, lane_offset, ds, dt;
  Scale by;
  float factor;
  Tensor row_magnitude{}, lane_magnitude{};  // both or none, with weights and squares only
};

// The weighted sum of a tile, and its shares in the sums of rows and lanes where these are wanted.
template <int kMeasure>
double match_tile(const Match& of, const Tile& tile, Sums<float>& rows, Sums<float>& lanes) {
  const bool wants = of.ds || of.dt, everything = of.lane_offset || rows || lanes,
             weights = of.lane_weight || everything;
  const auto run = of.row_magnitude ? match_row<kSquared, kWeights + kMagnitudes, true>
                   : wants          ? (everything ? match_row<kMeasure, kAllSides, true>
                                       : weights  ? match_row<kMeasure, kWeights, true>
                                                  : match_row<kMeasure, kAlike, true>)
                                    : (everything ? match_row<kMeasure, kAllSides, false>
                                       : weights  ? match_row<kMeasure, kWeights, false>
                                                  : match_row<kMeasure, kAlike, false>);
  alignas(64) float in_s[kMaxLanes], in_t[kMaxLanes], out[kMaxLanes], weight[kMaxLanes],
      offset[kMaxLanes];
  const float* magnitude = offset;
  LaneSums values, slopes;
  const Output ds(of.ds), dt(of.dt);
  const int64_t n = tile.lanes, lane = tile.batch * of.s.shape[2] + tile.lane;
  const int64_t step = least(ds.step(n), dt.step(n));
  for (int64_t i = 0; weights && i < n; ++i) {
    weight[i] = of.lane_weight ? of.lane_weight.as<float>()[lane + i] : 1.f;
    offset[i] = of.lane_offset ? of.lane_offset.as<float>()[lane + i] : 0.f;
  }
  if (of.lane_magnitude) magnitude = of.lane_magnitude.as<float>() + lane;
  const Lanes of_lanes{weight, offset, magnitude};
  if (lanes) values.clear(n), slopes.clear(n);
  double total = 0;
  for (int64_t k = 0; k < tile.rows; ++k) {
    const int64_t r = tile.row + k, of_sides = tile.batch * of.s.shape[1] + r;
    Side own;
    if (of.row_weight) own.weight = of.row_weight.as<float>()[of_sides];
    if (of.row_offset) own.offset = of.row_offset.as<float>()[of_sides];
    if (of.row_magnitude) own.magnitude = of.row_magnitude.as<float>()[of_sides];
    const float* x = read_row(of.s, tile.batch, r, tile.lane, n, in_s);
    const float* y = read_row(of.t, tile.batch, r, tile.lane, n, in_t);
    double of_row[] = {0.0, 0.0};
    Side scaled = own;
    scaled.weight *= of.factor;
    for (int64_t l = 0; l < n; l += step) {
      const int64_t some = least(step, n - l), at = tile.lane + l;
      float* made = ds ? ds.target(tile.batch, r, at, some, out) : out;
      run(x + l, y + l, some, scaled, {weight + l, offset + l, magnitude + l}, of.by, of_row, made);
      if (ds) ds.put(tile.batch, r, at, some, made);
      if (dt) {
        for (int64_t i = 0; i < some; ++i) out[i] = -made[i];
        dt.put(tile.batch, r, at, some, out);
      }
    }
    total += static_cast<double>(own.weight) * of_row[0];
    for (int field = 0; rows && field < 2; ++field)
      rows.put(tile.lane_piece, field, tile.batch, r, 1, &of_row[field]);
    if (lanes) {
      lane_sums<kMeasure>(x, y, n, own, of_lanes, of.by, values.few, slopes.few);
      if ((k + 1) % kRowsInFloat == 0) values.flush(n), slopes.flush(n);
    }
  }
  if (lanes) {
    values.flush(n), slopes.flush(n);
    lanes.put(tile.row_piece, 0, tile.batch, tile.lane, n, values.all);
    lanes.put(tile.row_piece, 1, tile.batch, tile.lane, n, slopes.all);
  }
  return total;
}

// The tiles' sum, in their order.
double match_sum(const Match& of, const Grid& grid, Tensor rows, Tensor lanes, int64_t measure,
                 int64_t threads) {
  const auto run = measure == kSquared    ? match_tile<kSquared>
                   : measure == kAbsolute ? match_tile<kAbsolute>
                                          : match_tile<kSmoothL1>;
  Sums<float> to_rows(rows, 2, of.s.shape[0], of.s.shape[1], grid.across);
  Sums<float> to_lanes(lanes, 2, of.s.shape[0], of.s.shape[2], grid.down);
  std::vector<double> each(static_cast<size_t>(grid.batch * grid.of_image));
  grid.each(threads, [&](const Tile& tile, int64_t i) {
    each[static_cast<size_t>(i)] = run(of, tile, to_rows, to_lanes);
  });
  to_rows.join(), to_lanes.join();
  double sum = 0;
  for (double one : each) sum += one;
  return sum;
}

// Rows of the tiles' width out of a single long one, from an element on.
Tensor cut(Tensor x, int64_t from, int64_t rows, int64_t lanes) {
  if (!x) return x;
  x.data = advance(x.data, x.dtype, from);
  x.shape[1] = rows, x.shape[2] = x.stride[1] = lanes;
  return x;
}

// Weights and offsets are (batch, rows) and (batch, lanes), contiguous. `total` is the weighted sum
// times the factor; the maps' gradients are its own, times `upstream` where that is given. `rows`
// (2, batch, rows) and `lanes` (2, batch, lanes) receive the sums of measure and slope with the
// other side's weights, without the factor.
void feature_match(Tensor s, Tensor t, Tensor row_weight, Tensor lane_weight, Tensor row_offset,
                   Tensor lane_offset, Tensor scalars, Tensor upstream, Tensor total, Tensor rows,
                   Tensor lanes, Tensor ds, Tensor dt, int64_t measure, int64_t threads) {
  const float* given = scalars.as<float>();  // beta, factor
  const float factor = upstream ? given[1] * *upstream.as<float>() : given[1];
  Match of{s,           t,          row_weight,
           lane_weight, row_offset, lane_offset,
           ds,          dt,         {given[0], 1.f / given[0]},
           factor};
  prefer_large_pages(ds), prefer_large_pages(dt);
  const bool alike = !row_weight && !lane_weight && !row_offset && !lane_offset && !rows && !lanes;
  double sum = 0;
  if (alike && s.shape[0] == 1 && s.shape[1] == 1 && s.shape[2] > kMaxLanes) {
    const int64_t whole = s.shape[2] / kMaxLanes, rest = s.shape[2] % kMaxLanes;
    const auto part = [&](int64_t from, int64_t n, int64_t width) {
      of.s = cut(s, from, n, width), of.t = cut(t, from, n, width);
      of.ds = cut(ds, from, n, width), of.dt = cut(dt, from, n, width);
      sum += match_sum(of, Grid(of.s, kLineElements), rows, lanes, measure, threads);
    };
    part(0, whole, kMaxLanes);
    if (rest) part(whole * kMaxLanes, 1, rest);
  } else {
    sum = match_sum(of, Grid(s), rows, lanes, measure, threads);
  }
  *total.as<float>() = static_cast<float>(sum * static_cast<double>(given[1]));
}

// ---- FGD ----

// `mask` (batch, height, width) of boxes (batch, boxes, 4) with their corners times `scale` (batch
// or 1, 4), if that is given.
void box_masks(Tensor boxes, Tensor scale, Tensor weights, Tensor mask) {
  const float* by = weights.as<float>();  // front, back
  const int64_t count = boxes.shape[1], height = mask.shape[1], width = mask.shape[2];
  for (int64_t b = 0; b < mask.shape[0]; ++b)
    mask_of_boxes(boxes.as<float>() + b * 4 * count,
                  scale ? scale.as<float>() + (scale.shape[0] == 1 ? 0 : 4 * b) : nullptr, count,
                  height, width, by[0], by[1], mask.as<float>() + b * height * width);
}

// The focal loss and the distance of the attentions. `mask` is (batch, pixels); `total` is the loss
// and ds its gradient, times `upstream` where that is given.
void feature_focal(Tensor s, Tensor t, Tensor mask, Tensor scalars, Tensor apart_weight,
                   Tensor upstream, Tensor total, Tensor ds, bool pixels_are_rows,
                   int64_t threads) {
  const int64_t batch = s.shape[0], rows = s.shape[1], lanes = s.shape[2], kept = rows + lanes;
  const double temperature = static_cast<double>(scalars.as<float>()[0]),
               share = static_cast<double>(scalars.as<float>()[1]),
               weight = share * static_cast<double>(*apart_weight.as<float>());
  const double by = upstream ? static_cast<double>(*upstream.as<float>()) : 1.0;
  std::vector<float> sums(static_cast<size_t>(2 * batch * kept));
  const auto part = [&](int64_t from, int64_t n) {
    Tensor x;
    x.data = sums.data() + from * batch, x.dtype = DType::f32, x.ndim = 2;
    x.shape[0] = batch, x.shape[1] = x.stride[0] = n, x.stride[1] = 1;
    return x;
  };
  const Tensor rows_s = part(0, rows), lanes_s = part(rows, lanes), rows_t = part(kept, rows),
               lanes_t = part(kept + rows, lanes);
  const float first = 1.f;
  Tensor exponent;
  exponent.data = const_cast<float*>(&first), exponent.dtype = DType::f32;
  feature_power_sums(t, {}, {}, exponent, rows_t, lanes_t, 1, false, threads);
  feature_power_sums(s, {}, {}, exponent, rows_s, lanes_s, 1, false, threads);
  double apart = 0.0;
  for (int64_t b = 0; b < batch; ++b) {
    const auto compare = [&](const Tensor& x, const Tensor& y, int64_t n, int64_t over) {
      float *of_s = x.as<float>() + b * n, *of_t = y.as<float>() + b * n;
      to_attention(of_s, n, over, temperature), to_attention(of_t, n, over, temperature);
      apart +=
          attentions_apart(of_s, of_t, n, weight * by / (static_cast<double>(over) * temperature));
    };
    compare(rows_s, rows_t, rows, lanes), compare(lanes_s, lanes_t, lanes, rows);
    const int64_t pixels = pixels_are_rows ? rows : lanes;
    float* of_pixels = (pixels_are_rows ? rows_t : lanes_t).as<float>() + b * pixels;
    const float* own = mask.as<float>() + b * pixels;
    for (int64_t i = 0; i < pixels; ++i) of_pixels[i] *= own[i];
  }
  Match of{s, t, rows_t, lanes_t, {}, {}, ds, {}, {1.f, 1.f}, static_cast<float>(share * by)};
  if (ds) of.row_magnitude = rows_s, of.lane_magnitude = lanes_s;
  prefer_large_pages(ds);
  const double focal = match_sum(of, Grid(s), {}, {}, kSquared, threads);
  *total.as<float>() = static_cast<float>(share * focal + weight * apart);
}

// ---- differences at several sizes ----

// `scalars` are Context's, `width` the pixels of a line. `total` is the loss, ds and dt its
// gradients, times `upstream` where that is given.
void feature_context(Tensor s, Tensor t, Tensor scalars, Tensor upstream, Tensor total, Tensor ds,
                     Tensor dt, int64_t width, int64_t threads) {
  const int64_t channels = s.shape[1], pixels = s.shape[2], rows = s.shape[0] * channels;
  const Context of(pixels, width, scalars.as<float>(), scalars.shape[0]);
  const double by = upstream ? static_cast<double>(*upstream.as<float>()) : 1.0;
  const int64_t group = kLineElements / least(pixels, kLineElements), groups = pieces(rows, group);
  const Output to_s(ds), to_t(dt);
  std::vector<double> each(static_cast<size_t>(groups));
  prefer_large_pages(ds), prefer_large_pages(dt);
  for_each(groups, 4 * rows * pixels, threads, [&](int64_t i) {
    static thread_local Scratch memory;
    const int64_t room = padded(pixels);
    float* in_s = memory.floats(3 * room + padded(width) + 2 * padded(of.cells));
    float *in_t = in_s + room, *buffer = in_t + room, *line = buffer + room;
    double* cells = reinterpret_cast<double*>(line + padded(width));
    double loss = 0;
    for (int64_t k = i * group; k < least(rows, (i + 1) * group); ++k) {
      const int64_t b = k / channels, r = k % channels;
      float* d = to_s ? to_s.target(b, r, 0, pixels, buffer) : buffer;
      double squares[2] = {0.0, 0.0};
      match_row<kSquared, kAlike, true>(read_row(s, b, r, 0, pixels, in_s),
                                        read_row(t, b, r, 0, pixels, in_t), pixels, {0.5f, 0.f}, {},
                                        {1.f, 1.f}, squares, d);
      loss += of.factor * squares[0] + pool(of, d, cells, line);
      if (!to_s && !to_t) continue;
      unpool(of, by, cells, line, d);
      put_row(to_s, b, r, pixels, d);
      if (to_t) {
        for (int64_t x = 0; x < pixels; ++x) in_t[x] = -d[x];
        put_row(to_t, b, r, pixels, in_t);
      }
    }
    each[static_cast<size_t>(i)] = loss;
  });
  double sum = 0;
  for (double one : each) sum += one;
  *total.as<float>() = static_cast<float>(sum);
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

// The moments (5, batch, rows) of each row, or (5, batch, lanes) of each lane, whichever is given.
void feature_moments(Tensor s, Tensor t, Tensor rows, Tensor lanes, int64_t threads) {
  const Grid grid(s);
  Sums<double> to_rows(rows, kMoments, s.shape[0], s.shape[1], grid.across);
  Sums<double> to_lanes(lanes, kMoments, s.shape[0], s.shape[2], grid.down);
  grid.each(threads, [&](const Tile& tile, int64_t) {
    alignas(64) float in_s[kMaxLanes], in_t[kMaxLanes];
    alignas(64) double made[kMoments][kMaxLanes];
    double sums[kMoments], *columns[kMoments];
    for (int m = 0; lanes && m < kMoments; ++m) {
      columns[m] = made[m];
      for (int64_t i = 0; i < tile.lanes; ++i) made[m][i] = 0.0;
    }
    for (int64_t r = tile.row; r < tile.row + tile.rows; ++r) {
      const float* x = read_row(s, tile.batch, r, tile.lane, tile.lanes, in_s);
      const float* y = read_row(t, tile.batch, r, tile.lane, tile.lanes, in_t);
      if (lanes) lane_moments(x, y, tile.lanes, columns);
      if (rows) {
        row_moments(x, y, tile.lanes, sums);
        for (int m = 0; m < kMoments; ++m)
          to_rows.put(tile.lane_piece, m, tile.batch, r, 1, &sums[m]);
      }
    }
    for (int m = 0; lanes && m < kMoments; ++m)
      to_lanes.put(tile.row_piece, m, tile.batch, tile.lane, tile.lanes, made[m]);
  });
  to_rows.join(), to_lanes.join();
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
                              bool of_lanes, int64_t threads) {
  const int64_t kept = upstream.shape[2], field = upstream.shape[1] * kept;
  prefer_large_pages(ds), prefer_large_pages(dt);
  Grid(s).each(threads, [&](const Tile& tile, int64_t) {
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
        const int64_t step = dx.step(tile.lanes);
        for (int64_t l = 0; l < tile.lanes; l += step) {
          const int64_t n = least(step, tile.lanes - l), lane = tile.lane + l;
          float* made = dx.target(tile.batch, r, lane, n, out);
          if (of_lanes)
            lane_combination(x + l, y + l, n, sum + lane, twice + l, mixed + lane, made);
          else
            row_combination(x + l, y + l, n, sum[r], 2.0 * square[r], mixed[r], made);
          dx.put(tile.batch, r, lane, n, made);
        }
      }
    }
  });
}

// ---- scores of right and wrong classes ----

// x and dx are (1, rows, classes), labels, upstream and values (rows). A row whose label is
// `ignore` counts nothing; one whose label is no class becomes NaN.
void margin_rows(Tensor x, Tensor labels, Tensor scalars, Tensor upstream, Tensor values, Tensor dx,
                 bool hardest, int64_t ignore, int64_t threads) {
  const Margin of{x, dx, *scalars.as<float>(), hardest};
  prefer_large_pages(dx);
  for_each(x.shape[1], x.numel(), threads, [&](int64_t r) {
    const int64_t y = labels.as<int64_t>()[r];
    const float by = upstream ? upstream.as<float>()[r] : 0.f;
    const float value = y == ignore                ? empty_row(of, r, 0.f)
                        : y < 0 || y >= x.shape[2] ? empty_row(of, r, NAN)
                                                   : margin_row(of, r, y, by);
    if (values) values.as<float>()[r] = value;
  });
}

KDK_EXPORT(feature_power_sums)
KDK_EXPORT(feature_power_gradient)
KDK_EXPORT(feature_attention)
KDK_EXPORT(feature_match)
KDK_EXPORT(box_masks)
KDK_EXPORT(feature_focal)
KDK_EXPORT(feature_context)
KDK_EXPORT(feature_moments)
KDK_EXPORT(feature_moments_gradient)
KDK_EXPORT(margin_rows)

}  // namespace
}  // namespace KDK_NAMESPACE
