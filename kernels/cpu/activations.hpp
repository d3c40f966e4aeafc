// Activations and their derivatives by vector arithmetic. They mean torch.nn.functional's with
// default arguments and are accurate to a few units in the last place, tails included; nan stays
// nan.
//
// Coefficients: best relative approximations by Remez exchange in 50-digit arithmetic, rounded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "simd.hpp"

namespace anode {

// In the order of anode_fast.spec.ACTIVATIONS.
enum class Activation : std::int32_t {
  relu,
  softplus,
  tanh,
  sigmoid,
  silu,
  gelu,
  elu,
  identity
};

// Whether act'(z) is computed from act(z); if not, `activate_saving` writes it to `slope`.
constexpr bool slope_from_value(Activation activation) {
  return activation != Activation::softplus && activation != Activation::silu &&
         activation != Activation::gelu;
}

// --- exponentials and logarithms -----------------------------------------------------------------

// c0 + c2 y + c4 y^2 + ..., the even part of a polynomial in x where y = x^2.
template <class T>
inline Vec<T> even_part(Vec<T>, T c0) {
  return broadcast(c0);
}

template <class T>
inline Vec<T> even_part(Vec<T>, T c0, T) {
  return broadcast(c0);
}

template <class T, class... Rest>
inline Vec<T> even_part(Vec<T> y, T c0, T, Rest... rest) {
  return even_part<T>(y, rest...) * y + c0;
}

// c0 + c1 x + c2 x^2 + ...
template <class T>
inline Vec<T> polynomial(Vec<T>, T c0) {
  return broadcast(c0);
}

template <class T, class... Rest>
inline Vec<T> polynomial(Vec<T> x, T c0, T c1, Rest... rest) {
  if constexpr (sizeof...(rest) < 6) {
    return polynomial<T>(x, c1, rest...) * x + c0;
  } else {
    // Two chains of half the length: they overlap, and gather fewer rounding errors.
    const Vec<T> y = x * x;
    return (even_part<T>(y, rest...) * x + even_part<T>(y, c1, rest...)) * x + c0;
  }
}

// `x` in every lane, from where the compiler cannot tell. GCC knows the machine's minimum and
// maximum by the pattern a < b ? a : b, which it destroys if it sees that one is a constant.
template <class T>
inline Vec<T> opaque(T x) {
  Vec<T> v = broadcast(x);
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// nan stays nan, as its comparisons are false.
template <class T>
inline Vec<T> at_least(Vec<T> x, T low) {
  const Vec<T> v = opaque(low);
  return v > x ? v : x;
}

template <class T>
inline Vec<T> at_most(Vec<T> x, T high) {
  const Vec<T> v = opaque(high);
  return v < x ? v : x;
}

// x = n ln 2 + r with an integer n and |r| <= ln(2) / 2; scale = 2^(n + kShift), which must be in
// the range of normal numbers.
template <class T>
struct Reduced {
  Vec<T> r, scale;
};

template <class T, int kShift>
inline Reduced<T> reduce(Vec<T> x) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  constexpr int kMantissaBits = std::numeric_limits<T>::digits - 1;
  constexpr int kBias = std::numeric_limits<T>::max_exponent - 1;
  // A number between 2^kMantissaBits and twice that has no fraction: the sum rounds. Its lowest
  // bits are those of the integer, here the exponent bits of `scale`.
  constexpr T kRound = T(3 * (std::int64_t(1) << (kMantissaBits - 1)) + kBias + kShift);
  constexpr T kPerLn2 = T(0x1.71547652b82fe1777d0ffda0d23ap0);
  // n * kLn2High is exact, even without a fused multiply-add.
  constexpr T kLn2High = kFloat ? T(0x1.62e4p-1) : T(0x1.62e42fefa38p-1);
  constexpr T kLn2Low = kFloat ? T(0x1.7f7d1cf79abc9e3b398p-20) : T(0x1.ef35793c7673007e5ep-45);
  const Vec<T> rounded = x * kPerLn2 + kRound;
  const Vec<T> n = rounded - kRound;
  return {(x - n * kLn2High) - n * kLn2Low, (Vec<T>)((IntVec<T>)rounded << kMantissaBits)};
}

// (exp(r) - 1) / r for |r| <= ln(2) / 2.
template <class T>
inline Vec<T> expm1_ratio(Vec<T> r) {
  if constexpr (std::is_same_v<T, float>) {
    return polynomial<T>(r, 1.0f, 0.49999998112f, 0.166665436381f, 0.0416672119857f,
                         0.00836652128528f, 0.00138818137341f);
  } else {
    return polynomial<T>(r, 1.0, 0.50000000000000051684, 0.16666666666666589325,
                         0.041666666666576848007, 0.0083333333333895304162,
                         0.0013888888931540479187, 0.00019841269719037755244,
                         0.000024801505298672726672, 2.7557407527136888757e-6,
                         2.7626029211309517448e-7, 2.5053776725215421282e-8);
  }
}

// exp(x + correction) for x <= 42 and a small correction.
template <class T>
inline Vec<T> exponential(Vec<T> x, Vec<T> correction = Vec<T>{}) {
  // Where exp is 0. Before it come subnormal numbers, to which the last product rounds.
  constexpr T kLowest = std::is_same_v<T, float> ? T(-105) : T(-746);
  constexpr int kShift = 64;
  constexpr T kUnshift = T(1) / (T(1ull << (kShift / 2)) * T(1ull << (kShift / 2)));
  const auto [remainder, scale] = reduce<T, kShift>(at_least<T>(x, kLowest));
  const Vec<T> r = remainder + correction;
  return (r * expm1_ratio<T>(r) + T(1)) * scale * kUnshift;
}

// exp(x) - 1 for -40 <= x <= 40.
template <class T>
inline Vec<T> exponential_minus_1(Vec<T> x) {
  const auto [r, scale] = reduce<T, 0>(x);
  return (r * scale) * expm1_ratio<T>(r) - (T(1) - scale);  // this way round -0 stays -0
}

// log(1 + x) for 0 <= x <= 1.
template <class T>
inline Vec<T> log_1_plus(Vec<T> x) {
  // 2 artanh(s). s^2 is at most 1/9, so that few terms do.
  const Vec<T> s = x / (x + T(2)), w = s * s;
  Vec<T> p;
  if constexpr (std::is_same_v<T, float>) {
    p = polynomial<T>(w, 0.333332101691f, 0.200106705982f, 0.140021904373f, 0.140004334874f);
  } else {
    p = polynomial<T>(w, 0.33333333333338384182, 0.19999999998131109585, 0.14285714520001844928,
                      0.11111096836909473325, 0.090913976907573437253, 0.076822825652246448964,
                      0.06792014228338422315, 0.04956671543402452444, 0.08859732802445294938);
  }
  const Vec<T> twice = s + s;
  return twice * (w * p) + twice;
}

// --- activations ---------------------------------------------------------------------------------
// Each has value(z), and either slope(a) = act'(z) from a = act(z), or value_and_slope(z).

template <class T>
struct Both {
  Vec<T> value, slope;
};

template <class T>
struct Identity {
  static Vec<T> value(Vec<T> z) { return z; }
  static Vec<T> slope(Vec<T>) { return broadcast(T(1)); }
};

template <class T>
struct Relu {
  static Vec<T> value(Vec<T> z) { return at_least<T>(z, T(0)); }
  static Vec<T> slope(Vec<T> a) { return a > T(0) ? broadcast(T(1)) : a; }
};

template <class T>
struct Elu {
  static Vec<T> value(Vec<T> z) {
    // Far below 0, exp(z) is lost beside 1. Above 0 anything may come out.
    return z < T(0) ? exponential_minus_1<T>(at_least<T>(z, T(-40))) : z;
  }
  static Vec<T> slope(Vec<T> a) { return a > T(0) ? broadcast(T(1)) : a + T(1); }
};

template <class T>
struct Tanh {
  static Vec<T> value(Vec<T> z) {
    const Vec<T> bounded = at_most<T>(at_least<T>(z, T(-20)), T(20));  // beyond, tanh rounds to 1
    const Vec<T> e = exponential_minus_1<T>(bounded + bounded);
    return e / (e + T(2));
  }
  static Vec<T> slope(Vec<T> a) { return T(1) - a * a; }
};

template <class T>
struct Sigmoid {
  static Vec<T> value(Vec<T> z) {
    const Vec<T> e = exponential<T>(at_most<T>(z, T(42)));  // beyond, 1 is lost beside exp(z)
    return e / (e + T(1));
  }
  static Vec<T> slope(Vec<T> a) { return a - a * a; }
};

template <class T>
struct Silu {
  static Vec<T> value(Vec<T> z) { return z * Sigmoid<T>::value(z); }
  static Both<T> value_and_slope(Vec<T> z) {
    // The slope needs z only where sigmoid(z) is neither 0 nor 1: no 0 * inf.
    constexpr T kLowest = std::is_same_v<T, float> ? T(-105) : T(-746);
    const Vec<T> bounded = at_most<T>(at_least<T>(z, kLowest), T(42));
    const Vec<T> e = exponential<T>(bounded);
    const Vec<T> complement = T(1) / (e + T(1));  // 1 - sigmoid(z)
    const Vec<T> sigmoid = e * complement;
    return {z * sigmoid, sigmoid + bounded * sigmoid * complement};
  }
};

template <class T>
struct Softplus {
  static Vec<T> value(Vec<T> z) { return combine(z, exponential<T>(-abs<T>(z))); }
  static Both<T> value_and_slope(Vec<T> z) {
    const Vec<T> e = exponential<T>(-abs<T>(z));
    const Vec<T> sigmoid = (z < T(0) ? e : broadcast(T(1))) / (e + T(1));
    return {combine(z, e), z > kThreshold ? broadcast(T(1)) : sigmoid};
  }

