// Log-probabilities at k classes a row, and what the other classes hold, on NVIDIA GPUs.
//
// Forward: a block a row, in tiles. A row's indices ascend, so that all threads walk them beside
// the tiles and take out what falls into their own classes. Backward: a block a tile.
#include <cfloat>

#include "common/cuda.cuh"
#include "common/registry.h"
#include "row_gather/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kThreads = 256;

struct Rows {  // (outer, classes, inner), strides in elements
  unsigned char* data;
  int64_t outer, cls, inner;
};

struct Problem {
  Rows s, ds;
  const int64_t* indices;
  const uint8_t* live;
  const float* scalars;  // on the device, or null: `temperature`
  float temperature;
  float *gathered, *rest, *total, *stats;
  const float *g, *g_rest, *g_total;
  int64_t inner;
  int classes, k, outside;
  int tiles;
};

template <typename T>
__device__ T* row_of(const Rows& m, int64_t inner, int64_t row) {
  return reinterpret_cast<T*>(m.data) + row / inner * m.outer + row % inner * m.inner;
}

// The classes of one thread in a tile: side by side where a row can be read in vectors, else
// kThreads apart.
template <typename T, bool kVector>
struct Tile {
  static constexpr int N = kVector ? Vec<T>::kSize : 4;
  static constexpr int kClasses = N * kThreads;

