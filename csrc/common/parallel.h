// Threads and scratch memory of the CPU kernels.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace KDK_NAMESPACE {

// Calls body(begin, end) on contiguous shares of [0, n), one a thread. How the range is cut depends
// on the number of threads: bodies whose results depend on the cut would not be deterministic.
// `work` is the cost in elements; a thread is worth waking for some sixteen thousand of them.
template <typename Body>
void parallel_for(int64_t n, int64_t work, int64_t threads, const Body& body) {
#ifdef _OPENMP
  const int64_t useful = work / 16384 + 1;
  int64_t used = threads < useful ? threads : useful;
  used = used < n ? used : n;
  if (used > 1) {
#pragma omp parallel num_threads(static_cast<int>(used))
    {
      // The runtime may give fewer threads than asked for.
      const int64_t id = omp_get_thread_num(), count = omp_get_num_threads();
      body(n * id / count, n * (id + 1) / count);
    }
    return;
  }
#endif
  (void)work, (void)threads;
  if (n > 0) body(0, n);
}

// 64-byte aligned floats that each thread keeps between calls, so that a call does not allocate.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* floats(int64_t n) {
    if (n > size_) {
      std::free(data_);
      size_ = (n + 15) / 16 * 16;
      data_ =
          static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(size_) * sizeof(float)));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace KDK_NAMESPACE
