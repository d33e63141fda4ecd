// Rows whose classes lie next to each other. A row belongs to a few lanes of a warp, to a block, or
// to a cluster of blocks, and stays in their shared memory between the sweeps: each thread copies
// its own chunks there, all in flight at once, and is the only one to read them, so that nothing
// but the sums needs a barrier. What does not fit is read from global memory again.
#pragma once
#include "row_divergence/cuda_row.cuh"

namespace KDK_NAMESPACE {

// The student's and the teacher's type. Where they differ the type is looked up at run time: nine
// kernels would be built otherwise, six of them for a few users.
struct AnyType {};

template <typename T>
struct Element {
  __device__ static int bytes(DType) { return sizeof(T); }
  __device__ static float get(const unsigned char* p, DType) {
    return to_float(*reinterpret_cast<const T*>(p));
  }
  __device__ static void put(unsigned char* p, DType, float x) {
    *reinterpret_cast<T*>(p) = from_float<T>(x);
  }
  template <int N>
  __device__ static void load(const unsigned char* p, DType, float (&x)[N]) {
    constexpr int kSize = Vec<T>::kSize;
#pragma unroll
    for (int i = 0; i < N; i += kSize) load_vec(reinterpret_cast<const T*>(p) + i).to(x + i);
  }
  template <int N>
  __device__ static void store(unsigned char* p, DType, const float (&x)[N]) {
    constexpr int kSize = Vec<T>::kSize;
#pragma unroll
    for (int i = 0; i < N; i += kSize)
      store_vec_streaming(reinterpret_cast<T*>(p) + i, Vec<T>::from(x + i));
  }
};

template <>
struct Element<AnyType> {
  template <class Call>
  __device__ static void with(DType type, Call&& call) {
    if (type == DType::f32) {
      call(Element<float>{});
    } else if (type == DType::f16) {
      call(Element<__half>{});
    } else {
      call(Element<__nv_bfloat16>{});
    }
  }
  __device__ static int bytes(DType type) { return type == DType::f32 ? 4 : 2; }
  __device__ static float get(const unsigned char* p, DType type) {
    float x = 0.f;
    with(type, [&](auto e) { x = e.get(p, type); });
    return x;
  }
  __device__ static void put(unsigned char* p, DType type, float x) {
    with(type, [&](auto e) { e.put(p, type, x); });
  }
  template <int N>
  __device__ static void load(const unsigned char* p, DType type, float (&x)[N]) {
    with(type, [&](auto e) { e.load(p, type, x); });
  }
  template <int N>
  __device__ static void store(unsigned char* p, DType type, const float (&x)[N]) {
    with(type, [&](auto e) { e.store(p, type, x); });
  }
};

template <typename T>
constexpr int chunk_size() {  // classes: 16 bytes of the narrower type
  return std::is_same_v<T, float> ? 4 : 8;
}

__device__ inline unsigned char* row_address(const Matrix& m, int bytes, int64_t inner,
                                             int64_t row) {
  if (!m.data) return nullptr;
  const int64_t o = inner == 1 ? row : row / inner;
  return m.data + (o * m.outer + (row - o * inner) * m.inner) * bytes;
}

// Chunk c holds classes c N - pad to c N - pad + N - 1, with the row's own pad such that whole
// chunks are aligned to 16 bytes where the tensors allow it. The first and the last chunk may be
// ragged; what is missing there counts as a class that neither model can take.
template <typename T>
class RowsIo {
 public:
  using E = Element<T>;
  static constexpr int kChunk = chunk_size<T>();
  static constexpr int N = kChunk;
  static constexpr bool kExact = std::is_same_v<T, float> || std::is_same_v<T, AnyType>;
  static constexpr int kAhead = 8;  // chunks of each thread in flight

  // `position` in the group, whose blocks have the ranks of a cluster.
  __device__ RowsIo(const Problem& p, unsigned char* smem_s, unsigned char* smem_t, int position,
                    int rank)
      : p_(p), smem_s_(smem_s), smem_t_(smem_t), position_(position), rank_(rank) {}

