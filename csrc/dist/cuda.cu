// DIST on NVIDIA GPUs: rows, then columns in shares of rows whose sums are added in a fixed order,
// then rows again for the gradient. What is kept in between is eight floats a row and a few a
// column.
#include <algorithm>

#include "common/cuda.cuh"
#include "common/registry.h"
#include "dist/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32, kSlices = kThreads / kColumns;  // a block of the column kernels
constexpr int kSumThreads = 256;

enum RowStat { kRefS, kInverseS, kRefT, kInverseT, kRowA, kRowBs, kRowBt, kRowRho, kRowStats };
enum ColumnStat { kShiftS, kDeltaS, kShiftT, kDeltaT, kColA, kColBs, kColBt };
enum Sum { kTotalWeight, kValidRows, kRowTerm, kColumnTerm, kFirstHigh, kFirstLow };

struct Matrix {  // (outer, classes, inner)
  unsigned char* data;
  int64_t outer, cls, inner;
  DType dtype;
};

struct Problem {
  Matrix s, t, ds, dt;
  const int64_t* labels;
  const float* weight;
  const float* scalars;  // null: by value
  float values[4];       // temperature, beta, gamma, eps
  float *total, *rows, *columns, *sums, *scratch;
  const float* upstream;
  bool clamp;
  int classes, shares;
  int64_t inner, count, share, ignore_index;
};

// One type for both models, or (void) types that are looked up at run time.
template <typename T>
struct Element {
  __device__ static float get(const Matrix& m, int64_t at) {
    if constexpr (!std::is_void_v<T>) {
      return to_float(reinterpret_cast<const T*>(m.data)[at]);
    } else {
      if (m.dtype == DType::f32) return reinterpret_cast<const float*>(m.data)[at];
      if (m.dtype == DType::f16) return to_float(reinterpret_cast<const __half*>(m.data)[at]);
      return to_float(reinterpret_cast<const __nv_bfloat16*>(m.data)[at]);
    }
  }
  __device__ static void put(const Matrix& m, int64_t at, float x) {
    if constexpr (!std::is_void_v<T>) {
      reinterpret_cast<T*>(m.data)[at] = from_float<T>(x);
    } else {
      if (m.dtype == DType::f32) reinterpret_cast<float*>(m.data)[at] = x;
      if (m.dtype == DType::f16) reinterpret_cast<__half*>(m.data)[at] = from_float<__half>(x);
      if (m.dtype == DType::bf16)
        reinterpret_cast<__nv_bfloat16*>(m.data)[at] = from_float<__nv_bfloat16>(x);
    }
  }
};

__device__ float scalar(const Problem& p, int i) { return p.scalars ? p.scalars[i] : p.values[i]; }
__device__ float row_weight(const Problem& p, int64_t r) {
  if (p.labels && p.labels[r] == p.ignore_index) return 0.f;
  return p.weight ? p.weight[r] : 1.f;
}
__device__ int64_t row_offset(const Matrix& m, int64_t r, int64_t inner) {
  return r / inner * m.outer + r % inner * m.inner;
}
// The same for every element of a column: a division of 64 bits would take longer than the rest.
__device__ int64_t row_place(const Matrix& m, int64_t r, int64_t inner) {
  return inner == 1 ? r * m.outer : row_offset(m, r, inner);
}

template <int kRowThreads, typename V, typename Op>
__device__ V reduce(V value, Op op) {
  if constexpr (kRowThreads == kThreads) {
    return block_reduce<kThreads>(value, op);
  } else {
    return warp_reduce<kRowThreads>(value, op);
  }
}

