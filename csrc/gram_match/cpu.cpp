// The match of a student's Gram matrices with a teacher's: loss and gradients, sample by sample,
// so that a sample's matrices stay in cache. See kdkernels/ops/gram_match/README.md.
#include <utility>

#include "common/registry.h"
#include "gram_match/gemm.h"
#include "gram_match/math.h"

namespace KDK_NAMESPACE {
namespace {

constexpr int64_t kChunk = 1 << 20;  // floats of a model that are packed at a time

Matrix matrix_of(const Tensor& x, int64_t sample) {
  if (!x) return {};
  return {advance(x.data, x.dtype, sample * x.stride[0]),
          x.dtype,
          x.shape[1],
          x.shape[2],
          x.stride[1],
          x.stride[2]};
}

// The whole problem: what every sample shares.
struct Problem {
  Tensor student, student_other, teacher, teacher_other, ds, ds_other, dt, dt_other;
  const float* weights;  // of the rows, kSigned only
  Epilogue epilogue;
  int normalize;
  float scale, student_factor, teacher_factor;
  int64_t rows, columns,
      row;  // of the Gram matrices; row: floats from one of their rows to the next
  bool symmetric;
};

// A Gram matrix, the factors of its rows and columns, and the statistics of its rows.
struct Gram {
  float* values = nullptr;
  float *unit = nullptr, *through = nullptr;                    // by row
  float *column = nullptr, *column_through = nullptr;           // by feature: length; kColumns only
  float *length = nullptr, *dot = nullptr, *inverse = nullptr;  // by row, as the epilogue's Side
  float factor = 1.f;
};

KDK_INLINE Side side_of(const Gram& g, int64_t i) { return {g.length[i], g.dot[i], g.inverse[i]}; }

// ---- rows of the epilogue; kind and order are constants here, so that the loops vectorise ----

struct RowPair {
  const Problem& p;
  const Gram &s, &t;
};

constexpr int64_t kRun = 512;  // elements whose sum is a float
template <typename Body>
void in_runs(int64_t n, const Body& body) {
  for (int64_t j = 0; j < n; j += kRun) body(j, least(n, j + kRun));
}

// The scale and the slopes' sum of row i in either model, and its share of the loss.
template <int kKind, int kOrder>
KDK_ONE_COPY double row_value(const RowPair& m, int64_t i) {
  Epilogue e = m.p.epilogue;
  e.kind = kKind;
  if (kOrder >= 0) e.order = kOrder;
  const int64_t n = m.p.columns;
  const float *gs = m.s.values + i * m.p.row, *gt = m.t.values + i * m.p.row;
  const float *us = m.s.unit, *ut = m.t.unit, *weights = m.p.weights;
  const float fs = m.s.factor * us[i], ft = m.t.factor * ut[i];
  Side of_s = {1.f, 0.f, 1.f}, of_t = {1.f, 0.f, 1.f};
  if constexpr (kKind == kRows || kKind == kRowsL1 || kKind == kProbabilities ||
                kKind == kLengths) {
    double sum_s = 0.0, sum_t = 0.0;
    in_runs(n, [&](int64_t begin, int64_t end) {
      float part_s = 0.f, part_t = 0.f;
#pragma omp simd reduction(+ : part_s, part_t)
      for (int64_t j = begin; j < end; ++j) {
        const float s = fs * us[j] * gs[j], t = ft * ut[j] * gt[j];
        if constexpr (kKind == kRows) {
          part_s += s * s, part_t += t * t;
        } else if constexpr (kKind == kRowsL1) {
          part_s += fabsf(s), part_t += fabsf(t);
        } else if constexpr (kKind == kProbabilities) {
          part_s += 0.5f * s + 0.5f, part_t += 0.5f * t + 0.5f;
        } else {
          part_s += apart(s, t) * apart(s, t);
        }
      }
      sum_s += static_cast<double>(part_s), sum_t += static_cast<double>(part_t);
    });
    if constexpr (kKind == kLengths) {
      const double length = std::sqrt(sum_s);
      const double inverse = length > 0.0 ? 1.0 / length : 0.0;
      m.s.inverse[i] = m.t.inverse[i] = static_cast<float>(inverse);
      m.s.dot[i] = m.t.dot[i] = static_cast<float>(inverse - static_cast<double>(m.s.inverse[i]));
      return length;
    }
    const auto length = [&](double sum) {
      if (!(sum > 0.0)) return 1.f;
      if (kKind == kRows) sum = std::sqrt(sum);
      const double least = kKind == kProbabilities ? 0.0 : static_cast<double>(e.eps);
      return static_cast<float>(sum > least ? sum : least);
    };
    of_s.length = length(sum_s), of_t.length = length(sum_t);
    of_s.inverse = sum_s > 0.0 ? 1.f / of_s.length : 0.f;
    of_t.inverse = sum_t > 0.0 ? 1.f / of_t.length : 0.f;
  }
  constexpr bool kDots = kKind == kRows || kKind == kRowsL1 || kKind == kProbabilities;
  double value = 0.0, dot_s = 0.0, dot_t = 0.0;
  in_runs(n, [&](int64_t begin, int64_t end) {
    float part = 0.f, part_s = 0.f, part_t = 0.f;
#pragma omp simd reduction(+ : part, part_s, part_t)
    for (int64_t j = begin; j < end; ++j) {
      const float s = fs * us[j] * gs[j], t = ft * ut[j] * gt[j];
      const float v = e.value(s, of_s, t, of_t);
      part += kKind == kSigned ? weights[j] * v : v;
      if constexpr (kDots) {
        part_s += e.outer_slope(true, s, of_s, t, of_t) * e.outer_value(s, of_s);
        part_t += e.outer_slope(false, t, of_t, s, of_s) * e.outer_value(t, of_t);
      }
    }
    value += static_cast<double>(part);
    dot_s += static_cast<double>(part_s), dot_t += static_cast<double>(part_t);
  });
  if constexpr (kKind == kRows || kKind == kRowsL1) {  // a clamped length passes nothing back
    if (of_s.length <= e.eps) dot_s = 0.0;
    if (of_t.length <= e.eps) dot_t = 0.0;
  }
  m.s.length[i] = of_s.length, m.s.inverse[i] = of_s.inverse,
  m.s.dot[i] = static_cast<float>(dot_s);
  m.t.length[i] = of_t.length, m.t.inverse[i] = of_t.inverse,
  m.t.dot[i] = static_cast<float>(dot_t);
  return kKind == kSigned ? static_cast<double>(weights[i]) * value : value;
}

// Row i of what a model's features are multiplied by to give their gradient (symmetric), or of the
// slopes alone.
template <int kKind, int kOrder>
KDK_ONE_COPY void row_slope(const RowPair& m, bool student, int64_t i, float* out) {
  Epilogue e = m.p.epilogue;
  e.kind = kKind;
  if (kOrder >= 0) e.order = kOrder;
  const Gram &own = student ? m.s : m.t, &other = student ? m.t : m.s;
  const int64_t n = m.p.columns;
  const float *go = own.values + i * m.p.row, *gp = other.values + i * m.p.row;
  const float *uo = own.unit, *up = other.unit, *weights = m.p.weights;
  const Side mine = side_of(own, i), theirs = side_of(other, i);
  const float fo = own.factor * uo[i], fp = other.factor * up[i];
  const float outer = m.p.scale * own.factor;
  if constexpr (kKind == kLengths) {
    // Roundings that a whole row would share are made once: dot is what inverse leaves over.
    const float by_row =
        static_cast<float>(static_cast<double>(m.p.scale) * static_cast<double>(own.factor) *
                           (static_cast<double>(own.inverse[i]) + static_cast<double>(own.dot[i])));
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = by_row * (fo * go[j] - fp * gp[j]);
    return;
  }
  if (!m.p.symmetric) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
      out[j] = outer * e.slope(student, fo * go[j], mine, fp * gp[j], theirs);
    return;
  }
  const float by_row = outer * uo[i] * (kKind == kSigned ? weights[i] : 1.f);
  const float through = own.through[i];
  double back = 0.0;
  in_runs(n, [&](int64_t begin, int64_t end) {
    float part = 0.f;
#pragma omp simd reduction(+ : part)
    for (int64_t j = begin; j < end; ++j) {
      const float c = fo * uo[j] * go[j], d = fp * up[j] * gp[j];
      float t;
      if constexpr (kKind == kRows || kKind == kRowsL1 || kKind == kProbabilities) {
        t = e.slope(student, c, mine, d, theirs) +
            e.slope(student, c, side_of(own, j), d, side_of(other, j));
      } else {
        t = 2.f * e.slope(student, c, mine, d, theirs);
      }
      if (kKind == kSigned) t *= weights[j];
      part += t * c;
      out[j] = by_row * uo[j] * t;
    }
    back += static_cast<double>(part);
  });
  if (through != 0.f)
    out[i] -=
        m.p.scale * (kKind == kSigned ? weights[i] : 1.f) * through * static_cast<float>(back);
}

struct RowFunctions {
  double (*value)(const RowPair&, int64_t);
  void (*slope)(const RowPair&, bool, int64_t, float*);
};
template <int kKind, int kOrder = -1>
constexpr RowFunctions kRowFunctions = {row_value<kKind, kOrder>, row_slope<kKind, kOrder>};

RowFunctions rows_of(const Epilogue& e) {
  switch (e.kind) {
    case kSeries:
      return e.order == 2   ? kRowFunctions<kSeries, 2>
             : e.order == 3 ? kRowFunctions<kSeries, 3>
                            : kRowFunctions<kSeries>;
    case kRows: return kRowFunctions<kRows>;
    case kRowsL1: return kRowFunctions<kRowsL1>;
    case kProbabilities: return kRowFunctions<kProbabilities>;
    case kSigned: return kRowFunctions<kSigned>;
    case kLengths: return kRowFunctions<kLengths>;
    default: return kRowFunctions<kLinear>;
  }
}

// ---- one sample at a time ----

class Worker {
 public:
  Worker(const Problem& p, int64_t threads)
      : p_(p),
        threads_(threads),
        large_(exceeds_caches(p.student) && (!p.student_other || exceeds_caches(p.student_other))) {
  }

