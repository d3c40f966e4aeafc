// The C ABI: everything that library.py calls. No exception leaves this file.

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define ANODE_HAS_FORK 1
#endif

#include "adjoint.hpp"
#include "continuous.hpp"
#include "mlp.hpp"
#include "peak.hpp"
#include "runge_kutta.hpp"

#define ANODE_EXPORT extern "C" __attribute__((visibility("default")))

namespace anode {
namespace {

// Raised whenever a struct or a function below changes; ABI_VERSION in library.py is the same.
constexpr int kAbiVersion = 3;

// What stays the same from call to call.
struct Plan {
  MlpShape field;
  std::int32_t is_double;
  Tableau tableau;
  Options options;
};

struct AnyTrace {
  virtual ~AnyTrace() = default;
};

template <class T>
struct OwnedTrace : AnyTrace {
  Trace<T> trace;
};

template <class T>
const T* const* typed(const void* const* pointers) {
  return reinterpret_cast<const T* const*>(pointers);
}

template <class T>
void* solve(const Plan& plan, Call<T> call, const void* const* parameters, bool keep_trace,
            Result& result) {
  const Mlp<T> field(plan.field, typed<T>(parameters), plan.options.backwards, true, false);
  std::unique_ptr<OwnedTrace<T>> owned;
  if (keep_trace) owned = std::make_unique<OwnedTrace<T>>();
  Solver<Mlp<T>> solver(field, plan.tableau, plan.options, call, owned ? &owned->trace : nullptr);
  result = solver.solve();
  if (result.status != kSuccess) return nullptr;
  return static_cast<AnyTrace*>(owned.release());
}

template <class T>
void discrete_gradient(const Plan& plan, const AnyTrace* trace, const void* const* parameters,
                       const void* grad, void* x_grad, void* const* parameter_grads,
                       Result& result) {
  const Trace<T>& kept = static_cast<const OwnedTrace<T>&>(*trace).trace;
  const Mlp<T> field(plan.field, typed<T>(parameters), plan.options.backwards,
                     !kept.has_all_records(), true);
  DiscreteGradient<Mlp<T>> gradient(field, plan.tableau, plan.options, kept);
  result = gradient.run(static_cast<const T*>(grad), static_cast<T*>(x_grad),
                        reinterpret_cast<T* const*>(parameter_grads));
}

template <class T>
void continuous_gradient(const Plan& plan, const AdjointCall<T>& call,
                         const void* const* parameters, Result& result) {
  const Mlp<T> field(plan.field, typed<T>(parameters), plan.options.backwards, true, true);
  result = ContinuousGradient<Mlp<T>>(field, plan.tableau, plan.options, call).run();
}

template <class F>
auto guarded(Result& result, F f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    result = {};
    result.status = kOutOfMemory;
    return decltype(f())();
  }
}

#ifdef ANODE_HAS_FORK
// A child forked while another thread holds the lock would wait for it for ever. (That a child uses
// one thread only is library.py's care.)
void lock_cache() { block_cache().lock(); }
void unlock_cache() { block_cache().unlock(); }
[[maybe_unused]] const int registered = pthread_atfork(lock_cache, unlock_cache, unlock_cache);
#endif

}  // namespace
}  // namespace anode

using namespace anode;

ANODE_EXPORT int anode_abi_version() { return kAbiVersion; }

ANODE_EXPORT void anode_set_thread_pool(void* parallel_for, void* num_threads) {
  thread_pool.parallel_for = reinterpret_cast<decltype(thread_pool.parallel_for)>(parallel_for);
  thread_pool.num_threads = reinterpret_cast<decltype(thread_pool.num_threads)>(num_threads);
}

// The two functions below take their arguments as one block of 8-byte words: a struct and, behind
// it, arrays. Through ctypes every argument of its own would cost as much as a small evaluation.

// Behind it: the parameters' addresses, the times, the grid.
struct SolveArguments {
  const Plan* plan;
  std::int64_t rows;
  const void* x;
  std::int64_t x_stride;
  void* out;
  std::int64_t keep_trace;
  Result* result;
  std::int64_t num_times;
  std::int64_t num_grid;
};

// Solves; returns the checkpoints if `keep_trace`, to be freed by anode_free.
ANODE_EXPORT void* anode_solve(const SolveArguments* a) {
  const auto* parameters = reinterpret_cast<const void* const*>(a + 1);
  const auto* times = reinterpret_cast<const double*>(parameters + 2 * a->plan->field.layers());
  auto run = [&](auto scalar) {
    using T = decltype(scalar);
    const Call<T> call{a->rows, static_cast<const T*>(a->x), a->x_stride,
                       times,   a->num_times,                times + a->num_times,
                       a->num_grid, static_cast<T*>(a->out)};
    return solve(*a->plan, call, parameters, a->keep_trace, *a->result);
  };
  return guarded(*a->result, [&] { return a->plan->is_double ? run(0.0) : run(0.0f); });
}

// Behind it: the parameters' addresses and, if they are wanted, those of their gradients.
struct DiscreteGradientArguments {
  const Plan* plan;
  const AnyTrace* trace;
  const void* grad;
  void* x_grad;  // may be null
  Result* result;
  std::int64_t wants_parameters;
};

// The exact gradient of a solve.
ANODE_EXPORT void anode_discrete_gradient(const DiscreteGradientArguments* a) {
  const auto* parameters = reinterpret_cast<void* const*>(a + 1);
  const std::int64_t count = 2 * a->plan->field.layers();
  void* const* grads = a->wants_parameters ? parameters + count : nullptr;
  auto run = a->plan->is_double ? discrete_gradient<double> : discrete_gradient<float>;
  guarded(*a->result,
          [&] { run(*a->plan, a->trace, parameters, a->grad, a->x_grad, grads, *a->result); });
}

// The gradient of a solve by the adjoint ODE; see AdjointCall. `plan` says how that is solved.
ANODE_EXPORT void anode_continuous_gradient(const Plan* plan, std::int64_t rows,
                                            const void* const* parameters, const double* times,
                                            std::int64_t num_times, const double* grid,
                                            std::int64_t num_grid, const void* solution,
                                            const void* grad, int seminorm, void* x_grad,
                                            void* const* parameter_grads, Result* result) {
  auto run = [&](auto scalar) {
    using T = decltype(scalar);
    const AdjointCall<T> call{rows,
                              times,
                              num_times,
                              grid,
                              num_grid,
                              static_cast<const T*>(solution),
                              static_cast<const T*>(grad),
                              seminorm != 0,
                              static_cast<T*>(x_grad),
                              reinterpret_cast<T* const*>(parameter_grads)};
    continuous_gradient<T>(*plan, call, parameters, *result);
  };
  guarded(*result, [&] { plan->is_double ? run(0.0) : run(0.0f); });
}

ANODE_EXPORT void anode_free(void* trace) { delete static_cast<AnyTrace*>(trace); }

// Floating point operations per second of one core's multiply-add units, measured for `seconds`.
ANODE_EXPORT double anode_peak_flops(int is_double, double seconds) {
  return is_double ? peak_flops<double>(seconds) : peak_flops<float>(seconds);
}
