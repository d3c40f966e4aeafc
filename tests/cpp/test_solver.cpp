// Perceptrons, solves by them and their gradients against scalar code and central differences.
//
// Memory that the kernels are given is exactly as large as they may touch, and nan where they have
// to write.
#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "check.hpp"
#include "continuous.hpp"
#include "program.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

using namespace anode;
using Doubles = std::vector<double>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Random {
  std::uint64_t state;

  double operator()() {  // from -1 to 1
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(state >> 11) / double(std::uint64_t(1) << 52) - 1;
  }
  Doubles operator()(std::size_t count) {
    Doubles values(count);
    for (double& value : values) value = (*this)();
    return values;
  }
  int below(int limit) { return int((*this)() * limit + limit) / 2; }
};

template <class T>
std::vector<T> cast(const Doubles& values) {
  return std::vector<T>(values.begin(), values.end());
}

// Whether they differ by no more than `tolerance`, relative for large numbers. Says where they do.
template <class T>
bool close(const std::vector<T>& got, const Doubles& want, double tolerance) {
  if (got.size() != want.size()) return false;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::abs(double(got[i]) - want[i]) <= tolerance * (1 + std::abs(want[i]))) continue;
    std::fprintf(stderr, "number %zu is %.17g, want %.17g\n", i, double(got[i]), want[i]);
    return false;
  }
  return true;
}

template <class T>
constexpr double kRounding = 500 * double(std::numeric_limits<T>::epsilon());

// --- perceptrons by scalars -----------------------------------------------------------------------

constexpr int kMostLayers = 4;  // hidden ones

// Its parameters are weight and bias of each layer; the first weight has the time's column first.
struct Perceptron {
  int dim, hidden_layers, hidden[kMostLayers], activation, time_dependent;
  ProgramShape program;

  int layers() const { return hidden_layers + 1; }
  int inputs(int layer) const { return layer == 0 ? dim : hidden[layer - 1]; }
  int outputs(int layer) const { return layer == hidden_layers ? dim : hidden[layer]; }
};

#include "perceptrons.inc"

double activated(Activation activation, double z, bool slope) {
  const double sigmoid = 1 / (1 + std::exp(-z)), tanh = std::tanh(z);
  const double normal = std::erfc(-z / std::sqrt(2)) / 2;  // distribution function
  const double density = std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0));
  switch (activation) {
    case Activation::relu: return slope ? z > 0 : std::max(z, 0.0);
    case Activation::softplus: return slope ? sigmoid : std::log1p(std::exp(z));
    case Activation::tanh: return slope ? 1 - tanh * tanh : tanh;
    case Activation::sigmoid: return slope ? sigmoid * (1 - sigmoid) : sigmoid;
    case Activation::silu: return slope ? sigmoid * (1 + z * (1 - sigmoid)) : z * sigmoid;
    case Activation::gelu: return slope ? normal + z * density : z * normal;
    case Activation::elu: return slope ? std::exp(std::min(z, 0.0)) : z > 0 ? z : std::expm1(z);
    case Activation::identity: return slope ? 1 : z;
  }
  return kNan;
}

constexpr int kActivations = 8;
static_assert(std::extent_v<decltype(kPerceptrons), 0> == kActivations);
static_assert(std::extent_v<decltype(kPerceptrons), 1> == kMostLayers);
static_assert(std::extent_v<decltype(kPerceptrons), 2> >= kTileVectors);

struct Net {
  Perceptron shape;
  bool backwards;
  std::vector<Doubles> parameters;

  Net(const Perceptron& shape, bool backwards, Random random)
      : shape(shape), backwards(backwards) {
    for (int l = 0; l < shape.layers(); ++l) {
      parameters.push_back(random(std::size_t(columns(l)) * shape.outputs(l)));
      for (double& weight : parameters.back()) weight *= 2 / std::sqrt(double(columns(l)));
      parameters.push_back(random(shape.outputs(l)));
    }
  }

  int columns(int l) const { return shape.inputs(l) + (l == 0 && shape.time_dependent); }
  Activation activation(int l) const {
    return l == shape.hidden_layers ? Activation::identity : Activation(shape.activation);
  }

