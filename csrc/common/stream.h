// Memory in one long stream: results written past the caches, inputs asked for in time.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/convert.h"
#include "common/tensor.h"

namespace KDK_NAMESPACE {

// Inputs from this many bytes on are not in the caches when a loss begins, and results are not left
// there, where whoever reads them next would find smaller ones. A plain store first reads the line
// that it overwrites, a third more traffic for a loss with its gradient.
constexpr int64_t kPastCaches = int64_t{6} << 20;
inline bool exceeds_caches(const Tensor& x) { return x.numel() * size_of(x.dtype) >= kPastCaches; }

// What the next tile needs from memory, asked for block by block while this one is worked on: a
// processor foresees long reads itself, but begins anew at every page.
class Ahead {
 public:
  Ahead() = default;  // asks for nothing
  Ahead(const void* tile, DType t) : tile_(static_cast<const char*>(tile)), size_(size_of(t)) {}

  void ask(int64_t begin, int64_t end) const {
    if (!tile_) return;
    for (int64_t i = begin * size_; i < end * size_; i += 64)
      __builtin_prefetch(tile_ + i, 0, 2);  // as far as the second-level cache
  }

 private:
  const char* tile_ = nullptr;
  int64_t size_ = 0;
};

// memcpy for a destination that is not read soon, in whole floats or pairs of halves. The parts of
// lines at both ends go the same way: they meet those of the neighbours on their way to memory,
// whereas a plain store among the others would hold them up until its line has been read.
inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t to_line = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) % kLine);
  const int64_t head = to_line < bytes ? to_line : bytes;
  const auto words = [&](int64_t n) {
    for (; n > 0; n -= 4, out += 4, in += 4) {
      int32_t word;
      memcpy(&word, in, 4);
      _mm_stream_si32(reinterpret_cast<int*>(out), word);
    }
  };
  words(head);
  for (bytes -= head; bytes >= kLine; bytes -= kLine, out += kLine, in += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#elif defined(__AVX__)
    for (int i = 0; i < kLine; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
#else
    for (int i = 0; i < kLine; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#endif
  }
  words(bytes);
#else
  memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// The same as store_tile for at most N elements.
template <int64_t N>
void stream_tile(void* p, DType t, int64_t n, const float* tile) {
  if (t == DType::f32) return stream(p, tile, n * 4);
  alignas(64) uint16_t narrow[N];
  store_tile(narrow, t, n, tile);
  if (n % 2 || reinterpret_cast<uintptr_t>(p) % 4)
    memcpy(p, narrow, static_cast<size_t>(n) * 2);
  else
    stream(p, narrow, n * 2);
}

// Before another thread may look at what was streamed.
inline void streams_done() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace KDK_NAMESPACE
