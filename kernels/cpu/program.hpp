// A field given as a program: data, that is executed operation by operation for tiles of rows.
//
// lowering.py makes the data: it says what is computed in one loop, and where every value lies. A
// tile is as affine.hpp has it: feature-major, a lane is a row. Every operation works on a block of
// features of the tile, so that choosing what to do costs little beside doing it.
#pragma once

#include <cmath>
#include <vector>

#include "affine.hpp"
#include "elementwise.hpp"

namespace anode {

// --- the program, as lowering.py has it -----------------------------------------------------------

// Where values lie: in the record, whose beginning is the input tile; in the result; in the deltas;
// in scratch memory; in blocks of scratch memory, which are used again for the next features; among
// numbers that are the same in all rows.
enum class Space : std::int32_t { record, out, deltas, scratch, local, lanes };

struct Place {
  Space space;
  std::int32_t offset;  // rows; for Space::lanes vectors
  std::int32_t moves;   // whether each feature has its own, or all the same
};

struct Operation {
  Op op;
  std::int32_t num_inputs, num_outputs;
  Place inputs[3];
  Place outputs[2];  // a second one: the slope that goes with the value
  double number;
};

// A loop over `width` features in blocks: an affine map, and relu of it or zeros where the gate is
// not positive, or none if `panel` is negative; then operations.
struct Group {
  std::int32_t width, panel, relu, gated;
  Place source, target, gate;
  std::int32_t first_operation, end_operation;
};

// Weights of an affine map: of output j and input i at offset + j * output_stride + i *
// input_stride of the parameter `weight`.
struct PanelShape {
  std::int32_t weight, bias;  // numbers of parameters; no bias: -1
  std::int32_t outputs, inputs;
  std::int32_t offset, output_stride, input_stride, bias_offset;
};

// `count` numbers of a parameter, or, if that is negative, one number.
struct ConstantShape {
  std::int32_t parameter, count;
  double number;
};

// A part of a parameter's gradient: the sum over rows of left, or of left times right.
struct SumShape {
  std::int32_t parameter, is_matrix;
  Place left, right;
};

struct TensorShape {
  std::int32_t rows, columns;  // columns is 0 for vectors
};

struct Zeros {
  std::int32_t first, rows;
};

struct ProgramShape {
  static constexpr int kBlock = 16;   // features of a block in Space::local
  static constexpr int kPadding = 4;  // of factors of weight gradients

  std::int32_t dim;
  std::int32_t forward_panels;  // those that evaluations take, the others are the product's
  std::int32_t record_rows, delta_rows, scratch_rows, local_rows;
  std::int32_t end_group[4];  // of an evaluation, one with a record, the product, the time's part
  std::int32_t num_constants, num_panels, num_sums, num_tensors, num_record_zeros, num_delta_zeros;
  const Group* groups;
  const Operation* operations;
  const ConstantShape* constants;
  const PanelShape* panels;
  const SumShape* sums;
  const TensorShape* tensors;
  const Zeros* record_zeros;
  const Zeros* delta_zeros;

  int parameters() const { return num_tensors; }
  std::int64_t parameter_size(int parameter) const {
    const TensorShape& tensor = tensors[parameter];
    return std::int64_t(tensor.rows) * std::max(tensor.columns, 1);
  }
};

static_assert(ProgramShape::kBlock >= kBlockOutputs);
static_assert(ProgramShape::kPadding % kGradientRows == 0);
static_assert(ProgramShape::kPadding % kGradientColumns == 0);

// --- the field ------------------------------------------------------------------------------------

// A solver writes the argument of an evaluation as an input tile: a row of times, then the state.
template <class T_>
class ProgramField {
 public:
  using T = T_;
  using Shape = ProgramShape;
  static constexpr int kInputRows = 1;

