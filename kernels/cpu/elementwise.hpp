// Functions of single numbers, on blocks of features of a tile: the steps of a program.
//
// Accurate to a few units in the last place, where torch's are; nan stays nan.
#pragma once

#include <cmath>

#include "activations.hpp"

namespace anode {

// In the order of OPS in lowering.py. Those that are done elsewhere are here for their numbers.
enum class Op : std::int32_t {
  neg, abs, sign, reciprocal, sqrt, exp, expm1, log, log1p, sin, cos,
  tanh, sigmoid, relu, softplus, silu, gelu, elu, pow,
  d_softplus, d_silu, d_gelu, d_elu,
  add, sub, mul, div, gt, ge,
  constant, parameter, linear, linear_t, slice, join, place, total, spread, select, cotangent,
  copy, tanh_slope, sigmoid_slope, gate
};

// Features of a tile: numbers between one feature and the next, 0 if they share one, and between
// its vectors, 0 if all rows share one number.
template <class T>
struct View {
  T* at;
  std::ptrdiff_t feature, vector;
};

// --- functions ------------------------------------------------------------------------------------

template <class T, class F>
inline Vec<T> by_lane(Vec<T> x, F f) {
  for (int i = 0; i < kLanes<T>; ++i) x[i] = f(x[i]);
  return x;
}

template <class T>
inline Vec<T> square_root(Vec<T> x) {
  return by_lane<T>(x, [](T z) { return std::sqrt(z); });
}

// exp(x) for all x.
template <class T>
inline Vec<T> exponential_of_any(Vec<T> x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr int kMantissaBits = std::numeric_limits<T>::digits - 1, kShift = 64;
  constexpr T kLowest = kFloat ? T(-105) : T(-746), kHighest = kFloat ? T(90) : T(711);
  constexpr T kUp = T(1ull << (kShift / 2)) * T(1ull << (kShift / 2));
  using Int = typename VectorTraits<T>::Int;
  x = at_most<T>(at_least<T>(x, kLowest), kHighest);
  // The scale in two factors, of which neither overflows: `reduce` has made 2^n modulo 2^2^bits.
  const auto [r, scale] = reduce<T, 0>(x);
  const IntVec<T> shift = (x > T(0) ? Int(-kShift) : Int(kShift)) + IntVec<T>{};
  const Vec<T> part = (Vec<T>)((IntVec<T>)scale + (shift << kMantissaBits));
  return (r * expm1_ratio<T>(r) + T(1)) * part * (x > T(0) ? broadcast(kUp) : broadcast(1 / kUp));
}

// exp(x) - 1 for all x.
template <class T>
inline Vec<T> exponential_minus_1_of_any(Vec<T> x) {
  const Vec<T> small = exponential_minus_1<T>(at_most<T>(at_least<T>(x, T(-40)), T(40)));
  return x > T(40) ? exponential_of_any<T>(x) : small;
}

template <class T>
inline Vec<T> logarithm(Vec<T> x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  using Int = typename VectorTraits<T>::Int;
  using Limits = std::numeric_limits<T>;
  constexpr int kMantissaBits = Limits::digits - 1, kBias = Limits::max_exponent - 1, kUp = 64;
  constexpr T kScale = T(1ull << (kUp / 2)) * T(1ull << (kUp / 2));
  constexpr T kLn2High = kFloat ? T(0x1.62e4p-1) : T(0x1.62e42fefa38p-1);  // n * it is exact
  constexpr T kLn2Low = kFloat ? T(0x1.7f7d1cf79abc9e3b398p-20) : T(0x1.ef35793c7673007e5ep-45);
  const auto subnormal = x < Limits::min();
  const Vec<T> normal = subnormal ? x * kScale : x;
  // x = m 2^n with m from sqrt(1/2) to sqrt(2).
  constexpr Int kRoot = kFloat ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcdll);
  const IntVec<T> above = (IntVec<T>)normal - kRoot;
  const IntVec<T> exponent = above >> kMantissaBits;
  const Vec<T> m = (Vec<T>)((IntVec<T>)normal - (exponent << kMantissaBits));
  // The exponent as a number, without a conversion: it fits in the bits of 1.5 2^bits.
  constexpr T kRound = T(3 * (std::int64_t(1) << (kMantissaBits - 1)));
  const Vec<T> rounded = (Vec<T>)((IntVec<T>)broadcast(kRound) + exponent);
  const Vec<T> n = (rounded - kRound) - (subnormal ? broadcast(T(kUp)) : Vec<T>{});
  static_assert(kBias > 0);
  const Vec<T> value = n * kLn2High + (log_1_plus<T>(m - T(1)) + n * kLn2Low);
  const Vec<T> nan = broadcast(Limits::quiet_NaN()), infinity = broadcast(Limits::infinity());
  return x > T(0) ? (x == infinity ? x : value) : (x == T(0) ? -infinity : nan);
}

