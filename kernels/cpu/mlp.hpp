// A perceptron as a field, for tiles of rows.
//
// A tile is feature-major: feature i of a tile of n rows lies at [i * n, (i + 1) * n), n a multiple
// of the vector width. A lane is a row, a weight is broadcast to all lanes, so widths need no
// padding. Time runs forwards here: a field of a solve backwards in time is packed with its signs
// changed.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "activations.hpp"
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

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Calls f with `count`, 1 to Most, as a compile-time constant.
template <int Most, class F>
inline void with_constant(int count, F&& f) {
  if constexpr (Most > 1) {
    if (count < Most) return with_constant<Most - 1>(count, f);
  }
  f(std::integral_constant<int, Most>{});
}

// --- one affine layer -----------------------------------------------------------------------------

// Weights of an affine map in blocks of outputs. A block of J outputs: J biases, J weights of time,
// then J weights of each input.
template <class T>
struct Panels {
  int inputs = 0;
  int outputs = 0;
  Buffer<T> weights;

  Panels() = default;
  Panels(int inputs, int outputs)
      : inputs(inputs), outputs(outputs), weights(std::size_t(inputs + 2) * outputs) {}

  int blocks() const { return (outputs + kBlockOutputs - 1) / kBlockOutputs; }

  // First output of block `b`; sizes of blocks differ by one at most.
  int begin(int b) const {
    const int size = outputs / blocks(), larger = outputs % blocks();
    return b * size + std::min(b, larger);
  }

  // Fills the weights from functions of the output (and the input).
  template <class Bias, class Time, class Weight>
  void fill(Bias bias, Time time, Weight weight) {
    T* p = weights.get();
    for (int b = 0; b < blocks(); ++b) {
      const int first = begin(b), last = begin(b + 1);
      for (int j = first; j < last; ++j) *p++ = bias(j);
      for (int j = first; j < last; ++j) *p++ = time(j);
      for (int i = 0; i < inputs; ++i) {
        for (int j = first; j < last; ++j) *p++ = weight(j, i);
      }
    }
  }
};

// out[j] = bias[j] + time_weight[j] * time + sum_i weight[j][i] * in[i] for a block of J outputs and
// V vectors of rows; `time` may be null.
template <class T, int J, int V>
inline void affine_block(const T* panel, int inputs, const T* time, const T* in, T* out,
                         bool relu) {
  constexpr int kWidth = kLanes<T>, kRows = V * kWidth;
  Vec<T> sum[J * V];
  auto add = [&](const T* weights, const T* x) ANODE_INLINE {
    Vec<T> lanes[V];
    unrolled<V>([&](auto v) ANODE_INLINE { lanes[v] = load(x + v * kWidth); });
    unrolled<J>([&](auto j) ANODE_INLINE {
      const Vec<T> weight = broadcast(weights[j]);
      unrolled<V>([&](auto v) ANODE_INLINE { sum[j * V + v] += weight * lanes[v]; });
    });
  };
  unrolled<J * V>([&](auto i) ANODE_INLINE { sum[i] = broadcast(panel[i / V]); });
  if (time) add(panel + J, time);
  panel += 2 * J;
  for (int i = 0; i < inputs; ++i, panel += J, in += kRows) add(panel, in);
  if (relu) {
    const Vec<T> zero{};
    unrolled<J * V>([&](auto i) ANODE_INLINE { sum[i] = zero > sum[i] ? zero : sum[i]; });
  }
  unrolled<J * V>([&](auto i) ANODE_INLINE { store(out + i * kWidth, sum[i]); });
}

// Applies an affine map to a tile of `vectors` vectors of rows. `finish(j, count)` is called for
// each block of outputs, first output and number, while it is in the cache.
template <class T, class Finish>
inline void affine(const Panels<T>& panels, const T* time, const T* in, T* out, int vectors,
                   bool relu, Finish finish) {
  with_constant<kTileVectors>(vectors, [&](auto v) {
    constexpr int kRows = v * kLanes<T>;
    for (int b = 0; b < panels.blocks(); ++b) {
      const int first = panels.begin(b), count = panels.begin(b + 1) - first;
      const T* panel = panels.weights.get() + std::size_t(first) * (panels.inputs + 2);
      with_constant<kBlockOutputs>(count, [&](auto j) {
        affine_block<T, j, v>(panel, panels.inputs, time, in, out + first * kRows, relu);
      });
      finish(first, count);
    }
  });
}

// --- weight gradients -----------------------------------------------------------------------------

