// Peer divergence on NVIDIA GPUs: every ordered pair of learners in one launch.
//
// A row of all learners belongs to one thread (class axis strided), to a warp, or to a block. Two
// sweeps: log-sum-exps, then everything that joins the learners; the second finds the scores in the
// caches. A thread holds a few classes of all learners in registers.
#include <algorithm>

#include "common/cuda.cuh"
#include "common/registry.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLearners = 16;
constexpr int kSumThreads = 512;

struct Problem {
  const void* x[kMaxLearners];  // where each learner begins
  int64_t x_outer[kMaxLearners], x_class[kMaxLearners], x_inner[kMaxLearners];
  unsigned char* d;
  int64_t d_learner, d_outer, d_class, d_inner;
  DType dtype;
  const int64_t* labels;
  const float* weight;
  const float* scalars;  // null: by value
  float temperature, factor;
  float* divisor;
  float* losses;  // (learners, rows); null in the backward
  float* total;
  const float* upstream;
  bool upstream_per_row, count;
  int learners, classes;
  int64_t inner, rows, ignore_index;
};

__device__ float row_weight(const Problem& p, int64_t r) {
  float w = p.weight ? p.weight[r] : 1.f;
  if (p.labels) {
    const int64_t y = p.labels[r];
    if (y == p.ignore_index) return 0.f;
    if (w != 0.f && (y < 0 || y >= p.classes)) w = NAN;
  }
  return w;
}

// A row's threads: one, a warp, or the block.
template <int kRowThreads, typename V, typename Op>
__device__ V reduce(V value, Op op) {
  if constexpr (kRowThreads == kThreads) {
    return block_reduce<kThreads>(value, op);
  } else {
    return warp_reduce<kRowThreads>(value, op);
  }
}

// A log-sum-exp under way: sum of 2^((x - top) c).
struct Running {
  float top, sum;
};
struct Join {
  float c;
  __device__ Running operator()(Running a, Running b) const {
    const float top = fmaxf(a.top, b.top), ref = top == -INFINITY ? 0.f : top;
    return {top, a.sum * fast_exp2((a.top - ref) * c) + b.sum * fast_exp2((b.top - ref) * c)};
  }
};

// N neighbouring classes of a row. Where N > 1 they are aligned (the launch sees to it).
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
template <typename T, int N>
__device__ void load(const T* row, int64_t stride, int v, int classes, float (&x)[N]) {
  if (N > 1 && v + N <= classes) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(row + v);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      x[i] = v + i < classes ? to_float(row[(v + i) * stride]) : -INFINITY;
  }
}
template <typename T, int N>
__device__ void store(T* row, int64_t stride, int v, int classes, const float (&g)[N]) {
  if (N > 1 && v + N <= classes) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.v[i] = from_float<T>(g[i]);
    *reinterpret_cast<Pack<T, N>*>(row + v) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (v + i < classes) row[(v + i) * stride] = from_float<T>(g[i]);
  }
}