template <class T>
inline Vec<T> logarithm_1_plus(Vec<T> x) {
  const Vec<T> sum = x + T(1), rounded = sum - T(1);
  // What the sum lost is small beside it. (Kahan; Goldberg, What Every Computer Scientist Should
  // Know About Floating-Point Arithmetic, 1991, theorem 4.)
  const Vec<T> value = logarithm<T>(sum) * (x / rounded);
  const auto infinite = sum == std::numeric_limits<T>::infinity();
  return sum == T(1) ? x : (infinite ? sum : value);
}

// Beyond, the reduction below loses digits.
template <class T>
constexpr T kMostAngle = std::is_same_v<T, float> ? T(8000) : T(1e5);

// sin(x + quarters pi / 2) for |x| <= kMostAngle. (Reduction in three parts: Cody, Waite, Software
// Manual for the Elementary Functions, 1980, chapter 8.)
template <class T, int kQuarters>
inline Vec<T> sine_of_some(Vec<T> x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr int kMantissaBits = std::numeric_limits<T>::digits - 1;
  constexpr T kRound = T(3 * (std::int64_t(1) << (kMantissaBits - 1)));
  constexpr T kPerQuarter = T(0.636619772367581343075535);
  // n times the first two is exact.
  constexpr T kHigh = kFloat ? T(1.5703125) : T(0x1.921fb544p0);
  constexpr T kMiddle = kFloat ? T(0x1.fb4p-12) : T(0x1.0b4611a6p-34);
  constexpr T kLow = kFloat ? T(7.5497899548918821692e-8) : T(0x1.3198a2e037073p-69);
  const Vec<T> rounded = x * kPerQuarter + kRound;
  const Vec<T> n = rounded - kRound;
  const Vec<T> r = ((x - n * kHigh) - n * kMiddle) - n * kLow, u = r * r;
  Vec<T> s, c;
  if constexpr (kFloat) {
    s = polynomial<T>(u, -0.16666664650f, 0.0083327459364f, -0.00019587387068f);
    c = polynomial<T>(u, 0.041666664645f, -0.0013888300697f, 0.000024547437210f);
  } else {
    s = polynomial<T>(u, -0.16666666666666664599, 0.0083333333333309245621,
                      -0.00019841269836722417756, 2.755731608381635861e-6,
                      -2.5051127944014187575e-8, 1.591784852480826101e-10);
    c = polynomial<T>(u, 0.041666666666666665373, -0.0013888888888887382271,
                      0.000024801587298743069286, -2.7557317260008838164e-7,
                      2.0876143827993132496e-9, -1.1382456778061305849e-11);
  }
  const Vec<T> of_sine = r + r * (u * s), of_cosine = T(1) + (u * (u * c) - u * T(0.5));
  using Int = typename VectorTraits<T>::Int;
  const IntVec<T> quarter = (IntVec<T>)rounded + Int(kQuarters);
  const Vec<T> value = (quarter & Int(1)) != 0 ? of_cosine : of_sine;
  const Vec<T> found = (quarter & Int(2)) != 0 ? -value : value;
  return kQuarters == 0 ? (x == T(0) ? x : found) : found;  // -0 stays -0
}

// --- operations ----------------------------------------------------------------------------------------