  __device__ static int index(int start, int i) {
    return kVector ? start + static_cast<int>(threadIdx.x) * N + i
                   : start + i * kThreads + static_cast<int>(threadIdx.x);
  }
  __device__ static void load(const T* row, int64_t stride, int start, int classes, float (&x)[N]) {
    if constexpr (kVector) {
      const int v = index(start, 0);
      if (v + N <= classes) {
        load_vec_streaming(row + v).to(x);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int v = index(start, i);
      x[i] = v < classes ? to_float(row[v * stride]) : -INFINITY;
    }
  }
  __device__ static void store(T* row, int64_t stride, int start, int classes,
                               const float (&x)[N]) {
    if constexpr (kVector) {
      const int v = index(start, 0);
      if (v + N <= classes) {
        store_vec_streaming(row + v, Vec<T>::from(x));
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int v = index(start, i);
      if (v < classes) row[v * stride] = from_float<T>(x[i]);
    }
  }
};

__device__ inline float finite(float m) { return m == -INFINITY ? 0.f : m; }

struct Online {
  float m, z;
};
struct OnlineOp {
  float c;
  __device__ Online operator()(const Online& a, const Online& b) const {
    const float m = fmaxf(a.m, b.m), at = finite(m);
    return {m, a.z * fast_exp2((a.m - at) * c) + b.z * fast_exp2((b.m - at) * c)};
  }
};

// What is the same in every thread of a block.
struct Head {
  const int64_t* index;
  float t, inverse_t, c;
  bool live, good;

  __device__ Head(const Problem& p, int64_t row) {
    index = p.indices + row * p.k;
    t = p.scalars ? __ldg(p.scalars) : p.temperature;
    inverse_t = 1.f / t;
    c = kLog2e / t;
    live = !p.live || p.live[row];
    good = index[0] >= -1 && index[p.k - 1] < p.classes;
  }
};

// The first j whose index is at least v.
__device__ inline int first_at_least(const int64_t* index, int k, int64_t v) {
  int low = 0, high = k;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (index[middle] < v)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(const Problem p) {
  using Own = Tile<T, kVector>;
  constexpr int N = Own::N;
  const int64_t row = blockIdx.x;
  const int tid = static_cast<int>(threadIdx.x);
  const Head h(p, row);
  float* const out = p.gathered + row * p.k;
  float* const stats = p.stats + row * kGatherStats;
  if (!h.live || !h.good) {
    const float fill = h.live ? NAN : 0.f;
    for (int j = tid; j < p.k; j += kThreads) out[j] = h.index[j] == -1 ? -INFINITY : fill;
    if (tid < kGatherStats) stats[tid] = fill;
    if (tid == 0 && p.rest) p.rest[row] = fill;
    if (tid == 0 && p.total) p.total[row] = fill;
    return;
  }
  const T* const x_row = row_of<T>(p.s, p.inner, row);
  const auto score = [&](int64_t v) { return to_float(x_row[v * p.s.cls]); };
  const int first = first_at_least(h.index, p.k, 0);
  float base = 0.f, sum = 0.f;
  if (p.total && first < p.k) {
    base = score(h.index[p.k - 1]);
    if (!(fabsf(base) <= FLT_MAX)) base = 0.f;
  }
  Online mine{-INFINITY, 0.f};
  int j = first;
#pragma unroll 1
  for (int start = 0; start < p.classes; start += Own::kClasses) {
    float x[N];
    Own::load(x_row, p.s.cls, start, p.classes, x);
    if (p.outside != kNoOutside) {
      unsigned taken = 0;
      for (; j < p.k && h.index[j] < int64_t{start} + Own::kClasses; ++j) {
        const int v = static_cast<int>(h.index[j]);
#pragma unroll
        for (int i = 0; i < N; ++i) taken |= (Own::index(start, i) == v ? 1u : 0u) << i;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool inside = taken >> i & 1u;
        if (p.outside == kRestAndTotal && !inside && Own::index(start, i) < p.classes)
          sum += x[i] - base;
        if (inside) x[i] = -INFINITY;
      }
    }
    float m = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) m = fmaxf(m, x[i]);
    m = fmaxf(m, mine.m);
    const float at = finite(m);
    if (m > mine.m) mine.z *= fast_exp2((mine.m - at) * h.c);
    mine.m = m;
#pragma unroll
    for (int i = 0; i < N; ++i) mine.z += fast_exp2((x[i] - at) * h.c);
  }
  const Online all = block_reduce<kThreads>(mine, OnlineOp{h.c});
  const float ref_out = finite(all.m), z_out = all.z;
  float ref = ref_out, z = z_out, mass_out = 1.f, count = static_cast<float>(p.classes);
  if (p.outside != kNoOutside) {
    float largest = all.m;
    for (int i = first + tid; i < p.k; i += kThreads) largest = fmaxf(largest, score(h.index[i]));
    ref = finite(block_max<kThreads>(largest));
    float z_in = 0.f;
    int unique = 0;
    for (int i = first + tid; i < p.k; i += kThreads) {
      if (i > first && h.index[i] == h.index[i - 1]) continue;
      z_in += fast_exp2((score(h.index[i]) - ref) * h.c);
      ++unique;
    }
    z_in = block_sum<kThreads>(z_in);
    unique = block_sum<kThreads>(unique);
    sum = block_sum<kThreads>(sum);
    mass_out = z_out > 0.f ? fast_exp2((ref_out - ref) * h.c) : z_out;  // or NaN
    z = z_out * mass_out + z_in;
    count = static_cast<float>(p.classes - unique);
  }
  const float log_z = logf(z);
  for (int i = tid; i < p.k; i += kThreads)
    out[i] = i < first ? -INFINITY : (score(h.index[i]) - ref) * h.inverse_t - log_z;
  if (tid == 0) {
    if (p.rest) p.rest[row] = logf(z_out) + ((ref_out - ref) * h.inverse_t - log_z);
    if (p.total)
      p.total[row] =
          count == 0.f ? 0.f : sum * h.inverse_t + count * ((base - ref) * h.inverse_t - log_z);
    stats[kRef] = ref;
    stats[kInverseZ] = 1.f / z;
    stats[kRefOutside] = ref_out;
    stats[kInverseZOut] = z_out == 0.f ? 0.f : 1.f / z_out;
    stats[kMassOut] = mass_out / z;
    stats[kCountOut] = count;
    for (int i = kCountOut + 1; i < kGatherStats; ++i) stats[i] = 0.f;
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Problem p) {
  using Own = Tile<T, kVector>;
  constexpr int N = Own::N;
  const int64_t row = blockIdx.x / static_cast<unsigned>(p.tiles);
  const int start = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.tiles)) * Own::kClasses;
  const Head h(p, row);
  T* const d_row = row_of<T>(p.ds, p.inner, row);
  float d[N];
  if (!h.live || !h.good) {
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] = h.live ? NAN : 0.f;
    Own::store(d_row, p.ds.cls, start, p.classes, d);
    return;
  }
  const float *const stats = p.stats + row * kGatherStats, *const g = p.g + row * p.k;
  const int first = first_at_least(h.index, p.k, 0);
  float own = 0.f;
  for (int j = first + static_cast<int>(threadIdx.x); j < p.k; j += kThreads) own += g[j];
  own = block_sum<kThreads>(own);
  const GatherCoefficients f = gather_coefficients(stats, own, p.g_rest ? p.g_rest[row] : 0.f,
                                                   p.g_total ? p.g_total[row] : 0.f, h.inverse_t);
  float x[N];
  Own::load(row_of<T>(p.s, p.inner, row), p.s.cls, start, p.classes, x);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float y = (x[i] - stats[kRefOutside]) * h.c;
    // Above 0 are only classes among the indices, which are replaced.
    d[i] = fast_exp2(y > 0.f ? 0.f : y) * f.outside + f.constant;
  }
  int j = first_at_least(h.index, p.k, start);
  while (j < p.k && h.index[j] < int64_t{start} + Own::kClasses) {
    const int v = static_cast<int>(h.index[j]);
    float here = g[j++];
    while (j < p.k && h.index[j] == v) here += g[j++];
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (Own::index(start, i) == v)
        d[i] = fast_exp2((x[i] - stats[kRef]) * h.c) * stats[kInverseZ] * f.inside +
               here * h.inverse_t;
  }
  Own::store(d_row, p.ds.cls, start, p.classes, d);
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("row_gather: ") + message);
}

