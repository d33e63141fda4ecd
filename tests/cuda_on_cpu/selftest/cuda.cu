// Kernels that the test of this folder runs: what CUDA promises, and planted bugs.
#include "common/cuda.cuh"
#include "common/registry.h"

namespace KDK_NAMESPACE {

// ------------------------------------------------------------------------------ features

__global__ void features_kernel(const int* in, int* out, int n) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int* row = out + (blockIdx.x * blockDim.x + threadIdx.x) * 16;
  const int v = in[threadIdx.x];
  row[0] = __shfl_xor_sync(kFullMask, v, 1);
  row[1] = __shfl_down_sync(kFullMask, v, 3, 8);
  row[2] = __shfl_up_sync(kFullMask, v, 2, 16);
  row[3] = __shfl_sync(kFullMask, v, 5, 8);
  row[4] = static_cast<int>(__shfl_xor_sync(kFullMask, static_cast<double>(v) * 1.5, 16));
  row[5] = static_cast<int>(__shfl_sync(kFullMask, static_cast<long long>(v) << 33, 0) >> 33);
  // Two halves of a warp in collectives of their own, with other numbers of turns.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = v;
  if (lane < 16) {
    for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(half, sum, step);
  } else {
    sum = __reduce_max_sync(half, v);
  }
  row[6] = sum;
  row[7] = static_cast<int>(__ballot_sync(half, v & 1));
  __syncwarp();
  row[8] = __any_sync(kFullMask, v == 7) * 2 + __all_sync(kFullMask, v >= 0);
  row[9] = __syncthreads_count(v & 1);
  row[10] = __syncthreads_or(v == n) * 2 + __syncthreads_and(v >= 0);
  row[11] = block_sum<64>(v);
  row[12] = block_max<64>(v);
  row[13] = static_cast<int>(__match_any_sync(kFullMask, v & 3));
  row[14] = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x + gridDim.x);
  row[15] = atomicAdd(out + (gridDim.x * blockDim.x) * 16, v) >= 0;
}
void features(Tensor in, Tensor out, int64_t device, int64_t stream) {
  launch({"features", dim3(3), dim3(64), device, stream}, features_kernel, in.as<int>(),
         out.as<int>(), 5);
}
KDK_EXPORT(features)

__global__ void index_kernel(int* out) {
  const dim3 g = gridDim, b = blockDim;
  const unsigned block = (blockIdx.z * g.y + blockIdx.y) * g.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * b.y + threadIdx.y) * b.x + threadIdx.x;
  atomicAdd(out + block * (b.x * b.y * b.z) + thread, static_cast<int>(block * 100 + thread));
}
void index3d(Tensor out, int64_t device, int64_t stream) {
  launch({"index3d", dim3(2, 3, 2), dim3(3, 2, 4), device, stream}, index_kernel, out.as<int>());
}
KDK_EXPORT(index3d)

// The rounding of every value of a table to half and bfloat16, and back.
__global__ void round_kernel(const float* in, __half* h, __nv_bfloat16* b, float* back, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  h[i] = __float2half_rn(in[i]);
  b[i] = __float2bfloat16_rn(in[i]);
  back[i] = __half2float(h[i]) + __bfloat162float(b[i]);
}
void round_small(Tensor in, Tensor h, Tensor b, Tensor back, int64_t device, int64_t stream) {
  const int n = static_cast<int>(in.numel());
  launch({"round_small", dim3((n + 63) / 64), dim3(64), device, stream}, round_kernel,
         in.as<float>(), h.as<__half>(), b.as<__nv_bfloat16>(), back.as<float>(), n);
}
KDK_EXPORT(round_small)

// Doubles a tensor of any strides in place; errors of every type; what the device says of itself.
__global__ void double_kernel(float* x, int64_t rows, int64_t cols, int64_t rs, int64_t cs) {
  for (int64_t i = threadIdx.x; i < rows * cols; i += blockDim.x)
    x[i / cols * rs + i % cols * cs] *= 2;
}
void twice(Tensor x, int64_t device, int64_t stream) {
  if (x.ndim != 2)
    throw std::invalid_argument("x must have 2 dimensions, got " + std::to_string(x.ndim));
  if (x.shape[0] > 100) throw std::out_of_range("x has too many rows");
  launch({"twice", dim3(1), dim3(32), device, stream}, double_kernel, x.as<float>(), x.shape[0],
         x.shape[1], x.stride[0], x.stride[1]);
}
KDK_EXPORT(twice)

void device_facts(Tensor out, int64_t device) {
  out.as<int64_t>()[0] = sm_count(device);
  out.as<int64_t>()[1] = max_smem(device);
  out.as<int64_t>()[2] = has_clusters(device);
}
KDK_EXPORT(device_facts)

