// Whether a field is the user's: compares its values where a solve begins with those that the
// user's own code gave.
//
// They may differ by rounding, which depends on the field: sums may cancel, activations saturate.
// How much rounding does is measured: by the same field in the other precision. In float, that is
// what the value is off the one in double; in double, the part of it that the ratio of the
// precisions leaves. Measured at several points, as one error may be small by chance.
#pragma once

#include <cmath>
#include <vector>

#include "runge_kutta.hpp"

namespace anode {

// Factor by which two ways to round may differ in what they do, and errors in units of the largest
// value's rounding that are let pass without a measurement.
constexpr double kRoundingFactor = 16, kMostUnits = 32;

// dy/dt in the user's time for `rows` rows of a state in contiguous memory, [rows, dim].
template <class Field>
std::vector<typename Field::T> values_of(const Field& field, const typename Field::T* states,
                                         std::int64_t rows, double time, bool backwards) {
  using T = typename Field::T;
  const int dim = field.dim();
  std::vector<T> values(std::size_t(rows) * dim);
  const std::size_t of_input = Field::kInputRows + dim;
  const Buffer<T> memory((of_input + dim + field.scratch_rows()) * kTileRows<T>);
  T *input = memory.get(), *derivative = input + of_input * kTileRows<T>;
  T* scratch = derivative + dim * kTileRows<T>;
  const Tiles<T> tiles{rows};
  for (std::int64_t i = 0; i < tiles.count(); ++i) {
    const Tile tile = tiles[i];
    std::fill_n(input, tile.lanes, T(time));
    read_rows(states, dim, dim, tile, input + Field::kInputRows * tile.lanes, dim);
    field.evaluate(input, derivative, scratch, tile.vectors);
    write_rows(derivative, tile, values.data(), dim);
  }
  if (backwards) {
    for (T& value : values) value = -value;
  }
  return values;
}

template <template <class> class Field, class T>
class FirstStage {
 public:
  using Other = std::conditional_t<std::is_same_v<T, float>, double, float>;
  using Shape = typename Field<T>::Shape;

  // `field` is of `shape` and `parameters`; the state is that of the call's first `rows` rows.
  FirstStage(const Field<T>& field, const Shape& shape, const T* const* parameters,
             const Options& options, const Call<T>& call, std::int64_t rows)
      : field_(field),
        shape_(shape),
        parameters_(parameters),
        backwards_(options.backwards),
        rows_(rows),
        time_(call.times[0]),
        states_(std::size_t(rows) * field.dim()) {
    for (std::int64_t r = 0; r < rows; ++r) {
      std::copy_n(call.x + r * call.x_stride, options.data_dim, &states_[r * field.dim()]);
    }
  }

  // Whether the field has these values, [rows, dim]. If not, says in `result` where it has others.
  bool has(const T* expected, Result& result) const {
    const std::vector<T> got = values_of(field_, states_.data(), rows_, time_, backwards_);
    double size = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (std::isfinite(expected[i])) size = std::max(size, std::abs(double(expected[i])));
    }
    const double units = kMostUnits * double(std::numeric_limits<T>::epsilon()) * size;
    if (!compare(got, expected, units, result)) return true;
    if (!compare(got, expected, units + kRoundingFactor * rounding(size), result)) return true;
    result.status = kFieldDiffers;
    return false;
  }

 private:
  static constexpr int kPoints = 4;

  // Number of rows with a difference above `most`.
  std::int64_t compare(const std::vector<T>& got, const T* expected, double most,
                       Result& result) const {
    result = {};
    for (std::int64_t r = 0; r < rows_; ++r) {
      bool differs = false;
      for (int i = 0; i < field_.dim(); ++i) {
        const double a = got[r * field_.dim() + i], b = expected[r * field_.dim() + i];
        if (a == b || (a != a && b != b)) continue;
        const double distance = std::abs(a - b);
        if (distance <= most) continue;
        differs = true;
        result.deviation = std::max(result.deviation, distance == distance ? distance : kInfinity);
      }
      if (differs && !result.rows++) result.row = r;
    }
    return result.rows;
  }

  // How much rounding does to the field's values, in T.
  double rounding(double size) const {
    std::vector<std::vector<Other>> copies(field_.parameters());
    std::vector<const Other*> parameters;
    for (int p = 0; p < field_.parameters(); ++p) {
      copies[p].assign(parameters_[p], parameters_[p] + shape_.parameter_size(p));
      parameters.push_back(copies[p].data());
    }
    const Field<Other> other(shape_, parameters.data(), backwards_, true, false);
    std::uint64_t random = 1;
    auto nudged = [&](double x) {  // to what both precisions have
      random = random * 6364136223846793005u + 1442695040888963407u;
      return double(float(x + (std::abs(x) + 1) * double(random >> 40) * 0x1p-36));
    };
    double most = 0;
    bool overflows = false;
    for (int point = 0; point < kPoints; ++point) {
      std::vector<T> states;
      for (T x : states_) states.push_back(T(point ? nudged(x) : double(float(x))));
      const double time = point ? nudged(time_) : double(float(time_));
      const std::vector<Other> others(states.begin(), states.end());
      const auto a = values_of(field_, states.data(), rows_, time, backwards_);
      const auto b = values_of(other, others.data(), rows_, time, backwards_);
      for (std::size_t i = 0; i < a.size(); ++i) {
        overflows |= std::isfinite(a[i]) != std::isfinite(b[i]);
        const double distance = std::abs(double(a[i]) - double(b[i]));
        if (std::isfinite(distance)) most = std::max(most, distance);
      }
    }
    constexpr double kFloat = double(std::numeric_limits<float>::epsilon());
    most *= double(std::numeric_limits<T>::epsilon()) / kFloat;
    return overflows ? std::max(most, kFloat * size) : most;  // not measured where float overflows
  }

  const Field<T>& field_;
  const Shape& shape_;
  const T* const* parameters_;
  const bool backwards_;
  const std::int64_t rows_;
  const double time_;
  std::vector<T> states_;
};

}  // namespace anode
