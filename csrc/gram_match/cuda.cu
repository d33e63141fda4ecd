// The match of a student's Gram matrices with a teacher's: lengths of what is normalised, all
// products of both models in one launch (with the reduction split where there are few tiles), row
// statistics and the loss, then each gradient, whose matrix is made tile by tile on the way.
// See kdkernels/ops/gram_match/README.md.
#include <cmath>
#include <utility>

#include "common/cuda.cuh"
#include "common/registry.h"
#include "gram_match/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int kSide = 16;  // threads on a side of a block
constexpr int kThreads = kSide * kSide;
constexpr int kMicro = 4;               // outputs on a side of a thread
constexpr int kTile = kMicro * kSide;   // and of a block
constexpr int kDepth = 16;              // products of an output between two barriers
constexpr int kPitch = kTile + kMicro;  // of a tile in shared memory: rows 16-byte aligned
constexpr int kStatThreads = 128;

int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// A batch of matrices of any dtype and strides; element (r, c) of sample b.
struct Batch {
  const void* data;
  DType dtype;
  int64_t rows, columns, sample, row, column;

  __device__ float at(int64_t b, int64_t r, int64_t c) const {
    const int64_t i = b * sample + r * row + c * column;
    switch (dtype) {
      case DType::f16: return to_float(static_cast<const __half*>(data)[i]);
      case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
      default: return static_cast<const float*>(data)[i];
    }
  }
};
Batch batch_of(const Tensor& x) {
  if (!x) return {nullptr, DType::f32, 0, 0, 0, 0, 0};
  return {x.data, x.dtype, x.shape[1], x.shape[2], x.stride[0], x.stride[1], x.stride[2]};
}

// What belongs to one model. `unit`, `through`, `length`, `dot`, `inverse` hold a value for every
// row (or, where columns are normalised, `unit` and `through` for every column) of every sample.
struct Model {
  Batch x, y;  // y: the right factor, x's own where there is no other
  float factor;
  float *gram, *partial;  // (B, R, Q); partial: (splits, B, R, Q), gram itself with one split
  float *unit, *through, *length, *dot, *inverse;
};

struct Problem {
  Model student, teacher;
  Epilogue epilogue;
  const float* weights;
  int64_t samples, rows, columns;
  int splits, models, normalize;
  float scale;
  bool symmetric;
};

// ---- lengths of rows (or of columns): a warp each ----

__global__ void __launch_bounds__(kStatThreads) lengths_kernel(Problem p, bool teacher) {
  const Model& m = teacher ? p.teacher : p.student;
  const bool by_column = p.normalize == kColumns;
  const int64_t vectors = by_column ? m.x.columns : m.x.rows,
                elements = by_column ? m.x.rows : m.x.columns;
  const int lane = threadIdx.x % kWarp;
  const int64_t v = int64_t{blockIdx.x} * (kStatThreads / kWarp) + threadIdx.x / kWarp;
  for (int64_t b = blockIdx.y; b < p.samples; b += gridDim.y) {
    float square = 0.f;
    for (int64_t k = lane; k < (v < vectors ? elements : 0); k += kWarp) {
      const float x = by_column ? m.x.at(b, k, v) : m.x.at(b, v, k);
      square += x * x;
    }
    square = warp_sum(square);
    if (v >= vectors || lane != 0) continue;
    const Unit u = unit_of(square, by_column ? int{kClamped} : p.normalize, p.epilogue.eps);
    // Of a column what it is divided by, so that one of one element is exactly 1.
    const float length = u.scale == 0.f ? INFINITY : fmaxf(sqrtf(square), p.epilogue.eps);
    m.unit[b * vectors + v] = by_column ? length : u.scale;
    m.through[b * vectors + v] = by_column ? (u.through != 0.f ? 1.f : 0.f) : u.through;
  }
}

// ---- products ----