// kLearners: the learners rounded up, so that they fit in registers. N: classes at a time.
template <typename T, int kLearners, int N, int kRowThreads, bool kLoss>
__global__ void __launch_bounds__(kThreads, 1) peer_kernel(const Problem p) {
  const float temperature = p.scalars ? p.scalars[0] : p.temperature;
  float factor = p.scalars ? p.scalars[1] : p.factor;
  if (p.divisor) factor = *p.divisor == 0.f ? 0.f : factor / *p.divisor;
  const float c = kLog2e / temperature;
  constexpr int kRows = kThreads / kRowThreads;
  const int group = threadIdx.x / kRowThreads, lane = threadIdx.x % kRowThreads;
  const int64_t row = int64_t{blockIdx.x} * kRows + group;
  const bool inside = row < p.rows;
  const float w = inside ? row_weight(p, row) : 0.f;
  const bool live = w != 0.f;
  const int64_t o = inside ? row / p.inner : 0, i = inside ? row % p.inner : 0;
  const auto scores = [&](int k) {
    return static_cast<const T*>(p.x[k]) + o * p.x_outer[k] + i * p.x_inner[k];
  };

  float ref[kLearners], inverse[kLearners], log_z[kLearners], loss[kLearners];
#pragma unroll 1
  for (int k = 0; k < p.learners; ++k) {
    Running run = {-INFINITY, 0.f};
    const T* const x = scores(k);
    for (int v = lane * N; live && v < p.classes; v += kRowThreads * N) {
      float s[N];
      load(x, p.x_class[k], v, p.classes, s);
      float top = run.top;
#pragma unroll
      for (int j = 0; j < N; ++j) top = fmaxf(top, s[j]);
      const float from = top == -INFINITY ? 0.f : top;
      run.sum *= fast_exp2((run.top - from) * c);
#pragma unroll
      for (int j = 0; j < N; ++j) run.sum += fast_exp2((s[j] - from) * c);
      run.top = top;
    }
    run = reduce<kRowThreads>(run, Join{c});
    // Every thread has it; registers have no index that is known only at run time.
#pragma unroll
    for (int slot = 0; slot < kLearners; ++slot) {
      if (slot != k) continue;
      ref[slot] = run.top == -INFINITY ? 0.f : run.top;
      inverse[slot] = 1.f / run.sum;
      if (kRowThreads > 1) log_z[slot] = log2f(run.sum);
    }
  }
#pragma unroll
  for (int k = 0; k < kLearners; ++k) loss[k] = 0.f;

  for (int v = lane * N; live && v < p.classes; v += kRowThreads * N) {
    float a[kLearners][N], e[kLearners][N], total[N], top[N];  // log2 p, p
#pragma unroll
    for (int j = 0; j < N; ++j) total[j] = 0.f, top[j] = -INFINITY;
#pragma unroll
    for (int k = 0; k < kLearners; ++k) {
      if (k >= p.learners) break;
      load(scores(k), p.x_class[k], v, p.classes, a[k]);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float y = (a[k][j] - ref[k]) * c;
        e[k][j] = fast_exp2(y) * inverse[k];
        // One thread a row has no register left for log Z.
        a[k][j] = y - (kRowThreads == 1 ? -log2f(inverse[k]) : log_z[k]);
        total[j] += e[k][j];
        top[j] = fmaxf(top[j], a[k][j]);
      }
    }
    if constexpr (kLoss) {
      // sum_j p_j (log p_j - log p_k) = S - P (log p_k - top) for every k, whatever top is.
      float all[N];
#pragma unroll
      for (int j = 0; j < N; ++j) all[j] = 0.f;
#pragma unroll
      for (int k = 0; k < kLearners; ++k) {
        if (k >= p.learners) break;
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (e[k][j] > 0.f) all[j] += e[k][j] * (a[k][j] - top[j]);
      }
#pragma unroll
      for (int k = 0; k < kLearners; ++k) {
        if (k >= p.learners) break;
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (total[j] != 0.f) loss[k] += all[j] - total[j] * (a[k][j] - top[j]);
      }
    }
    if (p.d) {
#pragma unroll
      for (int k = 0; k < kLearners; ++k) {
        if (k >= p.learners) break;
        const float up = p.upstream ? p.upstream[p.upstream_per_row ? k * p.rows + row : 0] : 1.f;
        const float by = factor * w / temperature * up;
        float g[N];
#pragma unroll
        for (int j = 0; j < N; ++j) g[j] = by * (p.learners * e[k][j] - total[j]);
        T* const d = reinterpret_cast<T*>(p.d) + k * p.d_learner + o * p.d_outer + i * p.d_inner;
        store(d, p.d_class, v, p.classes, g);
      }
    }
  }
  if (p.d && inside && !live) {
    for (int k = 0; k < p.learners; ++k) {
      T* const d = reinterpret_cast<T*>(p.d) + k * p.d_learner + o * p.d_outer + i * p.d_inner;
      const float zero[N] = {};
      for (int v = lane * N; v < p.classes; v += kRowThreads * N)
        store(d, p.d_class, v, p.classes, zero);
    }
  }
  if constexpr (kLoss) {
#pragma unroll
    for (int k = 0; k < kLearners; ++k) {
      if (k >= p.learners) break;
      const float sum = reduce<kRowThreads>(loss[k], Sum{});
      if (lane == 0 && inside) p.losses[k * p.rows + row] = live ? factor * w * (sum * kLn2) : 0.f;
    }
  }
}

