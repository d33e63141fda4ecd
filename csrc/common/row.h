// A row of scores (outer, classes, inner), its classes at any stride, read and written in tiles.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/convert.h"
#include "common/stream.h"
#include "common/tensor.h"

namespace KDK_NAMESPACE {

constexpr int64_t kTile = 1024;  // classes

struct Row {
  const Tensor& of;
  void* begin;

  // r = o * inner + i.
  Row(const Tensor& x, int64_t r)
      : of(x),
        begin(advance(x.data, x.dtype,
                      r / x.shape[2] * x.stride[0] + r % x.shape[2] * x.stride[2])) {}

  int64_t classes() const { return of.shape[1]; }
  bool side_by_side() const { return of.stride[1] == 1; }
  void* place(int64_t v) const { return advance(begin, of.dtype, v * of.stride[1]); }
  float at(int64_t v) const { return load_one(begin, of.dtype, v * of.stride[1]); }
  // n scores from class `start`, padded with -inf to whole vectors: where they lie if they can stay
  // there.
  const float* read(int64_t start, int64_t n, float* buffer) const {
    if (side_by_side()) return load_tile(place(start), of.dtype, n, buffer);
    for (int64_t v = 0; v < n; ++v) buffer[v] = at(start + v);
    std::fill(buffer + n, buffer + padded(n), -INFINITY);
    return buffer;
  }
  // The tile that follows the one at `start`, in this row or the next.
  Ahead after(int64_t start) const {
    return side_by_side() && exceeds_caches(of) ? Ahead(place(start + kTile), of.dtype) : Ahead();
  }

  // Where to build a tile that is written then.
  float* target(int64_t start, int64_t n, float* buffer) const {
    return side_by_side() ? tile_target(place(start), of.dtype, n, buffer) : buffer;
  }
  void write(int64_t start, int64_t n, const float* tile) const {
    if (side_by_side()) return store_tile(place(start), of.dtype, n, tile);
    for (int64_t v = 0; v < n; ++v) store_one(begin, of.dtype, (start + v) * of.stride[1], tile[v]);
  }
  void fill(float value) const {
    if (side_by_side() && value == 0.f) {
      memset(begin, 0, static_cast<size_t>(classes() * size_of(of.dtype)));
      return;
    }
    for (int64_t v = 0; v < classes(); ++v) store_one(begin, of.dtype, v * of.stride[1], value);
  }
};

}  // namespace KDK_NAMESPACE
