// The continuous gradient of a solve: the adjoint ODE, integrated from the last output time to the
// first (Chen et al., Neural Ordinary Differential Equations, 2018, algorithm 1).
//
// Its state is the gradient with respect to t, y once more, the gradient a with respect to y, and
// those with respect to the parameters; a' = -a df/dy, and likewise the others. At every output
// time y is set to the solution there, and a takes in the output's cotangent. All this runs in the
// solver's time negated, u = -t, which increases. The rules for steps are the forward solve's, and
// all tiles make each attempt together.
//
// The parameters' gradients are integrals along the solution: nothing else depends on them. The
// products of an evaluation's deltas and inputs are summed over the tile's rows once, and added
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
  // Fixed steps: their ends in negated time, increasing. Output times are among them; where the
  // grids of two intervals meet, they may stand twice.
  const double* grid;
  std::int64_t num_grid;
  const T* solution;          // [num_times, rows, dim]
  const T* grad;              // its cotangent
  bool seminorm;              // the parameters' gradients take no part in the norm
  T* x_grad;                  // [rows, data_dim], or null
  T* const* parameter_grads;  // null for those not wanted: they take no part in the norm either
};

inline double larger_or_nan(double a, double b) { return a > b || a != a ? a : b; }

template <class Field>
class ContinuousGradient {
 public:
  using T = typename Field::T;

  // `options` are those of the adjoint solve; their `backwards` and `data_dim` those of the solve.
  ContinuousGradient(const Field& field, const Tableau& tableau, const Options& options,
                     const AdjointCall<T>& call)
      : field_(field),
        method_(tableau),
        options_(options),
        controller_(options, tableau.order),
        call_(call),
        tiles_{call.rows},
        dim_(field.dim()),
        adaptive_(options.control != std::int32_t(Control::fixed)),
        size_(wants_parameters() ? field.gradient_size() : 0),
        groups_(gradient_groups(tiles_.count(), kSums * size_ * sizeof(T))),
        tile_size_(kParts * std::size_t(dim_) * kTileRows<T>),
        states_(2 * tile_size_ * tiles_.count()),
        sums_(groups_ * kSums * size_),
        gradients_(4 * size_),
        tile_slopes_(tiles_.count() * method_.stages) {
    current_ = states_.get();
    next_ = current_ + tile_size_ * tiles_.count();
    theta_ = gradients_.get();
    theta1_ = theta_ + size_;
    first_ = theta1_ + size_;
    ratios_ = first_ + size_;
    std::fill_n(theta_, size_, T(0));
    for (auto& squares : squares_) squares.resize(tiles_.count());
    for (std::int64_t i = 0; i < tiles_.count(); ++i) {
      const int size = dim_ * tiles_[i].lanes;
      std::fill_n(current_ + i * tile_size_ + kAdjoint * size, size, T(0));
    }
  }

  Result run() {
    if (adaptive_) {
      adaptive();
    } else {
      fixed();
    }
    if (result_.status) return result_;
    for (std::int64_t i = 0; i < tiles_.count(); ++i) {
      const Tile tile = tiles_[i];
      T* state = current_ + i * tile_size_;
      arrive(tile, 0, state);
      if (!call_.x_grad) continue;
      write_rows(state + kAdjoint * dim_ * tile.lanes, tile, call_.x_grad, options_.data_dim);
    }
    if (wants_parameters()) field_.unpack_gradient(theta_, call_.parameter_grads);
    return result_;
  }

 private:
  // Of a tile's state: y, a, and f and a df/dy there.
  enum Part { kY, kAdjoint, kYSlope, kAdjointSlope, kParts };

  // Sums over a group of tiles, each like the parameters' gradients: their derivative at the stage
  // that is handed on to the next step, their change over the step, its error, and their change up
  // to a time inside the step.
  enum Sum { kHandedOn, kChange, kError, kInside, kSums };

  // Weights of a step's stages in the sums, over h; null for a sum that is not wanted.
  struct Weights {
    const double* of[kSums] = {};
    double h = 0;

