// The continuous gradient of a solve: the adjoint ODE, integrated from the last output time to the
// first (Chen et al., Neural Ordinary Differential Equations, 2018, algorithm 1).
//
// Its state is the gradient with respect to t, y once more, the gradient a with respect to y, and
// those with respect to the parameters; a' = -a df/dy, and likewise the others. At every output
// time y is set to the solution there, and a takes in the output's cotangent. All this runs in the
// solver's time negated, u = -t, which increases. The rules for steps are the forward solve's, and
// all tiles make each attempt together.
//
// The parameters' gradients are integrals along the solution: nothing else depends on them. For
// each evaluation the products of deltas and inputs are summed over the tile's rows once, and added
// with one weight to the change over the step, with another to its error. The default norm takes
// that error in; the seminorm leaves it out (Kidger, Chen, Lyons, "Hey, that's not an ODE": faster
// ODE adjoints via seminorms, 2021). Sums of groups of tiles are added in the order of groups, so
// that results do not depend on the number of threads.
#pragma once

#include "adjoint.hpp"

namespace anode {

// The arguments of a continuous gradient.
template <class T>
struct AdjointCall {
  std::int64_t rows;
  const double* times;  // output times of the solve, increasing solver time
  std::int64_t num_times;
  const double* grid;  // fixed steps: the ends of all steps in negated time, increasing; the output
  std::int64_t num_grid;      // times are among them, once or twice
  const T* solution;          // [num_times, rows, dim]
  const T* grad;              // its cotangent, likewise
  bool seminorm;              // the parameters' gradients have no part in the norm
  T* x_grad;                  // [rows, data_dim], or null
  T* const* parameter_grads;  // null where not wanted; those have no part in the norm either
};

inline double larger_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// Takes steps from `t` until one reaches `end`, or ends exactly there if it `lands`, and counts
// them. attempt(t0, t1) makes a step and returns its error ratio; accept() keeps the last one made.
// Returns the step to go on with; in `result` the outcome, and t and dt if it is a failure.
template <class Attempt, class Accept>
double take_steps(const Controller& controller, const Options& options, double t, double end,
                  bool lands, double dt, Attempt attempt, Accept accept, Result& result) {
  auto rounded = [&](double x) { return options.float_time ? double(float(x)) : x; };
  auto fail = [&](Status status) {
    result.status = status;
    result.t = t;
    result.dt = dt;
    return dt;
  };
  const std::int64_t before = result.accepted + result.rejected;
  double ratio = 0, non_finite_at = t;
  int non_finite = 0;
  if (!std::isfinite(dt)) return fail(kNonFinite);
  dt = rounded(controller.clamp(dt));
  while (t < end) {
    if (result.accepted + result.rejected - before >= options.max_num_steps) return fail(kMaxSteps);
    double t1 = rounded(t + dt);
    if (!(t1 > t)) return fail(std::isfinite(ratio) ? kUnderflow : kNonFinite);
    if (lands && end <= t1) {
      t1 = end;
      dt = rounded(t1 - t);
    }
    ratio = attempt(t, t1);
    if (controller.accepts(dt, ratio)) {
      accept();
      ++result.accepted;
      if (t1 >= non_finite_at) non_finite = 0;
      t = t1;
    } else {
      ++result.rejected;
      if (!std::isfinite(ratio)) {
        ++non_finite;
        non_finite_at = t1;
        if (dt <= controller.min_step || non_finite == kMostNonFiniteAttempts) {
          return fail(kNonFinite);
        }
      }
    }
    dt = rounded(controller.next_step(dt, ratio));
  }
  return dt;
}

template <class Field>
class ContinuousGradient {
 public:
  using T = typename Field::T;

  ContinuousGradient(const Field& field, const Tableau& tableau, const Options& options,
                     const AdjointCall<T>& call)
      : field_(field),
        method_(tableau),
        options_(options),
        controller_(options, tableau.order),
        call_(call),
        tiles_{call.rows},
        dim_(field.dim()),
        carries_(options.control != std::int32_t(Control::fixed)),
        size_(wants_parameters(call) ? field.gradient_size() : 0),
        groups_(gradient_groups(tiles_.count(), kSums * size_ * sizeof(T))),
        state_size_(kParts * std::size_t(dim_) * kTileRows<T>),
        states_(2 * state_size_ * tiles_.count()),
        sums_(groups_ * kSums * size_),
        gradients_(4 * size_),
        y_squares_(tiles_.count()),
        adj_squares_(tiles_.count()),
        tile_slopes_(tiles_.count() * method_.stages) {
    current_ = states_.get();
    next_ = current_ + state_size_ * tiles_.count();
    theta_ = gradients_.get();
    theta1_ = theta_ + size_;
    first_ = theta1_ + size_;
    ratios_ = first_ + size_;
    std::fill_n(theta_, size_, T(0));
  }

  Result run() {
    for (std::int64_t i = 0; i < tiles_.count(); ++i) {
      std::fill_n(part(tiles_[i], current_, kAdjoint), dim_ * tiles_[i].lanes, T(0));
    }
    if (carries_) {
      adaptive();
    } else {
      fixed();
    }
    if (result_.status) return result_;
    for (std::int64_t i = 0; i < tiles_.count(); ++i) {
      const Tile tile = tiles_[i];
      if (!arrive(tile, current_, 0)) fail(kNonFiniteInput, 0);
      if (call_.x_grad) {
        write_rows(part(tile, current_, kAdjoint), tile, call_.x_grad, options_.data_dim);
      }
    }
    if (size_) field_.unpack_gradient(theta_, options_.backwards, call_.parameter_grads);
    return result_;
  }

 private:
  // Of a tile's state: y, a, and their derivatives.
  enum Part { kState, kAdjoint, kStateSlope, kAdjointSlope, kParts };

  // Sums of a group of tiles, each like all parameters' gradients: the derivative that a step hands
  // on to the next, changes over the step and to a time inside it, and the step's error.
  enum Sum { kHandedOn, kChange, kChangeInside, kError, kSums };

  // Weights of the stages in the sums; null for a sum that is not wanted.
  struct Weights {
    const double* of[kSums] = {};
    double h = 0;

    T operator()(int sum, int stage) const { return of[sum] ? T(h * of[sum][stage]) : T(0); }
  };

  struct Workspace {
    Buffer<T> memory;
    T *record, *deltas, *y_slopes, *adj_slopes, *values, *h, *minus_h, *squares, *product;
    const T* y_k[Tableau::kMostStages];
    const T* adj_k[Tableau::kMostStages];
    std::vector<Pair<T>> evaluation{1};
    int vectors = 0;  // for which the record and the deltas are prepared

    Workspace(const Field& field, int stages, std::size_t size) {
      const std::size_t dim = field.dim(), each = kTileRows<T>;
      const std::size_t rows = field.record_rows() + field.delta_rows() + (2 * stages + 1) * dim + 3;
      memory = Buffer<T>(rows * each + size);
      T* p = memory.get();
      auto take = [&](std::size_t rows) { return std::exchange(p, p + rows * each); };
      record = take(field.record_rows());
      deltas = take(field.delta_rows());
      y_slopes = take(stages * dim);
      adj_slopes = take(stages * dim);
      values = take(dim);
      h = take(1);
      minus_h = take(1);
      squares = take(1);
      product = p;
    }
  };

  static bool wants_parameters(const AdjointCall<T>& call) {
    return std::any_of(call.parameter_grads, call.parameter_grads + Field::parameters(call.shape),
                       [](const T* grad) { return grad; });
  }