  // `evaluates` and `differentiates` say what the field is to be used for.
  ProgramField(const Shape& shape, const T* const* parameters, bool backwards, bool evaluates,
               bool differentiates)
      : shape_(shape), backwards_(backwards), panels_(shape.num_panels) {
    for (int p = 0; p < shape.num_panels; ++p) {
      const PanelShape& panel = shape.panels[p];
      if (p < shape.forward_panels ? !evaluates : !differentiates) continue;
      const T* weight = parameters[panel.weight] + panel.offset;
      const T* bias = panel.bias < 0 ? nullptr : parameters[panel.bias] + panel.bias_offset;
      panels_[p] = Panels<T>(panel.inputs, panel.outputs);
      panels_[p].fill([=](int j) { return bias ? bias[j] : T(0); },
                      [&](int j, int i) {
                        return weight[std::ptrdiff_t(j) * panel.output_stride +
                                      std::ptrdiff_t(i) * panel.input_stride];
                      });
    }
    std::size_t count = 0;
    for (int i = 0; i < shape.num_constants; ++i) count += shape.constants[i].count;
    lanes_ = Buffer<T>(count * kLanes<T>);
    T* to = lanes_.get();
    for (int i = 0; i < shape.num_constants; ++i) {
      const ConstantShape& constant = shape.constants[i];
      for (int j = 0; j < constant.count; ++j, to += kLanes<T>) {
        const int p = constant.parameter;
        std::fill_n(to, kLanes<T>, p < 0 ? T(constant.number) : parameters[p][j]);
      }
    }
    has_sum_.resize(shape.num_tensors);
    for (int i = 0; i < shape.num_sums; ++i) has_sum_[shape.sums[i].parameter] = true;
  }

  int dim() const { return shape_.dim; }

  // --- evaluation

  // Of all functions below that take scratch memory.
  std::size_t scratch_rows() const {
    return std::size_t(shape_.scratch_rows) + shape_.local_rows;
  }

  // derivative = f(input); all tiles of `vectors` vectors of rows. The input's times become the
  // user's.
  void evaluate(T* input, T* derivative, T* scratch, int vectors) const {
    run_forwards(0, input, derivative, scratch, vectors);
  }

  // --- evaluation for the gradient
  //
  // A record holds what one evaluation leaves for its vector-Jacobian product; its first rows are
  // the evaluation's input tile. The product leaves deltas; records and deltas together make the
  // gradient of the parameters.

  std::size_t record_rows() const { return std::size_t(shape_.record_rows); }
  std::size_t delta_rows() const { return std::size_t(shape_.delta_rows); }

  // Writes what evaluations do not: the zeros behind factors of weight gradients.
  void prepare_record(T* record, int vectors) const {
    write_zeros(shape_.record_zeros, shape_.num_record_zeros, record, vectors);
  }

  void prepare_deltas(T* deltas, int vectors) const {
    write_zeros(shape_.delta_zeros, shape_.num_delta_zeros, deltas, vectors);
  }

  // derivative = f(the record's input tile), whose times become the user's. Fills the record.
  void evaluate_recording(T* record, T* derivative, T* scratch, int vectors) const {
    run_forwards(1, record, derivative, scratch, vectors);
  }

  // Where the cotangent of the derivative goes, [dim]. `vjp` makes it that of the user's field.
  T* cotangent(T* deltas) const { return deltas; }

  // gradient = cotangent^T df/dy, [dim]. Fills the deltas.
  void vjp(const T* record, T* deltas, T* gradient, T* scratch, int vectors) const {
    if (backwards_) negate(deltas, shape_.dim, vectors);
    run(2, record, gradient, deltas, scratch, vectors);
  }

  // gradient = cotangent^T df/dt of each row, from what `vjp` took and left.
  void time_gradient(const T* record, const T* deltas, T* gradient, T* scratch,
                     int vectors) const {
    run(3, record, gradient, deltas, scratch, vectors);
    if (backwards_) negate(gradient, 1, vectors);
  }

  // --- gradients of the parameters

  int parameters() const { return shape_.parameters(); }

  // Size of an accumulator of all parameters' gradients.
  std::size_t gradient_size() const {
    std::size_t size = 0;
    for (int p = 0; p < shape_.num_tensors; ++p) size += tensor_gradient_size(p);
    return size;
  }