// A tile's deltas and inputs of one layer at one evaluation.
template <class T>
struct Pair {
  const T* delta;
  const T* in;
};

// The gradient of a weight [rows, columns] in blocks of kGradientRows x kGradientColumns.
template <class T>
struct GradientBlocks {
  int rows, columns;

  int row_blocks() const { return round_up(rows, kGradientRows) / kGradientRows; }
  int column_blocks() const { return round_up(columns, kGradientColumns) / kGradientColumns; }
  std::size_t size() const {
    return std::size_t(row_blocks()) * column_blocks() * kGradientRows * kGradientColumns;
  }
  std::size_t index(int row, int column) const {
    const int block = row / kGradientRows * column_blocks() + column / kGradientColumns;
    return std::size_t(block) * kGradientRows * kGradientColumns +
           row % kGradientRows * kGradientColumns + column % kGradientColumns;
  }

  // gradient[j][i] += sum over pairs and their rows of delta[j] * in[i].
  void accumulate(const std::vector<Pair<T>>& pairs, int vectors, T* gradient) const {
    with_constant<kTileVectors>(vectors, [&](auto v) {
      for (int rb = 0; rb < row_blocks(); ++rb) {
        for (int cb = 0; cb < column_blocks(); ++cb) {
          block<v>(pairs, rb * kGradientRows, cb * kGradientColumns, gradient);
          gradient += kGradientRows * kGradientColumns;
        }
      }
    });
  }

 private:
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

// --- the field ------------------------------------------------------------------------------------

struct MlpShape {
  static constexpr int kMostLayers = 9;
  std::int32_t dim;
  std::int32_t hidden_layers;
  std::int32_t hidden[kMostLayers - 1];
  std::int32_t activation;
  std::int32_t time_dependent;

  int layers() const { return hidden_layers + 1; }
  int inputs(int layer) const { return layer == 0 ? dim : hidden[layer - 1]; }
  int outputs(int layer) const { return layer == hidden_layers ? dim : hidden[layer]; }
};

// dy/dt = L_n(act(... act(L_1([t, y])))).
//
// A solver writes the argument of an evaluation as an input tile: a row of ones, a row of times,
// then the state (kInputRows rows before it). The ones and times make the gradients of bias and
// time weight columns of the weight's.
template <class T_>
class Mlp {
 public:
  using T = T_;
  using Shape = MlpShape;
  static constexpr int kInputRows = 2;

  // `parameters`: weight [out, in] (the first layer's with the time's column first) and bias [out]
  // of each layer, contiguous.
  Mlp(const Shape& shape, const T* const* parameters, bool backwards, bool with_vjp)
      : shape_(shape), activation_(Activation(shape.activation)) {
    const T sign = backwards ? T(-1) : T(1);
    for (int l = 0; l < shape.layers(); ++l) {
      const int in = shape.inputs(l), out = shape.outputs(l);
      const int lead = l == 0 && shape.time_dependent ? 1 : 0;
      const T* weight = parameters[2 * l];
      const T* bias = parameters[2 * l + 1];
      const T scale = l == shape.hidden_layers ? sign : T(1);
      auto entry = [&](int j, int i) { return scale * weight[j * (in + lead) + lead + i]; };
      forward_.emplace_back(in, out);
      forward_.back().fill([&](int j) { return scale * bias[j]; },
                           [&](int j) { return lead ? sign * weight[j * (in + 1)] : T(0); }, entry);
      if (with_vjp) {
        auto zero = [](int) { return T(0); };
        backward_.emplace_back(out, in);
        backward_.back().fill(zero, zero, [&](int i, int j) { return entry(j, i); });
        if (lead) {
          time_backward_ = Panels<T>(out, 1);
          time_backward_.fill(zero, zero, [&](int, int j) { return sign * weight[j * (in + 1)]; });
        }
      }
    }
    for (int i = 0; i < shape.hidden_layers; ++i) widest_ = std::max(widest_, shape.hidden[i]);
    lay_out_record();
  }

  int dim() const { return shape_.dim; }

  // --- evaluation

  std::size_t scratch_rows() const { return 2 * std::size_t(widest_); }

  // derivative = f(input); all tiles of `vectors` vectors of rows.
  void evaluate(const T* input, T* derivative, T* scratch, int vectors) const {
    const int n = vectors * kLanes<T>;
    const T* in = input + kInputRows * n;
    for (int l = 0; l < shape_.layers(); ++l) {
      const bool last = l == shape_.hidden_layers;
      T* out = last ? derivative : scratch + (l % 2) * widest_ * n;
      affine(forward_[l], l == 0 ? time_row(input, n) : nullptr, in, out, vectors,
             !last && activation_ == Activation::relu, [&](int first, int count) {
               if (!last && activation_ != Activation::relu) {
                 activate(activation_, out + first * n, std::size_t(count) * n);
               }
             });
      in = out;
    }
  }