  double sample(int64_t b) {
    const bool pair = static_cast<bool>(p_.teacher);
    Gram s = reserve(student_, p_.student, p_.student_factor);
    Gram t = pair ? reserve(teacher_, p_.teacher, p_.teacher_factor) : s;
    // The student comes last, for its gradient to find it in cache again.
    if (pair) gram(t, matrix_of(p_.teacher, b), matrix_of(p_.teacher_other, b));
    gram(s, matrix_of(p_.student, b), matrix_of(p_.student_other, b));
    const RowPair m = {p_, s, t};
    const RowFunctions rows = rows_of(p_.epilogue);
    double* values = reinterpret_cast<double*>(values_.floats(2 * p_.rows));
    parallel_for(p_.rows, 8 * p_.rows * p_.columns, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[i] = rows.value(m, i);
    });
    if (pair) {
      gradients(m, rows, true, s, b, p_.student, p_.student_other, p_.ds, p_.ds_other);
      gradients(m, rows, false, t, b, p_.teacher, p_.teacher_other, p_.dt, p_.dt_other);
    } else if (p_.ds || p_.dt) {
      const float* slopes = slope_matrix(m, rows, true);
      const Matrix x = matrix_of(p_.student, b);
      const int64_t first = p_.dt ? p_.rows - p_.dt.shape[1] : 0;
      if (p_.ds) apply(slopes, x, matrix_of(p_.ds, b), nullptr);
      if (p_.dt) apply(slopes + first, x, matrix_of(p_.dt, b), nullptr);
    }
    double total = 0.0;
    for (int64_t i = 0; i < p_.rows; ++i) total += values[i];
    return total;
  }

