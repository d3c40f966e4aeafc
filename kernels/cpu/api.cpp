// The C ABI: everything that library.py calls. No exception leaves this file.

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define ANODE_HAS_FORK 1
#endif

#include "adjoint.hpp"
#include "combine.hpp"
#include "continuous.hpp"
#include "conv.hpp"
#include "first_stage.hpp"
#include "peak.hpp"
#include "program.hpp"
#include "runge_kutta.hpp"

#define ANODE_EXPORT extern "C" __attribute__((visibility("default")))

namespace anode {
namespace {

// Raised whenever a struct or a function below changes; ABI_VERSION in library.py is the same.
constexpr int kAbiVersion = 6;

// What stays the same from call to call.
struct Plan {
  const ProgramShape* field;
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
void* solve(const Plan& plan, const Call<T>& call, const void* const* parameters,
            const T* expected, std::int64_t expected_rows, bool keep_trace, Result& result) {
  const ProgramField<T> field(*plan.field, typed<T>(parameters), plan.options.backwards, true,
                              false);
  if (expected) {
    const FirstStage<ProgramField, T> first(field, *plan.field, typed<T>(parameters), plan.options,
                                            call, expected_rows);
    if (!first.has(expected, result)) return nullptr;
  }
  std::unique_ptr<OwnedTrace<T>> owned;
  if (keep_trace) owned = std::make_unique<OwnedTrace<T>>();
  Solver<ProgramField<T>> solver(field, plan.tableau, plan.options, call,
                                 owned ? &owned->trace : nullptr);
  result = solver.solve();
  if (result.status != kSuccess) return nullptr;
  return static_cast<AnyTrace*>(owned.release());
}

template <class T>
void discrete_gradient(const Plan& plan, const AnyTrace* trace, const void* const* parameters,
                       const void* grad, void* x_grad, void* const* parameter_grads,
                       Result& result) {
  const Trace<T>& kept = static_cast<const OwnedTrace<T>&>(*trace).trace;
  const ProgramField<T> field(*plan.field, typed<T>(parameters), plan.options.backwards,
                              !kept.has_all_records(), true);
  DiscreteGradient<ProgramField<T>> gradient(field, plan.tableau, plan.options, kept);
  result = gradient.run(static_cast<const T*>(grad), static_cast<T*>(x_grad),
                        reinterpret_cast<T* const*>(parameter_grads));
}

template <class T>
void continuous_gradient(const Plan& plan, const AdjointCall<T>& call,
                         const void* const* parameters, Result& result) {
  const ProgramField<T> field(*plan.field, typed<T>(parameters), plan.options.backwards, true,
                              true);
  result = ContinuousGradient<ProgramField<T>>(field, plan.tableau, plan.options, call).run();
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

// Images and tensors of a call of a convolutional field; see Images and ConvGradients.
struct ConvArguments {
  std::int64_t batch, height, width;
  const void* t;
  std::int64_t t_stride;
  const void* y;
  void* record;           // null: an evaluation keeps none
  void* out;              // of an evaluation
  const void* cotangent;  // of a gradient, from here on
  void *y_grad, *t_grad;
  void* parameter_grads[6];
};

// A convolutional field with its weights packed.
struct AnyConvolutions {
  virtual ~AnyConvolutions() = default;
  virtual std::int64_t record_size(const ConvArguments& a) const = 0;
  virtual void evaluate(const ConvArguments& a) const = 0;
  virtual void vjp(const ConvArguments& a) const = 0;
};

template <class T>
class OwnedConvolutions : public AnyConvolutions {
 public:
  OwnedConvolutions(const ConvShape& shape, const void* const* parameters, bool differentiates)
      : field_(shape, typed<T>(parameters), differentiates) {}

  std::int64_t record_size(const ConvArguments& a) const override {
    return field_.record_size(a.batch, int(a.height), int(a.width));
  }

  void evaluate(const ConvArguments& a) const override {
    field_.evaluate(images(a), static_cast<T*>(a.out), static_cast<T*>(a.record));
  }

  void vjp(const ConvArguments& a) const override {
    ConvGradients<T> gradients{static_cast<T*>(a.y_grad), static_cast<T*>(a.t_grad), {}};
    for (int i = 0; i < 6; ++i) gradients.parameters[i] = static_cast<T*>(a.parameter_grads[i]);
    field_.vjp(images(a), static_cast<const T*>(a.record), static_cast<const T*>(a.cotangent),
               gradients);
  }

 private:
  static Images<T> images(const ConvArguments& a) {
    return {a.batch,    int(a.height),              int(a.width), static_cast<const T*>(a.t),
            a.t_stride, static_cast<const T*>(a.y)};
  }

  const Convolutions<T> field_;
};

// Whether there was memory enough.
template <class F>
int enough_memory(F f) {
  try {
    f();
    return 1;
  } catch (const std::bad_alloc&) {
    return 0;
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
  const void* expected;  // dy/dt of the first rows at the first time as the user has it, or null
  std::int64_t expected_rows;
};

// Solves; returns the checkpoints if `keep_trace`, to be freed by anode_free. Does not solve if the
// field is not as expected.
ANODE_EXPORT void* anode_solve(const SolveArguments* a) {
  const auto* parameters = reinterpret_cast<const void* const*>(a + 1);
  const auto* times = reinterpret_cast<const double*>(parameters + a->plan->field->parameters());
  auto run = [&](auto scalar) {
    using T = decltype(scalar);
    const Call<T> call{a->rows, static_cast<const T*>(a->x), a->x_stride,
                       times,   a->num_times,                times + a->num_times,
                       a->num_grid, static_cast<T*>(a->out)};
    return solve(*a->plan, call, parameters, static_cast<const T*>(a->expected),
                 a->expected_rows, a->keep_trace, *a->result);
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
  const std::int64_t count = a->plan->field->parameters();
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

// A convolutional field, to be freed by anode_conv_free; null if there is no memory.
ANODE_EXPORT void* anode_conv_pack(const ConvShape* shape, int is_double,
                                   const void* const* parameters, int differentiates) {
  AnyConvolutions* field = nullptr;
  enough_memory([&] {
    if (is_double) {
      field = new OwnedConvolutions<double>(*shape, parameters, differentiates);
    } else {
      field = new OwnedConvolutions<float>(*shape, parameters, differentiates);
    }
  });
  return field;
}

ANODE_EXPORT void anode_conv_free(void* field) { delete static_cast<AnyConvolutions*>(field); }

// Numbers in the record of an evaluation.
ANODE_EXPORT std::int64_t anode_conv_record_size(const void* field, const ConvArguments* a) {
  return static_cast<const AnyConvolutions*>(field)->record_size(*a);
}

// Both return 1, or 0 if there is no memory.
ANODE_EXPORT int anode_conv_evaluate(const void* field, const ConvArguments* a) {
  return enough_memory([&] { static_cast<const AnyConvolutions*>(field)->evaluate(*a); });
}

ANODE_EXPORT int anode_conv_vjp(const void* field, const ConvArguments* a) {
  return enough_memory([&] { static_cast<const AnyConvolutions*>(field)->vjp(*a); });
}

// --- steps of a field that is evaluated elsewhere -------------------------------------------------

// Arguments as blocks of 8-byte words again. Behind each: the addresses of `count` stages.

struct CombineArguments {
  std::int64_t is_double;
  std::int64_t n;
  const void* y;  // may be null
  void* out;
  double h;
  const double* weights;
  std::int64_t count;
};

struct ErrorArguments {
  std::int64_t is_double;
  const void *y0, *y1;
  double rtol, atol;
  const void *rtols, *atols;  // may be null
  const std::int64_t* ends;
  std::int64_t parts;
  double h;
  const double* weights;
  std::int64_t count;
};

template <class T, class Arguments>
WeightedSum<T> sum_of(const Arguments* a) {
  return {a->h, a->weights, reinterpret_cast<const T* const*>(a + 1), a->count};
}

// The sum of y and the stages with their weights.
ANODE_EXPORT void anode_combine(const CombineArguments* a) {
  auto run = [&](auto scalar) {
    using T = decltype(scalar);
    combine(sum_of<T>(a), static_cast<const T*>(a->y), a->n, static_cast<T*>(a->out));
  };
  a->is_double ? run(0.0) : run(0.0f);
}

// The gradients of the stages, one after the other, from that of the sum, here `y`.
ANODE_EXPORT void anode_spread(const CombineArguments* a) {
  auto run = [&](auto scalar) {
    using T = decltype(scalar);
    const WeightedSum<T> sum{a->h, a->weights, nullptr, a->count};
    spread(sum, static_cast<const T*>(a->y), a->n, static_cast<T*>(a->out));
  };
  a->is_double ? run(0.0) : run(0.0f);
}

// The size of an error relative to the tolerance; -1 if there is no memory.
ANODE_EXPORT double anode_error_ratio(const ErrorArguments* a) {
  auto run = [&](auto scalar) {
    using T = decltype(scalar);
    const Tolerance<T> tolerance{T(a->rtol), T(a->atol), static_cast<const T*>(a->rtols),
                                 static_cast<const T*>(a->atols)};
    return error_ratio(sum_of<T>(a), static_cast<const T*>(a->y0), static_cast<const T*>(a->y1),
                       tolerance, a->ends, a->parts);
  };
  double ratio = -1;
  enough_memory([&] { ratio = a->is_double ? run(0.0) : run(0.0f); });
  return ratio;
}

struct TimesArguments {
  std::int64_t is_double;
  void* out;
  const double* c;
  std::int64_t count;
  std::int64_t side0, side1;
  double t0, t1, sign;
};

// The times of a step's stages.
ANODE_EXPORT void anode_node_times(const TimesArguments* a) {
  auto run = [&](auto scalar) {
    using T = decltype(scalar);
    node_times(a->c, a->count, a->t0, a->t1, a->side0, a->side1, a->sign,
               static_cast<T*>(a->out));
  };
  a->is_double ? run(0.0) : run(0.0f);
}

// Floating point operations per second of one core's multiply-add units, measured for `seconds`.
ANODE_EXPORT double anode_peak_flops(int is_double, double seconds) {
  return is_double ? peak_flops<double>(seconds) : peak_flops<float>(seconds);
}