// Adds kDepth products to each of a thread's outputs; both tiles are (kDepth, kPitch).
__device__ inline void multiply(const float* a, const float* b, float (&sums)[kMicro][kMicro]) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const Vec<float> u = load_vec(a + k * kPitch + ty * kMicro),
                     v = load_vec(b + k * kPitch + tx * kMicro);
#pragma unroll
    for (int r = 0; r < kMicro; ++r)
#pragma unroll
      for (int c = 0; c < kMicro; ++c) sums[r][c] += u[r] * v[c];
  }
}

// tile[k][r] = x[first + r][begin + k], zero outside and from column `end`; `lengths` divide
// columns.
__device__ inline void load_tile(const Batch& x, int64_t b, int64_t first, int64_t begin,
                                 int64_t end, const float* lengths, float* tile) {
  for (int at = threadIdx.x; at < kTile * kDepth; at += kThreads) {
    // Neighbouring threads on neighbouring addresses.
    const int k = x.row == 1 ? at / kTile : at % kDepth, r = x.row == 1 ? at % kTile : at / kDepth;
    float value = 0.f;
    if (first + r < x.rows && begin + k < end) {
      value = x.at(b, first + r, begin + k);
      if (lengths) value /= lengths[b * x.columns + begin + k];
    }
    tile[k * kPitch + r] = value;
  }
}

// One tile of one model's matrix of one sample over one share of the reduction, and its mirror.
__global__ void __launch_bounds__(kThreads) product_kernel(Problem p) {
  SMEM_STATIC(float, a, kDepth* kPitch);
  SMEM_STATIC(float, c, kDepth* kPitch);
  const int64_t right = (p.columns + kTile - 1) / kTile, left = (p.rows + kTile - 1) / kTile;
  int64_t at = blockIdx.x;
  const int64_t tj = at % right, ti = at / right % left;
  at /= right * left;
  const int split = static_cast<int>(at % p.splits);
  const int64_t b = at / p.splits % p.samples;
  const Model& m = at / p.splits / p.samples ? p.teacher : p.student;
  const bool wanted = !p.symmetric || tj >= ti;
  const int64_t features = m.x.columns, share = (features + p.splits - 1) / p.splits;
  const int64_t begin = split * share, end = begin + share < features ? begin + share : features;
  const float* lengths = p.normalize == kColumns ? m.unit : nullptr;
  float sums[kMicro][kMicro] = {};
  for (int64_t k = begin; k < (wanted ? end : begin); k += kDepth) {
    load_tile(m.x, b, ti * kTile, k, end, lengths, a);
    load_tile(m.y, b, tj * kTile, k, end, lengths, c);
    __syncthreads();
    float part[kMicro][kMicro] = {};  // a few products' sum goes to the whole one as one number
    multiply(a, c, part);
#pragma unroll
    for (int u = 0; u < kMicro; ++u)
#pragma unroll
      for (int v = 0; v < kMicro; ++v) sums[u][v] += part[u][v];
    __syncthreads();
  }
  if (!wanted) return;
  float* const out = m.partial + (split * p.samples + b) * p.rows * p.columns;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int u = 0; u < kMicro; ++u) {
    for (int v = 0; v < kMicro; ++v) {
      const int64_t i = ti * kTile + ty * kMicro + u, j = tj * kTile + tx * kMicro + v;
      if (i >= p.rows || j >= p.columns) continue;
      out[i * p.columns + j] = sums[u][v];
      if (p.symmetric && ti != tj) out[j * p.columns + i] = sums[u][v];
    }
  }
}

// ---- statistics of a row, and its share of the loss ----

// Whether rows are normalised by units of their own.
__device__ inline bool has_units(const Problem& p) {
  return p.normalize == kClamped || p.normalize == kShifted;
}
__device__ inline float unit_at(const Problem& p, const Model& m, int64_t at) {
  return has_units(p) ? m.unit[at] : 1.f;
}
__device__ inline float weight_at(const Problem& p, int64_t i) {
  return p.weights ? p.weights[i] : 1.f;
}

