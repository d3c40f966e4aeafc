// The convolutional field against scalar loops and central differences.
//
// Memory that the kernels are given is exactly as large as they may touch, and nan where they have
// to write.
#include <algorithm>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "check.hpp"
#include "conv.hpp"

namespace {

using namespace anode;
using Doubles = std::vector<double>;

template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

double random_number() {  // from -1 to 1
  static std::uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 11) / double(std::uint64_t(1) << 52) - 1;
}

Doubles random_numbers(std::size_t count) {
  Doubles values(count);
  for (double& value : values) value = random_number();
  return values;
}

template <class T>
std::vector<T> cast(const Doubles& values) {
  return std::vector<T>(values.begin(), values.end());
}

// A field and where it is evaluated; inputs[0] is y, inputs[1] t, then come the parameters.
struct Case {
  ConvShape shape;
  std::int64_t batch;
  int height, width;
  bool time_of_each;
  std::vector<Doubles> inputs;

  Case(ConvShape shape, std::int64_t batch, int height, int width, bool time_of_each)
      : shape(shape), batch(batch), height(height), width(width), time_of_each(time_of_each) {
    const std::size_t lead = shape.time_dependent, C = shape.channels, K = shape.filters;
    const std::size_t pixels = std::size_t(batch) * height * width;
    for (std::size_t count : {C * pixels, time_of_each ? std::size_t(batch) : 1, K * (lead + C), K,
                              K * (lead + K) * 9, K, C * (lead + K), C}) {
      inputs.push_back(random_numbers(count));
    }
  }
};

double activation(int number, double z) {
  switch (Activation(number)) {
    case Activation::tanh: return std::tanh(z);
    case Activation::softplus: return z > 20 ? z : std::log1p(std::exp(z));
    case Activation::relu: return z > 0 ? z : 0;
    default: return kNan<double>;
  }
}

// A convolution of [t, x] with zero padding, as it is written down.
Doubles convolution(const Case& c, const Doubles& x, int in, const Doubles& weight,
                    const Doubles& bias, int out, int taps, const Doubles& t) {
  const int lead = c.shape.time_dependent, reach = taps / 2;
  Doubles y;
  for (int b = 0; b < c.batch; ++b) {
    for (int o = 0; o < out; ++o) {
      for (int p = 0; p < c.height * c.width; ++p) {
        double sum = bias[o];
        for (int i = 0; i < lead + in; ++i) {
          for (int tap = 0; tap < taps * taps; ++tap) {
            const int row = p / c.width + tap / taps - reach;
            const int column = p % c.width + tap % taps - reach;
            if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
            const int at = ((b * in + i - lead) * c.height + row) * c.width + column;
            sum += weight[(o * (lead + in) + i) * taps * taps + tap] *
                   (i < lead ? t[c.time_of_each ? b : 0] : x[at]);
          }
        }
        y.push_back(sum);
      }
    }
  }
  return y;
}

Doubles by_scalars(const Case& c) {
  const auto& in = c.inputs;
  const int C = c.shape.channels, K = c.shape.filters;
  auto act = [&](Doubles z) {
    for (double& x : z) x = activation(c.shape.activation, x);
    return z;
  };
  const Doubles h1 = act(convolution(c, in[0], C, in[2], in[3], K, 1, in[1]));
  const Doubles h2 = act(convolution(c, h1, K, in[4], in[5], K, 3, in[1]));
  return convolution(c, h2, K, in[6], in[7], C, 1, in[1]);
}

template <class T>
struct Outcome {
  std::vector<T> out;
  std::vector<std::vector<T>> gradients;
};

template <class T>
Outcome<T> by_kernels(const Case& c, const Doubles& cotangent) {
  std::vector<std::vector<T>> in;
  const T* parameters[6];
  Outcome<T> found;
  for (const Doubles& input : c.inputs) {
    in.push_back(cast<T>(input));
    found.gradients.emplace_back(input.size(), kNan<T>);
  }
  for (int i = 0; i < 6; ++i) parameters[i] = in[2 + i].data();
  const Convolutions<T> field(c.shape, parameters, true);
  const Images<T> images{c.batch, c.height, c.width, in[1].data(), c.time_of_each, in[0].data()};
  std::vector<T> record(field.record_size(c.batch, c.height, c.width), kNan<T>);
  std::vector<T> without(in[0].size(), kNan<T>);
  found.out = without;
  field.evaluate(images, without.data(), nullptr);
  field.evaluate(images, found.out.data(), record.data());
  CHECK(found.out == without);
  ConvGradients<T> gradients{found.gradients[0].data(), found.gradients[1].data(), {}};
  for (int i = 0; i < 6; ++i) gradients.parameters[i] = found.gradients[2 + i].data();
  field.vjp(images, record.data(), cast<T>(cotangent).data(), gradients);
  return found;
}