struct Running {  // sum of 2^((x - top) c), for both models
  float top_s, sum_s, top_t, sum_t;
};
__device__ float finite(float top) { return top == -INFINITY ? 0.f : top; }
struct Join {
  float c;
  __device__ Running operator()(Running a, Running b) const {
    const float s = fmaxf(a.top_s, b.top_s), t = fmaxf(a.top_t, b.top_t);
    const auto sum = [=](float x, float from, float y, float other, float top) {
      return x * fast_exp2((from - finite(top)) * c) + y * fast_exp2((other - finite(top)) * c);
    };
    return {s, sum(a.sum_s, a.top_s, b.sum_s, b.top_s, s), t,
            sum(a.sum_t, a.top_t, b.sum_t, b.top_t, t)};
  }
};
struct Moments {
  float xy, xx, yy;
};
struct Add {
  __device__ Moments operator()(Moments a, Moments b) const {
    return {a.xy + b.xy, a.xx + b.xx, a.yy + b.yy};
  }
};

// Sum of weights and number of the valid rows, and the first of them. A label that is impossible
// makes the sum NaN, and with it everything.
__global__ void __launch_bounds__(kSumThreads) count_kernel(const Problem p) {
  float total = 0.f, valid = 0.f;
  // The first valid row, in two parts that float32 holds.
  float high = 16777216.f, low = 0.f;
  for (int64_t r = threadIdx.x; r < p.count; r += kSumThreads) {
    const float w = row_weight(p, r);
    if (w == 0.f) continue;
    const bool wrong = p.labels && (p.labels[r] < 0 || p.labels[r] >= p.classes);
    total += wrong ? NAN : w;
    if (valid == 0.f) high = static_cast<float>(r / 4096), low = static_cast<float>(r % 4096);
    valid += 1.f;
  }
  const float first = -block_max<kSumThreads>(-high);
  const float rest = -block_max<kSumThreads>(high == first ? -low : -4096.f);
  total = block_sum<kSumThreads>(total);
  valid = block_sum<kSumThreads>(valid);
  if (threadIdx.x == 0) {
    p.sums[kTotalWeight] = total;
    p.sums[kValidRows] = valid;
    p.sums[kFirstHigh] = valid == 0.f ? 0.f : first;
    p.sums[kFirstLow] = valid == 0.f ? 0.f : rest;
  }
}

// Log-sum-exps of a row, and its moments around 1 / V, which is every row's mean.
template <typename T, int kRowThreads>
__global__ void __launch_bounds__(kThreads) row_kernel(const Problem p) {
  using E = Element<T>;
  const float c = kLog2e / scalar(p, 0), mean = 1.f / static_cast<float>(p.classes);
  const int lane = threadIdx.x % kRowThreads;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  const bool inside = row < p.count, live = inside && row_weight(p, row) != 0.f;
  const int64_t s = inside ? row_offset(p.s, row, p.inner) : 0;
  const int64_t t = inside ? row_offset(p.t, row, p.inner) : 0;
  const int end = live ? p.classes : 0;
  Running run = {-INFINITY, 0.f, -INFINITY, 0.f};
  for (int v = lane; v < end; v += kRowThreads) {
    const float x = E::get(p.s, s + v * p.s.cls), y = E::get(p.t, t + v * p.t.cls);
    const float top_s = fmaxf(run.top_s, x), top_t = fmaxf(run.top_t, y);
    run.sum_s =
        run.sum_s * fast_exp2((run.top_s - finite(top_s)) * c) + fast_exp2((x - finite(top_s)) * c);
    run.sum_t =
        run.sum_t * fast_exp2((run.top_t - finite(top_t)) * c) + fast_exp2((y - finite(top_t)) * c);
    run.top_s = top_s, run.top_t = top_t;
  }
  run = reduce<kRowThreads>(run, Join{c});
  const float ref_s = finite(run.top_s), ref_t = finite(run.top_t);
  const float inverse_s = 1.f / run.sum_s, inverse_t = 1.f / run.sum_t;
  Moments m = {0.f, 0.f, 0.f};
  for (int v = lane; v < end; v += kRowThreads) {
    const float x = fast_exp2((E::get(p.s, s + v * p.s.cls) - ref_s) * c) * inverse_s - mean;
    const float y = fast_exp2((E::get(p.t, t + v * p.t.cls) - ref_t) * c) * inverse_t - mean;
    m.xy += x * y;
    m.xx += x * x;
    m.yy += y * y;
  }
  m = reduce<kRowThreads>(m, Add{});
  if (lane != 0 || !inside) return;
  float* const out = p.rows + row * kRowStats;
  const Pearson r = pearson(m.xy, m.xx, m.yy, scalar(p, 3), p.clamp);
  out[kRefS] = live ? ref_s : 0.f;
  out[kInverseS] = live ? inverse_s : 0.f;
  out[kRefT] = live ? ref_t : 0.f;
  out[kInverseT] = live ? inverse_t : 0.f;
  out[kRowA] = live ? r.a : 0.f;
  out[kRowBs] = live ? r.bx : 0.f;
  out[kRowBt] = live ? r.by : 0.f;
  out[kRowRho] = live ? r.rho : 0.f;
}