  // The derivative in solver time. `inputs` and `sums` of the layers are added to what they hold.
  Doubles value(double t, const Doubles& y, std::vector<Doubles>* inputs = nullptr,
                std::vector<Doubles>* sums = nullptr) const {
    Doubles x = y;
    if (shape.time_dependent) x.insert(x.begin(), backwards ? -t : t);
    for (int l = 0; l < shape.layers(); ++l) {
      Doubles z = parameters[2 * l + 1];
      for (std::size_t j = 0; j < z.size(); ++j) {
        const double* weight = &parameters[2 * l][j * x.size()];
        for (std::size_t i = 0; i < x.size(); ++i) z[j] += weight[i] * x[i];
      }
      if (inputs) inputs->push_back(x);
      if (sums) sums->push_back(z);
      for (double& element : z) element = activated(activation(l), element, false);
      x = z;
    }
    for (double& element : x) element *= backwards ? -1 : 1;
    return x;
  }

  // The gradient of cotangent . value with respect to t and y, in this order. Adds that with
  // respect to the parameters to `grads`.
  Doubles gradient(double t, const Doubles& y, Doubles cotangent,
                   std::vector<Doubles>& grads) const {
    std::vector<Doubles> inputs, sums;
    value(t, y, &inputs, &sums);
    for (double& element : cotangent) element *= backwards ? -1 : 1;
    for (int l = shape.hidden_layers; l >= 0; --l) {
      const Doubles& x = inputs[l];
      Doubles of_x(x.size());
      for (std::size_t j = 0; j < cotangent.size(); ++j) {
        const double delta = cotangent[j] * activated(activation(l), sums[l][j], true);
        grads[2 * l + 1][j] += delta;
        for (std::size_t i = 0; i < x.size(); ++i) {
          grads[2 * l][j * x.size() + i] += delta * x[i];
          of_x[i] += delta * parameters[2 * l][j * x.size() + i];
        }
      }
      cotangent = of_x;
    }
    if (!shape.time_dependent) cotangent.insert(cotangent.begin(), 0.0);
    cotangent[0] *= backwards ? -1 : 1;
    return cotangent;
  }

  std::vector<Doubles> zeros() const {
    std::vector<Doubles> grads;
    for (const Doubles& p : parameters) grads.emplace_back(p.size());
    return grads;
  }
};

// Tensors like a net's parameters, and what the kernels take for them.
template <class T>
struct Tensors {
  std::vector<std::vector<T>> values;
  std::vector<T*> pointers;

  explicit Tensors(const std::vector<Doubles>& from) {
    for (const Doubles& tensor : from) values.push_back(cast<T>(tensor));
    for (std::vector<T>& tensor : values) pointers.push_back(tensor.data());
  }
};

// It lives no longer than the net.
template <class T>
ProgramField<T> make_field(const Net& net, bool evaluates, bool differentiates) {
  const Tensors<T> parameters(net.parameters);
  return {net.shape.program, parameters.pointers.data(), net.backwards, evaluates, differentiates};
}

// --- one evaluation ------------------------------------------------------------------------------