template <class T>
double distance(const std::vector<T>& got, const Doubles& want) {
  double most = 0, scale = 1;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(double(got[i]) - want[i]);
    if (!(error <= most)) most = error;  // nan too
    scale = std::max(scale, std::abs(want[i]));
  }
  return most / scale;
}

double dot(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// Each gradient along a random direction.
void check_gradients(const Case& c, const std::vector<Doubles>& gradients,
                     const Doubles& cotangent) {
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const Doubles direction = random_numbers(gradients[i].size());
    constexpr double kStep = 1e-5;
    double ends[2];
    for (int side : {0, 1}) {
      Case there = c;
      for (std::size_t j = 0; j < direction.size(); ++j) {
        there.inputs[i][j] += (side ? kStep : -kStep) * direction[j];
      }
      ends[side] = dot(by_scalars(there), cotangent);
    }
    const double want = (ends[1] - ends[0]) / (2 * kStep);
    CHECK(std::abs(dot(gradients[i], direction) - want) <= 1e-6 * (1 + std::abs(want)));
  }
}

void test_values_and_gradients() {
  const int tanh = int(Activation::tanh), softplus = int(Activation::softplus);
  const Case cases[] = {
      {{1, 1, tanh, 1}, 1, 1, 1, false},    {{2, 3, softplus, 1}, 2, 1, 5, true},
      {{3, 17, tanh, 1}, 2, 5, 4, true},    {{5, 40, softplus, 1}, 1, 3, 3, false},
      {{17, 9, tanh, 0}, 2, 2, 3, false},   {{2, 16, softplus, 0}, 3, 4, 1, true},
      {{1, 23, tanh, 1}, 2, 7, 30, true},  // more tiles than go at once, at least without AVX
      {{1, 4, softplus, 1}, 1, 30, 21, true},
  };
  for (const Case& c : cases) {
    const Doubles cotangent = random_numbers(c.inputs[0].size());
    const auto found = by_kernels<double>(c, cotangent);
    CHECK(distance(found.out, by_scalars(c)) < 1e-13);
    check_gradients(c, found.gradients, cotangent);
    const auto single = by_kernels<float>(c, cotangent);
    CHECK(distance(single.out, found.out) < 1e-4);
    for (std::size_t i = 0; i < found.gradients.size(); ++i) {
      CHECK(distance(single.gradients[i], found.gradients[i]) < 1e-4);
    }
  }
}

// --- threads -------------------------------------------------------------------------------------

// Parts of one unit each on threads of their own; the last ones start first.
int backwards(std::int64_t begin, std::int64_t end, std::int64_t, ThreadPool::Body body,
              void* context) {
  std::vector<std::thread> threads;
  for (std::int64_t i = end; i-- > begin;) threads.emplace_back(body, i, i + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

int three_threads(std::uint32_t* count) {
  *count = 3;
  return 0;
}

void test_threads_do_not_change_a_bit() {
  const Case c({2, 5, int(Activation::relu), 1}, 3, 40, 13, true);
  const Doubles cotangent = random_numbers(c.inputs[0].size());
  const auto alone = by_kernels<float>(c, cotangent);
  thread_pool = {backwards, three_threads};
  const auto together = by_kernels<float>(c, cotangent);
  thread_pool = {};
  CHECK(alone.out == together.out);
  CHECK(alone.gradients == together.gradients);
}

void test_no_images() {
  const Case c({2, 5, int(Activation::relu), 1}, 0, 4, 4, false);
  const auto found = by_kernels<double>(c, {});
  CHECK(found.out.empty());
  for (const Doubles& gradient : found.gradients) CHECK(dot(gradient, gradient) == 0);
}

}  // namespace

int main() {
  test_values_and_gradients();
  test_threads_do_not_change_a_bit();
  test_no_images();
  return failed;
}
