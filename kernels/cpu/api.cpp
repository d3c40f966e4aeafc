// The C ABI: everything that library.py calls. No exception leaves this file.

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define ANODE_HAS_FORK 1
#endif

#include "adjoint.hpp"
#include "continuous.hpp"
#include "mlp.hpp"
#include "runge_kutta.hpp"

#define ANODE_EXPORT extern "C" __attribute__((visibility("default")))

namespace anode {
namespace {

// Raised whenever a struct or a function below changes; ABI_VERSION in library.py is the same.
constexpr int kAbiVersion = 1;

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
  const Mlp<T> field(plan.field, typed<T>(parameters), plan.options.backwards, false);
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
  const Mlp<T> field(plan.field, typed<T>(parameters), plan.options.backwards, true);
  const auto& owned = static_cast<const OwnedTrace<T>&>(*trace);
  DiscreteGradient<Mlp<T>> gradient(field, plan.tableau, plan.options, owned.trace);
  result = gradient.run(static_cast<const T*>(grad), static_cast<T*>(x_grad),
                        reinterpret_cast<T* const*>(parameter_grads));
}

template <class T>
void continuous_gradient(const Plan& plan, const AdjointCall<T>& call,
                         const void* const* parameters, Result& result) {
  const Mlp<T> field(plan.field, typed<T>(parameters), plan.options.backwards, true);
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

// Solves; returns the checkpoints if `keep_trace`, to be freed by anode_free.
ANODE_EXPORT void* anode_solve(const Plan* plan, std::int64_t rows, const void* x,
                               std::int64_t x_stride, const void* const* parameters,
                               const double* times, std::int64_t num_times, const double* grid,
                               std::int64_t num_grid, void* out, int keep_trace, Result* result) {
  return guarded(*result, [&]() -> void* {
    if (plan->is_double) {
      const Call<double> call{rows, static_cast<const double*>(x), x_stride, times, num_times,
                              grid, num_grid, static_cast<double*>(out)};
      return solve(*plan, call, parameters, keep_trace, *result);
    }
    const Call<float> call{rows, static_cast<const float*>(x), x_stride, times, num_times,
                           grid, num_grid, static_cast<float*>(out)};
    return solve(*plan, call, parameters, keep_trace, *result);
  });
}

// The exact gradient of a solve; x_grad and parameter_grads may be null.
ANODE_EXPORT void anode_discrete_gradient(const Plan* plan, const void* trace,
                                          const void* const* parameters, const void* grad,
                                          void* x_grad, void* const* parameter_grads,
                                          Result* result) {
  guarded(*result, [&] {
    const auto* any = static_cast<const AnyTrace*>(trace);
    const auto gradient = plan->is_double ? discrete_gradient<double> : discrete_gradient<float>;
    gradient(*plan, any, parameters, grad, x_grad, parameter_grads, *result);
  });
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