__device__ inline Side side_of(const Model& m, int64_t row) {
  return {m.length[row], m.dot[row], m.inverse[row]};
}
__device__ inline void put_side(const Model& m, int64_t row, Side side) {
  m.length[row] = side.length, m.dot[row] = side.dot, m.inverse[row] = side.inverse;
}

// Element j of row i, whose factor is `outer`.
__device__ inline float element(const Problem& p, const Model& m, int64_t b, int64_t i, int64_t j,
                                float outer) {
  return outer * unit_at(p, m, b * p.rows + j) * m.gram[(b * p.rows + i) * p.columns + j];
}

__global__ void __launch_bounds__(kStatThreads) statistics_kernel(Problem p, float* values) {
  const int64_t row = blockIdx.x, b = row / p.rows, i = row % p.rows;
  const Epilogue& e = p.epilogue;
  const Model &s = p.student, &t = p.models == 2 ? p.teacher : p.student;
  if (p.splits > 1) {
    for (int model = 0; model < p.models; ++model) {
      const Model& m = model ? t : s;
      for (int64_t j = threadIdx.x; j < p.columns; j += kStatThreads) {
        float sum = 0.f;
        for (int k = 0; k < p.splits; ++k)
          sum += m.partial[((k * p.samples + b) * p.rows + i) * p.columns + j];
        m.gram[row * p.columns + j] = sum;  // read again by this thread only
      }
    }
  }
  const float fs = s.factor * unit_at(p, s, row), ft = t.factor * unit_at(p, t, row);
  Side of_s = {1.f, 0.f, 1.f}, of_t = {1.f, 0.f, 1.f};
  if (e.by_row() || e.kind == kLengths) {
    float sum_s = 0.f, sum_t = 0.f;
    for (int64_t j = threadIdx.x; j < p.columns; j += kStatThreads) {
      const float c = element(p, s, b, i, j, fs), d = element(p, t, b, i, j, ft);
      switch (e.kind) {
        case kRows: sum_s += c * c, sum_t += d * d; break;
        case kRowsL1: sum_s += fabsf(c), sum_t += fabsf(d); break;
        case kProbabilities: sum_s += 0.5f * c + 0.5f, sum_t += 0.5f * d + 0.5f; break;
        default: sum_s += apart(c, d) * apart(c, d);
      }
    }
    sum_s = block_sum<kStatThreads>(sum_s);
    sum_t = block_sum<kStatThreads>(sum_t);
    if (e.kind == kRows || e.kind == kLengths) sum_s = sqrtf(sum_s), sum_t = sqrtf(sum_t);
    const float floor = e.kind == kRows || e.kind == kRowsL1 ? e.eps : 0.f;
    if (e.kind == kLengths) sum_t = sum_s;
    of_s.length = sum_s > 0.f ? fmaxf(sum_s, floor) : 1.f;
    of_t.length = sum_t > 0.f ? fmaxf(sum_t, floor) : 1.f;
    of_s.inverse = sum_s > 0.f ? 1.f / of_s.length : 0.f;
    of_t.inverse = sum_t > 0.f ? 1.f / of_t.length : 0.f;
  }
  float value = 0.f;
  for (int64_t j = threadIdx.x; j < p.columns; j += kStatThreads) {
    const float c = element(p, s, b, i, j, fs), d = element(p, t, b, i, j, ft);
    value += weight_at(p, j) * e.value(c, of_s, d, of_t);
    if (e.by_row()) {
      of_s.dot += e.outer_slope(true, c, of_s, d, of_t) * e.outer_value(c, of_s);
      of_t.dot += e.outer_slope(false, d, of_t, c, of_s) * e.outer_value(d, of_t);
    }
  }
  value = block_sum<kStatThreads>(value);
  of_s.dot = block_sum<kStatThreads>(of_s.dot);
  of_t.dot = block_sum<kStatThreads>(of_t.dot);
  if (threadIdx.x != 0) return;
  if (e.kind == kRows || e.kind == kRowsL1) {  // a clamped length passes nothing back
    if (of_s.length <= e.eps) of_s.dot = 0.f;
    if (of_t.length <= e.eps) of_t.dot = 0.f;
  }
  put_side(s, row, of_s);
  if (p.models == 2) put_side(t, row, of_t);
  if (e.kind == kLengths) value = of_s.inverse > 0.f ? of_s.length : 0.f;
  values[row] = weight_at(p, i) * value;
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const float* values, int64_t count, float scale, float* loss) {
  double sum = 0.0;
  for (int64_t k = threadIdx.x; k < count; k += kThreads) sum += values[k];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum * scale);
}

