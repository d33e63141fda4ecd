// The distance between two models' sorted probabilities, row by row, on the CPU. See
// kdkernels/ops/sorted_match/README.md.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/convert.h"
#include "common/parallel.h"
#include "common/registry.h"
#include "common/softmax.h"

namespace KDK_NAMESPACE {
namespace {

// A score as a number that falls as the score rises; NaN, as in torch, counts as the largest.
uint32_t key_of(float x) {
  uint32_t bits;
  x = x == 0.f ? 0.f : x;  // of either sign
  memcpy(&bits, &x, 4);
  return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}
float score_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key : key ^ 0x7fffffffu;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Sorts by the upper 32 bits, a byte at a time, and leaves the order of equals; `counts` are those
// of each byte. Returns which of the two arrays holds the result.
template <typename Item>
Item* sort_by_key(Item* items, Item* other, int64_t n, uint32_t (*counts)[256]) {
  constexpr int kBelow = 8 * sizeof(Item) - 32;
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = kBelow + 8 * byte;
    uint32_t *const count = counts[byte], places = 0;
    if (count[items[0] >> shift & 255] == n) continue;  // all are alike here
    for (int i = 0; i < 256; ++i) places += std::exchange(count[i], places);
    for (int64_t i = 0; i < n; ++i) other[count[items[i] >> shift & 255]++] = items[i];
    std::swap(items, other);
  }
  return items;
}

// What one model's row is worked on in.
struct Room {
  float* p;
  uint64_t *items, *other;

  static int64_t floats(int64_t n) { return 5 * padded(n); }
  Room(float* from, int64_t n)
      : p(from),
        items(reinterpret_cast<uint64_t*>(from + padded(n))),
        other(reinterpret_cast<uint64_t*>(from + 3 * padded(n))) {}
};

// exp((x - max) / T) over their sum, of n scores padded with -inf to whole vectors.
void to_probabilities(const float* x, int64_t n, double inverse_t, float top, float* p) {
  RunningSoftmax run(inverse_t);
  run.raise(top);
  const float inverse_z = static_cast<float>(1.0 / exponentials_of(x, padded(n), run, p));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] *= inverse_z;
}

// Makes room.p a row's probabilities from the largest on. Items (key, class) are what is sorted
// where classes are wanted, which are returned; else keys alone are.
const uint64_t* sort_row(const Tensor& x, int64_t row, float t, bool classes, const Room& room) {
  const int64_t n = x.shape[1];
  const float* scores = load_tile(advance(x.data, x.dtype, row * x.stride[0]), x.dtype, n, room.p);
  uint32_t counts[4][256] = {};
  uint32_t* keys = reinterpret_cast<uint32_t*>(room.other);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_of(scores[i]);
    for (int byte = 0; byte < 4; ++byte) ++counts[byte][key >> 8 * byte & 255];
    if (classes)
      room.items[i] = uint64_t{key} << 32 | static_cast<uint64_t>(i);
    else
      keys[i] = key;
  }
  const uint64_t* sorted = nullptr;
  if (classes) {
    sorted = sort_by_key(room.items, room.other, n, counts);
    for (int64_t i = 0; i < n; ++i) room.p[i] = score_of(static_cast<uint32_t>(sorted[i] >> 32));
  } else {
    keys = sort_by_key(keys, reinterpret_cast<uint32_t*>(room.items), n, counts);
    for (int64_t i = 0; i < n; ++i) room.p[i] = score_of(keys[i]);
  }
  for (int64_t i = n; i < padded(n); ++i) room.p[i] = -INFINITY;
  to_probabilities(room.p, n, 1.0 / t, room.p[0], room.p);
  return sorted;
}

double sum_of(const float* p, int64_t n) {
  double sum = 0.0;
  for_blocks(n, [&](int64_t begin, int64_t end) {
    float some = 0.f;
#pragma omp simd reduction(+ : some)
    for (int64_t i = begin; i < end; ++i) some += p[i];
    sum += some;
  });
  return sum;
}