  // Adds the parameters' gradients of `evaluations`, deltas and records.
  void accumulate_gradient(const std::vector<Pair<T>>& evaluations, int vectors,
                           T* gradient) const {
    const int n = vectors * kLanes<T>;
    std::vector<Pair<T>> pairs(evaluations.size());
    for (int i = 0; i < shape_.num_sums; ++i) {
      const SumShape& sum = shape_.sums[i];
      auto find = [&](const Place& place, const Pair<T>& evaluation) {
        const T* base = place.space == Space::record ? evaluation.in : evaluation.delta;
        return base + place.offset * n;
      };
      for (std::size_t e = 0; e < pairs.size(); ++e) {
        pairs[e].delta = find(sum.left, evaluations[e]);
        pairs[e].in = sum.is_matrix ? find(sum.right, evaluations[e]) : nullptr;
      }
      T* to = gradient;
      for (int p = 0; p < sum.parameter; ++p) to += tensor_gradient_size(p);
      const LayerGradient<T> of_tensor = tensor_gradient(sum.parameter);
      if (sum.is_matrix) {
        of_tensor.accumulate_weight(pairs, vectors, to);
      } else {
        of_tensor.accumulate_bias(pairs, vectors, to);
      }
    }
  }

  // The largest root mean square of a parameter's part of an accumulator, nan if there is one. Only
  // parameters that are not null in `wanted` count.
  double largest_rms(const T* values, const T* const* wanted) const {
    double largest = 0;
    for (int p = 0; p < shape_.num_tensors; ++p) {
      const std::size_t size = tensor_gradient_size(p);
      Vec<T> squares{};  // padding is zero
      for (std::size_t e = 0; e < size; e += kLanes<T>) {
        squares += load(values + e) * load(values + e);
      }
      values += size;
      double sum = 0;
      for (int i = 0; i < kLanes<T>; ++i) sum += double(squares[i]);
      const TensorShape& tensor = shape_.tensors[p];
      const double count = double(tensor.rows) * std::max(tensor.columns, 1);
      const double rms = std::sqrt(sum / count);
      if (wanted[p] && (rms > largest || rms != rms)) largest = rms;  // nan stays
    }
    return largest;
  }

  // Writes an accumulator into tensors like the parameters, those excepted that are null.
  void unpack_gradient(const T* gradient, T* const* out) const {
    for (int p = 0; p < shape_.num_tensors; ++p) {
      const TensorShape& tensor = shape_.tensors[p];
      const LayerGradient<T> from = tensor_gradient(p);
      const bool is_matrix = tensor.columns > 0;
      for (int j = 0; out[p] && j < tensor.rows; ++j) {
        if (!is_matrix) out[p][j] = has_sum_[p] ? gradient[j] : T(0);
        for (int i = 0; i < tensor.columns; ++i) {
          out[p][std::ptrdiff_t(j) * tensor.columns + i] =
              has_sum_[p] ? gradient[from.index(j, i)] : T(0);
        }
      }
      gradient += tensor_gradient_size(p);
    }
  }

 private:
  static void negate(T* rows, int count, int vectors) {
    for (int e = 0; e < count * vectors * kLanes<T>; e += kLanes<T>) {
      store(rows + e, -load(rows + e));
    }
  }

  static void write_zeros(const Zeros* zeros, int count, T* to, int vectors) {
    const int n = vectors * kLanes<T>;
    for (int i = 0; i < count; ++i) {
      std::fill_n(to + zeros[i].first * n, zeros[i].rows * n, T(0));
    }
  }

  LayerGradient<T> tensor_gradient(int p) const {
    return {shape_.tensors[p].rows, shape_.tensors[p].columns};
  }

  std::size_t tensor_gradient_size(int p) const {
    if (!has_sum_[p]) return 0;
    const LayerGradient<T> gradient = tensor_gradient(p);
    return gradient.columns > 0 ? gradient.weight_size() : gradient.bias_size();
  }

  // --- running a schedule

  void run_forwards(int schedule, T* input, T* derivative, T* scratch, int vectors) const {
    if (backwards_) negate(input, 1, vectors);
    run(schedule, input, derivative, nullptr, scratch, vectors);
    if (backwards_) negate(derivative, shape_.dim, vectors);
  }