// All that a field does to a tile whose last lanes do not count.
template <class T>
void test_field(const Net& net, int vectors, int rows, Random random) {
  const ProgramField<T> field = make_field<T>(net, true, true);
  const int dim = net.shape.dim, n = vectors * kLanes<T>, lead = ProgramField<T>::kInputRows;
  const std::vector<T> input = cast<T>(random(std::size_t(lead + dim) * n));
  std::vector<T> cotangent = cast<T>(random(std::size_t(dim) * n));
  for (int i = 0; i < dim; ++i) std::fill_n(cotangent.begin() + i * n + rows, n - rows, T(0));

  // By scalars, a row at a time; and along a direction by central differences.
  Doubles values(dim * n), y_grads(dim * n), time_grads(n);
  std::vector<Doubles> grads = net.zeros();
  const double step = 1e-5;
  Net nets[2] = {net, net};
  double slope = 0, difference = 0;
  std::vector<Doubles> directions;
  for (std::size_t p = 0; p < grads.size(); ++p) {
    directions.push_back(random(grads[p].size()));
    for (std::size_t i = 0; i < grads[p].size(); ++i) {
      nets[0].parameters[p][i] -= step * directions[p][i];
      nets[1].parameters[p][i] += step * directions[p][i];
    }
  }
  for (int r = 0; r < n; ++r) {
    const double t = input[(lead - 1) * n + r];
    Doubles y(dim), c(dim);
    for (int i = 0; i < dim; ++i) y[i] = input[(lead + i) * n + r], c[i] = cotangent[i * n + r];
    const Doubles value = net.value(t, y), gradient = net.gradient(t, y, c, grads);
    time_grads[r] = gradient[0];
    for (int i = 0; i < dim; ++i) {
      values[i * n + r] = value[i];
      y_grads[i * n + r] = gradient[i + 1];
    }
    const Doubles direction = random(dim + 1);
    for (int i = 0; i <= dim; ++i) slope += gradient[i] * direction[i];
    for (int side = 0; side < 2; ++side) {
      const double h = side ? step : -step;
      Doubles moved = y;
      for (int i = 0; i < dim; ++i) moved[i] += h * direction[i + 1];
      const Doubles f = nets[side].value(t + h * direction[0], moved);
      for (int i = 0; i < dim; ++i) difference += f[i] * c[i] / (2 * h);
    }
  }
  for (std::size_t p = 0; p < grads.size(); ++p) {
    for (std::size_t i = 0; i < grads[p].size(); ++i) slope += grads[p][i] * directions[p][i];
  }
  if (Activation(net.shape.activation) != Activation::relu) {  // which has kinks
    CHECK(std::abs(slope - difference) <= 1e-6 * (rows + std::abs(slope)));
  }

  std::vector<T> derivative(dim * n, T(kNan)), scratch(field.scratch_rows() * n, T(kNan));
  std::vector<T> own_input = input;
  field.evaluate(own_input.data(), derivative.data(), scratch.data(), vectors);
  CHECK(close(derivative, values, kRounding<T>));

  std::vector<T> record(field.record_rows() * n, T(kNan)), deltas(field.delta_rows() * n, T(kNan));
  field.prepare_record(record.data(), vectors);
  field.prepare_deltas(deltas.data(), vectors);
  std::copy(input.begin() + (lead - 1) * n, input.end(), record.begin() + (lead - 1) * n);
  std::vector<T> recorded(dim * n, T(kNan)), y_grad(dim * n, T(kNan)), time_grad(n, T(kNan));
  field.evaluate_recording(record.data(), recorded.data(), scratch.data(), vectors);
  CHECK(close(recorded, values, kRounding<T>));
  std::copy(cotangent.begin(), cotangent.end(), field.cotangent(deltas.data()));
  field.vjp(record.data(), deltas.data(), y_grad.data(), scratch.data(), vectors);
  CHECK(close(y_grad, y_grads, kRounding<T>));
  field.time_gradient(record.data(), deltas.data(), time_grad.data(), scratch.data(),
                      vectors);
  CHECK(close(time_grad, time_grads, kRounding<T>));

  std::vector<T> sum(field.gradient_size());
  const std::vector<Pair<T>> twice(2, {deltas.data(), record.data()});
  field.accumulate_gradient(twice, vectors, sum.data());
  field.accumulate_gradient(twice, vectors, sum.data());
  Tensors<T> unpacked(net.zeros());
  CHECK(field.parameters() == int(unpacked.values.size()));
  field.unpack_gradient(sum.data(), unpacked.pointers.data());
  double largest = 0;
  for (std::size_t p = 0; p < grads.size(); ++p) {
    double squares = 0;
    for (double& g : grads[p]) {
      g *= 4;
      squares += g * g;
    }
    largest = std::max(largest, p == 1 ? 0 : std::sqrt(squares / double(grads[p].size())));
    CHECK(close(unpacked.values[p], grads[p], kRounding<T> * n));
  }
  // Not all are wanted.
  unpacked.pointers[1] = nullptr;
  const std::vector<T> bias = unpacked.values[1];
  field.unpack_gradient(sum.data(), unpacked.pointers.data());
  CHECK(bias == unpacked.values[1]);
  const double rms = field.largest_rms(sum.data(), unpacked.pointers.data());
  CHECK(std::abs(rms - largest) <= kRounding<T> * n * (1 + largest));
}

template <class T>
void test_fields() {
  Random random{1};
  for (int activation = 0; activation < kActivations; ++activation) {
    for (int layers = 1; layers <= kMostLayers; ++layers) {
      for (int vectors = 1; vectors <= kTileVectors; ++vectors) {
        const Perceptron& shape = *kPerceptrons[activation][layers - 1][vectors - 1];
        const int rows = vectors * kLanes<T> - random.below(kLanes<T>);
        const int before = std::exchange(failed, 0);
        test_field<T>(Net(shape, random.below(2), random), vectors, rows, random);
        if (failed) {
          std::fprintf(stderr, "activation %d, %d hidden layers of %d, ..., dim %d, %d vectors\n",
                       activation, layers, shape.hidden[0], shape.dim, vectors);
        }
        failed |= before;
      }
    }
  }
}

// --- methods -------------------------------------------------------------------------------------

Tableau make_tableau(int order, const Doubles& c, const std::vector<Doubles>& a, const Doubles& b) {
  Tableau tableau{};
  tableau.stages = int(c.size());
  tableau.order = order;
  for (int i = 0; i < tableau.stages; ++i) {
    tableau.c[i] = c[i];
    tableau.b[i] = b[i];
    std::copy(a[i].begin(), a[i].end(), tableau.a[i]);
  }
  return tableau;
}

