// Feature maps as the kernels of this family walk them.
//
// A map is (batch, rows, lanes), lanes side by side in memory: (N, C, HW) of an NCHW tensor,
// (N, HW, C) of one whose channels come last. It is cut into tiles of a fixed size, so that what is
// added to what does not depend on the number of threads; a tile has its own share of each sum, and
// shares are added in their order in double.
#pragma once
#include <vector>

#include "common/convert.h"
#include "common/lanes.h"
#include "common/parallel.h"
#include "common/stream.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kMaxLanes = 1024;            // of a tile
constexpr int64_t kTileElements = 128 * 1024;  // at most
constexpr int64_t kLineElements = 16 * 1024;   // the same where nothing is kept of a tile but a sum
constexpr int64_t kRowsInFloat = 32;           // added in float32 before they go into a double
constexpr int64_t kLanesInFloat = 256;         // the same of a row

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// n elements of row r of image b from lane l on, as floats: where they lie, or in the buffer.
inline const float* read_row(const Tensor& x, int64_t b, int64_t r, int64_t l, int64_t n,
                             float* buffer) {
  const void* p = advance(x.data, x.dtype, b * x.stride[0] + r * x.stride[1] + l);
  if (exceeds_caches(x)) Ahead(advance(p, x.dtype, kMaxLanes), x.dtype).ask(0, n);
  return x.dtype == DType::f32 ? static_cast<const float*>(p) : load_tile(p, x.dtype, n, buffer);
}

// Calls body(i) for every i below n, which threads share out among them.
template <typename Body>
void for_each(int64_t n, int64_t work, int64_t threads, const Body& body) {
  parallel_for(n, work, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
    streams_done();
  });
}

// Rows of a result, built where they belong or in a buffer.
class Output {
 public:
  Output(const Tensor& x) : x_(x), large_(x && exceeds_caches(x)) {}
  explicit operator bool() const { return static_cast<bool>(x_); }

  // How many of n elements to make before they are put: few where they go past the caches, so that
  // reads go on behind the writes.
  int64_t step(int64_t n) const {
    return streams(n) ? padded(pieces(n, pieces(n, kLanesInFloat))) : n;
  }
  // Where to build n elements from this place on.
  float* target(int64_t b, int64_t r, int64_t l, int64_t n, float* buffer) const {
    return x_.dtype == DType::f32 && !streams(n) ? static_cast<float*>(at(b, r, l)) : buffer;
  }
  void put(int64_t b, int64_t r, int64_t l, int64_t n, const float* made) const {
    if (streams(n))
      stream_tile<kMaxLanes>(at(b, r, l), x_.dtype, n, made);
    else
      store_tile(at(b, r, l), x_.dtype, n, made);
  }

 private:
  // Of shorter pieces too much would be parts of lines.
  bool streams(int64_t n) const { return large_ && n >= 4 * kLanes; }
  void* at(int64_t b, int64_t r, int64_t l) const {
    return advance(x_.data, x_.dtype, b * x_.stride[0] + r * x_.stride[1] + l);
  }
  Tensor x_;
  bool large_;
};

// A whole row, in pieces that fit.
inline void put_row(const Output& to, int64_t b, int64_t r, int64_t n, const float* made) {
  if (!to) return;
  const int64_t step = least(to.step(n), kMaxLanes);
  for (int64_t l = 0; l < n; l += step) to.put(b, r, l, least(step, n - l), made + l);
}

struct Tile {
  int64_t batch, row_piece, lane_piece, row, rows, lane, lanes;
};

class Grid {
 public:
  explicit Grid(const Tensor& x, int64_t elements = kTileElements)
      : height_(x.shape[1]),
        width_(x.shape[2]),
        tile_rows_(elements / least(width_, kMaxLanes)),
        across(pieces(width_, kMaxLanes)),
        down(pieces(height_, tile_rows_)),
        batch(x.shape[0]),
        of_image(across * down) {}

  Tile operator[](int64_t i) const {
    Tile t;
    t.lane_piece = i % across, t.row_piece = i / across % down, t.batch = i / of_image;
    t.row = t.row_piece * tile_rows_, t.lane = t.lane_piece * kMaxLanes;
    t.rows = least(tile_rows_, height_ - t.row), t.lanes = least(kMaxLanes, width_ - t.lane);
    return t;
  }
  // Calls body(tile, its number) for every one.
  template <typename Body>
  void each(int64_t threads, const Body& body) const {
    for_each(batch * of_image, batch * height_ * width_, threads,
             [&](int64_t i) { body((*this)[i], i); });
  }

 private:
  int64_t height_, width_, tile_rows_;

 public:
  const int64_t across, down, batch, of_image;
};

// Sums of rows or of lanes on their way into a contiguous result (fields, batch, kept): straight
// there if only one tile has to do with each, else by way of the tiles' shares.
template <typename Real>
class Sums {
 public:
  Sums(const Tensor& out, int64_t fields, int64_t batch, int64_t kept, int64_t pieces)
      : out_(out.as<Real>()),
        batch_(batch),
        kept_(kept),
        pieces_(pieces),
        field_(batch * kept),
        all_(fields * field_) {
    if (out_ && pieces > 1) shares_.resize(static_cast<size_t>(pieces * all_));
  }
  explicit operator bool() const { return out_ != nullptr; }

  void put(int64_t piece, int64_t field, int64_t b, int64_t from, int64_t n, const double* made) {
    const int64_t at = field * field_ + b * kept_ + from;
    if (pieces_ == 1)
      for (int64_t i = 0; i < n; ++i) out_[at + i] = static_cast<Real>(made[i]);
    else
      for (int64_t i = 0; i < n; ++i) shares_[static_cast<size_t>(piece * all_ + at + i)] = made[i];
  }
  // Once the tiles of the image are done.
  void join(int64_t b) {
    if (!out_ || pieces_ == 1) return;
    for (int64_t begin = b * kept_; begin < all_; begin += field_) {
      for (int64_t i = begin; i < begin + kept_; ++i) {
        double sum = 0;
        for (int64_t p = 0; p < pieces_; ++p) sum += shares_[static_cast<size_t>(p * all_ + i)];
        out_[i] = static_cast<Real>(sum);
      }
    }
  }
  void join() {
    for (int64_t b = 0; b < batch_; ++b) join(b);
  }

 private:
  Real* out_;
  int64_t batch_, kept_, pieces_, field_, all_;
  std::vector<double> shares_;
};

// The sums of a tile's lanes: in float over a few rows, in double over these. Long float sums would
// cost an attention over pixels its last digits.
struct LaneSums {
  alignas(64) float few[kMaxLanes];
  alignas(64) double all[kMaxLanes];

  void clear(int64_t n) {
    for (int64_t i = 0; i < n; ++i) few[i] = 0.f, all[i] = 0.0;
  }
  void flush(int64_t n) {
    for (int64_t i = 0; i < n; ++i) all[i] += static_cast<double>(few[i]), few[i] = 0.f;
  }
};

}  // namespace
}  // namespace KDK_NAMESPACE