 private:
  static constexpr T kThreshold = T(20);  // torch's; above it, softplus is the identity

  // log(1 + exp(z)) = max(z, 0) + log(1 + exp(-|z|)), which does not overflow.
  static Vec<T> combine(Vec<T> z, Vec<T> e) {
    return z > kThreshold ? z : at_least<T>(z, T(0)) + log_1_plus<T>(e);
  }
};

// z Phi(z), Phi the standard normal distribution function.
template <class T>
struct Gelu {
  static Vec<T> value(Vec<T> z) {
    const Tail tail = Tail::of(z);
    return z * tail.distribution(z);
  }
  static Both<T> value_and_slope(Vec<T> z) {
    constexpr T kPerRoot2Pi = T(0.398942280401432677939946059934);
    const Tail tail = Tail::of(z);
    const Vec<T> below = tail.gauss * (tail.ratio - tail.a * kPerRoot2Pi);  // slope at -|z|
    return {z * tail.distribution(z), z < T(0) ? below : T(1) - below};
  }

 private:
  // Phi(-a) = exp(-a^2 / 2) ratio(a), so that its relative accuracy survives where it is tiny.
  struct Tail {
    Vec<T> a, gauss, ratio;

    static Tail of(Vec<T> z) {
      constexpr bool kFloat = std::is_same_v<T, float>;
      const Vec<T> a = at_most<T>(abs<T>(z), kFloat ? T(14.5) : T(39));  // beyond, Phi(-a) is 0
      // exp multiplies the rounding error of a^2 / 2 by it. The square of a's leading half is
      // exact; a^2 - leading^2 is small.
      using Int = typename VectorTraits<T>::Int;
      constexpr Int kLeading = ~((Int(1) << ((std::numeric_limits<T>::digits + 1) / 2)) - 1);
      const Vec<T> leading = (Vec<T>)((IntVec<T>)a & (kLeading - IntVec<T>{}));
      const Vec<T> gauss = exponential<T>(leading * leading * T(-0.5),
                                          (a - leading) * (a + leading) * T(-0.5));
      return {a, gauss, mills_ratio(a)};
    }