// With the quartic through both ends with their slopes and through the middle.
Tableau make_adaptive(Tableau tableau, const Doubles& b_err, const Doubles& b_mid) {
  const int last = tableau.stages - 1;
  const double of_mid[] = {0, 16, -32, 16}, of_end[] = {0, -5, 14, -8};
  const double of_slope0[] = {1, -4, 5, -2}, of_slope1[] = {0, 1, -3, 2};
  for (int j = 0; j <= last; ++j) {
    tableau.b_err[j] = b_err[j];
    for (int k = 0; k < 4; ++k) {
      tableau.interpolant[j][k] = b_mid[j] * of_mid[k] + tableau.b[j] * of_end[k] +
                                  (j == 0 ? of_slope0[k] : 0) + (j == last ? of_slope1[k] : 0);
    }
  }
  return tableau;
}

Tableau dopri5() {
  const Doubles b = {35. / 384, 0, 500. / 1113, 125. / 192, -2187. / 6784, 11. / 84, 0};
  const Doubles embedded = {1951. / 21600,      0,           22642. / 50085, 451. / 720,
                            -12231. / 42400, 649. / 6300, 1. / 60};
  Doubles b_err(7);
  for (int j = 0; j < 7; ++j) b_err[j] = b[j] - embedded[j];
  Tableau tableau = make_tableau(
      5, {0, .2, .3, .8, 8. / 9, 1, 1},
      {{},
       {1. / 5},
       {3. / 40, 9. / 40},
       {44. / 45, -56. / 15, 32. / 9},
       {19372. / 6561, -25360. / 2187, 64448. / 6561, -212. / 729},
       {9017. / 3168, -355. / 33, 46732. / 5247, 49. / 176, -5103. / 18656},
       {35. / 384, 0, 500. / 1113, 125. / 192, -2187. / 6784, 11. / 84}},
      b);
  tableau.last_at_solution = 1;
  return make_adaptive(tableau, b_err,
                       {6025192743 / 30085553152. / 2, 0, 51252292925 / 65400821598. / 2,
                        -2691868925 / 45128329728. / 2, 187940372067 / 1594534317056. / 2,
                        -1776094331 / 19743644256. / 2, 11237099 / 235043384. / 2});
}

// Its last stage is not at the solution.
Tableau adaptive_heun() {
  return make_adaptive(make_tableau(2, {0, 1}, {{}, {1}}, {.5, .5}), {.5, -.5}, {.5, 0});
}

// Interpolates linearly.
Tableau rk4() {
  Tableau tableau =
      make_tableau(4, {0, 1. / 3, 2. / 3, 1}, {{}, {1. / 3}, {-1. / 3, 1}, {1, -1, 1}},
                   {1. / 8, 3. / 8, 3. / 8, 1. / 8});
  for (int j = 0; j < 4; ++j) tableau.interpolant[j][0] = tableau.b[j];
  return tableau;
}

// Interpolates by the cubic through both ends with their slopes, the last stage at the end.
Tableau rk4_cubic() {
  Tableau tableau = rk4();
  tableau.stages = 5;
  tableau.c[4] = 1;
  tableau.last_at_solution = tableau.last_on_demand = 1;
  std::copy_n(tableau.b, 4, tableau.a[4]);
  for (int j = 0; j < 5; ++j) {
    double* row = tableau.interpolant[j];
    row[0] = 0, row[1] = 3 * tableau.b[j], row[2] = -2 * tableau.b[j];
  }
  for (int k = 0; k < 3; ++k) {
    tableau.interpolant[0][k] += k == 1 ? -2 : 1;
    tableau.interpolant[4][k] += k == 0 ? 0 : k == 1 ? -1 : 1;
  }
  return tableau;
}

// --- solves: in double ---------------------------------------------------------------------------

constexpr int kRows = kTileRows<double>;

struct Case {
  Net net;
  Tableau method;
  Options options;
  std::int64_t rows, stride;
  Doubles x;  // nan between the rows
  Doubles times{0.1, 0.15, 0.5, 0.51, 0.7, 1.13}, grid{0.1, 0.3, 0.5, 0.7, 0.9, 1.13};

  Case(Control control, const Tableau& method, std::int64_t rows, Random random = {7})
      : net(of_solves, random.below(2), random),
        method(method),
        options{int(control), net.backwards, 0, 2, 1e-6, 1e-6, 0, .9, 10, .2, 0, kInfinity, 1000},
        rows(rows),
        stride(options.data_dim + 2),
        x(rows ? (rows - 1) * stride + options.data_dim : 0, kNan) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < options.data_dim; ++i) x[r * stride + i] = 1.5 * random();
    }
  }

  std::size_t size() const { return times.size() * rows * net.shape.dim; }
  void pin(double h) { options.first_step = options.min_step = options.max_step = h; }
};