double distance_of(const float* p, const float* q, int64_t n) {
  double sum = 0.0;
  for_blocks(n, [&](int64_t begin, int64_t end) {
    float some = 0.f;
#pragma omp simd reduction(+ : some)
    for (int64_t i = begin; i < end; ++i) some += std::fabs(p[i] - q[i]);
    sum += some;
  });
  return sum;
}

// The sign of p - q at each of n places, at the class that was sorted there; 1 behind q's end.
void put_signs(const float* p, const float* q, int64_t n, int64_t common, const uint64_t* sorted,
               int8_t* signs) {
  for (int64_t i = 0; i < common; ++i)
    signs[static_cast<uint32_t>(sorted[i])] = static_cast<int8_t>((p[i] > q[i]) - (p[i] < q[i]));
  for (int64_t i = common; i < n; ++i) signs[static_cast<uint32_t>(sorted[i])] = 1;
}

// Of `rows` rows; signs_s and signs_t, a byte a class, are left out where no gradient is wanted.
void sorted_match_forward(Tensor s, Tensor t, Tensor scalars, Tensor losses, Tensor signs_s,
                          Tensor signs_t, int64_t threads) {
  const int64_t rows = s.shape[0], of_s = s.shape[1], of_t = t.shape[1];
  const int64_t common = std::min(of_s, of_t);
  const float* temperatures = scalars.as<float>();
  // A class is read some sixteen times.
  parallel_for(rows, 16 * rows * (of_s + of_t), threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* const memory = scratch.floats(Room::floats(of_s) + Room::floats(of_t));
    const Room x(memory, of_s), y(memory + Room::floats(of_s), of_t);
    for (int64_t r = begin; r < end; ++r) {
      const uint64_t* by_s = sort_row(s, r, temperatures[0], static_cast<bool>(signs_s), x);
      const uint64_t* by_t = sort_row(t, r, temperatures[1], static_cast<bool>(signs_t), y);
      losses.as<float>()[r] =
          static_cast<float>(distance_of(x.p, y.p, common) + sum_of(x.p + common, of_s - common) +
                             sum_of(y.p + common, of_t - common));
      if (by_s) put_signs(x.p, y.p, of_s, common, by_s, signs_s.as<int8_t>() + r * of_s);
      if (by_t) put_signs(y.p, x.p, of_t, common, by_t, signs_t.as<int8_t>() + r * of_t);
    }
  });
}

double signed_sum(const float* p, const int8_t* signs, int64_t n) {
  double sum = 0.0;
  for_blocks(n, [&](int64_t begin, int64_t end) {
    float some = 0.f;
#pragma omp simd reduction(+ : some)
    for (int64_t i = begin; i < end; ++i) some += p[i] * static_cast<float>(signs[i]);
    sum += some;
  });
  return sum;
}

// dx from the signs of one model's places, `side` being which temperature is its.
void sorted_match_backward(Tensor x, Tensor signs, Tensor scalars, Tensor upstream, Tensor dx,
                           int64_t side, int64_t threads) {
  const int64_t rows = x.shape[0], n = x.shape[1];
  const float t = scalars.as<float>()[side];
  parallel_for(rows, 4 * rows * n, threads, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* const p = scratch.floats(2 * padded(n));
    float* const out = p + padded(n);
    for (int64_t r = begin; r < end; ++r) {
      const float u = upstream.as<float>()[r] / t;
      const int8_t* h = signs.as<int8_t>() + r * n;
      void* const place = advance(dx.data, dx.dtype, r * n);
      // Rows without an upstream gradient are left out: whatever they hold, theirs is 0.
      std::fill(out, out + n, 0.f);
      if (u != 0.f) {
        const float* scores = load_tile(advance(x.data, x.dtype, r * x.stride[0]), x.dtype, n, p);
        to_probabilities(scores, n, 1.0 / t, largest_of(scores, n), p);
        const float mean = static_cast<float>(signed_sum(p, h, n));
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = p[i] * (static_cast<float>(h[i]) - mean) * u;
      }
      store_tile(place, dx.dtype, n, out);
    }
  });
}

KDK_EXPORT(sorted_match_forward)
KDK_EXPORT(sorted_match_backward)

}  // namespace
}  // namespace KDK_NAMESPACE