struct Pair {
  float s, t;
};
template <typename T>
__device__ Pair probabilities(const Problem& p, int64_t row, int v, float c) {
  const float* const stats = p.rows + row * kRowStats;
  const float x = Element<T>::get(p.s, row_place(p.s, row, p.inner) + v * p.s.cls);
  const float y = Element<T>::get(p.t, row_place(p.t, row, p.inner) + v * p.t.cls);
  return {fast_exp2((x - stats[kRefS]) * c) * stats[kInverseS],
          fast_exp2((y - stats[kRefT]) * c) * stats[kInverseT]};
}

// A column's sum over the shares, in their order.
__device__ float over_shares(const float* scratch, const Problem& p, int parts, int which, int v) {
  float sum = 0.f;
  for (int k = 0; k < p.shares; ++k) sum += scratch[(int64_t{k} * parts + which) * p.classes + v];
  return sum;
}

// The sums of one share of the rows for kColumns columns: of p less the first valid row's, in which
// a constant column is exactly 0, or (else) the moments around the means.
template <typename T, bool kMeans>
__global__ void __launch_bounds__(kThreads) column_kernel(const Problem p) {
  SMEM_STATIC(Moments, partial, kThreads);
  const float c = kLog2e / scalar(p, 0);
  const int lane = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int v = blockIdx.x * kColumns + lane;
  const bool inside = v < p.classes;
  const int64_t first =
      static_cast<int64_t>(p.sums[kFirstHigh]) * 4096 + static_cast<int64_t>(p.sums[kFirstLow]);
  const Pair shift = inside ? probabilities<T>(p, first, v, c) : Pair{0.f, 0.f};
  Pair delta = {0.f, 0.f};
  float* const moments = p.scratch + 2 * int64_t{p.shares} * p.classes;
  if constexpr (!kMeans) {
    if (inside) {
      delta.s = over_shares(p.scratch, p, 2, 0, v) / p.sums[kTotalWeight];
      delta.t = over_shares(p.scratch, p, 2, 1, v) / p.sums[kTotalWeight];
    }
    if (inside && slice == 0 && blockIdx.y == 0) {
      const float stats[] = {shift.s, delta.s, shift.t, delta.t};
      for (int i = 0; i < 4; ++i) p.columns[int64_t{i} * p.classes + v] = stats[i];
    }
  }
  Moments sum = {0.f, 0.f, 0.f};
  const int64_t begin = blockIdx.y * p.share,
                end = begin + p.share < p.count ? begin + p.share : p.count;
  for (int64_t r = begin + slice; inside && r < end; r += kSlices) {
    const float w = row_weight(p, r);
    if (w == 0.f) continue;
    const Pair q = probabilities<T>(p, r, v, c);
    const float x = (q.s - shift.s) - delta.s, y = (q.t - shift.t) - delta.t;
    if constexpr (kMeans) {
      sum.xx += w * x;
      sum.yy += w * y;
    } else {
      sum.xy += w * x * y;
      sum.xx += w * x * x;
      sum.yy += w * y * y;
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (slice == 0 && inside) {
    for (int k = 1; k < kSlices; ++k) sum = Add{}(sum, partial[k * kColumns + lane]);
    if constexpr (kMeans) {
      float* const out = p.scratch + int64_t{blockIdx.y} * 2 * p.classes + v;
      out[0] = sum.xx;
      out[p.classes] = sum.yy;
    } else {
      float* const out = moments + int64_t{blockIdx.y} * 3 * p.classes + v;
      out[0] = sum.xy;
      out[p.classes] = sum.xx;
      out[2 * int64_t{p.classes}] = sum.yy;
    }
  }
}

// The coefficients of kColumns columns, and their sum of 1 - rho.
__global__ void __launch_bounds__(kColumns) finish_kernel(const Problem p) {
  const int v = blockIdx.x * kColumns + threadIdx.x;
  const float* const moments = p.scratch + 2 * int64_t{p.shares} * p.classes;
  float term = 0.f;
  if (v < p.classes) {
    const Pearson r = pearson(over_shares(moments, p, 3, 0, v), over_shares(moments, p, 3, 1, v),
                              over_shares(moments, p, 3, 2, v), scalar(p, 3), p.clamp);
    p.columns[int64_t{kColA} * p.classes + v] = r.a;
    p.columns[int64_t{kColBs} * p.classes + v] = r.bx;
    p.columns[int64_t{kColBt} * p.classes + v] = r.by;
    term = 1.f - r.rho;
  }
  term = warp_sum(term);
  if (threadIdx.x == 0) p.scratch[5 * int64_t{p.shares} * p.classes + blockIdx.x] = term;
}

__global__ void __launch_bounds__(kSumThreads) total_kernel(const Problem p) {
  float by_row = 0.f, by_column = 0.f;
  for (int64_t r = threadIdx.x; r < p.count; r += kSumThreads) {
    const float w = row_weight(p, r);
    if (w != 0.f) by_row += w * (1.f - p.rows[r * kRowStats + kRowRho]);
  }
  if (p.count > 1 && p.sums[kValidRows] > 1.f) {
    const float* const parts = p.scratch + 5 * int64_t{p.shares} * p.classes;
    const int blocks = (p.classes + kColumns - 1) / kColumns;
    for (int k = threadIdx.x; k < blocks; k += kSumThreads) by_column += parts[k];
  }
  by_row = block_sum<kSumThreads>(by_row);
  by_column = block_sum<kSumThreads>(by_column) / static_cast<float>(p.classes);
  const float n = p.sums[kTotalWeight];
  by_row = n == 0.f ? 0.f : by_row / n;
  if (threadIdx.x == 0) {
    p.sums[kRowTerm] = by_row;
    p.sums[kColumnTerm] = by_column;
    *p.total = scalar(p, 1) * by_row + scalar(p, 2) * by_column;
  }
}

// p (sum p g - g) / T with g = -d loss / d p, for the models that want it.
template <typename T, int kRowThreads>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const Problem p) {
  using E = Element<T>;
  const float temperature = scalar(p, 0), c = kLog2e / temperature;
  const float mean = 1.f / static_cast<float>(p.classes);
  const int lane = threadIdx.x % kRowThreads;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  const bool inside = row < p.count;
  const float w = inside ? row_weight(p, row) : 0.f;
  const bool live = w != 0.f, by_column = p.sums[kValidRows] > 1.f;
  const float* const stats = p.rows + (inside ? row : 0) * kRowStats;
  const float up = live ? *p.upstream * w : 0.f;
  const float row_factor = live ? up * scalar(p, 1) / p.sums[kTotalWeight] : 0.f;
  const float column_factor = by_column ? up * scalar(p, 2) / static_cast<float>(p.classes) : 0.f;
  const float a = row_factor * stats[kRowA];
  const float bs = row_factor * stats[kRowBs], bt = row_factor * stats[kRowBt];
  const auto column = [&](ColumnStat which, int v) {
    return p.columns[int64_t{which} * p.classes + v];
  };
  const auto pull = [&](Pair q, int v) {
    Pair g = {a * (q.t - mean) - bs * (q.s - mean), a * (q.s - mean) - bt * (q.t - mean)};
    if (by_column) {
      const float x = (q.s - column(kShiftS, v)) - column(kDeltaS, v);
      const float y = (q.t - column(kShiftT, v)) - column(kDeltaT, v);
      const float ca = column(kColA, v);
      g.s += column_factor * (ca * y - column(kColBs, v) * x);
      g.t += column_factor * (ca * x - column(kColBt, v) * y);
    }
    return g;
  };
  Pair dot = {0.f, 0.f};
  for (int v = lane; live && v < p.classes; v += kRowThreads) {
    const Pair q = probabilities<T>(p, row, v, c), g = pull(q, v);
    dot.s += q.s * g.s;
    dot.t += q.t * g.t;
  }
  dot = reduce<kRowThreads>(dot, [](Pair x, Pair y) { return Pair{x.s + y.s, x.t + y.t}; });
  for (int v = lane; inside && v < p.classes; v += kRowThreads) {
    Pair g = {0.f, 0.f};
    if (live) {
      const Pair q = probabilities<T>(p, row, v, c);
      g = pull(q, v);
      g = {q.s * (dot.s - g.s) / temperature, q.t * (dot.t - g.t) / temperature};
    }
    if (p.ds.data) E::put(p.ds, row_offset(p.ds, row, p.inner) + v * p.ds.cls, g.s);
    if (p.dt.data) E::put(p.dt, row_offset(p.dt, row, p.inner) + v * p.dt.cls, g.t);
  }
}

struct Context {
  int64_t device, stream;
};

template <typename Run>
void with_type(const Problem& p, const Run& run) {
  if (p.s.dtype != p.t.dtype) return run(static_cast<void*>(nullptr));
  switch (p.s.dtype) {
    case DType::f32: return run(static_cast<float*>(nullptr));
    case DType::f16: return run(static_cast<__half*>(nullptr));
    default: return run(static_cast<__nv_bfloat16*>(nullptr));
  }
}

// A row's threads: one where its classes are far apart and the rows' neighbours, else a warp or a
// block.
template <typename OneThread, typename Warp, typename Block>
void launch_rows(const Problem& p, const Context& c, OneThread one, Warp warp, Block block) {
  const bool contiguous = p.classes == 1 || (p.s.cls == 1 && p.t.cls == 1);
  const int threads = !contiguous ? 1 : p.classes <= 1024 ? kWarp : kThreads;
  const int64_t blocks = (p.count * threads + kThreads - 1) / kThreads;
  if (blocks > 0x7fffffff) throw std::invalid_argument("dist: too many rows");
  const LaunchConfig config{"dist rows", dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                            c.device, c.stream};
  launch(config, threads == 1 ? one : threads == kWarp ? warp : block, p);
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("dist: ") + message);
}