// ---- a gradient: a matrix made of the slopes, times features ----

struct Output {
  float* data;
  int64_t rows, columns, sample, row, column;
  int64_t first;         // the row of the Gram matrix that its first row belongs to
  bool student, turned;  // turned: its rows are the matrix's columns
};

// What features j are multiplied by for output i, and in `back` its product with the element.
__device__ inline float slope_at(const Problem& p, const Output& o, int64_t b, int64_t i, int64_t j,
                                 float& back) {
  const Model& t = p.models == 2 ? p.teacher : p.student;
  const Model &own = o.student ? p.student : t, &other = o.student ? t : p.student;
  const int64_t row = b * p.rows + (o.turned ? j : i), column = b * p.rows + (o.turned ? i : j);
  const int64_t at = row * p.columns + (o.turned ? i : j);
  const Epilogue& e = p.epilogue;
  const Side mine = side_of(own, row), theirs = side_of(other, row);
  const float outer = p.scale * own.factor;
  if (!p.symmetric)
    return outer * e.slope(o.student, own.factor * own.gram[at], mine,
                           other.factor * other.gram[at], theirs);
  const float ui = unit_at(p, own, row), uj = unit_at(p, own, column);
  const float c = own.factor * ui * uj * own.gram[at];
  const float d =
      other.factor * unit_at(p, other, row) * unit_at(p, other, column) * other.gram[at];
  float t_ij = e.slope(o.student, c, mine, d, theirs);
  t_ij +=
      e.by_row() ? e.slope(o.student, c, side_of(own, column), d, side_of(other, column)) : t_ij;
  t_ij *= outer * weight_at(p, i) * weight_at(p, j);
  back += t_ij * c / own.factor;
  return ui * uj * t_ij;
}