// The solution [times, rows, dim] by scalars, with steps that are given. An adaptive step takes
// over the last stage of the one before, wherever that was evaluated.
Doubles by_scalars(const Case& c) {
  const bool adaptive = c.options.control != int(Control::fixed);
  Doubles grid = c.grid, solution;
  if (adaptive) {
    grid = {c.times.front()};
    while (grid.back() < c.times.back()) grid.push_back(grid.back() + c.options.first_step);
  }
  const int dim = c.net.shape.dim, stages = c.method.stages;
  solution.resize(c.size());
  for (std::int64_t r = 0; r < c.rows; ++r) {
    Doubles y(dim);
    std::copy_n(&c.x[r * c.stride], c.options.data_dim, y.begin());
    std::copy_n(y.begin(), dim, &solution[r * dim]);
    std::size_t output = 1;
    Doubles taken_over;
    for (std::size_t s = 0; s + 1 < grid.size(); ++s) {
      const double t0 = grid[s], h = grid[s + 1] - t0;
      std::vector<Doubles> k(stages);
      auto moved = [&](auto weight) {
        Doubles to = y;
        for (int j = 0; j < stages; ++j) {
          for (int i = 0; i < dim && !k[j].empty(); ++i) to[i] += h * weight(j) * k[j][i];
        }
        return to;
      };
      for (int i = 0; i < stages; ++i) {
        k[i] = c.net.value(t0 + c.method.c[i] * h, moved([&](int j) { return c.method.a[i][j]; }));
        if (i == 0 && adaptive && s > 0) k[0] = taken_over;
      }
      taken_over = k.back();
      for (; output < c.times.size() && c.times[output] <= grid[s + 1]; ++output) {
        const double x = (c.times[output] - t0) / h;
        const Doubles there = moved([&](int j) {
          const double* p = c.method.interpolant[j];
          return x * (p[0] + x * (p[1] + x * (p[2] + x * p[3])));
        });
        std::copy_n(there.begin(), dim, &solution[(output * c.rows + r) * dim]);
      }
      y = moved([&](int j) { return c.method.b[j]; });
    }
  }
  return solution;
}

struct Solved {
  Result result;
  Doubles out;
};

Solved solve(const Case& c, Trace<double>* trace = nullptr) {
  const ProgramField<double> field = make_field<double>(c.net, true, false);
  Doubles out(c.size(), kNan);
  const Call<double> call{c.rows,
                          c.x.data(),
                          c.stride,
                          c.times.data(),
                          std::int64_t(c.times.size()),
                          c.grid.data(),
                          std::int64_t(c.grid.size()),
                          out.data()};
  Solver<ProgramField<double>> solver(field, c.method, c.options, call, trace);
  const Result result = solver.solve();
  return {result, out};
}

struct Gradients {
  Result result;
  Doubles x;
  Tensors<double> parameters;

  explicit Gradients(const Case& c)
      : x(c.rows * c.options.data_dim, kNan), parameters(c.net.zeros()) {
    for (Doubles& tensor : parameters.values) std::fill(tensor.begin(), tensor.end(), kNan);
  }
  bool operator==(const Gradients& other) const {
    return x == other.x && parameters.values == other.parameters.values;
  }
};

Gradients gradients(const Case& c, const Trace<double>& trace, const Doubles& grad) {
  Gradients found(c);
  const ProgramField<double> field = make_field<double>(c.net, !trace.has_all_records(), true);
  DiscreteGradient<ProgramField<double>> gradient(field, c.method, c.options, trace);
  found.result = gradient.run(grad.data(), found.x.data(), found.parameters.pointers.data());
  // Without the others, each is the same. Nothing of the trace is used up.
  Gradients parts(c);
  gradient.run(grad.data(), parts.x.data(), nullptr);
  DiscreteGradient<ProgramField<double>> again(field, c.method, c.options, trace);
  again.run(grad.data(), nullptr, parts.parameters.pointers.data());
  again.run(grad.data(), nullptr, nullptr);
  CHECK(parts == found);
  return found;
}