  __device__ void open(int64_t row) {
    s_ = row_address(p_.s, s_bytes(), p_.inner, row);
    t_ = row_address(p_.t, t_bytes(), p_.inner, row);
    pad_ = s_bytes() == 2 || t_bytes() == 4 ? excess(s_, s_bytes()) : excess(t_, t_bytes());
    wide_s_ = fits(s_, s_bytes());
    wide_t_ = fits(t_, t_bytes());
    const int chunks = (p_.classes + pad_ + N - 1) / N;
    const int ranks = p_.lanes == kThreads ? p_.cluster : 1, share = (chunks + ranks - 1) / ranks;
    base_ = rank_ * share;
    end_ = base_ + share < chunks ? base_ + share : chunks;
  }
  // Before gradients are stored; the addresses need no registers until then.
  __device__ void open_gradient(int64_t row) {
    ds_ = row_address(p_.ds, s_bytes(), p_.inner, row);
    dt_ = row_address(p_.dt, t_bytes(), p_.inner, row);
    wide_ds_ = fits(ds_, s_bytes());
    wide_dt_ = fits(dt_, t_bytes());
  }

  __device__ int begin() const { return base_ + position_; }
  __device__ int end() const { return end_; }
  __device__ int step() const { return p_.lanes; }
  __device__ int index(int chunk, int i) const { return chunk * N - pad_ + i; }
  __device__ bool holds(int chunk, int v) const {
    return v >= 0 && static_cast<unsigned>(v - (chunk * N - pad_)) < static_cast<unsigned>(N);
  }
  __device__ float student(int v) const { return E::get(s_ + int64_t{v} * s_bytes(), p_.s.dtype); }
  __device__ float teacher(int v) const { return E::get(t_ + int64_t{v} * t_bytes(), p_.t.dtype); }

  // body(chunk, student, teacher) for this thread's chunks. The first sweep of a row fetches it.
  template <class Body>
  __device__ void sweep(bool first, Body&& body) {
    if (first) {
#pragma unroll 1
      for (int j = 0; j < kAhead; ++j) {
        request(begin() + j * step());
        cp_async_commit();
      }
    }
#pragma unroll 1
    for (int c = begin(); c < end_; c += step()) {
      if (first) cp_async_wait<kAhead - 1>();
      float xs[N], xt[N];
      if (c - base_ < p_.on_chip) {
        E::load(slot(smem_s_, s_bytes(), c), p_.s.dtype, xs);
        E::load(slot(smem_t_, t_bytes(), c), p_.t.dtype, xt);
      } else {
        fetch(s_, s_bytes(), p_.s.dtype, wide_s_, c, -INFINITY, xs);
        fetch(t_, t_bytes(), p_.t.dtype, wide_t_, c, no_teacher(), xt);
      }
      body(c, xs, xt);
      if (first) {
        request(c + kAhead * step());
        cp_async_commit();
      }
    }
  }

  __device__ void store_student(int c, const float (&g)[N]) {
    store(ds_, s_bytes(), p_.s.dtype, wide_ds_, c, g);
  }
  __device__ void store_teacher(int c, const float (&g)[N]) {
    store(dt_, t_bytes(), p_.t.dtype, wide_dt_, c, g);
  }