  // Of each space where it is, numbers between its rows or vectors, those between vectors of rows,
  // and whether it goes on from one block to the next.
  struct Memory {
    struct {
      T* at;
      std::ptrdiff_t row, vector;
      std::int32_t goes_on;
    } of[6];
    int vectors;

    // A place from the feature `first` of a block on.
    T* at(const Place& place, int first) const {
      const auto& space = of[int(place.space)];
      return space.at + (place.offset + (place.moves & space.goes_on) * first) * space.row;
    }

    View<T> view(const Place& place, int first) const {
      const auto& space = of[int(place.space)];
      return {at(place, first), place.moves * space.row, space.vector};
    }
  };

  // Schedules write the record in an evaluation only, the deltas in the product only.
  void run(int schedule, const T* record, T* out, const T* deltas, T* scratch, int vectors) const {
    constexpr int kWidth = kLanes<T>;
    const std::ptrdiff_t n = vectors * kWidth;
    const Memory memory{{{const_cast<T*>(record), n, kWidth, 1},
                         {out, n, kWidth, 1},
                         {const_cast<T*>(deltas), n, kWidth, 1},
                         {scratch, n, kWidth, 1},
                         {scratch + shape_.scratch_rows * n, n, kWidth, 0},
                         {lanes_.get(), kWidth, 0, 1}},
                        vectors};
    const int begin = schedule == 0 ? 0 : shape_.end_group[schedule - 1];
    for (int g = begin; g < shape_.end_group[schedule]; ++g) {
      const Group& group = shape_.groups[g];
      if (group.panel >= 0) {
        run_affine(group, memory);
      } else {
        for (int first = 0; first < group.width; first += ProgramShape::kBlock) {
          run_operations(group, memory, first, std::min(group.width - first, ProgramShape::kBlock));
        }
      }
    }
  }

  void run_affine(const Group& group, const Memory& memory) const {
    const Panels<T>& panels = panels_[group.panel];
    const T* in = memory.at(group.source, 0);
    with_constant<kTileVectors>(memory.vectors, [&](auto v) {
      constexpr int kRows = v * kLanes<T>;
      int first = 0;  // feature on which the operations have yet to work
      for (int b = 0; b < panels.blocks; ++b) {
        const int begin = panels.begin(b), end = panels.begin(b + 1);
        const T* gate = group.gated ? memory.at(group.gate, begin) : nullptr;
        T* out = memory.at(group.target, first) + (begin - first) * kRows;
        with_constant<kBlockOutputs>(end - begin, [&](auto j) {
          affine_block<T, j, v>(panels.block(b), panels.inputs, in, out, group.relu, gate);
        });
        // As many at a time as there is room for.
        if (b + 1 < panels.blocks && panels.begin(b + 2) - first <= ProgramShape::kBlock) continue;
        run_operations(group, memory, first, end - first);
        first = end;
      }
    });
  }

  void run_operations(const Group& group, const Memory& memory, int first, int features) const {
    for (int s = group.first_operation; s < group.end_operation; ++s) {
      const Operation& operation = shape_.operations[s];
      View<T> in[3], out[2];
      for (int i = 0; i < operation.num_inputs; ++i) {
        in[i] = memory.view(operation.inputs[i], first);
      }
      for (int i = 0; i < operation.num_outputs; ++i) {
        out[i] = memory.view(operation.outputs[i], first);
      }
      if (operation.op == Op::total) {
        add_features(in[0], out[0].at, features, memory.vectors, first == 0);
      } else {
        apply<T>(operation.op, in, out, operation.num_outputs > 1, features, memory.vectors, T(operation.number));
      }
    }
  }

  static void add_features(const View<T>& in, T* out, int features, int vectors, bool is_first) {
    for (int v = 0; v < vectors; ++v) {
      Vec<T> sum = is_first ? Vec<T>{} : load(out + v * kLanes<T>);
      for (int i = 0; i < features; ++i) sum += load(in.at + i * in.feature + v * in.vector);
      store(out + v * kLanes<T>, sum);
    }
  }

  const Shape& shape_;
  const bool backwards_;
  std::vector<Panels<T>> panels_;
  Buffer<T> lanes_;
  std::vector<char> has_sum_;
};

}  // namespace anode
