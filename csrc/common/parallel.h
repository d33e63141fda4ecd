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

// What a thread's Scratches have done with, for its next ones. Fresh memory costs a fault a page,
// which takes longer than many kernels write to it.
class Kept {
 public:
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() {
    while (count_ > 0) drop(0);
  }

  // The least block of at least n floats and its size, or null.
  float* take(int64_t n, int64_t& size) {
    int best = -1;
    for (int i = 0; i < count_; ++i)
      if (size_[i] >= n && (best < 0 || size_[i] < size_[best])) best = i;
    if (best < 0) return nullptr;
    float* const data = data_[best];
    size = size_[best];
    remove(best);
    return data;
  }
  // The oldest make room.
  void give(float* data, int64_t size) {
    if (!data || size > kMost) return std::free(data);
    while (count_ == kBlocks || (count_ > 0 && total_ + size > kMost)) drop(0);
    data_[count_] = data, size_[count_++] = size;
    total_ += size;
  }

 private:
  static constexpr int kBlocks = 16;
  static constexpr int64_t kMost = int64_t{1} << 22;  // floats of all

  void drop(int i) {
    std::free(data_[i]);
    remove(i);
  }
  void remove(int i) {
    total_ -= size_[i];
    --count_;
    for (; i < count_; ++i) data_[i] = data_[i + 1], size_[i] = size_[i + 1];
  }

  float* data_[kBlocks];
  int64_t size_[kBlocks], total_ = 0;
  int count_ = 0;
};

inline Kept& kept() {
  static thread_local Kept blocks;
  return blocks;
}

// 64-byte aligned floats, not initialised.
class Scratch {
 public:
  Scratch() { kept(); }  // made first, gone last: a Scratch may live as long as its thread
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { kept().give(data_, size_); }

  float* floats(int64_t n) {
    if (n <= size_) return data_;
    kept().give(data_, size_);
    size_ = 0;
    data_ = kept().take(n, size_);
    if (data_) return data_;
    const int64_t whole = (n + 15) / 16 * 16;
    data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(whole) * sizeof(float)));
    if (!data_) throw std::bad_alloc();
    size_ = whole;
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace KDK_NAMESPACE