Matrix matrix(const Tensor& x, const Tensor& like) {
  if (!x) return {};
  require(x.ndim == 3 && (x.dtype == DType::f32 || x.dtype == DType::f16 || x.dtype == DType::bf16),
          "scores must be (outer, classes, inner) of f32, f16 or bf16");
  for (int d = 0; d < 3; ++d)
    require(x.shape[d] == like.shape[d], "all scores must have one shape");
  return {x.as<unsigned char>(), x.stride[0], x.stride[1], x.stride[2], x.dtype};
}

Problem make_problem(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                     const Tensor& weight, const Tensor& scalars, const Tensor& rows,
                     const Tensor& columns, const Tensor& sums, bool clamp, int64_t ignore_index,
                     bool scalars_on_device) {
  Problem p = {};
  p.s = matrix(student, student);
  p.t = matrix(teacher, student);
  require(student.shape[1] < (int64_t{1} << 31) - 8192, "too many classes");
  p.classes = static_cast<int>(student.shape[1]);
  p.inner = student.shape[2];
  p.count = student.shape[0] * p.inner;
  require(!labels || labels.numel() == p.count, "labels must be i64[rows]");
  require(!weight || weight.numel() == p.count, "weight must be f32[rows]");
  require(rows.numel() == p.count * kRowStats, "rows must be f32[rows, 8]");
  require(columns.numel() == int64_t{7} * p.classes && sums.numel() == 8,
          "columns must be f32[7, classes] and sums f32[8]");
  p.labels = labels.as<const int64_t>();
  p.weight = weight.as<const float>();
  p.rows = rows.as<float>();
  p.columns = columns.as<float>();
  p.sums = sums.as<float>();
  require(scalars && scalars.numel() >= 4, "scalars must be f32[4]");
  if (scalars_on_device) {
    p.scalars = scalars.as<const float>();
  } else {
    std::copy(scalars.as<const float>(), scalars.as<const float>() + 4, p.values);
  }
  p.clamp = clamp;
  p.ignore_index = ignore_index;
  return p;
}

}  // namespace