// out = f(in[0], ..., in[Count - 1]). A function of its own for each f: one for many has no registers
// left for the constants of any.
template <class T, int Count, class F>
__attribute__((noinline)) void map(const View<T>* in, const View<T>& out, int features,
                                   int vectors, F f) {
  constexpr int kWidth = kLanes<T>;
  bool dense = out.feature == vectors * kWidth;
  for (int k = 0; k < Count; ++k) {
    dense &= in[k].feature == vectors * kWidth && in[k].vector == kWidth;
  }
  if (dense) {
    T* to = out.at;
    const T *a = in[0].at, *b = in[Count > 1].at, *c = in[Count > 2 ? 2 : 0].at;
    const std::ptrdiff_t count = std::ptrdiff_t(features) * vectors * kWidth;
    for (std::ptrdiff_t e = 0; e < count; e += kWidth) {
      if constexpr (Count == 1) store<T>(to + e, f(load(a + e)));
      if constexpr (Count == 2) store<T>(to + e, f(load(a + e), load(b + e)));
      if constexpr (Count == 3) store<T>(to + e, f(load(a + e), load(b + e), load(c + e)));
    }
    return;
  }
  for (int i = 0; i < features; ++i) {
    for (int v = 0; v < vectors; ++v) {
      auto x = [&](int k) ANODE_INLINE {
        return load(in[k].at + i * in[k].feature + v * in[k].vector);
      };
      T* to = out.at + i * out.feature + v * kWidth;
      if constexpr (Count == 1) store<T>(to, f(x(0)));
      if constexpr (Count == 2) store<T>(to, f(x(0), x(1)));
      if constexpr (Count == 3) store<T>(to, f(x(0), x(1), x(2)));
    }
  }
}

// out[0] = act(in), and out[1] = act'(in) if it is wanted.
template <class T, class Act>
inline void map_activation(const View<T>& in, const View<T>* out, bool both, int features,
                           int vectors) {
  if (!both) return map<T, 1>(&in, out[0], features, vectors, [](Vec<T> z) {
    return Act::value(z);
  });
  for (int i = 0; i < features; ++i) {
    for (int v = 0; v < vectors; ++v) {
      const auto found = Act::value_and_slope(load(in.at + i * in.feature + v * in.vector));
      store<T>(out[0].at + i * out[0].feature + v * kLanes<T>, found.value);
      store<T>(out[1].at + i * out[1].feature + v * kLanes<T>, found.slope);
    }
  }
}

// out = sin(in + quarters pi / 2).
template <class T, int kQuarters>
void map_sine(const View<T>& in, const View<T>& out, int features, int vectors) {
  IntVec<T> large{};
  for (int i = 0; i < features; ++i) {
    for (int v = 0; v < vectors; ++v) {
      large |= anode::abs<T>(load(in.at + i * in.feature + v * in.vector)) > kMostAngle<T>;
    }
  }
  for (int i = 0; i < kLanes<T>; ++i) {
    if (large[i]) return map<T, 1>(&in, out, features, vectors, [](Vec<T> x) {
      return by_lane<T>(x, [](T z) { return kQuarters ? std::cos(z) : std::sin(z); });
    });
  }
  map<T, 1>(&in, out, features, vectors, [](Vec<T> x) { return sine_of_some<T, kQuarters>(x); });
}

// x^p. The powers that torch has by multiplication are so here too.
template <class T>
void map_power(const View<T>* in, const View<T>& out, int features, int vectors, T p) {
  auto with = [&](auto f) { map<T, 1>(in, out, features, vectors, f); };
  using V = Vec<T>;
  if (p == 0) return with([](V) { return broadcast(T(1)); });
  if (p == 1) return with([](V x) { return x; });
  if (p == 2) return with([](V x) { return x * x; });
  if (p == 3) return with([](V x) { return x * x * x; });
  if (p == 4) return with([](V x) { return (x * x) * (x * x); });
  if (p == T(0.5)) return with([](V x) { return square_root<T>(x); });
  if (p == -1) return with([](V x) { return T(1) / x; });
  if (p == -2) return with([](V x) { return T(1) / (x * x); });
  if (p == T(-0.5)) return with([](V x) { return T(1) / square_root<T>(x); });
  with([=](V x) { return by_lane<T>(x, [=](T z) { return std::pow(z, p); }); });
}

