// Vectors of the machine's width by the compiler's vector extension: one source for every
// instruction set. GCC and Clang; no intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

namespace anode {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

// Enough for every instruction set, and a cache line.
constexpr std::size_t kAlignment = 64;

template <class T>
struct VectorTraits;

template <>
struct VectorTraits<float> {
  using Int = std::int32_t;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef float Memory __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef std::int32_t IntVector __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorTraits<double> {
  using Int = std::int64_t;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef double Memory __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef std::int64_t IntVector __attribute__((vector_size(kVectorBytes)));
};

// A vector of floats or doubles. Arithmetic, comparison and `mask ? a : b` work lane by lane.
template <class T>
using Vec = typename VectorTraits<T>::Vector;

// Integers of the same width, one per lane. What a comparison gives: -1 for true, 0 for false. A
// C-style cast between Vec and IntVec keeps the bits.
template <class T>
using IntVec = typename VectorTraits<T>::IntVector;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorTraits<T>::Memory*>(p);
}

template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorTraits<T>::Memory*>(p) = v;
}

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // not x + 0, which would turn -0 into 0
}

template <class T>
inline Vec<T> abs(Vec<T> v) {
  using I = typename VectorTraits<T>::Int;
  return (Vec<T>)((IntVec<T>)v & (std::numeric_limits<I>::max() - IntVec<T>{}));
}

// The larger of two lanes, nan if either is.
template <class T>
inline Vec<T> max_nan(Vec<T> a, Vec<T> b) {
  return a > b ? a : (b != b || b >= a ? b : a);
}

// --- loops that leave nothing of themselves -------------------------------------------------------

#define ANODE_INLINE __attribute__((always_inline))

template <class F, int... I>
ANODE_INLINE inline void unrolled(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), ..., f(Count - 1) with compile-time constants. Unlike an unrolled loop this lets an array
// of vectors that they index live in registers. f is a lambda marked ANODE_INLINE.
template <int Count, class F>
ANODE_INLINE inline void unrolled(F f) {
  unrolled(f, std::make_integer_sequence<int, Count>{});
}

// Calls f with `count`, 1 to Most, as a compile-time constant.
template <int Most, class F>
inline void with_constant(int count, F&& f) {
  if constexpr (Most > 1) {
    if (count < Most) return with_constant<Most - 1>(count, f);
  }
  f(std::integral_constant<int, Most>{});
}

// --- sums across lanes ----------------------------------------------------------------------------

// Lanes of `a` and `b` in blocks of `Stride`, taken from the lower (`Upper` false) or upper halves
// of blocks of 2 * Stride: a's first, b's after it.
template <class T, int Stride, bool Upper, std::size_t... Lane>
inline Vec<T> zip_blocks(Vec<T> a, Vec<T> b, std::index_sequence<Lane...>) {
  constexpr int kWidth = kLanes<T>;
  constexpr auto source = [](int lane) {
    const int block = lane / (2 * Stride) * (2 * Stride), rest = lane % (2 * Stride);
    const int from = block + (Upper ? Stride : 0);
    return rest < Stride ? from + rest : kWidth + from + rest - Stride;
  };
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(int(Lane))...);
#else
  return __builtin_shuffle(a, b, IntVec<T>{source(int(Lane))...});
#endif
}

// Sums each of kLanes<T> vectors over its lanes; lane i of the result is the sum of v[i].
// Always the same order of additions. Overwrites v.
template <class T, int Stride = 1>
ANODE_INLINE inline Vec<T> sum_each(Vec<T>* v) {
  constexpr int kWidth = kLanes<T>;
  constexpr auto kAll = std::make_index_sequence<kWidth>{};
  unrolled<kWidth / (2 * Stride)>([&](auto i) ANODE_INLINE {
    v[i] = zip_blocks<T, Stride, false>(v[2 * i], v[2 * i + 1], kAll) +
           zip_blocks<T, Stride, true>(v[2 * i], v[2 * i + 1], kAll);
  });
  if constexpr (2 * Stride < kWidth) return sum_each<T, 2 * Stride>(v);
  return v[0];
}

}  // namespace anode
