// Rows whose classes lie apart (NCHW: the class axis is strided, the rows are neighbours). A block
// takes 32 rows, one a lane, so that each access of a warp is contiguous; its warps share the
// classes. The second and third look at a class find it in cache.
#pragma once
#include "row_divergence/cuda_rows.cuh"

namespace KDK_NAMESPACE {

constexpr int kSlices = kThreads / kWarp;

template <typename T>
class ColumnsIo {
 public:
  using E = Element<T>;
  static constexpr int kChunk = 4;  // classes a slice apart, all loads in flight together
  static constexpr int N = kChunk;
  static constexpr bool kExact = true;

  __device__ explicit ColumnsIo(const Problem& p)
      : p_(p),
        s_bytes_(E::bytes(p.s.dtype)),
        t_bytes_(E::bytes(p.t.dtype)),
        no_teacher_(p.inputs == 2 ? 0.f : -INFINITY) {}

  __device__ void open(int64_t row) {
    s_ = row_address(p_.s, s_bytes_, p_.inner, row);
    t_ = row_address(p_.t, t_bytes_, p_.inner, row);
  }
  __device__ void open_gradient(int64_t row) {
    ds_ = row_address(p_.ds, s_bytes_, p_.inner, row);
    dt_ = row_address(p_.dt, t_bytes_, p_.inner, row);
  }
  // A chunk is named by its first class.
  __device__ int begin() const { return threadIdx.x / kWarp; }
  __device__ int end() const { return p_.classes; }
  __device__ int step() const { return kSlices * N; }
  __device__ int index(int chunk, int i) const { return chunk + kSlices * i; }
  __device__ bool holds(int, int v) const { return v >= 0; }
  __device__ float student(int v) const { return E::get(s_ + v * p_.s.cls * s_bytes_, p_.s.dtype); }
  __device__ float teacher(int v) const { return E::get(t_ + v * p_.t.cls * t_bytes_, p_.t.dtype); }

  template <class Body>
  __device__ void sweep(bool, Body&& body) {
#pragma unroll 1
    for (int c = begin(); c < end(); c += step()) {
      float xs[N], xt[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int v = index(c, i);
        const bool there = v < p_.classes;
        xs[i] = there ? E::get(s_ + v * p_.s.cls * s_bytes_, p_.s.dtype) : -INFINITY;
        xt[i] = there ? E::get(t_ + v * p_.t.cls * t_bytes_, p_.t.dtype) : no_teacher_;
      }
      body(c, xs, xt);
    }
  }
  __device__ void store_student(int c, const float (&g)[N]) { store(p_.ds, ds_, s_bytes_, c, g); }
  __device__ void store_teacher(int c, const float (&g)[N]) { store(p_.dt, dt_, t_bytes_, c, g); }

 private:
  __device__ void store(const Matrix& m, unsigned char* row, int bytes, int c,
                        const float (&g)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int v = index(c, i);
      if (v < p_.classes) E::put(row + v * m.cls * bytes, m.dtype, g[i]);
    }
  }

  const Problem& p_;
  int s_bytes_, t_bytes_;
  float no_teacher_;
  const unsigned char *s_ = nullptr, *t_ = nullptr;
  unsigned char *ds_ = nullptr, *dt_ = nullptr;
};

// The warps' shares of each lane's row.
class ColumnsGroup {
 public:
  __device__ bool leads() const { return threadIdx.x < kWarp; }
  template <typename V, typename Op>
  __device__ V within_warp(V value, Op) const {
    return value;
  }
  template <int kSlot, typename V, typename Op>
  __device__ V across_warps(V value, Op op) const {
    SMEM_STATIC(V, partial, kThreads);
    partial[threadIdx.x] = value;
    __syncthreads();
    const int lane = threadIdx.x % kWarp;
    value = partial[lane];
    for (int w = 1; w < kSlices; ++w) value = op(value, partial[w * kWarp + lane]);
    return value;
  }
};

template <typename T, bool kAny>
__global__ void __launch_bounds__(kThreads, 5) columns_kernel(const Problem p) {
  const Setup q = make_setup(p, p.divisors ? p.divisors[0] : 1.f, p.divisors ? p.divisors[1] : 1.f);
  ColumnsIo<T> io(p);
  const int64_t row = int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
  run_row<kAny>(p, q, io, ColumnsGroup{}, row, row < p.rows);
}

}  // namespace KDK_NAMESPACE