    T operator()(int sum, int stage) const { return of[sum] ? T(h * of[sum][stage]) : T(0); }
  };

  struct Workspace {
    Buffer<T> memory;
    T *record, *deltas, *y_slopes, *adjoint_slopes, *values, *h, *minus_h, *squares, *scratch,
        *product;
    const T* y_k[Tableau::kMostStages];
    const T* adjoint_k[Tableau::kMostStages];
    std::vector<Pair<T>> evaluation{1};
    int vectors = 0;  // for which the record and the deltas are prepared

    Workspace(const Field& field, int stages, std::size_t size) {
      const std::size_t dim = field.dim();
      const std::size_t of_field =
          field.record_rows() + field.delta_rows() + field.scratch_rows();
      memory = Buffer<T>((of_field + (2 * stages + 1) * dim + 3) * kTileRows<T> + size);
      T* p = memory.get();
      auto take = [&](std::size_t rows) { return std::exchange(p, p + rows * kTileRows<T>); };
      record = take(field.record_rows());
      deltas = take(field.delta_rows());
      y_slopes = take(stages * dim);
      adjoint_slopes = take(stages * dim);
      values = take(dim);
      h = take(1);
      minus_h = take(1);
      squares = take(1);
      scratch = take(field.scratch_rows());
      product = p;
    }
  };

  bool wants_parameters() const {
    T* const* grads = call_.parameter_grads;
    return grads && std::any_of(grads, grads + field_.parameters(), [](T* grad) { return grad; });
  }

  // f(tile, workspace, the sums of its group) for every tile. Leaves the sums' totals over the
  // groups in the first group's.
  template <class F>
  void for_each_tile(const Weights& weights, F f) {
    const std::int64_t tiles = tiles_.count();
    const std::size_t size = kSums * size_;
    parallel_for(groups_, [&](std::int64_t begin, std::int64_t end) {
      typename WorkspacePool<Workspace>::Loan loan(workspaces_, [&] {
        return std::make_unique<Workspace>(field_, method_.stages, size_);
      });
      Workspace& w = *loan;
      for (std::int64_t g = begin; g < end; ++g) {
        T* sums = sums_.get() + g * size;
        std::fill_n(sums, size, T(0));
        for (std::int64_t i = g * tiles / groups_; i < (g + 1) * tiles / groups_; ++i) {
          const Tile tile = tiles_[i];
          if (w.vectors != tile.vectors) {
            field_.prepare_record(w.record, tile.vectors);
            field_.prepare_deltas(w.deltas, tile.vectors);
            w.vectors = tile.vectors;
          }
          f(tile, w, sums);
        }
      }
    });
    for (int s = 0; s < kSums; ++s) {
      if (s != kHandedOn && !weights.of[s]) continue;
      for (std::int64_t g = 1; g < groups_; ++g) add(total(s), T(1), total(s) + g * size);
    }
  }

  T* total(int sum) const { return sums_.get() + sum * size_; }

  // to += weight * from, both like the parameters' gradients.
  void add(T* to, T weight, const T* from) const {
    for (std::size_t e = 0; e < size_; ++e) to[e] += weight * from[e];
  }

  // Makes y the solution at an output time and adds the output's cotangent to a. Returns whether a
  // is finite.
  bool arrive(const Tile& tile, std::int64_t output, T* state) const {
    const int size = dim_ * tile.lanes;
    const std::int64_t first = output * call_.rows * dim_;
    T *y = state + kY * size, *adjoint = state + kAdjoint * size;
    read_rows(call_.grad + first, dim_, dim_, tile, y, dim_);
    for (int i = 0; i < size; i += tile.lanes) {
      // Not the lanes beyond the batch: they must not count.
      for (int r = 0; r < tile.rows; ++r) adjoint[i + r] += y[i + r];
    }
    read_rows(call_.solution + first, dim_, dim_, tile, y, dim_);
    return all_finite(adjoint, size);
  }

  // --- evaluations and steps of a tile

  T* argument(const Tile& tile, Workspace& w) const {
    return w.record + Field::kInputRows * tile.lanes;
  }