// For every row, by how much grad . solution changes along a direction: `move` adds its second
// argument times the direction to a case.
template <class Move>
Doubles central_differences(const Case& c, const Doubles& grad, Move move) {
  const double step = 1e-5;
  const int dim = c.net.shape.dim;
  Doubles changes(c.rows);
  for (const double h : {step, -step}) {
    Case moved = c;
    move(moved, h);
    const Doubles out = solve(moved).out;
    for (std::size_t e = 0; e < out.size(); ++e) {
      changes[e / dim % c.rows] += out[e] * grad[e] / (2 * h);
    }
  }
  return changes;
}

void test_gradients(const Case& c, const Gradients& found, const Doubles& grad) {
  const int columns = c.options.data_dim;
  for (int i = 0; i < columns; ++i) {
    const Doubles want = central_differences(c, grad, [&](Case& moved, double h) {
      for (std::int64_t r = 0; r < c.rows; ++r) moved.x[r * c.stride + i] += h;
    });
    Doubles got;
    for (std::int64_t r = 0; r < c.rows; ++r) got.push_back(found.x[r * columns + i]);
    CHECK(close(got, want, 1e-7));
  }
  Random random{5};
  for (std::size_t p = 0; p < c.net.parameters.size(); ++p) {
    const Doubles direction = random(c.net.parameters[p].size());
    const Doubles changes = central_differences(c, grad, [&](Case& moved, double h) {
      for (std::size_t i = 0; i < direction.size(); ++i) {
        moved.net.parameters[p][i] += h * direction[i];
      }
    });
    double got = 0, want = 0;
    for (double change : changes) want += change;
    for (std::size_t i = 0; i < direction.size(); ++i) {
      got += found.parameters.values[p][i] * direction[i];
    }
    CHECK(close(Doubles{got}, {want}, 1e-7));
  }
}

// With given steps.
void test_solve(const Case& c) {
  Trace<double> trace;
  const Solved plain = solve(c), kept = solve(c, &trace);
  CHECK(plain.result.status == kSuccess);
  CHECK(close(plain.out, by_scalars(c), kRounding<double>));
  CHECK(kept.out == plain.out);
  CHECK(kept.result.nfe == plain.result.nfe && kept.result.accepted == plain.result.accepted);
  const Doubles grad = Random{3}(c.size());
  const Gradients found = gradients(c, trace, grad);
  CHECK(c.rows == 0 || found.result.nfe <= plain.result.nfe);
  test_gradients(c, found, grad);
}

void test_solves() {
  for (std::int64_t rows : {0, 1, kRows - 1, kRows, kRows + 1, 3 * kRows + 5}) {
    for (const Tableau& method : {rk4(), rk4_cubic()}) {
      test_solve(Case(Control::fixed, method, rows));
    }
    for (const Control control : {Control::batch, Control::sample}) {
      for (const Tableau& method : {dopri5(), adaptive_heun()}) {
        Case c(control, method, rows);
        c.pin(0.17);
        test_solve(c);
      }
    }
  }
  // More steps than there is room for records.
  Case c(Control::batch, dopri5(), 3 * kRows + 5);
  c.pin(0.01);
  test_solve(c);
  // Outputs at the ends of fixed steps only: the last stage is never wanted.
  c = Case(Control::fixed, rk4_cubic(), kRows + 1);
  c.times = c.grid;
  test_solve(c);
  CHECK(solve(c).result.nfe == 4 * std::int64_t(c.grid.size() - 1));
}

// Steps of the solver's own choice: near the solution, and by row for each what it is alone.
void test_chosen_steps() {
  Case exact(Control::batch, dopri5(), kRows + 3);
  exact.pin(0.01);
  const Doubles want = by_scalars(exact);
  for (const Control control : {Control::batch, Control::sample}) {
    Case c(control, dopri5(), exact.rows);
    c.options.float_time = control == Control::batch;
    c.options.first_step = 0.6;  // too large
    Trace<double> trace;
    const Solved solved = solve(c, &trace);
    CHECK(solved.result.status == kSuccess && solved.result.rejected > 0);
    CHECK(close(solved.out, want, 1e-4));
    gradients(c, trace, Random{3}(c.size()));
    c.options.first_step = 0;
    CHECK(close(solve(c).out, want, 1e-4));
  }
  const Case all(Control::sample, dopri5(), exact.rows);
  const Solved together = solve(all);
  std::int64_t accepted = 0, rejected = 0;
  for (std::int64_t row = 0; row < all.rows; ++row) {
    Case alone = all;
    alone.rows = 1;
    alone.x = Doubles(&all.x[row * all.stride], &all.x[row * all.stride] + all.options.data_dim);
    Doubles of_row;
    for (std::size_t o = 0; o < all.times.size(); ++o) {
      for (int i = 0; i < 3; ++i) of_row.push_back(together.out[(o * all.rows + row) * 3 + i]);
    }
    const Solved one = solve(alone);
    CHECK(close(one.out, of_row, kRounding<double>));
    accepted = std::max(accepted, one.result.accepted);
    rejected = std::max(rejected, one.result.rejected);
  }
  CHECK(together.result.accepted == accepted && together.result.rejected == rejected);
}

