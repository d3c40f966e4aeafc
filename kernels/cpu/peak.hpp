// The most that one core can multiply and add: what a kernel's speed is a share of.
#pragma once

#include <chrono>

#include "simd.hpp"

namespace anode {

// Keeps a value in a register and the compiler from knowing what it is.
template <class T>
inline void forget(Vec<T>& v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

// FLOP/s of the calling thread, two to a fused multiply-add: the best of many short stretches in
// about so many seconds.
template <class T>
double peak_flops(double seconds) {
  using Clock = std::chrono::steady_clock;
  // Two units times a latency of 4 to 5 need 8 to 10 chains; two registers hold the constants.
  constexpr int kChains = kVectorRegisters == 32 ? 24 : 12;
  constexpr int kSteps = 20000;  // some 50 to 100 microseconds
  Vec<T> factor = broadcast(T(0.5)), term = broadcast(T(0.5));
  forget<T>(factor);
  forget<T>(term);
  Vec<T> chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = broadcast(T(i));

  const auto start = Clock::now();
  double best = 0;
  do {
    const auto before = Clock::now();
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 32
      for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term;
    }
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) forget<T>(chain[i]);
    const std::chrono::duration<double> taken = Clock::now() - before;
    const double flops = 2.0 * kLanes<T> * kChains * kSteps / taken.count();
    best = flops > best ? flops : best;
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace anode