  T* cotangent(Workspace& w) const {
    return field_.cotangent(w.deltas);
  }

  // f and a df/dy at the negated time u, from the y and a in the record and the deltas.
  void evaluate(const Tile& tile, Workspace& w, T u, T* y_slope, T* adjoint_slope) const {
    std::fill_n(w.record, tile.lanes, -u);
    field_.evaluate_recording(w.record, y_slope, w.scratch, tile.vectors);
    field_.vjp(w.record, w.deltas, adjoint_slope, w.scratch, tile.vectors);
  }

  // What this evaluation, a stage of a step, adds to the gradients of t and the parameters.
  void integrate(const Tile& tile, Workspace& w, int stage, const Weights& weights, T* sums) {
    if (adaptive_) {
      field_.time_gradient(w.record, w.deltas, w.values, w.scratch, tile.vectors);
      double slope = 0;
      for (int r = 0; r < tile.rows; ++r) slope += double(w.values[r]);
      tile_slopes_[tile.index * method_.stages + stage] = slope;
    }
    if (size_ == 0) return;
    w.evaluation[0] = {w.deltas, w.record};
    if (adaptive_ && stage == method_.stages - 1) {
      return field_.accumulate_gradient(w.evaluation, tile.vectors, sums + kHandedOn * size_);
    }
    bool made = false;
    for (int s = kChange; s < kSums; ++s) {
      const T weight = weights(s, stage);
      if (weight == 0) continue;
      if (!made) {
        std::fill_n(w.product, size_, T(0));
        field_.accumulate_gradient(w.evaluation, tile.vectors, w.product);
        made = true;
      }
      add(sums + s * size_, weight, w.product);
    }
  }

  // One step from the tile's state `from` to `to`. Adaptive methods find the first stage there,
  // and hand on the last.
  void step(const Tile& tile, Workspace& w, double u0, double u1, const T* from, T* to,
            const Weights& weights, T* sums) {
    const int size = dim_ * tile.lanes, last = method_.stages - 1;
    std::fill_n(w.h, tile.lanes, T(u1 - u0));
    std::fill_n(w.minus_h, tile.lanes, T(u0 - u1));
    auto advance = [&](const Terms<T>& terms, T* y, T* adjoint) {
      combine<T>(from + kY * size, w.minus_h, terms, nullptr, w.y_k, y, dim_, tile.vectors);
      combine<T>(from + kAdjoint * size, w.h, terms, nullptr, w.adjoint_k, adjoint, dim_,
                 tile.vectors);
    };
    auto stage = [&](int i, double c) {
      const bool handed_on = adaptive_ && i == last;
      T* y_slope = handed_on ? to + kYSlope * size : w.y_slopes + i * size;
      T* adjoint_slope = handed_on ? to + kAdjointSlope * size : w.adjoint_slopes + i * size;
      evaluate(tile, w, node<T>(u0, u1, c, adaptive_), y_slope, adjoint_slope);
      integrate(tile, w, i, weights, sums);
      w.y_k[i] = y_slope;
      w.adjoint_k[i] = adjoint_slope;
    };
    w.y_k[0] = from + kYSlope * size;
    w.adjoint_k[0] = from + kAdjointSlope * size;
    for (int i = adaptive_ ? 1 : 0; i < method_.inner; ++i) {
      advance(method_.a[i], argument(tile, w), cotangent(w));
      stage(i, method_.c[i]);
    }
    advance(method_.b, to + kY * size, to + kAdjoint * size);
    if (adaptive_ && method_.last_at_solution) {
      std::copy_n(to + kY * size, size, argument(tile, w));
      std::copy_n(to + kAdjoint * size, size, cotangent(w));
      stage(last, 1.0);
    }
  }

  // --- fixed steps