__global__ void __launch_bounds__(kSumThreads) count_kernel(const Problem p) {
  float sum = 0.f;
  for (int64_t r = threadIdx.x; r < p.rows; r += kSumThreads) {
    const bool ignored = p.labels && p.labels[r] == p.ignore_index;
    if (!ignored) sum += p.weight ? p.weight[r] : 1.f;
  }
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) *p.divisor = sum;
}

__global__ void __launch_bounds__(kSumThreads) total_kernel(const Problem p) {
  float sum = 0.f;
  for (int64_t r = threadIdx.x; r < p.learners * p.rows; r += kSumThreads) sum += p.losses[r];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) *p.total = sum;
}

struct Context {
  int64_t device, stream;
};

template <typename T, int kLearners, int N, int kRowThreads>
void launch_rows(const Problem& p, const Context& c) {
  constexpr int kRows = kThreads / kRowThreads;
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  if (blocks > 0x7fffffff) throw std::invalid_argument("peer_divergence: too many rows");
  const LaunchConfig config{"peer_divergence", dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                            c.device, c.stream};
  if (p.losses) {
    launch(config, peer_kernel<T, kLearners, N, kRowThreads, true>, p);
  } else {
    launch(config, peer_kernel<T, kLearners, N, kRowThreads, false>, p);
  }
}

template <typename T, int kLearners>
void launch_learners(const Problem& p, const Context& c) {
  // As many classes at a time as leave the learners' scores in 32 registers.
  constexpr int N = std::min(16 / static_cast<int>(sizeof(T)), std::max(1, 32 / kLearners));
  bool contiguous = p.classes == 1 || !p.d || p.d_class == 1, aligned = true;
  const auto fits = [&](const void* base, int64_t outer, int64_t inner) {
    return reinterpret_cast<uintptr_t>(base) % (N * sizeof(T)) == 0 && outer % N == 0 &&
           inner % N == 0;
  };
  for (int k = 0; k < p.learners; ++k) {
    contiguous = contiguous && (p.classes == 1 || p.x_class[k] == 1);
    // The stride of an axis of one row is any number.
    aligned = aligned &&
              fits(p.x[k], p.rows > p.inner ? p.x_outer[k] : 0, p.inner > 1 ? p.x_inner[k] : 0);
  }
  if (p.d)
    aligned = aligned && p.d_learner % N == 0 &&
              fits(p.d, p.rows > p.inner ? p.d_outer : 0, p.inner > 1 ? p.d_inner : 0);
  if (!contiguous) return launch_rows<T, kLearners, 1, 1>(p, c);
  if (aligned) {
    return p.classes <= 1024 ? launch_rows<T, kLearners, N, kWarp>(p, c)
                             : launch_rows<T, kLearners, N, kThreads>(p, c);
  }
  p.classes <= 1024 ? launch_rows<T, kLearners, 1, kWarp>(p, c)
                    : launch_rows<T, kLearners, 1, kThreads>(p, c);
}

template <typename T>
void launch_type(const Problem& p, const Context& c) {
  p.learners <= 4 ? launch_learners<T, 4>(p, c) : launch_learners<T, kMaxLearners>(p, c);
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("peer_divergence: ") + message);
}