    Vec<T> distribution(Vec<T> z) const {
      const Vec<T> below = gauss * ratio;
      return z < T(0) ? below : T(1) - below;
    }
  };

  // Phi(-a) exp(a^2 / 2) for 0 <= a <= 14.5 (float), 39 (double).
  static Vec<T> mills_ratio(Vec<T> a) {
    if constexpr (std::is_same_v<T, float>) {
      return polynomial<T>(a, 0.500000002954f, 0.438295211887f, 0.183235272633f, 0.0406332542290f,
                           0.00411630820538f) /
             polynomial<T>(a, 1.0f, 1.67447540492f, 1.20250382885f, 0.469470970278f,
                           0.101858910728f, 0.0103179347978f);
    } else {
      return polynomial<T>(a, 0.49999999999999997435, 0.77488162205127566844,
                           0.59405776510582806517, 0.28934107579124794301,
                           0.097703241306206526493, 0.0236236458159184361,
                           0.0040895796467073822993, 0.00049045688848587602139,
                           0.000037257852263539200983, 1.3858713678348020476e-6) /
             polynomial<T>(a, 1.0, 2.3476478049054065751, 2.5612674679487404528,
                           1.7144155381563343702, 0.78206241660551703716,
                           0.25496996826889227148, 0.060438144352833651857,
                           0.010344447548543660875, 0.0012328669687210885146,
                           0.000093391585933677916436, 3.4738643556265609308e-6);
    }
  }
};

// --- loops over values ---------------------------------------------------------------------------

// Calls visit(Act<T>{}) for the activation's struct: the one choice, outside of all loops.
template <class T, class Visit>
inline void with_activation(Activation activation, Visit visit) {
  switch (activation) {
    case Activation::relu: return visit(Relu<T>{});
    case Activation::softplus: return visit(Softplus<T>{});
    case Activation::tanh: return visit(Tanh<T>{});
    case Activation::sigmoid: return visit(Sigmoid<T>{});
    case Activation::silu: return visit(Silu<T>{});
    case Activation::gelu: return visit(Gelu<T>{});
    case Activation::elu: return visit(Elu<T>{});
    case Activation::identity: return visit(Identity<T>{});
  }
}

template <class Act, class = void>
constexpr bool kSavesSlope = false;
template <class Act>
constexpr bool kSavesSlope<Act, std::void_t<decltype(&Act::value_and_slope)>> = true;

// z <- act(z). `count` is a multiple of kLanes<T>, here and below.
template <class T>
void activate(Activation activation, T* z, std::size_t count) {
  with_activation<T>(activation, [=](auto act) {
    for (std::size_t i = 0; i < count; i += kLanes<T>) {
      store<T>(z + i, act.value(load<T>(z + i)));
    }
  });
}

// z <- act(z) and slope <- act'(z); `slope` is left alone where `slope_from_value`.
template <class T>
void activate_saving(Activation activation, T* z, T* slope, std::size_t count) {
  with_activation<T>(activation, [=](auto act) {
    for (std::size_t i = 0; i < count; i += kLanes<T>) {
      if constexpr (kSavesSlope<decltype(act)>) {
        const auto both = act.value_and_slope(load<T>(z + i));
        store<T>(z + i, both.value);
        store<T>(slope + i, both.slope);
      } else {
        store<T>(z + i, act.value(load<T>(z + i)));
      }
    }
  });
}

// delta <- delta * act'(z), where value = act(z). Reads `slope` only if not `slope_from_value`.
template <class T>
void times_slope(Activation activation, T* delta, const T* value, const T* slope,
                 std::size_t count) {
  with_activation<T>(activation, [=](auto act) {
    for (std::size_t i = 0; i < count; i += kLanes<T>) {
      if constexpr (kSavesSlope<decltype(act)>) {
        store<T>(delta + i, load<T>(delta + i) * load<T>(slope + i));
      } else {
        store<T>(delta + i, load<T>(delta + i) * act.slope(load<T>(value + i)));
      }
    }
  });
}

}  // namespace anode