// --- the continuous gradient ---------------------------------------------------------------------

Gradients continuous_gradients(const Case& c, const Doubles& solution,
                                  const Doubles& grad, bool seminorm, bool all) {
  Gradients found(c);
  if (!all) found.parameters.pointers[1] = found.parameters.pointers[2] = nullptr;
  Doubles grid(c.grid.rbegin(), c.grid.rend());
  for (double& t : grid) t = -t;
  const AdjointCall<double> call{c.rows,
                                 c.times.data(),
                                 std::int64_t(c.times.size()),
                                 grid.data(),
                                 std::int64_t(grid.size()),
                                 solution.data(),
                                 grad.data(),
                                 seminorm,
                                 all ? found.x.data() : nullptr,
                                 found.parameters.pointers.data()};
  const ProgramField<double> field = make_field<double>(c.net, true, true);
  found.result =
      ContinuousGradient<ProgramField<double>>(field, c.method, c.options, call).run();
  return found;
}

void test_continuous_gradient(Case c, double tolerance) {
  Trace<double> trace;
  const Doubles solution = solve(c, &trace).out;
  const Doubles grad = Random{3}(c.size());
  const Gradients want = gradients(c, trace, grad);
  for (const bool seminorm : {false, true}) {
    const Gradients found = continuous_gradients(c, solution, grad, seminorm, true);
    CHECK(found.result.status == kSuccess);
    CHECK(close(found.x, want.x, tolerance));
    const Gradients part = continuous_gradients(c, solution, grad, seminorm, false);
    CHECK(part.result.status == kSuccess);
    for (std::size_t p = 0; p < want.parameters.values.size(); ++p) {
      const Doubles& exact = want.parameters.values[p];
      const Doubles wanted(exact.begin(), exact.end());
      CHECK(close(found.parameters.values[p], wanted, tolerance * double(c.rows)));
      const bool left_out = p == 1 || p == 2;
      const Doubles& got = part.parameters.values[p];
      CHECK(left_out ? std::isnan(got[0]) : close(got, wanted, tolerance * double(c.rows)));
    }
  }
}

void test_continuous_gradients() {
  for (std::int64_t rows : {0, 1, kRows - 1, kRows, kRows + 1, 3 * kRows + 5}) {
    Case c(Control::batch, dopri5(), rows);
    c.options.rtol = c.options.atol = 1e-8;
    test_continuous_gradient(c, 1e-5);
    c = Case(Control::batch, adaptive_heun(), rows);
    c.options.rtol = c.options.atol = 1e-4;
    test_continuous_gradient(c, 1e-2);
    c = Case(Control::fixed, rk4(), rows);
    c.times = {0.1, 0.5, 1.13};
    test_continuous_gradient(c, 1e-2);
  }
}

// --- failures ------------------------------------------------------------------------------------

bool all_finite(const Doubles& values, std::size_t count) {
  return std::all_of(values.begin(), values.begin() + std::ptrdiff_t(count),
                     [](double value) { return std::isfinite(value); });
}

void test_failures() {
  const std::int64_t rows = kRows + 3;
  for (const Control control : {Control::fixed, Control::batch, Control::sample}) {
    const bool fixed = control == Control::fixed, by_row = control == Control::sample;
    const Case good(control, fixed ? rk4_cubic() : dopri5(), rows);
    Trace<double> trace;
    const std::size_t state = rows * good.net.shape.dim;

    Case c = good;
    c.x.back() = kNan;
    CHECK(solve(c, &trace).result.status == kNonFiniteInput);

    c = good;
    c.net.parameters[0][0] = kNan;
    Result result = solve(c).result;
    CHECK(result.status == kNonFinite);
    CHECK(!fixed || result.output == 1);
    CHECK(fixed || (result.t == c.times[0] && result.accepted == 0));
    CHECK(!by_row || (result.row == 0 && result.rows == rows));

    if (fixed) continue;
    c = good;
    c.options.max_num_steps = 2;
    const Solved stopped = solve(c);
    result = stopped.result;
    CHECK(result.status == kMaxSteps);
    CHECK(c.times.front() < result.t && result.t < c.times.back());
    CHECK(!by_row || result.rows == rows);
    CHECK(by_row || all_finite(stopped.out, 2 * state));  // the last state and its derivative

    c = good;
    c.options.rtol = 0, c.options.atol = 1e-40;
    result = solve(c).result;
    CHECK(result.status == kUnderflow && result.dt > 0);
    CHECK(!by_row || result.rows > 0);
  }
  for (const bool by_step : {true, false}) {
    Case c(by_step ? Control::batch : Control::fixed, by_step ? dopri5() : rk4(), rows);
    c.times = c.grid;
    const Doubles solution = solve(c).out;
    Doubles grad = Random{3}(c.size());
    auto status = [&] {
      return continuous_gradients(c, solution, grad, false, true).result.status;
    };
    CHECK(status() == kSuccess);
    c.options.max_num_steps = 0;
    CHECK(status() == (by_step ? kMaxSteps : kSuccess));
    c.options.max_num_steps = 1000;
    c.net.parameters[0][0] = kNan;
    CHECK(status() == kNonFinite);
    grad.back() = kNan;
    CHECK(status() == kNonFiniteInput);
  }
}

