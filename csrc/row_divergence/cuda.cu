// Launches of row_divergence: what the kernels are is in cuda_row.cuh.
#include <algorithm>

#include "common/registry.h"
#include "row_divergence/cuda_columns.cuh"

namespace KDK_NAMESPACE {
namespace {

constexpr int kCountThreads = 512;

__global__ void __launch_bounds__(kCountThreads) count_kernel(const Problem p) {
  SMEM_STATIC(Maxima, slots, kMaxCluster);
  const Maxima sums = count_rows<kCountThreads>(p, static_cast<Maxima*>(slots));
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    if (p.count & 1) p.divisors[0] = sums.s;
    if (p.count & 2) p.divisors[1] = sums.t;
  }
  if (p.cluster > 1) cluster_sync();
}

__global__ void __launch_bounds__(kCountThreads) total_kernel(const Problem p) {
  SMEM_STATIC(float, slots, kMaxCluster);
  float sum = 0.f;
  constexpr int kAhead = 16;  // loads of a thread in flight: few multiprocessors do this alone
  const int64_t stride = int64_t{kCountThreads} * cluster_size();
  for (int64_t first = int64_t{kCountThreads} * cluster_rank() + threadIdx.x; first < p.rows;
       first += stride * kAhead) {
    float x[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t r = first + i * stride;
      x[i] = r < p.rows ? p.losses[r] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum += x[i];
  }
  sum = cluster_reduce(block_sum<kCountThreads>(sum), Sum{}, static_cast<float*>(slots));
  if (cluster_rank() == 0 && threadIdx.x == 0) *p.total = sum;
  if (p.cluster > 1) cluster_sync();
}

// Shared memory of a block: three blocks of this size fit on a multiprocessor of an H100 (two on an
// A100), so that one loads while another computes.
constexpr int64_t kBlockBytes = 72 * 1024;
// Rows of at most this many bytes (both models) go to lanes of one warp.
constexpr int64_t kWarpBytes = 8 * 1024;
constexpr int kPortableCluster = 8;

struct Context {
  int64_t device, stream;
  bool clusters;
  int sms;
};

int power_of_two_at_least(int64_t n) {
  int x = 1;
  while (x < n) x *= 2;
  return x;
}

template <typename T>
size_t smem_bytes(const Problem& p) {
  SmemCarver carver;
  const int64_t each = int64_t{kThreads / p.lanes} * p.on_chip * chunk_size<T>();
  carver.take<unsigned char>(each * size_of(p.s.dtype));
  carver.take<unsigned char>(each * size_of(p.t.dtype));
  return carver.bytes();
}

template <typename T, bool kAny>
void launch_rows(Problem p, const Context& c) {
  constexpr int N = chunk_size<T>();
  const int64_t bytes = p.classes * (size_of(p.s.dtype) + size_of(p.t.dtype));
  const int64_t chunk_bytes = N * (size_of(p.s.dtype) + size_of(p.t.dtype));
  const int chunks = static_cast<int>((int64_t{p.classes} + 2 * N - 2) / N);  // of any alignment
  LaunchConfig config{"row_divergence", dim3(1), dim3(kThreads), c.device, c.stream};
  int64_t blocks;
  p.cluster = 1;
  if (bytes <= kWarpBytes) {
    // Two chunks a lane keep the sums' shuffles few; a handful of rows takes all lanes instead.
    const bool few = p.rows * kWarp <= kPortableCluster * kThreads;
    p.lanes = std::min(kWarp, power_of_two_at_least(few ? chunks : (chunks + 1) / 2));
    p.on_chip = chunks;
    blocks = (p.rows + kThreads / p.lanes - 1) / (kThreads / p.lanes);
    // Small enough to count, do the rows and add them up without another launch.
    const int64_t widest = c.clusters ? kPortableCluster : 1;
    const int64_t work = p.rows * ((chunks + p.lanes - 1) / p.lanes) * p.lanes;
    if (!p.backward && work <= widest * kThreads * 16) {
      p.one_launch = true;
      blocks = p.cluster = power_of_two_at_least(std::min(blocks, widest));
    }
    blocks = std::min<int64_t>(blocks, 1 << 30);
  } else {
    p.lanes = kThreads;
    if (c.clusters) {
      while (p.cluster < kPortableCluster && bytes > kBlockBytes * p.cluster) p.cluster *= 2;
      // Few rows: spread them, as long as each thread keeps a chunk or two.
      while (p.cluster < kPortableCluster && p.rows * p.cluster * 2 <= c.sms &&
             chunks >= p.cluster * 4 * kThreads)
        p.cluster *= 2;
    }
    const int64_t room = max_smem(c.device) - 4096;  // less the static arrays
    const auto share = [&](int cluster) { return (chunks + cluster - 1) / cluster * chunk_bytes; };
    // A little too much for three blocks: that little is read again, from L2.
    constexpr int64_t kNearly = kBlockBytes * 5 / 4;
    if (c.clusters && share(p.cluster) > kNearly && share(kMaxCluster) <= room) {
      LaunchConfig trial = config;
      trial.grid = dim3(kMaxCluster);
      trial.cluster = kMaxCluster;
      trial.smem = static_cast<size_t>(share(kMaxCluster));
      if (max_active_clusters(trial, rows_kernel<T, kAny>) > 0) p.cluster = kMaxCluster;
    }
    const int64_t bytes_each = share(p.cluster);
    const bool whole = c.clusters && bytes_each > kNearly && bytes_each <= room;
    p.on_chip =
        static_cast<int>((whole ? bytes_each : std::min(bytes_each, kBlockBytes)) / chunk_bytes);
    blocks = p.rows * p.cluster;
    if (blocks > 0x7fffffff) throw std::invalid_argument("row_divergence: too many rows");
  }
  config.grid = dim3(static_cast<unsigned>(blocks));
  config.cluster = p.cluster;
  config.smem = smem_bytes<T>(p);
  const bool one_launch = p.one_launch;

  LaunchConfig single{"row_divergence sums", dim3(1), dim3(kCountThreads), c.device, c.stream};
  single.cluster = c.clusters && p.rows > 16 * kCountThreads ? kPortableCluster : 1;
  single.grid = dim3(single.cluster);
  Problem sums = p;
  sums.cluster = single.cluster;
  if (!one_launch && p.count && !p.backward) launch(single, count_kernel, sums);
  launch(config, rows_kernel<T, kAny>, p);
  if (!one_launch && p.total && !p.backward) launch(single, total_kernel, sums);
}

template <typename T, bool kAny>
void launch_columns(const Problem& p, const Context& c) {
  LaunchConfig single{"row_divergence sums", dim3(1), dim3(kCountThreads), c.device, c.stream};
  single.cluster = c.clusters && p.rows > 16 * kCountThreads ? kPortableCluster : 1;
  single.grid = dim3(single.cluster);
  Problem sums = p;
  sums.cluster = single.cluster;
  if (p.count && !p.backward) launch(single, count_kernel, sums);
  const int64_t blocks = (p.rows + kWarp - 1) / kWarp;
  if (blocks > 0x7fffffff) throw std::invalid_argument("row_divergence: too many rows");
  launch({"row_divergence columns", dim3(static_cast<unsigned>(blocks)), dim3(kThreads), c.device,
          c.stream},
         columns_kernel<T, kAny>, p);
  if (p.total && !p.backward) launch(single, total_kernel, sums);
}

void run(const Problem& p, int64_t device, int64_t stream) {
  const Context c{device, stream, has_clusters(device), sm_count(device)};
  bool rows = true;
  for (const Matrix* m : {&p.s, &p.t, &p.ds, &p.dt}) rows = rows && (!m->data || m->cls == 1);
  const auto with = [&](auto type) {
    using T = decltype(type);
    if (p.inputs || p.kind > kJSD) {
      rows ? launch_rows<T, true>(p, c) : launch_columns<T, true>(p, c);
    } else {
      rows ? launch_rows<T, false>(p, c) : launch_columns<T, false>(p, c);
    }
  };
  // A single class must give exactly 0, which takes the exponents of float32.
  if (p.s.dtype != p.t.dtype || p.classes == 1) return with(AnyType{});
  switch (p.s.dtype) {
    case DType::f32: return with(float{});
    case DType::f16: return with(__half{});
    default: return with(__nv_bfloat16{});
  }
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("row_divergence: ") + message);
}

Matrix matrix(const Tensor& x, const Tensor& like, const char* message) {
  if (!x) return {};
  require(x.ndim == 3 && (x.dtype == DType::f32 || x.dtype == DType::f16 || x.dtype == DType::bf16),
          message);
  for (int d = 0; d < 3; ++d) require(x.shape[d] == like.shape[d], message);
  return {x.as<unsigned char>(), x.stride[0], x.stride[1], x.stride[2], x.dtype};
}

template <typename T>
T* array(const Tensor& x, DType dtype, int64_t size, const char* message) {
  if (!x) return nullptr;
  require(x.dtype == dtype && x.numel() >= size, message);
  // Sizes of 1 may have any stride.
  int64_t stride = 1;
  for (int d = x.ndim - 1; d >= 0; --d) {
    require(x.shape[d] == 1 || x.stride[d] == stride, message);
    stride *= x.shape[d];
  }
  return x.as<T>();
}

Problem problem(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                const Tensor& weight, const Tensor& class_weight, const Tensor& scalars,
                const Tensor& divisors, const Tensor& stats, const Tensor& ds, const Tensor& dt,
                int64_t kind, int64_t inputs, int64_t hard, int64_t ignore_index,
                bool scalars_on_device) {
  Problem p = {};
  p.s = matrix(student, student, "student must be (outer, classes, inner) of f32, f16 or bf16");
  p.t = matrix(teacher, student, "teacher must be f32, f16 or bf16 of student's shape");
  p.ds = matrix(ds, student, "ds must have student's shape and type");
  p.dt = matrix(dt, student, "dt must have teacher's shape and type");
  require(!ds || ds.dtype == student.dtype, "ds must have student's shape and type");
  require(!dt || dt.dtype == teacher.dtype, "dt must have teacher's shape and type");
  require(student.shape[1] < (int64_t{1} << 31) - 64, "too many classes");
  p.classes = static_cast<int>(student.shape[1]);
  p.inner = student.shape[2];
  p.rows = student.shape[0] * p.inner;
  p.labels =
      array<const int64_t>(labels, DType::i64, p.rows, "labels must be contiguous i64[rows]");
  p.weight = array<const float>(weight, DType::f32, p.rows, "weight must be contiguous f32[rows]");
  p.class_weight = array<const float>(class_weight, DType::f32, p.classes,
                                      "class_weight must be contiguous f32[classes]");
  const float* values =
      array<const float>(scalars, DType::f32, kScalars, "scalars must be contiguous f32[8]");
  if (scalars_on_device) {
    p.scalars = values;
  } else {
    for (int i = 0; i < kScalars; ++i) p.values[i] = values[i];
  }
  p.divisors = array<float>(divisors, DType::f32, 2, "divisors must be contiguous f32[2]");
  p.stats =
      array<float>(stats, DType::f32, p.rows * kStats, "stats must be contiguous f32[rows, 8]");
  require(p.stats || p.rows == 0, "stats are required");
  require(aligned16(p.stats), "stats must be aligned to 16 bytes");
  require(kind >= 0 && (kind < kKinds || kind == kDecoupledKL), "unknown kind");
  require(inputs >= 0 && inputs <= 2, "inputs must be 0, 1 or 2");
  require(inputs != 2 || !dt, "a teacher given as probabilities has no gradient");
  require(!hard || labels || p.rows == 0, "the hard-label term needs labels");
  require(kind != kDecoupledKL || labels || p.rows == 0, "a decoupled KL needs labels");
  require(kind != kDecoupledKL || inputs == 0, "a decoupled KL takes logits only");
  p.ignore_index = ignore_index;
  p.kind = static_cast<int>(kind);
  p.inputs = static_cast<int>(inputs);
  p.hard = hard != 0;
  return p;
}

}  // namespace