__global__ void __launch_bounds__(kThreads) gradient_kernel(Problem p, Batch y, Output o) {
  SMEM_STATIC(float, a, kDepth* kPitch);
  SMEM_STATIC(float, c, kDepth* kPitch);
  SMEM_STATIC(float, backs, kTile);
  const int64_t across = (o.columns + kTile - 1) / kTile, down = (o.rows + kTile - 1) / kTile;
  const int64_t f0 = blockIdx.x % across * kTile, i0 = blockIdx.x / across % down * kTile,
                b = blockIdx.x / across / down;
  const Model& own = o.student ? p.student : p.teacher;
  const float* lengths = p.normalize == kColumns ? own.unit : nullptr;
  // Four threads a row make four of its slopes each.
  constexpr int kEach = kTile * kDepth / kThreads;
  const int mine = threadIdx.x / (kDepth / kEach), k0 = threadIdx.x % (kDepth / kEach) * kEach;
  float sums[kMicro][kMicro] = {}, back = 0.f;
  for (int64_t j0 = 0; j0 < y.rows; j0 += kDepth) {
    for (int k = 0; k < kEach; ++k) {
      const int64_t i = i0 + mine, j = j0 + k0 + k;
      a[(k0 + k) * kPitch + mine] =
          i < o.rows && j < y.rows ? slope_at(p, o, b, o.first + i, j, back) : 0.f;
    }
    for (int at = threadIdx.x; at < kTile * kDepth; at += kThreads) {
      const bool along = y.column == 1;
      const int k = along ? at / kTile : at % kDepth, f = along ? at % kTile : at / kDepth;
      float value = 0.f;
      if (j0 + k < y.rows && f0 + f < y.columns) {
        value = y.at(b, j0 + k, f0 + f);
        if (lengths) value /= lengths[b * y.columns + f0 + f];
      }
      c[k * kPitch + f] = value;
    }
    __syncthreads();
    float part[kMicro][kMicro] = {};
    multiply(a, c, part);
#pragma unroll
    for (int u = 0; u < kMicro; ++u)
#pragma unroll
      for (int v = 0; v < kMicro; ++v) sums[u][v] += part[u][v];
    __syncthreads();
  }
  back = warp_reduce<kDepth / kEach>(back, Sum{});
  if (k0 == 0) backs[mine] = back;
  __syncthreads();
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int u = 0; u < kMicro; ++u) {
    const int64_t i = i0 + ty * kMicro + u;
    if (i >= o.rows) continue;
    const float through =
        has_units(p) ? own.factor * own.through[b * p.rows + o.first + i] * backs[ty * kMicro + u]
                     : 0.f;
    for (int v = 0; v < kMicro; ++v) {
      const int64_t f = f0 + tx * kMicro + v;
      if (f >= o.columns) continue;
      float value = sums[u][v];
      if (through != 0.f) value -= through * y.at(b, o.first + i, f);
      o.data[b * o.sample + i * o.row + f * o.column] = value;
    }
  }
}

// Through the columns' normalisation, in place: a warp a column.
__global__ void __launch_bounds__(kStatThreads) columns_kernel(Problem p, Output o) {
  const Model& m = o.student ? p.student : p.teacher;
  const int lane = threadIdx.x % kWarp;
  const int64_t at = (int64_t{blockIdx.x} * kStatThreads + threadIdx.x) / kWarp;
  const int64_t b = at / o.columns, f = at % o.columns;
  const bool live = b < p.samples;
  float* const out = o.data + b * o.sample + f * o.column;
  float dot = 0.f;
  if (live)
    for (int64_t r = lane; r < o.rows; r += kWarp)
      dot += out[r * o.row] * (m.x.at(b, r, f) / m.unit[at]);
  dot = warp_sum(dot);
  if (!live) return;
  dot *= m.through[at];
  for (int64_t r = lane; r < o.rows; r += kWarp)
    out[r * o.row] = (out[r * o.row] - dot * (m.x.at(b, r, f) / m.unit[at])) / m.unit[at];
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// A gradient's launches; `x` is whose gradient it is.
void run_gradient(const Problem& p, const Tensor& dx, const Batch& y, int64_t first, bool student,
                  bool turned, int64_t device, int64_t stream) {
  if (!dx) return;
  require(dx.dtype == DType::f32, "gram_match: gradients must be f32");
  const Output o = {dx.as<float>(), dx.shape[1], dx.shape[2], dx.stride[0], dx.stride[1],
                    dx.stride[2],   first,       student,     turned};
  const int64_t blocks = p.samples * blocks_of(o.rows, kTile) * blocks_of(o.columns, kTile);
  launch(
      {"gram_match gradient", dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device, stream},
      gradient_kernel, p, y, o);
  if (p.normalize != kColumns) return;
  const int64_t warps = p.samples * o.columns;
  launch({"gram_match columns", dim3(static_cast<unsigned>(blocks_of(warps, kStatThreads / kWarp))),
          dim3(kStatThreads), device, stream},
         columns_kernel, p, o);
}

}  // namespace