  // --- evaluation for the gradient
  //
  // A record holds what one evaluation leaves for its vector-Jacobian product: the inputs of every
  // layer. Its first rows are the evaluation's input tile. The product leaves deltas, cotangents
  // of every layer's outputs; records and deltas together make the gradient of the weights.

  std::size_t record_rows() const { return std::size_t(record_rows_); }
  std::size_t delta_rows() const { return std::size_t(delta_rows_); }

  // Writes what evaluations do not: rows of ones, and the padding.
  void prepare_record(T* record, int vectors) const {
    const int n = vectors * kLanes<T>;
    for (int l = 0; l < shape_.layers(); ++l) {
      const int columns = gradient_blocks(l).columns;
      const int padding = round_up(columns, kGradientColumns) - columns;
      std::fill_n(record + in_[l] * n, n, T(1));
      std::fill_n(record + (in_[l] + columns) * n, padding * n, T(0));
    }
    if (!shape_.time_dependent) std::fill_n(record + n, n, T(0));
  }

  void prepare_deltas(T* deltas, int vectors) const {
    const int n = vectors * kLanes<T>;
    for (int l = 0; l < shape_.layers(); ++l) {
      const int rows = shape_.outputs(l), padding = round_up(rows, kGradientRows) - rows;
      std::fill_n(deltas + (delta_[l] + rows) * n, padding * n, T(0));
    }
  }

  // derivative = f(the record's input tile). Fills the record.
  void evaluate_recording(T* record, T* derivative, int vectors) const {
    const int n = vectors * kLanes<T>;
    for (int l = 0; l < shape_.layers(); ++l) {
      const bool last = l == shape_.hidden_layers;
      const T* in = record + (in_[l] + (l == 0 ? kInputRows : 1)) * n;
      T* out = last ? derivative : record + (in_[l + 1] + 1) * n;
      affine(forward_[l], l == 0 ? time_row(record, n) : nullptr, in, out, vectors,
             !last && activation_ == Activation::relu, [&](int first, int count) {
               if (last || activation_ == Activation::relu) return;
               activate_saving(activation_, out + first * n, record + (slope_[l] + first) * n,
                               std::size_t(count) * n);
             });
    }
  }

  // Where the cotangent of the derivative goes, [dim].
  T* cotangent(T* deltas, int vectors) const {
    return deltas + delta_[shape_.hidden_layers] * vectors * kLanes<T>;
  }

  // gradient = cotangent^T df/dy, [dim]. Fills the deltas.
  void vjp(const T* record, T* deltas, T* gradient, int vectors) const {
    const int n = vectors * kLanes<T>;
    for (int l = shape_.hidden_layers; l >= 0; --l) {
      T* out = l == 0 ? gradient : deltas + delta_[l - 1] * n;
      affine(backward_[l], static_cast<const T*>(nullptr), deltas + delta_[l] * n, out, vectors,
             false, [&](int first, int count) {
               if (l == 0) return;
               const T* value = record + (in_[l] + 1 + first) * n;
               const T* slope = record + (slope_[l - 1] + first) * n;
               times_slope(activation_, out + first * n, value, slope, std::size_t(count) * n);
             });
    }
  }

  // gradient = cotangent^T df/dt of each row, from the deltas of `vjp`.
  void time_gradient(const T* deltas, T* gradient, int vectors) const {
    const int n = vectors * kLanes<T>;
    if (!shape_.time_dependent) return void(std::fill_n(gradient, n, T(0)));
    affine(time_backward_, static_cast<const T*>(nullptr), deltas + delta_[0] * n, gradient,
           vectors, false, [](int, int) {});
  }

  // --- gradients of the weights

  // Number of tensors: a weight and a bias of each layer.
  int parameters() const { return 2 * shape_.layers(); }

  // Size of an accumulator of all weights' gradients.
  std::size_t gradient_size() const {
    std::size_t size = 0;
    for (int l = 0; l < shape_.layers(); ++l) size += gradient_blocks(l).size();
    return size;
  }