  // A tile goes all the way by itself.
  void fixed() {
    std::atomic<bool> bad_input{false};
    std::vector<std::int64_t> first_bad(tiles_.count(), -1);
    Weights weights;
    weights.of[kChange] = method_.tableau->b;
    for_each_tile(weights, [&](const Tile& tile, Workspace& w, T* sums) {
      const int size = dim_ * tile.lanes;
      T *from = current_ + tile.index * tile_size_, *to = next_ + tile.index * tile_size_;
      std::int64_t i = 0;
      for (std::int64_t output = call_.num_times - 1; output > 0; --output) {
        if (!arrive(tile, output, from) && first_bad[tile.index] < 0) bad_input = true;
        for (; call_.grid[i] < -call_.times[output - 1]; ++i) {
          Weights of_step = weights;
          of_step.h = call_.grid[i + 1] - call_.grid[i];
          if (of_step.h == 0) continue;
          step(tile, w, call_.grid[i], call_.grid[i + 1], from, to, of_step, sums);
          std::swap(from, to);
        }
        const bool finite = all_finite(from + kY * size, size) &&
                            all_finite(from + kAdjoint * size, size);
        if (!finite) first_bad[tile.index] = std::max(first_bad[tile.index], output - 1);
      }
      std::copy_n(from + kAdjoint * size, size,
                  current_ + tile.index * tile_size_ + kAdjoint * size);
    });
    if (size_) add(theta_, T(1), total(kChange));
    for (std::int64_t i = 1; i < call_.num_grid; ++i) {
      result_.accepted += call_.grid[i] > call_.grid[i - 1];
    }
    result_.nfe = result_.accepted * method_.inner;
    for (std::int64_t output : first_bad) {
      if (output < 0) continue;
      result_.output = result_.status ? std::max(result_.output, output) : output;
      result_.status = kNonFinite;
      result_.t = call_.times[result_.output];
    }
    if (bad_input) result_.status = kNonFiniteInput;
  }

  // --- adaptive steps

  void adaptive() {
    double dt = options_.first_step;
    for (std::int64_t output = call_.num_times - 1; output > 0; --output) {
      const double u = -call_.times[output], end = -call_.times[output - 1];
      const bool is_last = output == 1;
      if (!start(u, output)) {
        result_.status = kNonFiniteInput;
        result_.t = -u;
        return;
      }
      if (dt == 0) dt = choose_step(u);
      // One solve in pieces: it goes on with the step it has, and ends exactly on each output time
      // but the last, past which it steps.
      dt = take_steps(
          controller_, options_, u, end, !is_last, dt,
          [&](double u0, double u1) { return attempt(u0, u1, is_last && u1 >= end, end); },
          [&] { accept(); }, result_);
      if (result_.status) {
        result_.t = -result_.t;
        result_.field_failed = !slopes_are_finite();
        return;
      }
    }
  }

  // Goes on from an output time. Returns whether a is finite.
  bool start(double u, std::int64_t output) {
    std::atomic<bool> finite{true};
    const int last = method_.stages - 1;
    const Weights none;
    for_each_tile(none, [&](const Tile& tile, Workspace& w, T* sums) {
      const int size = dim_ * tile.lanes;
      T* state = current_ + tile.index * tile_size_;
      if (!arrive(tile, output, state)) finite = false;
      std::copy_n(state + kY * size, size, argument(tile, w));
      std::copy_n(state + kAdjoint * size, size, cotangent(w));
      evaluate(tile, w, T(u), state + kYSlope * size, state + kAdjointSlope * size);
      integrate(tile, w, last, none, sums);
    });
    ++result_.nfe;
    hand_on(time_slope(last));
    return finite;
  }

  // Makes the stage that is handed on the first.
  void hand_on(double time_slope) {
    time_first_ = time_slope;
    std::copy_n(total(kHandedOn), size_, first_);
  }

  double time_slope(int stage) const {
    double sum = 0;
    for (std::int64_t i = 0; i < tiles_.count(); ++i) {
      sum += tile_slopes_[i * method_.stages + stage];
    }
    return sum;
  }

