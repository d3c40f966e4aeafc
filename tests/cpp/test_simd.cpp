// Vectors against the same operation on one number at a time.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.hpp"
#include "simd.hpp"

namespace {

using anode::kLanes;
using anode::Vec;

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class T>
std::vector<T> specials() {
  using Limits = std::numeric_limits<T>;
  return {T(0),          -T(0),           T(1),          -T(1.5),
          Limits::min(), -Limits::max(),  Limits::max(), -Limits::denorm_min(),
          Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(), -Limits::quiet_NaN()};
}

// The memory ends where the vector does, so that a sanitizer sees a byte too many.
template <class T>
void test_load_and_store_at_every_offset() {
  for (int offset = 0; offset <= kLanes<T>; ++offset) {
    std::vector<T> from(offset + kLanes<T>), to(offset + kLanes<T>, T(-7));
    for (std::size_t i = 0; i < from.size(); ++i) from[i] = T(i + 1);
    const Vec<T> v = anode::load(from.data() + offset);
    anode::store(to.data() + offset, v);
    for (int i = 0; i < kLanes<T>; ++i) CHECK(v[i] == T(offset + i + 1));
    for (int i = 0; i < offset; ++i) CHECK(to[i] == T(-7));
    for (int i = offset; i < offset + kLanes<T>; ++i) CHECK(to[i] == from[i]);
  }
}

template <class T>
void test_broadcast_keeps_every_bit() {
  for (T x : specials<T>()) {
    const Vec<T> v = anode::broadcast(x);
    for (int i = 0; i < kLanes<T>; ++i) CHECK(same_bits<T>(v[i], x));
  }
}

template <class T>
void test_abs() {
  for (T x : specials<T>()) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      Vec<T> v = anode::broadcast(T(-3));
      v[lane] = x;
      const Vec<T> a = anode::abs<T>(v);
      for (int i = 0; i < kLanes<T>; ++i) {
        CHECK(same_bits<T>(a[i], std::fabs(i == lane ? x : T(-3))));
      }
    }
  }
}

template <class T>
void test_max_nan() {
  for (T x : specials<T>()) {
    for (T y : specials<T>()) {
      const Vec<T> m = anode::max_nan<T>(anode::broadcast(x), anode::broadcast(y));
      for (int i = 0; i < kLanes<T>; ++i) {
        const T got = m[i];
        CHECK(std::isnan(x) || std::isnan(y) ? std::isnan(got) : got == std::fmax(x, y));
      }
    }
  }
}

// Each sum is exact, and no two are alike.
template <class T>
void test_sum_each() {
  Vec<T> v[kLanes<T>];
  T want[kLanes<T>] = {};
  for (int i = 0; i < kLanes<T>; ++i) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      v[i][lane] = T((i + 1) * 100 + lane * lane);
      want[i] += v[i][lane];
    }
  }
  const Vec<T> sums = anode::sum_each<T>(v);
  for (int i = 0; i < kLanes<T>; ++i) CHECK(sums[i] == want[i]);
}

// The order of additions, and so the rounding, does not depend on the place among the vectors.
template <class T>
void test_sum_each_rounds_alike() {
  Vec<T> terms;
  for (int lane = 0; lane < kLanes<T>; ++lane) terms[lane] = T(1) / T(3 + 7 * lane);
  Vec<T> v[kLanes<T>];
  for (Vec<T>& copy : v) copy = terms;
  const Vec<T> sums = anode::sum_each<T>(v);
  for (int i = 1; i < kLanes<T>; ++i) CHECK(same_bits<T>(sums[i], sums[0]));
}

template <class T>
void test_all() {
  static_assert(sizeof(Vec<T>) == anode::kVectorBytes);
  test_load_and_store_at_every_offset<T>();
  test_broadcast_keeps_every_bit<T>();
  test_abs<T>();
  test_max_nan<T>();
  test_sum_each<T>();
  test_sum_each_rounds_alike<T>();
}

}  // namespace

int main() {
  test_all<float>();
  test_all<double>();
  return failed;
}