 private:
  Gram reserve(Scratch& memory, const Tensor& x, float factor) {
    const int64_t side = up_to(p_.rows > p_.columns ? p_.rows : p_.columns, kPanel),
                  features = p_.normalize == kColumns ? up_to(x.shape[2], kPanel) : 0;
    float* at = memory.floats(5 * side + 2 * features + up_to(p_.rows, kPanel) * p_.row);
    Gram g;
    g.factor = factor;
    for (float** part : {&g.unit, &g.through, &g.length, &g.dot, &g.inverse})
      *part = at, at += side;
    for (float** part : {&g.column, &g.column_through}) *part = at, at += features;
    g.values = at;
    return g;
  }

  // All products of rows of x with rows of y (x itself where there is none), and x's units.
  void gram(Gram& g, const Matrix& x, const Matrix& y) {
    if (p_.normalize != kColumns && x.has_pairs() && (!y || y.has_pairs()))
      products<true>(g, x, y);
    else
      products<false>(g, x, y);
  }

  template <bool kPairs>
  void products(Gram& g, const Matrix& x, const Matrix& y) {
    const int64_t left = (x.rows + kPanel - 1) / kPanel,
                  right = y ? (y.rows + kPanel - 1) / kPanel : left;
    const int64_t panels = left + (y ? right : 0);
    const int64_t columns = kPairs ? x.pairs() : x.columns;
    const int64_t depth = least(up_to(kChunk / (panels * kPanel) + 1, kPacked), columns);
    const int64_t size = up_to(depth, 16) * kPanel;
    float* packed = packed_.floats(panels * size + 2 * left * kPanel);
    float* others = y ? packed + left * size : packed;
    double* squares = reinterpret_cast<double*>(packed + panels * size);
    for (int64_t i = 0; i < left * kPanel; ++i) squares[i] = 0.0;
    const bool units = p_.normalize == kClamped || p_.normalize == kShifted;
    for (int64_t k = 0; k < columns; k += depth) {
      const int64_t n = least(depth, columns - k);
      parallel_for(panels, 4 * panels * n * kPanel, threads_, [&](int64_t begin, int64_t end) {
        Scratch buffer;
        for (int64_t i = begin; i < end; ++i) {
          pack<kPairs>(i < left ? x : y, (i < left ? i : i - left) * kPanel, k, n,
                       packed + i * size, buffer.floats(kPanel * kPacked));
          if (units) add_squares<kPairs>(packed + i * size, n, squares + i * kPanel);
        }
      });
      if (p_.normalize == kColumns) normalize_columns(g, packed, left, size, k, n);
      // Strips of rows against panels of columns; of a symmetric matrix, the upper half.
      const int64_t strips = (x.rows + kStrip - 1) / kStrip;
      const auto strips_of = [&](int64_t j) {
        return y ? strips : least(strips, (j + 1) * (kPanel / kStrip));
      };
      int64_t blocks = 0;
      for (int64_t j = 0; j < right; ++j) blocks += strips_of(j);
      parallel_for(blocks, blocks * n * 64, threads_, [&](int64_t begin, int64_t end) {
        int64_t j = 0, from = 0;
        for (int64_t unit = begin; unit < end; ++unit) {
          while (unit >= from + strips_of(j)) from += strips_of(j++);
          const int64_t i = (unit - from) * kStrip;
          multiply_deep<kPairs>(packed + i / kPanel * size + i % kPanel, kPanel, others + j * size,
                                n, g.values + i * p_.row + j * kPanel, p_.row, k == 0);
        }
      });
    }
    if (x.columns == 0)
      for (int64_t i = 0; i < x.rows * p_.row; ++i) g.values[i] = 0.f;
    if (!y) mirror(g.values, left);
    for (int64_t i = 0; i < (y ? p_.columns : 0); ++i) g.unit[i] = 1.f;
    for (int64_t i = 0; i < x.rows; ++i) {
      const Unit u = unit_of(squares[i], p_.normalize, static_cast<double>(p_.epilogue.eps));
      g.unit[i] = u.scale, g.through[i] = u.through;
    }
  }

