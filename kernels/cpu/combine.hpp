// What a Runge-Kutta step computes beside the field, over whole states in memory: for a field that
// is evaluated elsewhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.hpp"

namespace anode {

// Numbers that are worked on at a time: all that a step reads of them fits the innermost cache.
constexpr std::int64_t kBlock = 512;

// Below this size threads cost more than they bring.
constexpr std::int64_t kParallelSize = 1 << 15;

// Calls f(begin, end) for blocks of [0, n), on several threads if it is worth it.
template <class F>
void for_blocks(std::int64_t n, F f) {
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  auto run = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t b = first; b < last; ++b) f(b * kBlock, std::min(n, (b + 1) * kBlock));
  };
  if (n < kParallelSize) {
    run(0, blocks);
  } else {
    parallel_for(blocks, run);
  }
}

// Stages with weights: the sum of h * weights[j] * stages[j]. Those of weight 0 are not read.
template <class T>
struct WeightedSum {
  double h;
  const double* weights;
  const T* const* stages;
  std::int64_t count;

  T weight(std::int64_t j) const { return T(h * weights[j]); }

  // out[0..n) is the sum over the entries from `begin` on, added to y's unless that is null.
  void add_to(const T* y, std::int64_t begin, std::int64_t n, T* __restrict out) const {
    bool is_empty = !y;
    if (y) std::copy(y + begin, y + begin + n, out);
    for (std::int64_t j = 0; j < count; ++j) {
      if (weights[j] == 0) continue;
      const T w = weight(j);
      const T* __restrict k = stages[j] + begin;
      if (is_empty) {
        for (std::int64_t i = 0; i < n; ++i) out[i] = w * k[i];
        is_empty = false;
      } else {
        for (std::int64_t i = 0; i < n; ++i) out[i] += w * k[i];
      }
    }
    if (is_empty) std::fill(out, out + n, T(0));
  }
};

// out = y + the sum, [n]; y may be null.
template <class T>
void combine(const WeightedSum<T>& sum, const T* y, std::int64_t n, T* out) {
  for_blocks(n, [&](std::int64_t begin, std::int64_t end) {
    sum.add_to(y, begin, end - begin, out + begin);
  });
}

// out[j] = h * weights[j] * grad, [count, n]: the gradients of the stages from that of the sum.
template <class T>
void spread(const WeightedSum<T>& sum, const T* grad, std::int64_t n, T* out) {
  for_blocks(n, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = 0; j < sum.count; ++j) {
      const T w = sum.weight(j);
      for (std::int64_t i = begin; i < end; ++i) out[j * n + i] = w * grad[i];
    }
  });
}

// rtol and atol: numbers, or one for every entry where the pointer is not null.
template <class T>
struct Tolerance {
  T rtol, atol;
  const T *rtols, *atols;
};

// Sum of the squares of error / (atol + rtol * max(|y0|, |y1|)) over the entries [begin, end) of a
// block.
template <class T>
double scaled_squares(const WeightedSum<T>& sum, const T* y0, const T* y1,
                      const Tolerance<T>& tolerance, std::int64_t begin, std::int64_t end) {
  constexpr int kWidth = 16;
  T errors[kBlock], lanes[kWidth] = {};
  const std::int64_t n = end - begin;
  sum.add_to(nullptr, begin, n, errors);
  auto square = [&](std::int64_t i) {
    const T a = std::abs(y0[begin + i]), b = std::abs(y1[begin + i]);
    const T size = a > b || a != a ? a : b;  // nan if one is
    const T rtol = tolerance.rtols ? tolerance.rtols[begin + i] : tolerance.rtol;
    const T atol = tolerance.atols ? tolerance.atols[begin + i] : tolerance.atol;
    const T ratio = errors[i] / (size * rtol + atol);
    return ratio * ratio;
  };
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    for (int l = 0; l < kWidth; ++l) lanes[l] += square(i + l);
  }
  for (int l = 0; i < n; ++i, ++l) lanes[l] += square(i);
  double total = 0;
  for (T lane : lanes) total += lane;
  return total;
}

// The largest root mean square of the scaled error over parts of the state, each up to its end.
// nan if one is. The same on any number of threads.
template <class T>
double error_ratio(const WeightedSum<T>& sum, const T* y0, const T* y1,
                   const Tolerance<T>& tolerance, const std::int64_t* ends, std::int64_t parts) {
  double largest = 0;
  std::int64_t begin = 0;
  for (std::int64_t p = 0; p < parts; ++p) {
    const std::int64_t n = ends[p] - begin;
    std::vector<double> totals(n < kParallelSize ? 0 : (n + kBlock - 1) / kBlock);
    double total = 0;
    for_blocks(n, [&](std::int64_t first, std::int64_t last) {
      const double found =
          scaled_squares(sum, y0, y1, tolerance, begin + first, begin + last);
      if (totals.empty()) {
        total += found;
      } else {
        totals[first / kBlock] = found;
      }
    });
    for (double found : totals) total += found;
    const double norm = std::sqrt(total / double(std::max<std::int64_t>(n, 1)));
    if (norm > largest || norm != norm) largest = norm;
    if (largest != largest) return largest;
    begin = ends[p];
  }
  return largest;
}

// sign * (t0 + c * (t1 - t0)) for the nodes c, [count]. At the ends of a step, c = 0 and c = 1, the
// neighbouring number below (side -1) or above (1) that time, if a side is given.
template <class T>
void node_times(const double* c, std::int64_t count, double t0, double t1, std::int64_t side0,
                std::int64_t side1, double sign, T* out) {
  for (std::int64_t j = 0; j < count; ++j) {
    T t = T(c[j] == 1 ? t1 : t0 + c[j] * (t1 - t0));
    const std::int64_t side = c[j] == 1 ? side1 : c[j] == 0 ? side0 : 0;
    if (side) t = std::nextafter(t, T(side) * std::numeric_limits<T>::infinity());
    out[j] = T(sign) * t;
  }
}

}  // namespace anode