__global__ void order_kernel(int* ticket, int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = atomicAdd(ticket, 1);
}
void depends_on_order(Tensor ticket, Tensor out, int64_t device, int64_t stream) {
  launch({"depends_on_order", dim3(8), dim3(32), device, stream}, order_kernel, ticket.as<int>(),
         out.as<int>());
}
KDK_EXPORT(depends_on_order)

// ------------------------------------------------------------------------------ planted bugs

// Columns of a matrix, split over the two blocks of a cluster: out[c] = sum over rows of x, minus
// the largest such sum. `bug` leaves one thing out; 0 is right.
enum Bug {
  kNone,
  kNoBlockBarrier,
  kNoClusterBarrier,
  kSlotReused,
  kReadOverrun,
  kWriteOverrun,
  kSharedOverrun,
  kCarvedOverrun,
  kEarlyExit,
  kMissingLane,
  kUninitialised,
  kNoCopyWait,
  kNoLastBarrier,
  kStaticOverrun,
  kDivergentBarrier,
};

constexpr int kThreads = 64;

__device__ void carve(SmemCarver& c, float** tile, float** column) {
  *tile = c.take<float>(kThreads * 4);
  *column = c.take<float>(kThreads);
}

__global__ void planted_kernel(const float* x, float* out, int rows, int bug) {
  SMEM_DYNAMIC(unsigned char, raw);
  SmemCarver carver(raw);
  float *tile, *column;
  carve(carver, &tile, &column);
  SMEM_STATIC(float, largest, kMaxCluster);
  SMEM_STATIC(float, smallest, kMaxCluster);
  SMEM_STATIC(float, scratch, kThreads);
  const int t = static_cast<int>(threadIdx.x), rank = cluster_rank();
  const int width = cluster_size() * kThreads;
  float total = 0;

  // Each thread copies four columns of one row in four, and sums one column.
  for (int r0 = 0; r0 < rows; r0 += 4) {
    const int row = r0 + t / 16, first = t % 16 * 4;
    const int edge = bug == kReadOverrun ? rows + 1 : rows;
    cp_async16(tile + t * 4, x + (row < edge ? row : 0) * width + rank * kThreads + first,
               row < edge ? 16 : 0);
    cp_async_commit();
    if (bug != kNoCopyWait) cp_async_wait();
    if (bug != kNoBlockBarrier) __syncthreads();
    for (int i = 0; i < 4; ++i) total += tile[i * kThreads + t];
    __syncthreads();
  }
  column[t + (bug == kCarvedOverrun)] = total;
  float* const next = scratch;  // a pointer: UBSan knows the bounds of the array itself
  next[t + (bug == kStaticOverrun)] = total;
  if (bug == kSharedOverrun && t == 0) largest[kMaxCluster] = 0;
  if (bug == kUninitialised && t == 5) column[t] = smallest[3];
  if (bug == kEarlyExit && t == 7 && rank == 1) return;
  if (bug == kDivergentBarrier && t == 9) __syncthreads();
  __syncthreads();
  if (bug == kMissingLane && t == 3) {
    total = column[t];
  } else {
    total = 0 * next[t] + column[t] + 0 * __shfl_xor_sync(kFullMask, total, 1);
  }

  // The largest sum of this block, then of the cluster.
  float top = block_max<kThreads>(total);
  if (t == 0) largest[0] = top;
  if (bug != kNoClusterBarrier) cluster_sync();
  for (int r = 0; r < cluster_size(); ++r) top = fmaxf(top, *cluster_map(largest, r));

  // Then the smallest, in a slot of its own.
  float low = -block_max<kThreads>(-total);
  float* slot = bug == kSlotReused ? largest : smallest;
  if (t == 0) slot[0] = low;
  cluster_sync();
  for (int r = 0; r < cluster_size(); ++r) low = fminf(low, *cluster_map(slot, r));
  if (bug == kNone) low = cluster_reduce(low, Sum{}, smallest + 1) / cluster_size();

  // And the other block's column, read from there.
  const int other = (rank + 1) % cluster_size();
  const float theirs = *cluster_map(column + t, other);
  const int at = rank * kThreads + t + (bug == kWriteOverrun);
  out[at] = total - top + low + theirs;
  if (bug != kNoLastBarrier) cluster_sync();
}

void planted(Tensor x, Tensor out, int64_t cluster, int64_t bug, int64_t device, int64_t stream) {
  SmemCarver size;
  size.take<float>(kThreads * 4);
  size.take<float>(kThreads);
  LaunchConfig c{"planted",
                 dim3(static_cast<unsigned>(cluster)),
                 dim3(kThreads),
                 device,
                 stream,
                 size.bytes(),
                 static_cast<int>(cluster)};
  launch(c, planted_kernel, x.as<float>(), out.as<float>(), static_cast<int>(x.shape[0]),
         static_cast<int>(bug));
}
KDK_EXPORT(planted)

}  // namespace KDK_NAMESPACE