void row_divergence_forward(Tensor student, Tensor teacher, Tensor labels, Tensor weight,
                            Tensor class_weight, Tensor scalars, Tensor divisors, Tensor losses,
                            Tensor total, Tensor stats, Tensor ds, Tensor dt, int64_t kind,
                            int64_t inputs, int64_t hard, int64_t count, int64_t ignore_index,
                            bool scalars_on_device, int64_t device, int64_t stream) {
  Problem p = problem(student, teacher, labels, weight, class_weight, scalars, divisors, stats, ds,
                      dt, kind, inputs, hard, ignore_index, scalars_on_device);
  p.losses = array<float>(losses, DType::f32, p.rows, "losses must be contiguous f32[rows]");
  p.total = array<float>(total, DType::f32, 1, "total must be f32[1]");
  p.count = static_cast<int>(count);
  require(!count || divisors, "count needs divisors");
  require(p.losses || p.rows == 0, "losses are required");
  if (p.rows == 0) {
    // The sums of nothing, by the kernels that make them: no pointer of an empty tensor is read.
    LaunchConfig single{"row_divergence sums", dim3(1), dim3(kCountThreads), device, stream};
    p.cluster = 1;
    if (count) launch(single, count_kernel, p);
    if (p.total) launch(single, total_kernel, p);
    return;
  }
  run(p, device, stream);
}
KDK_EXPORT(row_divergence_forward)