  // The error ratio of a step from u0 to u1. If it `ends` the solve, leaves a and the parameters'
  // gradients at `end` inside it, not at its own end.
  double attempt(double u0, double u1, bool ends, double end) {
    const int stages = method_.stages, last = stages - 1;
    const double h = u1 - u0;
    const Tableau& tableau = *method_.tableau;
    const Terms<T> to_end = ends ? method_.interpolant((end - u0) / h) : Terms<T>();
    double inside[Tableau::kMostStages] = {};
    for (int i = 0; i < to_end.count; ++i) inside[to_end.stage[i]] = double(to_end.weight[i]);
    Weights weights;
    weights.h = h;
    weights.of[kChange] = ends && call_.seminorm ? nullptr : tableau.b;
    weights.of[kError] = call_.seminorm ? nullptr : tableau.b_err;
    weights.of[kInside] = ends ? inside : nullptr;
    for_each_tile(weights, [&](const Tile& tile, Workspace& w, T* sums) {
      const int size = dim_ * tile.lanes;
      const T* from = current_ + tile.index * tile_size_;
      T* to = next_ + tile.index * tile_size_;
      step(tile, w, u0, u1, from, to, weights, sums);
      for (const Part part : {kY, kAdjoint}) {
        combine<T>(nullptr, w.h, method_.b_err, nullptr, part == kY ? w.y_k : w.adjoint_k,
                   w.values, dim_, tile.vectors);
        measure(tile, w, part, w.values, nullptr, from, to);
      }
      if (ends) {
        combine<T>(from + kAdjoint * size, w.h, to_end, nullptr, w.adjoint_k, to + kAdjoint * size,
                   dim_, tile.vectors);
      }
    });
    result_.nfe += stages - 1;
    for (int s = kChange; s < kSums && size_; ++s) {
      if (!weights.of[s]) continue;
      add(total(s), weights(s, 0), first_);
      add(total(s), weights(s, last), total(kHandedOn));
    }

    time_last_ = time_slope(last);
    double change = 0, error = 0;
    for (int j = 0; j < stages; ++j) {
      const double slope = j == 0 ? time_first_ : j == last ? time_last_ : time_slope(j);
      change += h * tableau.b[j] * slope;
      error += h * tableau.b_err[j] * slope;
    }
    time1_ = time_ + change;
    set_theta1(kChange);
    const double ratio = norm(over_tolerance(error, time_, time1_),
                              parameter_norm(total(kError), nullptr, theta1_));
    if (ends) set_theta1(kInside);
    return ratio;
  }

  void set_theta1(Sum change) {
    std::copy_n(theta_, size_, theta1_);
    add(theta1_, T(1), total(change));
  }

  void accept() {
    std::swap(current_, next_);
    std::swap(theta_, theta1_);
    time_ = time1_;
    hand_on(time_last_);
  }

  // The first step; one evaluation. As `choose_initial_step` of the reference.
  double choose_step(double u) {
    const Weights none;
    auto norm_of = [&](Part first, double time, const T* parameters) {
      for_each_tile(none, [&](const Tile& tile, Workspace& w, T*) {
        const T* state = current_ + tile.index * tile_size_;
        for (const Part part : {kY, kAdjoint}) {
          measure(tile, w, part, state + (first + part) * dim_ * tile.lanes, nullptr, state,
                  nullptr);
        }
      });
      return norm(over_tolerance(time, time_, time_), parameter_norm(parameters, nullptr, theta_));
    };
    const double d0 = norm_of(kY, time_, theta_), d1 = norm_of(kYSlope, time_first_, first_);
    const double h0 = first_guess(d0, d1);
    if (!(h0 > 0)) return std::nan("");
    const double one = 1;
    const Terms<T> euler(&one, 1);
    const int last = method_.stages - 1;
    for_each_tile(none, [&](const Tile& tile, Workspace& w, T* sums) {
      const int size = dim_ * tile.lanes;
      const T* state = current_ + tile.index * tile_size_;
      std::fill_n(w.h, tile.lanes, T(h0));
      std::fill_n(w.minus_h, tile.lanes, T(-h0));
      w.y_k[0] = state + kYSlope * size;
      w.adjoint_k[0] = state + kAdjointSlope * size;
      combine<T>(state + kY * size, w.minus_h, euler, nullptr, w.y_k, argument(tile, w), dim_,
                 tile.vectors);
      combine<T>(state + kAdjoint * size, w.h, euler, nullptr, w.adjoint_k, cotangent(w),
                 dim_, tile.vectors);
      evaluate(tile, w, T(u + h0), w.y_slopes, w.adjoint_slopes);
      integrate(tile, w, last, none, sums);
      measure(tile, w, kY, w.y_slopes, w.y_k[0], state, nullptr);
      measure(tile, w, kAdjoint, w.adjoint_slopes, w.adjoint_k[0], state, nullptr);
    });
    ++result_.nfe;
    const double d2 = norm(over_tolerance(time_slope(last) - time_first_, time_, time_),
                           parameter_norm(total(kHandedOn), first_, theta_));
    return initial_step(h0, d1, d2 / h0, method_.order);
  }

