// Neighbouring rows of a tensor as blocks of floats, in either order.
#pragma once
#include <algorithm>

#include "common/convert.h"
#include "row_divergence/cpu_job.h"
#include "row_divergence/cpu_lanes.h"

namespace KDK_NAMESPACE {
namespace {

inline void* address(const Tensor& x, int64_t r, int64_t inner) {
  return x ? advance(x.data, x.dtype, r / inner * x.stride[0] + r % inner * x.stride[2]) : nullptr;
}

typedef float Four __attribute__((vector_size(16)));

// Four vectors of four, each the others' column.
KDK_INLINE void transpose(Four (&x)[4]) {
  const Four a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5),
             b = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7),
             c = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5),
             d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  x[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  x[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// to[c][r] = from[r][c], in steps of so many floats.
inline void copy_transposed(const float* from, int64_t from_step, int64_t rows, int64_t columns,
                            float* to, int64_t to_step) {
  const int64_t r4 = rows / 4 * 4, c4 = columns / 4 * 4;
  for (int64_t c = 0; c < c4; c += 4)
    for (int64_t r = 0; r < r4; r += 4) {
      Four x[4];
      for (int i = 0; i < 4; ++i) memcpy(&x[i], from + (r + i) * from_step + c, sizeof(Four));
      transpose(x);
      for (int i = 0; i < 4; ++i) memcpy(to + (c + i) * to_step + r, &x[i], sizeof(Four));
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < r4 ? c4 : 0; c < columns; ++c)
      to[c * to_step + r] = from[r * from_step + c];
}

// At most sixteen neighbouring rows of a tensor, and a block of floats that they are copied to and
// from: class by class with the rows in lanes, or row by row.
struct Block {
  const Tensor& x;
  int64_t first, rows, inner;
  float *block, *turned;         // the second: as large, for rows that are to be turned
  int64_t class_step, row_step;  // in the block

  int64_t stride() const { return inner == 1 ? x.stride[0] : x.stride[2]; }
  bool in_one_run() const { return inner == 1 || first % inner + rows <= inner; }
  // Whether the rows are the lanes of a vector where they lie.
  bool in_place() const {
    return class_step == kRowLanes && x.dtype == DType::f32 && stride() == 1 && rows == kRowLanes &&
           in_one_run();
  }
  LaneScores with_gradient(const Block& d) const {
    auto data = [](const Block& b) {
      return b.in_place() ? static_cast<float*>(address(b.x, b.first, b.inner)) : b.block;
    };
    auto step = [](const Block& b) { return b.in_place() ? b.x.stride[1] : kRowLanes; };
    return {data(*this), step(*this), d.x ? data(d) : nullptr, step(d)};
  }

  void load() const {
    if (in_place()) return;
    if (turns()) {
      if (x.dtype == DType::f32) {
        turn_from(static_cast<const float*>(address(x, first, inner)), stride());
      } else {
        const int64_t n = padded(x.shape[1]);
        for (int64_t r = 0; r < rows; ++r)
          load_tile(address(x, first + r, inner), x.dtype, x.shape[1], turned + r * n);
        turn_from(turned, n);
      }
    } else if (lies_in_lanes()) {
      for (int64_t v = 0; v < x.shape[1]; ++v) {
        float lanes[kRowLanes];
        const void* from = advance(address(x, first, inner), x.dtype, v * x.stride[1]);
        memcpy(block + v * kRowLanes, load_tile(from, x.dtype, rows, lanes), sizeof(lanes));
      }
    } else {
      each([&](void* row, int64_t i, float& to) { to = load_one(row, x.dtype, i); });
    }
  }
  void save() const {
    if (!x || in_place()) return;
    if (turns()) {
      if (x.dtype == DType::f32) {
        turn_to(static_cast<float*>(address(x, first, inner)), stride());
      } else {
        const int64_t n = padded(x.shape[1]);
        turn_to(turned, n);
        for (int64_t r = 0; r < rows; ++r)
          store_tile(address(x, first + r, inner), x.dtype, x.shape[1], turned + r * n);
      }
    } else if (lies_in_lanes()) {
      for (int64_t v = 0; v < x.shape[1]; ++v)
        store_tile(advance(address(x, first, inner), x.dtype, v * x.stride[1]), x.dtype, rows,
                   block + v * kRowLanes);
    } else {
      each([&](void* row, int64_t i, float from) { store_one(row, x.dtype, i, from); });
    }
  }

 private:
  // Whether a vector of lanes is read, or a vector of classes that is turned into them.
  bool lies_in_lanes() const { return row_step == 1 && stride() == 1 && in_one_run(); }
  bool turns() const { return row_step == 1 && x.stride[1] == 1 && in_one_run(); }
  void turn_from(const float* from, int64_t step) const {
    copy_transposed(from, step, rows, x.shape[1], block, class_step);
  }
  void turn_to(float* to, int64_t step) const {
    copy_transposed(block, class_step, x.shape[1], rows, to, step);
  }

  template <typename Copy>  // copy(row of the tensor, element in it, place in the block)
  void each(const Copy& copy) const {
    void* row[kRowLanes];
    for (int64_t r = 0; r < rows; ++r) row[r] = address(x, first + r, inner);
    const int64_t classes = x.shape[1], stride = x.stride[1];
    if (stride == 1)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t v = 0; v < classes; ++v) copy(row[r], v, block[v * class_step + r * row_step]);
    else
      for (int64_t v = 0; v < classes; ++v)
        for (int64_t r = 0; r < rows; ++r)
          copy(row[r], v * stride, block[v * class_step + r * row_step]);
  }
};

// The blocks of student, teacher and their gradients.
struct Blocks {
  static int64_t memory(int64_t classes) { return 5 * kRowLanes * padded(classes); }

  Blocks(const Job& job, int64_t first, int64_t rows, float* memory, int64_t class_step,
         int64_t row_step)
      : s(one(job, job.student, first, rows, memory, 0, class_step, row_step)),
        t(one(job, job.teacher, first, rows, memory, 1, class_step, row_step)),
        ds(one(job, job.ds, first, rows, memory, 2, class_step, row_step)),
        dt(one(job, job.dt, first, rows, memory, 3, class_step, row_step)) {
    s.load();
    t.load();
  }
  void save() const {
    ds.save();
    dt.save();
  }

  Block s, t, ds, dt;

 private:
  static Block one(const Job& job, const Tensor& x, int64_t first, int64_t rows, float* memory,
                   int which, int64_t class_step, int64_t row_step) {
    const int64_t size = kRowLanes * padded(job.classes);
    return {x,          first,   rows, job.inner, memory + which * size, memory + 4 * size,
            class_step, row_step};
  }
};

}  // namespace
}  // namespace KDK_NAMESPACE