Rows rows_of(const Tensor& x) {
  return {x.as<unsigned char>(), x.stride[0], x.stride[1], x.stride[2]};
}

// Whether every row can be read in whole vectors.
bool by_vectors(const Rows& m, DType type) {
  const int64_t size = 16 / size_of(type);
  return m.cls == 1 && m.outer % size == 0 && m.inner % size == 0 && aligned16(m.data);
}

Problem problem(const Tensor& student, const Tensor& indices, const Tensor& live,
                const Tensor& scalars, const Tensor& stats, bool scalars_on_device) {
  require(student.ndim == 3 && indices.ndim == 2 && indices.dtype == DType::i64,
          "student must be (outer, classes, inner), indices i64 (rows, k)");
  require(student.shape[1] <= 2147483647 - 8 * kThreads && indices.shape[1] >= 1,
          "too many classes, or no index");
  require(indices.shape[0] == student.shape[0] * student.shape[2],
          "indices must have the student's rows");
  Problem p = {};
  p.s = rows_of(student);
  // The stride along an axis of one row is never used, and torch leaves anything there.
  if (student.shape[2] == 1) p.s.inner = 0;
  if (student.shape[0] == 1) p.s.outer = 0;
  p.indices = indices.as<int64_t>();
  p.live = live.as<uint8_t>();
  p.scalars = scalars_on_device ? scalars.as<float>() : nullptr;
  p.temperature = scalars_on_device ? 1.f : *scalars.as<float>();
  p.stats = stats.as<float>();
  p.inner = student.shape[2];
  p.classes = static_cast<int>(student.shape[1]);
  p.k = static_cast<int>(indices.shape[1]);
  return p;
}

template <typename T, bool kVector>
void run(Problem p, int64_t rows, bool backward, int64_t device, int64_t stream) {
  constexpr int kClasses = Tile<T, kVector>::kClasses;
  p.tiles = (p.classes + kClasses - 1) / kClasses;
  const int64_t blocks = backward ? rows * p.tiles : rows;
  require(blocks <= 2147483647, "too many rows for one launch");
  const LaunchConfig config{backward ? "row_gather_backward" : "row_gather_forward",
                            dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device, stream};
  launch(config, backward ? backward_kernel<T, kVector> : forward_kernel<T, kVector>, p);
}

template <typename T>
void run_by(const Problem& p, DType type, int64_t rows, bool backward, int64_t device,
            int64_t stream) {
  const bool vectors = by_vectors(p.s, type) && (!backward || by_vectors(p.ds, type));
  return vectors ? run<T, true>(p, rows, backward, device, stream)
                 : run<T, false>(p, rows, backward, device, stream);
}

void run_typed(const Problem& p, DType type, int64_t rows, bool backward, int64_t device,
               int64_t stream) {
  switch (type) {
    case DType::f32: return run_by<float>(p, type, rows, backward, device, stream);
    case DType::f16: return run_by<__half>(p, type, rows, backward, device, stream);
    case DType::bf16: return run_by<__nv_bfloat16>(p, type, rows, backward, device, stream);
    default: require(false, "student must be f32, f16 or bf16");
  }
}

}  // namespace

void row_gather_forward(Tensor student, Tensor indices, Tensor live, Tensor scalars,
                        Tensor gathered, Tensor rest, Tensor total, Tensor stats, int64_t outside,
                        bool scalars_on_device, int64_t device, int64_t stream) {
  Problem p = problem(student, indices, live, scalars, stats, scalars_on_device);
  p.gathered = gathered.as<float>();
  p.rest = rest.as<float>();
  p.total = total.as<float>();
  p.outside = static_cast<int>(outside);
  run_typed(p, student.dtype, indices.shape[0], false, device, stream);
}
KDK_EXPORT(row_gather_forward)

void row_gather_backward(Tensor student, Tensor indices, Tensor live, Tensor scalars, Tensor stats,
                         Tensor g, Tensor g_rest, Tensor g_total, Tensor ds, bool scalars_on_device,
                         int64_t device, int64_t stream) {
  Problem p = problem(student, indices, live, scalars, stats, scalars_on_device);
  require(ds.ndim == 3 && ds.dtype == student.dtype, "ds must be the student's shape and dtype");
  p.ds = rows_of(ds);
  if (ds.shape[2] == 1) p.ds.inner = 0;
  if (ds.shape[0] == 1) p.ds.outer = 0;
  p.g = g.as<float>();
  p.g_rest = g_rest.as<float>();
  p.g_total = g_total.as<float>();
  run_typed(p, student.dtype, indices.shape[0], true, device, stream);
}
KDK_EXPORT(row_gather_backward)

}  // namespace KDK_NAMESPACE