// --- threads -------------------------------------------------------------------------------------

// Parts of several sizes run on threads of their own; the last ones start first.
int in_odd_order(std::int64_t begin, std::int64_t end, std::int64_t, ThreadPool::Body body,
                 void* context) {
  std::vector<std::thread> threads;
  for (std::int64_t size = 1; end > begin; size = size % 20 + 6) {
    const std::int64_t first = std::max(begin, end - size);
    threads.emplace_back(body, first, end, context);
    end = first;
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

int three_threads(std::uint32_t* count) {
  *count = 3;
  return 0;
}

void test_threads_do_not_change_a_bit() {
  const std::int64_t rows = kMostGroups * kRows + 1;  // more tiles than groups
  for (const Control control : {Control::fixed, Control::batch, Control::sample}) {
    const Case c(control, control == Control::fixed ? rk4() : dopri5(), rows);
    const Doubles grad = Random{3}(c.size());
    auto everything = [&] {
      Trace<double> trace;
      const Doubles solution = solve(c, &trace).out;
      std::vector<Gradients> grads{gradients(c, trace, grad)};
      if (control == Control::batch) {
        grads.push_back(continuous_gradients(c, solution, grad, false, true));
      }
      return std::make_pair(solution, grads);
    };
    const auto one = everything();
    thread_pool = {in_odd_order, three_threads};
    const auto several = everything();
    thread_pool = {};
    CHECK(several == one);
  }
}

void test_no_memory_on_a_thread() {
  thread_pool = {in_odd_order, three_threads};
  bool thrown = false;
  try {
    parallel_for(20, [](std::int64_t begin, std::int64_t) {
      if (begin > 0) throw std::bad_alloc();
    });
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  thread_pool = {};
  CHECK(thrown);
}

// --- memory --------------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
// How many of so many blocks it frees when they are given back. Leaves it as it was.
int freed_of(int count, std::size_t bytes) {
  BlockCache& cache = block_cache();
  std::vector<void*> blocks;
  for (int i = 0; i < count; ++i) blocks.push_back(cache.take(bytes));
  for (void* block : blocks) cache.give_back(block, bytes);
  const auto freed = std::count_if(blocks.begin(), blocks.end(), __asan_address_is_poisoned);
  for (int i = 0; i < count; ++i) std::free(cache.take(bytes));
  return int(freed);
}

// While it is empty.
void test_block_cache() {
  CHECK(freed_of(10, 64) == 0);
  CHECK(freed_of(5, BlockCache::kMostBytes / 4) == 1);
  CHECK(freed_of(1, BlockCache::kMostBytes + 64) == 1);
  const int freed = freed_of(500, 64);  // it keeps a few
  CHECK(0 < freed && freed < 500);
}
#else
void test_block_cache() {}
#endif

void test_buffers() {
  double* first = nullptr;
  for (int i = 0; i < 3; ++i) {
    const Buffer<double> buffer(57), other(58), smaller(3);
    if (i == 0) first = buffer.get();
    CHECK(buffer.get() == first || other.get() == first);  // of equal size in whole lines
    CHECK(reinterpret_cast<std::uintptr_t>(smaller.get()) % kAlignment == 0);
  }
  CHECK(!Buffer<double>(0) && Buffer<double>(1));
}

}  // namespace

int main() {
  test_block_cache();
  test_buffers();
  if constexpr (kVectorBytes == 16) test_fields<float>();  // which takes long to compile
  test_fields<double>();
  test_solves();
  test_chosen_steps();
  test_continuous_gradients();
  test_failures();
  test_threads_do_not_change_a_bit();
  test_no_memory_on_a_thread();
  return failed;
}