  // Adds the weights' gradients of `evaluations`, deltas and records.
  void accumulate_gradient(const std::vector<Pair<T>>& evaluations, int vectors,
                           T* gradient) const {
    const int n = vectors * kLanes<T>;
    std::vector<Pair<T>> pairs(evaluations.size());
    for (int l = 0; l < shape_.layers(); ++l) {
      for (std::size_t i = 0; i < pairs.size(); ++i) {
        pairs[i] = {evaluations[i].delta + delta_[l] * n, evaluations[i].in + in_[l] * n};
      }
      const GradientBlocks<T> blocks = gradient_blocks(l);
      blocks.accumulate(pairs, vectors, gradient);
      gradient += blocks.size();
    }
  }

  // The largest root mean square of a parameter's part of an accumulator, nan if there is one. Only
  // parameters that are not null in `wanted` count.
  double largest_rms(const T* values, const T* const* wanted) const {
    constexpr int kSums = kGradientRows * kGradientColumns;
    double largest = 0;
    auto note = [&](const T* is_wanted, double sum, std::int64_t count) {
      const double rms = std::sqrt(sum / double(count));
      if (is_wanted && (rms > largest || rms != rms)) largest = rms;  // nan stays
    };
    for (int l = 0; l < shape_.layers(); ++l) {
      const GradientBlocks<T> blocks = gradient_blocks(l);
      T first[kSums] = {}, others[kSums] = {};  // by place in a block: the first columns', the rest
      for (int rb = 0; rb < blocks.row_blocks(); ++rb) {
        for (int cb = 0; cb < blocks.column_blocks(); ++cb, values += kSums) {
          T* sums = cb == 0 ? first : others;
          for (int k = 0; k < kSums; ++k) sums[k] += values[k] * values[k];
        }
      }
      const int lead = l == 0 && shape_.time_dependent ? 1 : 0;
      double weight = 0, bias = 0;
      for (int k = 0; k < kSums; ++k) {
        const int column = k % kGradientColumns;
        const bool no_parameter = l == 0 && column == 1 && !lead;
        weight += double(others[k]);
        if (!no_parameter) (column == 0 ? bias : weight) += double(first[k]);
      }
      const std::int64_t rows = shape_.outputs(l);
      note(wanted[2 * l], weight, rows * (shape_.inputs(l) + lead));
      note(wanted[2 * l + 1], bias, rows);
    }
    return largest;
  }

  // Writes an accumulator into tensors like the parameters, those excepted that are null.
  void unpack_gradient(const T* gradient, bool backwards, T* const* out) const {
    const T sign = backwards ? T(-1) : T(1);
    for (int l = 0; l < shape_.layers(); ++l) {
      const GradientBlocks<T> blocks = gradient_blocks(l);
      const int in = shape_.inputs(l), lead = l == 0 && shape_.time_dependent ? 1 : 0;
      const T scale = l == shape_.hidden_layers ? sign : T(1);
      T* weight = out[2 * l];
      T* bias = out[2 * l + 1];
      for (int j = 0; j < shape_.outputs(l); ++j) {
        if (bias) bias[j] = scale * gradient[blocks.index(j, 0)];
        if (!weight) continue;
        if (lead) *weight++ = sign * gradient[blocks.index(j, 1)];
        for (int i = 0; i < in; ++i) {
          *weight++ = scale * gradient[blocks.index(j, i + (l == 0 ? kInputRows : 1))];
        }
      }
      gradient += blocks.size();
    }
  }

 private:
  const T* time_row(const T* input, int n) const {
    return shape_.time_dependent ? input + n : nullptr;
  }

  GradientBlocks<T> gradient_blocks(int l) const {
    return {shape_.outputs(l), shape_.inputs(l) + (l == 0 ? kInputRows : 1)};
  }

  // First rows of each layer's part of a record and of the deltas, padded to the blocks of the
  // weight gradient. Slopes are there where the activation wants them.
  void lay_out_record() {
    for (int l = 0; l < shape_.layers(); ++l) {
      in_.push_back(record_rows_);
      record_rows_ += round_up(gradient_blocks(l).columns, kGradientColumns);
      delta_.push_back(delta_rows_);
      delta_rows_ += round_up(shape_.outputs(l), kGradientRows);
    }
    for (int l = 0; l < shape_.hidden_layers; ++l) {
      slope_.push_back(record_rows_);
      record_rows_ += slope_from_value(activation_) ? 0 : shape_.hidden[l];
    }
  }

  Shape shape_;
  Activation activation_;
  std::vector<Panels<T>> forward_, backward_;
  Panels<T> time_backward_;
  std::int32_t widest_ = 0;
  std::vector<int> in_, delta_, slope_;
  int record_rows_ = 0, delta_rows_ = 0;
};

}  // namespace anode