  // The squared lengths of a panel's rows. A row's length is in all its elements: it gets more
  // digits than they have.
  template <bool kPairs>
  KDK_ONE_COPY static void add_squares(const float* panel, int64_t n, double* squares) {
    for (int64_t k0 = 0; k0 < n; k0 += 16) {
      float part[kPanel] = {};
      for (int64_t k = k0; k < least(k0 + 16, n); ++k)
#pragma omp simd
        for (int64_t r = 0; r < kPanel; ++r) {
          const float x = panel[k * kPanel + r];
          if constexpr (kPairs) {
            const float first = unpaired(x, false), second = unpaired(x, true);
            part[r] += first * first + second * second;
          } else {
            part[r] += x * x;
          }
        }
      for (int64_t r = 0; r < kPanel; ++r) squares[r] += static_cast<double>(part[r]);
    }
  }

  void mirror(float* g, int64_t panels) const {
    parallel_for(panels, panels * panels * kPanel * kPanel, threads_,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin * kPanel; i < end * kPanel; i += kFloats)
                     for (int64_t j = 0; j < i / kPanel * kPanel; j += kFloats)
                       transpose_block(g + j * p_.row + i, p_.row, g + i * p_.row + j, p_.row);
                 });
  }

  void normalize_columns(Gram& g, float* packed, int64_t panels, int64_t size, int64_t first,
                         int64_t n) const {
    parallel_for(n, panels * n * kPanel, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        double square = 0.0;
        for (int64_t i = 0; i < panels; ++i) {
          const float* x = packed + i * size + k * kPanel;
          float part = 0.f;
#pragma omp simd reduction(+ : part)
          for (int64_t r = 0; r < kPanel; ++r) part += x[r] * x[r];
          square += static_cast<double>(part);
        }
        const Unit u = unit_of(square, kClamped, static_cast<double>(p_.epilogue.eps));
        const float length = u.scale == 0.f
                                 ? INFINITY
                                 : greatest(static_cast<float>(std::sqrt(square)), p_.epilogue.eps);
        g.column[first + k] = length;
        g.column_through[first + k] = u.through != 0.f ? 1.f : 0.f;
        for (int64_t i = 0; i < panels; ++i) {
          float* x = packed + i * size + k * kPanel;
#pragma omp simd
          for (int64_t r = 0; r < kPanel; ++r) x[r] /= length;
        }
      }
    });
  }

  float* slope_matrix(const RowPair& m, const RowFunctions& rows, bool student) {
    float* out = slopes_.floats(up_to(p_.rows, kPanel) * p_.row);
    parallel_for(p_.rows, 8 * p_.rows * p_.columns, threads_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rows.slope(m, student, i, out + i * p_.row);
    });
    return out;
  }

  void gradients(const RowPair& m, const RowFunctions& rows, bool student, const Gram& g, int64_t b,
                 const Tensor& x, const Tensor& y, const Tensor& dx, const Tensor& dy) {
    if (!dx && !dy) return;
    const float* slopes = slope_matrix(m, rows, student);
    if (p_.symmetric) {
      apply(slopes, matrix_of(x, b), matrix_of(dx, b), p_.normalize == kColumns ? &g : nullptr);
      return;
    }
    if (dy) apply(slopes, matrix_of(x, b), matrix_of(dy, b), nullptr);
    if (dx) {
      const int64_t row = up_to(p_.rows, kPanel);
      float* turned = turned_.floats(up_to(p_.columns, kPanel) * row);
      for (int64_t j = 0; j < p_.columns; j += kFloats)
        for (int64_t i = 0; i < p_.rows; i += kFloats)
          transpose_block(slopes + i * p_.row + j, p_.row, turned + j * row + i, row);
      apply(turned, matrix_of(y, b), matrix_of(dx, b), nullptr, row);
    }
  }

  // dx_r = sum over j of slopes[j][r] y_j; through the columns' normalisation where `g` is given.
  void apply(const float* slopes, const Matrix& y, const Matrix& dx, const Gram* g,
             int64_t row = 0) {
    if (!row) row = p_.row;
    const int64_t panels = (dx.columns + kPanel - 1) / kPanel, rows = up_to(dx.rows, kStrip);
    parallel_for(panels, panels * y.rows * rows * 2, threads_, [&](int64_t begin, int64_t end) {
      Scratch memory;
      float* packed = memory.floats((up_to(y.rows, 16) + rows + kPacked) * kPanel);
      float* out = packed + up_to(y.rows, 16) * kPanel;
      for (int64_t f = begin; f < end; ++f)
        apply_panel(slopes, row, y, dx, f * kPanel, g, large_, packed, out, out + rows * kPanel);
      streams_done();
    });
  }

  KDK_ONE_COPY static void apply_panel(const float* slopes, int64_t row, const Matrix& y,
                                       const Matrix& dx, int64_t first, const Gram* g,
                                       bool past_caches, float* packed, float* out, float* buffer) {
    pack(y.transposed(), first, 0, y.rows, packed, buffer);
    float length[kPanel];
    if (g) {
      for (int64_t c = 0; c < kPanel; ++c)
        length[c] = first + c < dx.columns ? g->column[first + c] : 1.f;
      for (int64_t j = 0; j < y.rows; ++j)
#pragma omp simd
        for (int64_t c = 0; c < kPanel; ++c) packed[j * kPanel + c] /= length[c];
    }
    for (int64_t r = 0; r < dx.rows; r += kStrip)
      multiply_deep(slopes + r, row, packed, y.rows, out + r * kPanel, kPanel, true);
    if (g) {
      float dots[kPanel] = {};
      for (int64_t j = 0; j < dx.rows; ++j)
#pragma omp simd
        for (int64_t c = 0; c < kPanel; ++c)
          dots[c] += out[j * kPanel + c] * packed[j * kPanel + c];
      for (int64_t c = 0; c < least(kPanel, dx.columns - first); ++c)
        dots[c] *= g->column_through[first + c];
      for (int64_t j = 0; j < dx.rows; ++j)
#pragma omp simd
        for (int64_t c = 0; c < kPanel; ++c)
          out[j * kPanel + c] =
              (out[j * kPanel + c] - dots[c] * packed[j * kPanel + c]) / length[c];
    }
    unpack(out, dx.rows, dx, 0, first, past_caches);
  }

  const Problem& p_;
  const int64_t threads_;
  const bool large_;  // gradients go past the caches
  Scratch student_, teacher_, slopes_, turned_, packed_, values_;
};