  // --- the norm: the largest of those of the gradient of t, y, a and each parameter's gradient

  double over_tolerance(double value, double x0, double x1) const {
    const double size = std::max(std::abs(x0), std::abs(x1));
    return std::abs(value) / (options_.atol + options_.rtol * size);
  }

  // Notes a tile's part of the norm of `value` - `minus`, which belongs to y or to a.
  void measure(const Tile& tile, Workspace& w, Part part, const T* value, const T* minus,
               const T* from, const T* to) {
    const int offset = part * dim_ * tile.lanes;
    scaled_squares<T>(value, minus, from + offset, to ? to + offset : nullptr, T(options_.rtol),
                      T(options_.atol), dim_, tile.lanes, w.squares);
    double sum = 0;
    for (int r = 0; r < tile.rows; ++r) sum += double(w.squares[r]);
    squares_[part][tile.index] = sum;
  }

  double parameter_norm(const T* value, const T* minus, const T* theta1) {
    if (size_ == 0 || call_.seminorm) return 0;
    const T rtol = T(options_.rtol), atol = T(options_.atol);
    for (std::size_t e = 0; e < size_; e += kLanes<T>) {
      const Vec<T> size = max_nan<T>(abs<T>(load(theta_ + e)), abs<T>(load(theta1 + e)));
      const Vec<T> x = minus ? load(value + e) - load(minus + e) : load(value + e);
      store(ratios_ + e, x / (size * rtol + atol));
    }
    return field_.largest_rms(ratios_, call_.parameter_grads);
  }

  double norm(double time, double parameters) const {
    double largest = larger_or_nan(time, parameters);
    for (const auto& squares : squares_) {
      double sum = 0;
      for (double s : squares) sum += s;
      const double count = double(std::max<std::int64_t>(call_.rows * dim_, 1));
      largest = larger_or_nan(largest, std::sqrt(sum / count));
    }
    return largest;
  }

  bool slopes_are_finite() const {
    for (std::int64_t i = 0; i < tiles_.count(); ++i) {
      const int size = dim_ * tiles_[i].lanes;
      const T* state = current_ + i * tile_size_;
      if (!all_finite(state + kYSlope * size, size)) return false;
      if (!all_finite(state + kAdjointSlope * size, size)) return false;
    }
    return true;
  }

  const Field& field_;
  const Method<T> method_;
  const Options& options_;
  const Controller controller_;
  const AdjointCall<T>& call_;
  const Tiles<T> tiles_;
  const int dim_;
  const bool adaptive_;
  const std::size_t size_;       // of the parameters' gradients, 0 if none is wanted
  const std::int64_t groups_;    // of tiles
  const std::size_t tile_size_;  // numbers a tile has in a state
  const Buffer<T> states_, sums_, gradients_;
  T *current_, *next_;  // states at the start and the end of an attempt
  // The parameters' gradients there; their derivatives at its first stage; over the tolerance.
  T *theta_, *theta1_, *first_, *ratios_;
  // The gradient of t there; its derivatives at its first and its last stage.
  double time_ = 0, time1_ = 0, time_first_ = 0, time_last_ = 0;
  std::vector<double> tile_slopes_;  // parts of the latter, [tiles, stages]
  std::vector<double> squares_[2];   // of y and a over the tolerance, of each tile
  WorkspacePool<Workspace> workspaces_;
  Result result_{};
};

}  // namespace anode
