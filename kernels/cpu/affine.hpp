// Affine maps of tiles of rows, and the gradients of their weights.
//
// A tile is feature-major: feature i of a tile of n rows lies at [i * n, (i + 1) * n), n a multiple
// of the vector width. A lane is a row, a weight is broadcast to all lanes, so widths need no
// padding.
#pragma once

#include <algorithm>
#include <vector>

#include "memory.hpp"
#include "simd.hpp"

namespace anode {

// Vectors of rows in a full tile, and outputs that are accumulated at once: as many sums as the
// registers hold beside one weight and a vector of inputs each.
constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int kBlockOutputs = 6;

template <class T>
constexpr int kTileRows = kTileVectors * kLanes<T>;

// Block of a weight gradient: kGradientRows deltas times kGradientColumns inputs.
constexpr int kGradientRows = 4;
constexpr int kGradientColumns = kVectorRegisters == 32 ? 4 : 2;

// --- one affine layer -----------------------------------------------------------------------------

// Weights of an affine map in blocks of outputs. A block of J outputs: J biases, then J weights of
// each input.
template <class T>
struct Panels {
  int inputs = 0;
  int blocks = 0, size = 0, larger = 0;  // outputs of a block; how many blocks have one more
  Buffer<T> weights;

  Panels() = default;
  Panels(int inputs, int outputs)
      : inputs(inputs),
        blocks((outputs + kBlockOutputs - 1) / kBlockOutputs),
        size(outputs / blocks),
        larger(outputs % blocks),
        weights(std::size_t(inputs + 1) * outputs) {}

  // First output of block `b`.
  int begin(int b) const { return b * size + std::min(b, larger); }

  const T* block(int b) const { return weights.get() + std::size_t(begin(b)) * (inputs + 1); }

  // Fills the weights from functions of the output (and the input).
  template <class Bias, class Weight>
  void fill(Bias bias, Weight weight) {
    T* p = weights.get();
    for (int b = 0; b < blocks; ++b) {
      const int first = begin(b), last = begin(b + 1);
      for (int j = first; j < last; ++j) *p++ = bias(j);
      for (int i = 0; i < inputs; ++i) {
        for (int j = first; j < last; ++j) *p++ = weight(j, i);
      }
    }
  }
};

// out[j] = bias[j] + sum_i weight[j][i] * in[i] for a block of J outputs and V vectors of rows; then
// relu of it, or zeros where `gate` is not positive, if that is not null.
template <class T, int J, int V>
inline void affine_block(const T* panel, int inputs, const T* in, T* out, bool relu,
                         const T* gate) {
  constexpr int kWidth = kLanes<T>, kRows = V * kWidth;
  Vec<T> sum[J * V];
  unrolled<J * V>([&](auto i) ANODE_INLINE { sum[i] = broadcast(panel[i / V]); });
  panel += J;
  for (int i = 0; i < inputs; ++i, panel += J, in += kRows) {
    Vec<T> lanes[V];
    unrolled<V>([&](auto v) ANODE_INLINE { lanes[v] = load(in + v * kWidth); });
    unrolled<J>([&](auto j) ANODE_INLINE {
      const Vec<T> weight = broadcast(panel[j]);
      unrolled<V>([&](auto v) ANODE_INLINE { sum[j * V + v] += weight * lanes[v]; });
    });
  }
  if (relu) {
    const Vec<T> zero{};
    unrolled<J * V>([&](auto i) ANODE_INLINE { sum[i] = zero > sum[i] ? zero : sum[i]; });
  }
  if (gate) {
    const Vec<T> zero{};
    unrolled<J * V>([&](auto i) ANODE_INLINE {
      sum[i] = load(gate + i * kWidth) > zero ? sum[i] : zero;
    });
  }
  unrolled<J * V>([&](auto i) ANODE_INLINE { store(out + i * kWidth, sum[i]); });
}

// --- weight gradients -----------------------------------------------------------------------------

// A tile's deltas and inputs of one layer at one evaluation.
template <class T>
struct Pair {
  const T* delta;
  const T* in;
};

// How the gradient of a layer lies: of its weight [rows, columns] in blocks of kGradientRows x
// kGradientColumns, of its bias [rows] one after the other.
template <class T>
struct LayerGradient {
  int rows, columns;