void dist_forward(Tensor student, Tensor teacher, Tensor labels, Tensor weight, Tensor scalars,
                  Tensor total, Tensor rows, Tensor columns, Tensor sums, Tensor scratch,
                  bool clamp, int64_t ignore_index, int64_t shares, bool scalars_on_device,
                  int64_t device, int64_t stream) {
  Problem p = make_problem(student, teacher, labels, weight, scalars, rows, columns, sums, clamp,
                           ignore_index, scalars_on_device);
  const int blocks = (p.classes + kColumns - 1) / kColumns;
  require(shares >= 1 && shares <= 65535, "shares must be from 1 to 65535");
  require(scratch.numel() >= 5 * shares * p.classes + blocks, "scratch is too small");
  p.scratch = scratch.as<float>();
  p.total = total.as<float>();
  p.shares = static_cast<int>(shares);
  p.share = (p.count + shares - 1) / shares;
  const Context c{device, stream};
  const LaunchConfig single{"dist sums", dim3(1), dim3(kSumThreads), device, stream};
  launch(single, count_kernel, p);
  if (p.count) {
    with_type(p, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch_rows(p, c, row_kernel<T, 1>, row_kernel<T, kWarp>, row_kernel<T, kThreads>);
      if (p.count == 1) return;
      const LaunchConfig config{"dist columns", dim3(blocks, static_cast<unsigned>(shares)),
                                dim3(kThreads), device, stream};
      launch(config, column_kernel<T, true>, p);
      launch(config, column_kernel<T, false>, p);
    });
    if (p.count > 1)
      launch({"dist finish", dim3(blocks), dim3(kColumns), device, stream}, finish_kernel, p);
  }
  launch(single, total_kernel, p);
}
KDK_EXPORT(dist_forward)

void dist_backward(Tensor student, Tensor teacher, Tensor labels, Tensor weight, Tensor scalars,
                   Tensor rows, Tensor columns, Tensor sums, Tensor upstream, Tensor ds, Tensor dt,
                   bool clamp, int64_t ignore_index, bool scalars_on_device, int64_t device,
                   int64_t stream) {
  Problem p = make_problem(student, teacher, labels, weight, scalars, rows, columns, sums, clamp,
                           ignore_index, scalars_on_device);
  p.ds = matrix(ds, student);
  p.dt = matrix(dt, student);
  require(!ds || ds.dtype == student.dtype, "ds must have student's type");
  require(!dt || dt.dtype == teacher.dtype, "dt must have teacher's type");
  require(upstream && upstream.numel() == 1, "upstream must be f32[1]");
  p.upstream = upstream.as<const float>();
  if (p.count == 0) return;
  const Context c{device, stream};
  with_type(p, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_rows(p, c, gradient_kernel<T, 1>, gradient_kernel<T, kWarp>,
                gradient_kernel<T, kThreads>);
  });
}
KDK_EXPORT(dist_backward)

}  // namespace KDK_NAMESPACE
