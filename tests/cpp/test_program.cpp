// Programs against what torch made of them (programs.py), and solves by them.
//
// Memory that the field is given is exactly as large as it may touch, and nan where it has to write.
#include <cmath>
#include <limits>
#include <vector>

#include "check.hpp"
#include "continuous.hpp"
#include "first_stage.hpp"
#include "program.hpp"

namespace {

using namespace anode;
using Doubles = std::vector<double>;

template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

// A program, arguments, and its value and gradients there. Only the first rows have a cotangent
// that is not zero.
struct Example {
  const char* name;
  ProgramShape shape;
  Doubles y, cotangent, value, y_grad, t_grad;
  std::vector<Doubles> parameters, gradients;
};

#include "programs.inc"

template <class T>
std::vector<T> cast(const Doubles& values) {
  return std::vector<T>(values.begin(), values.end());
}

template <class T>
struct Parameters {
  std::vector<std::vector<T>> values;
  std::vector<const T*> pointers;

  explicit Parameters(const Example& example) {
    for (const Doubles& parameter : example.parameters) values.push_back(cast<T>(parameter));
    for (const auto& parameter : values) pointers.push_back(parameter.data());
  }
};

template <class T>
bool close(double got, double want, double scale) {
  const double most = 2000 * double(std::numeric_limits<T>::epsilon());
  return std::abs(got - want) <= most * (1 + scale);
}

// Whether a tile has the first rows of [rows, dim] times `sign`.
template <class T>
bool has_rows(const std::vector<T>& tile, const Doubles& rows, int dim, int n, double sign) {
  bool good = true;
  for (int r = 0; r < n; ++r) {
    for (int i = 0; i < dim; ++i) {
      const double want = sign * rows[r * dim + i];
      good &= close<T>(tile[i * n + r], want, std::abs(want));
    }
  }
  return good;
}

template <class T>
void test_example(const Example& example, int vectors, bool backwards) {
  const int dim = example.shape.dim, n = vectors * kLanes<T>;
  const double sign = backwards ? -1 : 1;
  const Parameters<T> parameters(example);
  const ProgramField<T> field(example.shape, parameters.pointers.data(), backwards, true, true);
  auto memory = [&](std::size_t rows) { return std::vector<T>(rows * n, kNan<T>); };
  auto to_tile = [&](const Doubles& rows, T* to) {
    for (int r = 0; r < n; ++r) {
      for (int i = 0; i < dim; ++i) to[i * n + r] = T(rows[r * dim + i]);
    }
  };
  auto put_input = [&](T* to) {
    std::fill_n(to, n, T(sign * kTime));
    to_tile(example.y, to + n);
  };
  std::vector<T> input = memory(1 + dim), derivative = memory(dim);
  std::vector<T> scratch = memory(field.scratch_rows());
  put_input(input.data());
  field.evaluate(input.data(), derivative.data(), scratch.data(), vectors);
  CHECK(has_rows(derivative, example.value, dim, n, sign));

  std::vector<T> record = memory(field.record_rows()), deltas = memory(field.delta_rows());
  std::vector<T> recorded = memory(dim), y_grad = memory(dim), t_grad = memory(1);
  field.prepare_record(record.data(), vectors);
  field.prepare_deltas(deltas.data(), vectors);
  put_input(record.data());
  field.evaluate_recording(record.data(), recorded.data(), scratch.data(), vectors);
  CHECK(recorded == derivative);
  to_tile(example.cotangent, field.cotangent(deltas.data()));
  std::fill(scratch.begin(), scratch.end(), kNan<T>);
  field.vjp(record.data(), deltas.data(), y_grad.data(), scratch.data(), vectors);
  CHECK(has_rows(y_grad, example.y_grad, dim, n, sign));
  std::fill(scratch.begin(), scratch.end(), kNan<T>);
  field.time_gradient(record.data(), deltas.data(), t_grad.data(), scratch.data(), vectors);
  CHECK(has_rows(t_grad, example.t_grad, 1, n, 1));

  // Twice, as two stages of a step.
  std::vector<T> sums(field.gradient_size(), T(0));
  const std::vector<Pair<T>> pairs(2, {deltas.data(), record.data()});
  field.accumulate_gradient(pairs, vectors, sums.data());
  std::vector<std::vector<T>> gradients;
  std::vector<T*> pointers;
  for (const Doubles& gradient : example.gradients) gradients.emplace_back(gradient.size(), kNan<T>);
  for (auto& gradient : gradients) pointers.push_back(gradient.data());
  field.unpack_gradient(sums.data(), pointers.data());
  double largest = 0;
  for (std::size_t p = 0; p < gradients.size(); ++p) {
    double scale = 0, squares = 0;
    for (double want : example.gradients[p]) scale = std::max(scale, 2 * std::abs(want));
    for (std::size_t i = 0; i < gradients[p].size(); ++i) {
      CHECK(close<T>(gradients[p][i], sign * 2 * example.gradients[p][i], scale));
      squares += std::pow(double(gradients[p][i]), 2);
    }
    largest = std::max(largest, std::sqrt(squares / double(gradients[p].size())));
  }
  const double rms = field.largest_rms(sums.data(), parameters.pointers.data());
  CHECK(close<T>(rms, largest, largest));
}

// --- solves ---------------------------------------------------------------------------------------

Tableau euler() {
  Tableau tableau{};
  tableau.stages = tableau.order = 1;
  tableau.b[0] = 1;
  tableau.interpolant[0][0] = 1;
  return tableau;
}

template <class T>
void test_solve(const Example& example, bool backwards) {
  const std::int64_t rows = 21;
  const int dim = example.shape.dim;
  const double sign = backwards ? -1 : 1, step = 0x1p-12;
  const Parameters<T> parameters(example);
  const ProgramField<T> field(example.shape, parameters.pointers.data(), backwards, true, true);
  const Tableau tableau = euler();
  Options options{};
  options.backwards = backwards;
  options.data_dim = dim;
  const Doubles times{sign * kTime, sign * kTime + step, sign * kTime + 2 * step};
  std::vector<T> state = cast<T>(example.y), expected = cast<T>(example.value);
  state.resize(rows * dim);
  state.shrink_to_fit();
  std::vector<T> out(3 * rows * dim, kNan<T>), grad(out.size(), T(0.5)), x_grad(rows * dim);
  const Call<T> call{rows, state.data(), dim, times.data(), 3, times.data(), 3, out.data()};

  const FirstStage<ProgramField, T> first(field, example.shape, parameters.pointers.data(), options,
                                          call, rows);
  Result result{};
  CHECK(first.has(expected.data(), result));
  expected[dim] += T(0.1) * (1 + std::abs(expected[dim]));
  CHECK(!first.has(expected.data(), result));
  CHECK(result.status == kFieldDiffers && result.row == 1 && result.rows == 1);

  Trace<T> trace;
  CHECK(Solver<ProgramField<T>>(field, tableau, options, call, &trace).solve().status == kSuccess);
  for (std::size_t i = 0; i < state.size(); ++i) {
    const double want = example.y[i] + sign * step * example.value[i];
    CHECK(close<T>(out[rows * dim + i], want, std::abs(want)));
  }
  std::vector<std::vector<T>> gradients, others;
  std::vector<T*> pointers, other_pointers;
  for (const Doubles& gradient : example.gradients) gradients.emplace_back(gradient.size(), kNan<T>);
  others = gradients;
  for (auto& gradient : gradients) pointers.push_back(gradient.data());
  for (auto& gradient : others) other_pointers.push_back(gradient.data());
  DiscreteGradient<ProgramField<T>>(field, tableau, options, trace)
      .run(grad.data(), x_grad.data(), pointers.data());
  const Doubles grid{-times[2], -times[1], -times[0]};
  const AdjointCall<T> adjoint{rows,       times.data(), 3,     grid.data(),   3,
                               out.data(), grad.data(),  false, x_grad.data(), other_pointers.data()};
  CHECK(ContinuousGradient<ProgramField<T>>(field, tableau, options, adjoint).run().status ==
        kSuccess);
  for (std::size_t p = 0; p < gradients.size(); ++p) {
    double scale = 0;
    for (T value : gradients[p]) scale = std::max(scale, std::abs(double(value)));
    for (std::size_t i = 0; i < gradients[p].size(); ++i) {
      // They differ by a part like the step.
      CHECK(std::abs(double(gradients[p][i]) - double(others[p][i])) <= 0.3 * scale + 1e-6);
    }
  }
}

}  // namespace

int main() {
  for (const Example* example : kExamples) {
    for (bool backwards : {false, true}) {
      for (int vectors = 1; vectors <= kTileVectors; ++vectors) {
        test_example<float>(*example, vectors, backwards);
        test_example<double>(*example, vectors, backwards);
      }
      test_solve<float>(*example, backwards);
      test_solve<double>(*example, backwards);
    }
    if (failed) std::fprintf(stderr, "up to here: %s\n", example->name);
  }
  return failed;
}