// `scratch`: for each model B R Q floats (times 1 + splits with more than one split), 2 for every
// normalised row or column of every sample and 3 for every row; and one for every row.
void gram_match(Tensor student, Tensor student_other, Tensor teacher, Tensor teacher_other,
                Tensor weights, Tensor scalars, Tensor loss, Tensor ds, Tensor ds_other, Tensor dt,
                Tensor dt_other, int64_t kind, int64_t normalize, int64_t order, Tensor scratch,
                int64_t splits, int64_t device, int64_t stream) {
  const float* given = scalars.as<float>();
  Problem p = {};
  p.epilogue = {static_cast<int>(kind), static_cast<int>(order), given[kEps], given[kGamma],
                static_cast<float>(std::exp(-2.0 * static_cast<double>(given[kGamma])))};
  p.weights = weights.as<float>();
  p.samples = student.shape[0];
  p.rows = student.shape[1];
  p.columns = student_other ? student_other.shape[1] : p.rows;
  p.splits = static_cast<int>(splits);
  p.models = teacher ? 2 : 1;
  p.normalize = static_cast<int>(normalize);
  p.scale = given[kScale];
  p.symmetric = !student_other;
  float* at = scratch.as<float>();
  const float* const end = at + scratch.numel();
  const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
  const auto model = [&](const Tensor& x, const Tensor& y, float factor) {
    const int64_t matrix = p.samples * p.rows * p.columns;
    const int64_t vectors = p.samples * (normalize == kColumns ? x.shape[2] : p.rows);
    Model m = {};
    m.x = batch_of(x), m.y = batch_of(y ? y : x), m.factor = factor;
    m.gram = take(matrix);
    m.partial = splits > 1 ? take(splits * matrix) : m.gram;
    m.unit = take(vectors), m.through = take(vectors);
    for (float** part : {&m.length, &m.dot, &m.inverse}) *part = take(p.samples * p.rows);
    return m;
  };
  p.student = model(student, student_other, given[kStudentFactor]);
  if (teacher) p.teacher = model(teacher, teacher_other, given[kTeacherFactor]);
  float* values = take(p.samples * p.rows);
  require(at <= end, "gram_match: scratch is too small");

  for (int m = 0; m < (normalize == kAsTheyAre ? 0 : p.models); ++m) {
    const Batch& x = m ? p.teacher.x : p.student.x;
    const int64_t vectors = normalize == kColumns ? x.columns : x.rows;
    launch({"gram_match lengths",
            dim3(static_cast<unsigned>(blocks_of(vectors, kStatThreads / kWarp)),
                 static_cast<unsigned>(p.samples < 65535 ? p.samples : 65535)),
            dim3(kStatThreads), device, stream},
           lengths_kernel, p, m == 1);
  }
  const int64_t tiles = blocks_of(p.rows, kTile) * blocks_of(p.columns, kTile);
  const int64_t rows = p.samples * p.rows;
  launch({"gram_match products", dim3(static_cast<unsigned>(tiles * splits * p.samples * p.models)),
          dim3(kThreads), device, stream},
         product_kernel, p);
  launch({"gram_match statistics", dim3(static_cast<unsigned>(rows)), dim3(kStatThreads), device,
          stream},
         statistics_kernel, p, values);
  launch({"gram_match loss", dim3(1), dim3(kThreads), device, stream}, total_kernel, values, rows,
         p.scale, loss.as<float>());
  if (!teacher) {  // the rows of both models in one matrix
    run_gradient(p, ds, p.student.x, 0, true, false, device, stream);
    run_gradient(p, dt, p.student.x, dt ? p.rows - dt.shape[1] : 0, true, false, device, stream);
    return;
  }
  run_gradient(p, ds, p.student.y, 0, true, false, device, stream);
  run_gradient(p, dt, p.teacher.y, 0, false, false, device, stream);
  run_gradient(p, ds_other, p.student.x, 0, true, true, device, stream);
  run_gradient(p, dt_other, p.teacher.x, 0, false, true, device, stream);
}
KDK_EXPORT(gram_match)

}  // namespace KDK_NAMESPACE
