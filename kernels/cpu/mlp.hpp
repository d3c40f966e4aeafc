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

// --- one affine layer -----------------------------------------------------------------------------

// Weights of an affine map in blocks of outputs. A block of J outputs: J biases, J weights of time,
// then J weights of each input.
template <class T>
struct Panels {
  using Pointer = const T*;  // not deduced, so that it may be given as nullptr
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
inline void affine_block(const T* panel, int inputs, const T* time, const T* in, T* out, bool relu,
                         const T* gate) {
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
  if (gate) {
    const Vec<T> zero{};
    unrolled<J * V>([&](auto i) ANODE_INLINE {
      sum[i] = load(gate + i * kWidth) > zero ? sum[i] : zero;
    });
  }
  unrolled<J * V>([&](auto i) ANODE_INLINE { store(out + i * kWidth, sum[i]); });
}

// Applies an affine map to a tile of `vectors` vectors of rows, and to the result relu, or zeros
// where `gate` is not positive, if that is not null. `finish(j, count)` is called for each block of
// outputs, first output and number, while it is in the cache.
template <class T, class Finish>
inline void affine(const Panels<T>& panels, typename Panels<T>::Pointer time, const T* in, T* out,
                   int vectors, bool relu, typename Panels<T>::Pointer gate, Finish finish) {
  with_constant<kTileVectors>(vectors, [&](auto v) {
    constexpr int kRows = v * kLanes<T>;
    for (int b = 0; b < panels.blocks(); ++b) {
      const int first = panels.begin(b), count = panels.begin(b + 1) - first;
      const T* panel = panels.weights.get() + std::size_t(first) * (panels.inputs + 2);
      with_constant<kBlockOutputs>(count, [&](auto j) {
        const T* gate_here = gate ? gate + first * kRows : nullptr;
        affine_block<T, j, v>(panel, panels.inputs, time, in, out + first * kRows, relu, gate_here);
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

// The gradient of a layer: of its weight [rows, columns] in blocks of kGradientRows x
// kGradientColumns, then of its bias.
template <class T>
struct LayerGradient {
  int rows, columns;

  int row_blocks() const { return round_up(rows, kGradientRows) / kGradientRows; }
  int column_blocks() const { return round_up(columns, kGradientColumns) / kGradientColumns; }
  std::size_t weight_size() const {
    return std::size_t(row_blocks()) * column_blocks() * kGradientRows * kGradientColumns;
  }
  std::size_t bias_size() const { return round_up(rows, kLanes<T>); }
  std::size_t size() const { return weight_size() + bias_size(); }
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

  void accumulate(const std::vector<Pair<T>>& pairs, int vectors, T* gradient) const {
    accumulate_weight(pairs, vectors, gradient);
    accumulate_bias(pairs, vectors, gradient + weight_size());
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

  // Tensors, a weight and a bias of each layer, and numbers in one of them.
  int parameters() const { return 2 * layers(); }
  std::int64_t parameter_size(int parameter) const {
    const int layer = parameter / 2, columns = inputs(layer) + (layer == 0 && time_dependent);
    return std::int64_t(outputs(layer)) * (parameter % 2 ? 1 : columns);
  }
};

// dy/dt = L_n(act(... act(L_1([t, y])))).
//
// A solver writes the argument of an evaluation as an input tile: a row of times, then the state
// (kInputRows rows before it).
template <class T_>
class Mlp {
 public:
  using T = T_;
  using Shape = MlpShape;
  static constexpr int kInputRows = 1;

  // `parameters`: weight [out, in] (the first layer's with the time's column first) and bias [out]
  // of each layer, contiguous. `evaluates` and `differentiates` say what the field is to be used
  // for.
  Mlp(const Shape& shape, const T* const* parameters, bool backwards, bool evaluates,
      bool differentiates)
      : shape_(shape), activation_(Activation(shape.activation)) {
    const T sign = backwards ? T(-1) : T(1);
    for (int l = 0; l < shape.layers(); ++l) {
      const int in = shape.inputs(l), out = shape.outputs(l);
      const int lead = l == 0 && shape.time_dependent ? 1 : 0;
      const T* weight = parameters[2 * l];
      const T* bias = parameters[2 * l + 1];
      const T scale = l == shape.hidden_layers ? sign : T(1);
      auto entry = [&](int j, int i) { return scale * weight[j * (in + lead) + lead + i]; };
      if (evaluates) {
        auto of_time = [&](int j) { return lead ? sign * weight[j * (in + 1)] : T(0); };
        forward_.emplace_back(in, out);
        forward_.back().fill([&](int j) { return scale * bias[j]; }, of_time, entry);
      }
      if (differentiates) {
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
      affine(forward_[l], l == 0 ? time_row(input) : nullptr, in, out, vectors,
             !last && activation_ == Activation::relu, nullptr, [&](int first, int count) {
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

  // Writes what evaluations do not: the padding.
  void prepare_record(T* record, int vectors) const {
    const int n = vectors * kLanes<T>;
    for (int l = 0; l < shape_.layers(); ++l) {
      const int columns = layer_gradient(l).columns;
      const int padding = round_up(columns, kGradientColumns) - columns;
      std::fill_n(record + (in_[l] + columns) * n, padding * n, T(0));
    }
  }

  void prepare_deltas(T* deltas, int vectors) const {
    const int n = vectors * kLanes<T>;
    for (int l = 0; l < shape_.layers(); ++l) {
      const int rows = shape_.outputs(l), padding = round_up(rows, kGradientRows) - rows;
      std::fill_n(deltas + (delta_[l] + rows) * n, padding * n, T(0));
    }
  }

  // derivative = f(the record's input tile). Fills the record.
  void evaluate_recording(T* record, T* derivative, T*, int vectors) const {
    const int n = vectors * kLanes<T>;
    for (int l = 0; l < shape_.layers(); ++l) {
      const bool last = l == shape_.hidden_layers;
      const T* in = record + (l == 0 ? kInputRows : in_[l]) * n;
      T* out = last ? derivative : record + in_[l + 1] * n;
      affine(forward_[l], l == 0 ? time_row(record) : nullptr, in, out, vectors,
             !last && activation_ == Activation::relu, nullptr, [&](int first, int count) {
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
  void vjp(const T* record, T* deltas, T* gradient, T*, int vectors) const {
    const int n = vectors * kLanes<T>;
    for (int l = shape_.hidden_layers; l >= 0; --l) {
      T* out = l == 0 ? gradient : deltas + delta_[l - 1] * n;
      const T* value = record + in_[l] * n;
      const bool gated = l > 0 && activation_ == Activation::relu;
      affine(backward_[l], nullptr, deltas + delta_[l] * n, out, vectors,
             false, gated ? value : nullptr, [&](int first, int count) {
               if (l == 0 || gated) return;
               const T* slope = record + (slope_[l - 1] + first) * n;
               times_slope(activation_, out + first * n, value + first * n, slope,
                           std::size_t(count) * n);
             });
    }
  }

  // gradient = cotangent^T df/dt of each row, from the deltas of `vjp`.
  void time_gradient(const T*, const T* deltas, T* gradient, T*, int vectors) const {
    const int n = vectors * kLanes<T>;
    if (!shape_.time_dependent) return void(std::fill_n(gradient, n, T(0)));
    affine(time_backward_, nullptr, deltas + delta_[0] * n, gradient,
           vectors, false, nullptr, [](int, int) {});
  }

  // --- gradients of the weights

  int parameters() const { return shape_.parameters(); }

  // Size of an accumulator of all weights' gradients.
  std::size_t gradient_size() const {
    std::size_t size = 0;
    for (int l = 0; l < shape_.layers(); ++l) size += layer_gradient(l).size();
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
      const LayerGradient<T> layer = layer_gradient(l);
      layer.accumulate(pairs, vectors, gradient);
      gradient += layer.size();
    }
  }

  // The largest root mean square of a parameter's part of an accumulator, nan if there is one. Only
  // parameters that are not null in `wanted` count.
  double largest_rms(const T* values, const T* const* wanted) const {
    double largest = 0;
    auto note = [&](const T* is_wanted, const T* part, std::size_t size, std::int64_t count) {
      Vec<T> squares{};  // padding is zero
      for (std::size_t e = 0; e < size; e += kLanes<T>) squares += load(part + e) * load(part + e);
      double sum = 0;
      for (int i = 0; i < kLanes<T>; ++i) sum += double(squares[i]);
      const double rms = std::sqrt(sum / double(count));
      if (is_wanted && (rms > largest || rms != rms)) largest = rms;  // nan stays
    };
    for (int l = 0; l < shape_.layers(); ++l) {
      const LayerGradient<T> layer = layer_gradient(l);
      const std::size_t weight_size = layer.weight_size();
      note(wanted[2 * l], values, weight_size, std::int64_t(layer.rows) * layer.columns);
      note(wanted[2 * l + 1], values + weight_size, layer.size() - weight_size, layer.rows);
      values += layer.size();
    }
    return largest;
  }

  // Writes an accumulator into tensors like the parameters, those excepted that are null.
  void unpack_gradient(const T* gradient, bool backwards, T* const* out) const {
    const T sign = backwards ? T(-1) : T(1);
    for (int l = 0; l < shape_.layers(); ++l) {
      const LayerGradient<T> layer = layer_gradient(l);
      const int lead = l == 0 && shape_.time_dependent ? 1 : 0;
      const T scale = l == shape_.hidden_layers ? sign : T(1);
      T* weight = out[2 * l];
      T* bias = out[2 * l + 1];
      for (int j = 0; j < layer.rows; ++j) {
        if (bias) bias[j] = scale * gradient[layer.weight_size() + j];
        for (int i = 0; weight && i < layer.columns; ++i) {
          // The time's column is the first layer's, the sign is the last layer's and the time's.
          *weight++ = (lead && i == 0 ? sign : scale) * gradient[layer.index(j, i)];
        }
      }
      gradient += layer.size();
    }
  }

 private:
  const T* time_row(const T* input) const {
    return shape_.time_dependent ? input : nullptr;
  }

  LayerGradient<T> layer_gradient(int l) const {
    return {shape_.outputs(l), shape_.inputs(l) + (l == 0 && shape_.time_dependent ? 1 : 0)};
  }

  // First rows of each layer's part of a record and of the deltas, padded to the blocks of the
  // weight gradient. Slopes are there where the activation wants them.
  void lay_out_record() {
    record_rows_ = shape_.time_dependent ? 0 : kInputRows;  // then the time is no input
    for (int l = 0; l < shape_.layers(); ++l) {
      in_.push_back(record_rows_);
      record_rows_ += round_up(layer_gradient(l).columns, kGradientColumns);
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