 private:
  __device__ int s_bytes() const { return E::bytes(p_.s.dtype); }
  __device__ int t_bytes() const { return E::bytes(p_.t.dtype); }
  __device__ float no_teacher() const { return p_.inputs == 2 ? 0.f : -INFINITY; }
  // Elements that p lies beyond a 16-byte boundary.
  __device__ static int excess(const unsigned char* p, int bytes) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15) / bytes;
  }
  __device__ bool fits(const unsigned char* p, int bytes) const {
    return ((reinterpret_cast<uintptr_t>(p) - static_cast<unsigned>(pad_ * bytes)) & 15) == 0;
  }
  __device__ bool whole(int c) const { return c * N >= pad_ && (c + 1) * N - pad_ <= p_.classes; }
  __device__ unsigned char* slot(unsigned char* smem, int bytes, int c) const {
    return smem + (c - base_) * (N * bytes);
  }
  __device__ const unsigned char* address(const unsigned char* row, int bytes, int c) const {
    return row + (int64_t{c} * N - pad_) * bytes;
  }

  __device__ void request(int c) {
    if (c >= end_ || c - base_ >= p_.on_chip) return;
    request(s_, s_bytes(), p_.s.dtype, wide_s_, c, -INFINITY, slot(smem_s_, s_bytes(), c));
    request(t_, t_bytes(), p_.t.dtype, wide_t_, c, no_teacher(), slot(smem_t_, t_bytes(), c));
  }
  __device__ void request(const unsigned char* row, int bytes, DType type, bool wide, int c,
                          float missing, unsigned char* to) const {
    if (wide && whole(c)) {
      const unsigned char* const from = address(row, bytes, c);
      for (int i = 0; i < N * bytes; i += 16) cp_async16(to + i, from + i);
    } else {
#pragma unroll 1
      for (int i = 0; i < N; ++i) {
        const int v = index(c, i);
        E::put(to + i * bytes, type,
               v >= 0 && v < p_.classes ? E::get(row + int64_t{v} * bytes, type) : missing);
      }
    }
  }
  __device__ void fetch(const unsigned char* row, int bytes, DType type, bool wide, int c,
                        float missing, float (&x)[N]) const {
    if (wide && whole(c)) {
      E::load(address(row, bytes, c), type, x);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int v = index(c, i);
        x[i] = v >= 0 && v < p_.classes ? E::get(row + int64_t{v} * bytes, type) : missing;
      }
    }
  }
  __device__ void store(unsigned char* row, int bytes, DType type, bool wide, int c,
                        const float (&g)[N]) const {
    if (wide && whole(c)) {
      E::store(row + (int64_t{c} * N - pad_) * bytes, type, g);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int v = index(c, i);
        if (v >= 0 && v < p_.classes) E::put(row + int64_t{v} * bytes, type, g[i]);
      }
    }
  }

  const Problem& p_;
  unsigned char *smem_s_, *smem_t_;
  const unsigned char *s_ = nullptr, *t_ = nullptr;
  unsigned char *ds_ = nullptr, *dt_ = nullptr;
  int position_, rank_;
  int pad_ = 0, base_ = 0, end_ = 0;
  bool wide_s_ = false, wide_t_ = false, wide_ds_ = false, wide_dt_ = false;
};

// The threads that share a row: `lanes` neighbours in a warp, or whole blocks.
class RowsGroup {
 public:
  __device__ RowsGroup(int lanes, int cluster) : lanes_(lanes), cluster_(cluster) {}

  __device__ bool leads() const {
    return lanes_ < kThreads ? threadIdx.x % lanes_ == 0 : threadIdx.x == 0 && cluster_rank() == 0;
  }
  template <typename V, typename Op>
  __device__ V within_warp(V value, Op op) const {
    for (int step = (lanes_ < kWarp ? lanes_ : kWarp) / 2; step > 0; step /= 2)
      value = op(value, shuffle_xor(value, step));
    return value;
  }
  // One row a launch comes this way, so no slot is used twice.
  template <int kSlot, typename V, typename Op>
  __device__ V across_warps(V value, Op op) const {
    if (lanes_ < kThreads) return value;
    constexpr int kWarps = kThreads / kWarp;
    SMEM_STATIC(V, partial, kWarps);
    SMEM_STATIC(V, remote, kMaxCluster);
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = partial[0];
    for (int w = 1; w < kWarps; ++w) value = op(value, partial[w]);
    if (cluster_ > 1) value = cluster_reduce(value, op, static_cast<V*>(remote));
    return value;
  }

 private:
  int lanes_, cluster_;
};