void row_divergence_backward(Tensor student, Tensor teacher, Tensor labels, Tensor weight,
                             Tensor class_weight, Tensor scalars, Tensor divisors, Tensor stats,
                             Tensor upstream, Tensor ds, Tensor dt, Tensor temperature_grad,
                             int64_t kind, int64_t inputs, int64_t hard, int64_t ignore_index,
                             bool scalars_on_device, int64_t device, int64_t stream) {
  Problem p = problem(student, teacher, labels, weight, class_weight, scalars, divisors, stats, ds,
                      dt, kind, inputs, hard, ignore_index, scalars_on_device);
  p.backward = true;
  p.upstream = array<const float>(upstream, DType::f32, 1, "upstream must be f32[1] or f32[rows]");
  p.upstream_per_row = upstream.numel() > 1;
  p.temperature_grad = array<float>(temperature_grad, DType::f32, 2 * p.rows,
                                    "temperature_grad must be f32[rows, 2]");
  if (p.rows == 0 || !(ds || dt || temperature_grad)) return;
  require(p.upstream != nullptr, "upstream is required");
  require(!p.upstream_per_row || upstream.numel() == p.rows,
          "upstream must be f32[1] or f32[rows]");
  run(p, device, stream);
}
KDK_EXPORT(row_divergence_backward)

}  // namespace KDK_NAMESPACE