template <size_t N>
Problem make_problem(const Tensor (&parts)[N], const Tensor& labels, const Tensor& weight,
                     const Tensor& scalars, const Tensor& divisor, const Tensor& d,
                     int64_t ignore_index, bool scalars_on_device) {
  Problem p = {};
  const Tensor& first = parts[0];
  require(first.ndim == 4, "scores must be (learners, outer, classes, inner)");
  for (const Tensor& x : parts) {
    if (!x && x.ndim == 0) break;
    require(x.ndim == 4 && x.dtype == first.dtype, "all scores must be 4-D and of one type");
    for (int axis = 1; axis < 4; ++axis)
      require(x.shape[axis] == first.shape[axis], "all learners must have one shape");
    for (int64_t i = 0; i < x.shape[0]; ++i) {
      require(p.learners < kMaxLearners, "takes at most 16 learners");
      p.x[p.learners] = x.as<unsigned char>() + i * x.stride[0] * size_of(x.dtype);
      p.x_outer[p.learners] = x.stride[1];
      p.x_class[p.learners] = x.stride[2];
      p.x_inner[p.learners] = x.stride[3];
      ++p.learners;
    }
  }
  require(first.shape[2] < (int64_t{1} << 31) - 8192, "too many classes");
  p.dtype = first.dtype;
  require(p.dtype == DType::f32 || p.dtype == DType::f16 || p.dtype == DType::bf16,
          "scores must be f32, f16 or bf16");
  p.classes = static_cast<int>(first.shape[2]);
  p.inner = first.shape[3];
  p.rows = first.shape[1] * p.inner;
  require(!d || (d.ndim == 4 && d.dtype == p.dtype && d.shape[0] == p.learners),
          "d must have the scores' shape and type");
  p.d = d.as<unsigned char>();
  p.d_learner = d.stride[0], p.d_outer = d.stride[1], p.d_class = d.stride[2],
  p.d_inner = d.stride[3];
  require(!labels || labels.numel() == p.rows, "labels must be i64[rows]");
  require(!weight || weight.numel() == p.rows, "weight must be f32[rows]");
  p.labels = labels.as<const int64_t>();
  p.weight = weight.as<const float>();
  require(scalars && scalars.numel() >= 2, "scalars must be f32[2]");
  const float* const values = scalars.as<const float>();
  if (scalars_on_device) {
    p.scalars = values;
  } else {
    p.temperature = values[0], p.factor = values[1];
  }
  p.divisor = divisor.as<float>();
  p.ignore_index = ignore_index;
  return p;
}

void run(const Problem& p, const Context& c) {
  switch (p.dtype) {
    case DType::f32: return launch_type<float>(p, c);
    case DType::f16: return launch_type<__half>(p, c);
    default: return launch_type<__nv_bfloat16>(p, c);
  }
}

}  // namespace

void peer_divergence_forward(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5,
                             Tensor x6, Tensor x7, Tensor x8, Tensor x9, Tensor x10, Tensor x11,
                             Tensor x12, Tensor x13, Tensor x14, Tensor x15, Tensor labels,
                             Tensor weight, Tensor scalars, Tensor divisor, Tensor losses,
                             Tensor total, Tensor d, int64_t count, int64_t ignore_index,
                             bool scalars_on_device, int64_t device, int64_t stream) {
  const Tensor parts[] = {x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15};
  Problem p =
      make_problem(parts, labels, weight, scalars, divisor, d, ignore_index, scalars_on_device);
  require(losses.numel() == p.learners * p.rows, "losses must be f32[learners, rows]");
  require(!count || divisor, "count needs a divisor");
  p.losses = losses.as<float>();
  p.total = total.as<float>();
  const LaunchConfig single{"peer_divergence sums", dim3(1), dim3(kSumThreads), device, stream};
  if (count) launch(single, count_kernel, p);
  if (p.rows) run(p, {device, stream});
  if (p.total) launch(single, total_kernel, p);
}
KDK_EXPORT(peer_divergence_forward)

void peer_divergence_backward(Tensor x0, Tensor x1, Tensor x2, Tensor x3, Tensor x4, Tensor x5,
                              Tensor x6, Tensor x7, Tensor x8, Tensor x9, Tensor x10, Tensor x11,
                              Tensor x12, Tensor x13, Tensor x14, Tensor x15, Tensor labels,
                              Tensor weight, Tensor scalars, Tensor divisor, Tensor upstream,
                              Tensor d, int64_t ignore_index, bool scalars_on_device,
                              int64_t device, int64_t stream) {
  const Tensor parts[] = {x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15};
  Problem p =
      make_problem(parts, labels, weight, scalars, divisor, d, ignore_index, scalars_on_device);
  if (p.rows == 0) return;
  require(upstream.numel() == 1 || upstream.numel() == p.learners * p.rows,
          "upstream must be f32[1] or f32[learners * rows]");
  p.upstream = upstream.as<const float>();
  p.upstream_per_row = upstream.numel() > 1;
  run(p, {device, stream});
}
KDK_EXPORT(peer_divergence_backward)

}  // namespace KDK_NAMESPACE