// The divisors, summed over the rows by all threads of a block or cluster.
template <int kBlock>
__device__ inline Maxima count_rows(const Problem& p, Maxima* slots) {
  Maxima sum = {0.f, 0.f};   // rows, class weights of the rows
  constexpr int kAhead = 8;  // rows of a thread whose loads are in flight together
  const int64_t stride = int64_t{kBlock} * cluster_size();
  for (int64_t first = int64_t{kBlock} * cluster_rank() + threadIdx.x; first < p.rows;
       first += stride * kAhead) {
    int64_t y[kAhead];
    float w[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t r = first + i * stride;
      y[i] = r < p.rows && p.labels ? p.labels[r] : 0;
      w[i] = r >= p.rows ? 0.f : p.weight ? p.weight[r] : 1.f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (w[i] == 0.f || (p.labels && y[i] == p.ignore_index)) continue;
      sum.s += w[i];
      if (p.count & 2) {
        // A label out of range is its own row's NaN, not everybody's.
        const bool known = y[i] >= 0 && y[i] < p.classes;
        sum.t += !p.class_weight ? w[i] : (known ? w[i] * p.class_weight[y[i]] : 0.f);
      }
    }
  }
  const auto add = [](Maxima a, Maxima b) { return Maxima{a.s + b.s, a.t + b.t}; };
  return cluster_reduce(block_reduce<kBlock>(sum, add), add, slots);
}

template <typename T, bool kAny>
__global__ void __launch_bounds__(kThreads, 3) rows_kernel(const Problem p) {
  SMEM_DYNAMIC(unsigned char, bytes);
  SMEM_STATIC(Maxima, count_slots, kMaxCluster);
  SMEM_STATIC(float, total_slots, kMaxCluster);
  using E = Element<T>;
  const bool blocks = p.lanes == kThreads;
  const int groups = kThreads / p.lanes, group = threadIdx.x / p.lanes;
  const int rank = blocks && p.cluster > 1 ? cluster_rank() : 0;

  float divisor_kd = p.divisors ? p.divisors[0] : 1.f,
        divisor_ce = p.divisors ? p.divisors[1] : 1.f;
  if (p.one_launch && p.count) {
    const Maxima sums = count_rows<kThreads>(p, static_cast<Maxima*>(count_slots));
    if (p.count & 1) divisor_kd = sums.s;
    if (p.count & 2) divisor_ce = sums.t;
    if (cluster_rank() == 0 && threadIdx.x == 0) {
      if (p.count & 1) p.divisors[0] = divisor_kd;
      if (p.count & 2) p.divisors[1] = divisor_ce;
    }
  }
  const Setup q = make_setup(p, divisor_kd, divisor_ce);

  SmemCarver carver(bytes);
  const int s_slots = p.on_chip * chunk_size<T>() * E::bytes(p.s.dtype);
  const int t_slots = p.on_chip * chunk_size<T>() * E::bytes(p.t.dtype);
  unsigned char* const smem_s = carver.take<unsigned char>(groups * s_slots);
  unsigned char* const smem_t = carver.take<unsigned char>(groups * t_slots);
  RowsIo<T> io(p, smem_s + group * s_slots, smem_t + group * t_slots, threadIdx.x % p.lanes, rank);
  const RowsGroup threads(p.lanes, blocks ? p.cluster : 1);

  // A warp's lanes go round together, so that each reaches the shuffles; a block has one row.
  const int64_t stride = blocks ? p.rows : int64_t{gridDim.x} * groups;
  const int in_warp = blocks ? 0 : (threadIdx.x % kWarp) / p.lanes;
  float losses = 0.f;
  for (int64_t first = blocks ? blockIdx.x / p.cluster
                              : int64_t{blockIdx.x} * groups + (group - in_warp);
       first < p.rows; first += stride) {
    const int64_t row = first + in_warp;
    const float loss = run_row<kAny>(p, q, io, threads, row, row < p.rows);
    if (row < p.rows && threads.leads()) losses += loss;
  }

  if (p.one_launch && p.total) {
    losses = cluster_reduce(block_sum<kThreads>(losses), Sum{}, static_cast<float*>(total_slots));
    if (cluster_rank() == 0 && threadIdx.x == 0) *p.total = losses;
  }
  if (p.cluster > 1) cluster_sync();
}

}  // namespace KDK_NAMESPACE