void gram_match(Tensor student, Tensor student_other, Tensor teacher, Tensor teacher_other,
                Tensor weights, Tensor scalars, Tensor loss, Tensor ds, Tensor ds_other, Tensor dt,
                Tensor dt_other, int64_t kind, int64_t normalize, int64_t order, int64_t threads) {
  const float* given = scalars.as<float>();
  const float decay = static_cast<float>(std::exp(-2.0 * static_cast<double>(given[kGamma])));
  const int64_t rows = student.shape[1];
  const int64_t columns = student_other ? student_other.shape[1] : rows;
  const Problem p = {
      student,
      student_other,
      teacher,
      teacher_other,
      ds,
      ds_other,
      dt,
      dt_other,
      weights.as<float>(),
      {static_cast<int>(kind), static_cast<int>(order), given[kEps], given[kGamma], decay},
      static_cast<int>(normalize),
      given[kScale],
      given[kStudentFactor],
      given[kTeacherFactor],
      rows,
      columns,
      up_to(columns, kPanel) + 16,  // rows whose distance is a power of two share cache lines' sets
      !student_other};
  const int64_t samples = student.shape[0];
  Scratch memory;
  double* values = reinterpret_cast<double*>(memory.floats(2 * samples));
  // The bits are the same either way: no sum depends on who computes it.
  const bool by_sample = samples >= 2 * threads;
  const int64_t work = by_sample ? samples * rows * columns * 64 : 0;
  parallel_for(samples, work, by_sample ? threads : 1, [&](int64_t begin, int64_t end) {
    Worker worker(p, by_sample ? 1 : threads);
    for (int64_t b = begin; b < end; ++b) values[b] = worker.sample(b);
  });
  double total = 0.0;
  for (int64_t b = 0; b < samples; ++b) total += values[b];
  *loss.as<float>() = static_cast<float>(total * static_cast<double>(p.scale));
}

KDK_EXPORT(gram_match)

}  // namespace
}  // namespace KDK_NAMESPACE
