// Mean squared differences of two maps and of their averages over windows, level by level, with
// their gradient: ReviewKD's hierarchical context. Averages of two maps differ by the average of
// the maps' difference, so that one row (a channel of an image) needs nothing but that, in cache.
#pragma once
#include <vector>

#include "weighted_match/tiles.h"

namespace KDK_NAMESPACE {
namespace {

// torch's adaptive windows on one axis: `cells` of them over n places.
struct Windows {
  int64_t n, cells;
  std::vector<int32_t> begin, end;

  Windows(int64_t places, int64_t size) : n(places), cells(size) {
    for (int64_t i = 0; i < cells; ++i) {
      begin.push_back(static_cast<int32_t>(i * n / cells));
      end.push_back(static_cast<int32_t>(((i + 1) * n + cells - 1) / cells));
    }
  }
  int64_t length(int64_t i) const { return end[i] - begin[i]; }
};

struct Level {
  Windows down, across;
  int64_t finer;              // where the cells that windows consist of are; -1: they are pixels
  int64_t at;                 // its own cells among those of all levels
  double factor;              // of the sum of its squares
  std::vector<double> share;  // of each place in its cell's average

  Level(int64_t rows, int64_t columns, int64_t size, int64_t of, int64_t from, double by)
      : down(rows, size), across(columns, size), finer(of), at(from), factor(by) {
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j)
        share.push_back(1.0 / static_cast<double>(down.length(i) * across.length(j)));
  }
};

struct Context {
  int64_t height, width, cells = 0;
  double factor;  // of the sum of the squares at full size
  std::vector<Level> levels;

  // `given`: the factor at full size, then a size and a factor for each level.
  Context(int64_t pixels, int64_t w, const float* given, int64_t n)
      : height(pixels / w), width(w), factor(static_cast<double>(given[0])) {
    int64_t rows = height, columns = width, finer = -1;
    for (int64_t k = 1; k + 1 < n; k += 2) {
      const int64_t size = static_cast<int64_t>(given[k]);
      // Windows may consist of the last level's where both divide without a rest.
      if (rows % size || columns % size || height % rows || width % columns)
        rows = height, columns = width, finer = -1;
      levels.emplace_back(rows, columns, size, finer, cells, static_cast<double>(given[k + 1]));
      finer = cells, rows = columns = size;
      cells += size * size;
    }
  }
};

// The averages of all levels of a difference d, and their share of the loss. `line` has room for
// a row of pixels.
KDK_ONE_COPY inline double pool(const Context& of, const float* d, double* cells, float* line) {
  double loss = 0;
  for (const Level& level : of.levels) {
    const Windows &down = level.down, &across = level.across;
    double* mean = cells + level.at;
    double squares = 0;
    for (int64_t i = 0; i < down.cells; ++i) {
      const int64_t top = down.begin[i], bottom = down.end[i], n = across.n;
      if (level.finer < 0) {
        for (int64_t x = 0; x < n; ++x) line[x] = d[top * n + x];
        for (int64_t y = top + 1; y < bottom; ++y) {
          const float* row = d + y * n;
#pragma omp simd
          for (int64_t x = 0; x < n; ++x) line[x] += row[x];
        }
      }
      for (int64_t j = 0; j < across.cells; ++j) {
        double sum = 0;
        if (level.finer < 0)
          for (int64_t x = across.begin[j]; x < across.end[j]; ++x)
            sum += static_cast<double>(line[x]);
        else
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = across.begin[j]; x < across.end[j]; ++x)
              sum += cells[level.finer + y * n + x];
        const int64_t c = i * across.cells + j;
        mean[c] = sum * level.share[c];
        squares += mean[c] * mean[c];
      }
    }
    loss += level.factor * squares;
  }
  return loss;
}

// The gradient by d in its place; the levels' averages become those by them.
KDK_ONE_COPY inline void unpool(const Context& of, double upstream, double* cells, float* line,
                                float* d) {
  const float own = static_cast<float>(2.0 * of.factor * upstream);
  const int64_t pixels = of.height * of.width;
#pragma omp simd
  for (int64_t i = 0; i < pixels; ++i) d[i] *= own;
  for (const Level& level : of.levels) {
    const int64_t n = level.down.cells * level.across.cells;
    for (int64_t c = 0; c < n; ++c) cells[level.at + c] *= 2.0 * level.factor * upstream;
  }
  for (size_t k = of.levels.size(); k-- > 0;) {
    const Level& level = of.levels[k];
    const Windows &down = level.down, &across = level.across;
    for (int64_t i = 0; i < down.cells; ++i) {
      const int64_t top = down.begin[i], bottom = down.end[i], n = across.n;
      if (level.finer < 0)
        for (int64_t x = 0; x < n; ++x) line[x] = 0.f;
      for (int64_t j = 0; j < across.cells; ++j) {
        const int64_t c = i * across.cells + j;
        const double g = cells[level.at + c] * level.share[c];
        if (level.finer < 0)
          for (int64_t x = across.begin[j]; x < across.end[j]; ++x)
            line[x] += static_cast<float>(g);
        else
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = across.begin[j]; x < across.end[j]; ++x)
              cells[level.finer + y * n + x] += g;
      }
      for (int64_t y = top; level.finer < 0 && y < bottom; ++y) {
        float* row = d + y * n;
#pragma omp simd
        for (int64_t x = 0; x < n; ++x) row[x] += line[x];
      }
    }
  }
}

}  // namespace
}  // namespace KDK_NAMESPACE