// One operation on `features` features of `vectors` vectors of rows. `both` says whether out[1] is
// wanted, the slope of an activation.
template <class T>
void apply(Op op, const View<T>* in, const View<T>* out, bool both, int features, int vectors,
           T number) {
  using V = Vec<T>;
  auto of_one = [&](auto f) { map<T, 1>(in, out[0], features, vectors, f); };
  auto of_two = [&](auto f) { map<T, 2>(in, out[0], features, vectors, f); };
  auto of_three = [&](auto f) { map<T, 3>(in, out[0], features, vectors, f); };
  const V one = broadcast(T(1)), zero{};
  switch (op) {
    case Op::neg: return of_one([](V x) { return -x; });
    case Op::abs: return of_one([](V x) { return anode::abs<T>(x); });
    case Op::sign: return of_one([=](V x) { return x > zero ? one : (x < zero ? -one : zero); });
    case Op::reciprocal: return of_one([](V x) { return T(1) / x; });
    case Op::sqrt: return of_one([](V x) { return square_root<T>(x); });
    case Op::exp: return of_one([](V x) { return exponential_of_any<T>(x); });
    case Op::expm1: return of_one([](V x) { return exponential_minus_1_of_any<T>(x); });
    case Op::log: return of_one([](V x) { return logarithm<T>(x); });
    case Op::log1p: return of_one([](V x) { return logarithm_1_plus<T>(x); });
    case Op::sin: return map_sine<T, 0>(in[0], out[0], features, vectors);
    case Op::cos: return map_sine<T, 1>(in[0], out[0], features, vectors);
    case Op::tanh: return of_one([](V x) { return Tanh<T>::value(x); });
    case Op::sigmoid: return of_one([](V x) { return Sigmoid<T>::value(x); });
    case Op::relu: return of_one([](V x) { return Relu<T>::value(x); });
    case Op::softplus: return map_activation<T, Softplus<T>>(in[0], out, both, features, vectors);
    case Op::silu: return map_activation<T, Silu<T>>(in[0], out, both, features, vectors);
    case Op::gelu: return map_activation<T, Gelu<T>>(in[0], out, both, features, vectors);
    case Op::elu:
      return of_one([=](V x) { return x > zero ? x : number * Elu<T>::value(x); });
    case Op::pow: return map_power<T>(in, out[0], features, vectors, number);
    case Op::d_softplus: return of_one([](V x) { return Softplus<T>::value_and_slope(x).slope; });
    case Op::d_silu: return of_one([](V x) { return Silu<T>::value_and_slope(x).slope; });
    case Op::d_gelu: return of_one([](V x) { return Gelu<T>::value_and_slope(x).slope; });
    case Op::d_elu:
      return of_one([=](V x) {
        return x > zero ? one : number * exponential<T>(at_most<T>(x, T(0)));
      });
    case Op::add: return of_two([](V a, V b) { return a + b; });
    case Op::sub: return of_two([](V a, V b) { return a - b; });
    case Op::mul: return of_two([](V a, V b) { return a * b; });
    case Op::div: return of_two([](V a, V b) { return a / b; });
    case Op::gt: return of_two([=](V a, V b) { return a > b ? one : zero; });
    case Op::ge: return of_two([=](V a, V b) { return a >= b ? one : zero; });
    case Op::select: return of_three([=](V c, V a, V b) { return c != zero ? a : b; });
    case Op::copy: return of_one([](V x) { return x; });
    case Op::tanh_slope: return of_two([=](V g, V v) { return g * (one - v * v); });
    case Op::sigmoid_slope: return of_two([=](V g, V v) { return g * (v * (one - v)); });
    case Op::gate: return of_two([=](V v, V g) { return v > zero ? g : zero; });
    default: return;  // done elsewhere
  }
}

}  // namespace anode