  int row_blocks() const { return round_up(rows, kGradientRows) / kGradientRows; }
  int column_blocks() const { return round_up(columns, kGradientColumns) / kGradientColumns; }
  std::size_t weight_size() const {
    return std::size_t(row_blocks()) * column_blocks() * kGradientRows * kGradientColumns;
  }
  std::size_t bias_size() const { return round_up(rows, kLanes<T>); }
  std::size_t index(int row, int column) const {
    const int block = row / kGradientRows * column_blocks() + column / kGradientColumns;
    return std::size_t(block) * kGradientRows * kGradientColumns +
           row % kGradientRows * kGradientColumns + column % kGradientColumns;
  }

  // Adds sums over pairs and their rows: of delta[j] * in[i] to weight[j][i].
  void accumulate_weight(const std::vector<Pair<T>>& pairs, int vectors, T* weight) const {
    with_constant<kTileVectors>(vectors, [&](auto v) {
      for (int rb = 0; rb < row_blocks(); ++rb) {
        for (int cb = 0; cb < column_blocks(); ++cb) {
          block<v>(pairs, rb * kGradientRows, cb * kGradientColumns, weight);
          weight += kGradientRows * kGradientColumns;
        }
      }
    });
  }

  // Of delta[j] to bias[j].
  void accumulate_bias(const std::vector<Pair<T>>& pairs, int vectors, T* bias) const {
    with_constant<kTileVectors>(vectors, [&](auto v) {
      for (int row = 0; row < rows; row += kLanes<T>, bias += kLanes<T>) {
        bias_block<v>(pairs, row, std::min(rows - row, kLanes<T>), bias);
      }
    });
  }

 private:
  template <int V>
  static void bias_block(const std::vector<Pair<T>>& pairs, int row, int count, T* gradient) {
    constexpr int kRows = V * kLanes<T>;
    Vec<T> sum[kLanes<T>] = {};
    for (const Pair<T>& pair : pairs) {
      for (int j = 0; j < count; ++j) {
        const T* delta = pair.delta + (row + j) * kRows;
        unrolled<V>([&](auto v) ANODE_INLINE { sum[j] += load(delta + v * kLanes<T>); });
      }
    }
    store(gradient, load(gradient) + sum_each<T>(sum));
  }

  template <int V>
  static void block(const std::vector<Pair<T>>& pairs, int row, int column, T* gradient) {
    constexpr int kWidth = kLanes<T>, kRows = V * kWidth;
    constexpr int kSums = kGradientRows * kGradientColumns;
    static_assert(kSums % kWidth == 0);
    Vec<T> sum[kSums];
    unrolled<kSums>([&](auto k) ANODE_INLINE { sum[k] = Vec<T>{}; });
    for (const Pair<T>& pair : pairs) {
      const T* delta = pair.delta + row * kRows;
      const T* in = pair.in + column * kRows;
      for (int v = 0; v < V; ++v, delta += kWidth, in += kWidth) {
        Vec<T> d[kGradientRows];
        unrolled<kGradientRows>([&](auto j) ANODE_INLINE { d[j] = load(delta + j * kRows); });
        unrolled<kGradientColumns>([&](auto i) ANODE_INLINE {
          const Vec<T> x = load(in + i * kRows);
          unrolled<kGradientRows>([&](auto j) ANODE_INLINE {
            sum[j * kGradientColumns + i] += d[j] * x;
          });
        });
      }
    }
    unrolled<kSums / kWidth>([&](auto k) ANODE_INLINE {
      T* to = gradient + k * kWidth;
      store(to, load(to) + sum_each<T>(sum + k * kWidth));
    });
  }
};

}  // namespace anode
