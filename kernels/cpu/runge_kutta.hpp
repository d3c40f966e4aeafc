// Explicit Runge-Kutta solves: fixed steps, adaptive steps, adaptive steps by row.
//
// Templated over the field, and so over its scalar; the tableau is data. The rows of the batch are
// cut into tiles that live in the cache. With fixed steps and with steps by row a tile goes through
// the whole solve by itself; with one step size for the batch all tiles make each attempt, and
// their error sums are added in the order of tiles: results do not depend on the number of threads.
//
// The rules for steps and errors are those of anode_fast/controller.py and
// anode_fast/reference/runge_kutta.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "affine.hpp"
#include "parallel.hpp"
#include "problem.hpp"

namespace anode {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// As in the reference: attempts that gave nan or inf, none of them passed, after which it gives up.
constexpr int kMostNonFiniteAttempts = 16;

// Most memory for records of evaluations, which spare the gradient to make them again: what stays
// in the cache until then.
constexpr std::size_t kMostRecordBytes = std::size_t(1) << 20;

// --- arithmetic of a step -------------------------------------------------------------------------

// The nonzero weights of a sum over stages.
template <class T>
struct Terms {
  int count = 0;
  int stage[Tableau::kMostStages];
  T weight[Tableau::kMostStages];

  Terms() = default;
  Terms(const double* weights, int stages) {
    for (int j = 0; j < stages; ++j) {
      if (weights[j] == 0) continue;
      stage[count] = j;
      weight[count++] = T(weights[j]);
    }
  }
};

template <class T>
struct Method {
  int stages, inner;  // inner: those that come before the solution
  int order;
  bool last_at_solution, last_on_demand;
  double c[Tableau::kMostStages];
  Terms<T> a[Tableau::kMostStages], b, b_err;
  const Tableau* tableau;

  explicit Method(const Tableau& t)
      : stages(t.stages),
        inner(t.last_at_solution ? t.stages - 1 : t.stages),
        order(t.order),
        last_at_solution(t.last_at_solution),
        last_on_demand(t.last_on_demand),
        b(t.b, t.stages),
        b_err(t.b_err, t.stages),
        tableau(&t) {
    for (int i = 0; i < stages; ++i) {
      c[i] = t.c[i];
      a[i] = Terms<T>(t.a[i], i);
    }
  }

  // All stages, for sums whose weights are given by row.
  Terms<T> all_stages() const {
    Terms<T> terms;
    for (int j = 0; j < stages; ++j) terms.stage[terms.count++] = j;
    return terms;
  }

  // Weight of a stage in the solution at the fraction x of the step.
  double interpolant(int stage, double x) const {
    const double* p = tableau->interpolant[stage];
    return x * (p[0] + x * (p[1] + x * (p[2] + x * p[3])));
  }

  Terms<T> interpolant(double x) const {
    double weights[Tableau::kMostStages];
    for (int j = 0; j < stages; ++j) weights[j] = interpolant(j, x);
    return Terms<T>(weights, stages);
  }
};

// The rows [first, first + rows) of the batch in `vectors` vectors. Lanes beyond `rows` repeat the
// last row.
struct Tile {
  std::int64_t index, first;
  int rows, vectors, lanes;
};

template <class T>
struct Tiles {
  std::int64_t rows;

  std::int64_t count() const { return (rows + kTileRows<T> - 1) / kTileRows<T>; }
  Tile operator[](std::int64_t i) const {
    const std::int64_t first = i * kTileRows<T>;
    const int n = int(std::min<std::int64_t>(kTileRows<T>, rows - first));
    const int vectors = (n + kLanes<T> - 1) / kLanes<T>;
    return {i, first, n, vectors, vectors * kLanes<T>};
  }
};

// out = base + h * sum_j weight_j k_j for `features` features; base may be null. h has one entry a
// row; so has every weight if `row_weights` [stage, rows] is given.
template <class T>
inline void combine(const T* base, const T* h, const Terms<T>& terms, const T* row_weights,
                    const T* const* k, T* out, int features, int vectors) {
  with_constant<kTileVectors>(vectors, [&](auto constant) {
    constexpr int V = constant, n = V * kLanes<T>;
    Vec<T> step[V];
    unrolled<V>([&](auto v) ANODE_INLINE { step[v] = load(h + v * kLanes<T>); });
    for (int e = 0; e < features * n; e += n) {
      Vec<T> sum[V];
      unrolled<V>([&](auto v) ANODE_INLINE { sum[v] = Vec<T>{}; });
      for (int i = 0; i < terms.count; ++i) {
        const T* from = k[terms.stage[i]] + e;
        if (row_weights) {
          const T* weights = row_weights + terms.stage[i] * n;
          unrolled<V>([&](auto v) ANODE_INLINE {
            sum[v] += load(weights + v * kLanes<T>) * load(from + v * kLanes<T>);
          });
        } else {
          const Vec<T> weight = broadcast(terms.weight[i]);
          unrolled<V>([&](auto v) ANODE_INLINE { sum[v] += weight * load(from + v * kLanes<T>); });
        }
      }
      unrolled<V>([&](auto v) ANODE_INLINE {
        const Vec<T> change = step[v] * sum[v];
        store(out + e + v * kLanes<T>, base ? load(base + e + v * kLanes<T>) + change : change);
      });
    }
  });
}

// The time of the node c of a step, in the field's scalar. An adaptive method evaluates the end of
// a step just before it, as torchdiffeq does.
template <class T>
inline T node(double t0, double t1, double c, bool adaptive) {
  if (c != 1) return T(t0 + c * (t1 - t0));
  return adaptive ? std::nextafter(T(t1), -std::numeric_limits<T>::infinity()) : T(t1);
}

// Ends of a step: for all rows, or if `rows0` is set for each row.
struct Interval {
  double t0 = 0, t1 = 0;
  const double* rows0 = nullptr;
  const double* rows1 = nullptr;
};

template <class T>
inline void fill_node(const Interval& at, double c, bool adaptive, T* out, int lanes) {
  if (!at.rows0) return void(std::fill_n(out, lanes, node<T>(at.t0, at.t1, c, adaptive)));
  for (int r = 0; r < lanes; ++r) out[r] = node<T>(at.rows0[r], at.rows1[r], c, adaptive);
}

template <class T>
inline void fill_sizes(const Interval& at, T* out, int lanes) {
  if (!at.rows0) return void(std::fill_n(out, lanes, T(at.t1 - at.t0)));
  for (int r = 0; r < lanes; ++r) out[r] = T(at.rows1[r] - at.rows0[r]);
}

// --- rows of the user's tensors and tiles ---------------------------------------------------------

// tile[i] = rows[.., i] for i < columns, 0 for the other features. Returns whether all are finite.
template <class T>
inline bool read_rows(const T* rows, std::int64_t stride, int columns, const Tile& tile, T* to,
                      int features) {
  T nothing = 0;  // 0 * x is 0 for finite x only
  const T* from = rows + tile.first * stride;
  for (int r = 0; r < tile.lanes; ++r) {
    const T* row = from + std::min(r, tile.rows - 1) * stride;
    for (int i = 0; i < columns; ++i) {
      to[i * tile.lanes + r] = row[i];
      nothing += row[i] * 0;
    }
  }
  std::fill_n(to + columns * tile.lanes, (features - columns) * tile.lanes, T(0));
  return nothing == 0;
}

template <class T>
inline void write_rows(const T* from, const Tile& tile, T* rows, int columns) {
  T* to = rows + tile.first * columns;
  for (int r = 0; r < tile.rows; ++r) {
    for (int i = 0; i < columns; ++i) to[r * columns + i] = from[i * tile.lanes + r];
  }
}

template <class T>
inline bool all_finite(const T* values, int count) {
  Vec<T> nothing{};
  for (int e = 0; e < count; e += kLanes<T>) nothing += load(values + e) * T(0);
  for (int i = 0; i < kLanes<T>; ++i) {
    if (nothing[i] != 0) return false;
  }
  return true;
}

// --- the controller -------------------------------------------------------------------------------

// As anode_fast/controller.py.
struct Controller {
  int order;
  double safety, ifactor, dfactor, min_step, max_step;

  Controller(const Options& o, int order)
      : order(order),
        safety(o.safety),
        ifactor(o.ifactor),
        dfactor(o.dfactor),
        min_step(o.min_step),
        max_step(o.max_step) {}

  double clamp(double dt) const { return std::min(std::max(dt, min_step), max_step); }

  bool accepts(double dt, double ratio) const {
    return ratio <= 1 || (dt <= min_step && std::isfinite(ratio));
  }

  double next_step(double dt, double ratio) const {
    double factor = ifactor;
    if (!std::isfinite(ratio)) {
      factor = dfactor;
    } else if (ratio != 0) {
      const double smallest = ratio < 1 ? 1.0 : dfactor;
      factor = std::min(ifactor, std::max(safety / std::pow(ratio, 1.0 / order), smallest));
    }
    return clamp(dt * factor);
  }
};

inline double first_guess(double d0, double d1) {
  return d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
}

inline double initial_step(double h0, double d1, double d2, int order) {
  const double h1 = d1 <= 1e-15 && d2 <= 1e-15 ? std::max(1e-6, h0 * 1e-3)
                                               : std::pow(0.01 / std::max(d1, d2), 1.0 / order);
  return std::min(100 * h0, h1);
}

// sums[r] = sum over features of (value / (atol + rtol * max(|y0|, |y1|)))^2; y1 may be null, and
// `minus` a tile to subtract from `value`.
template <class T>
inline void scaled_squares(const T* value, const T* minus, const T* y0, const T* y1, T rtol, T atol,
                           int features, int lanes, T* sums) {
  for (int r = 0; r < lanes; r += kLanes<T>) {
    Vec<T> sum{};
    for (int e = r; e < features * lanes; e += lanes) {
      Vec<T> size = abs<T>(load(y0 + e));
      if (y1) size = max_nan<T>(size, abs<T>(load(y1 + e)));
      const Vec<T> x = minus ? load(value + e) - load(minus + e) : load(value + e);
      const Vec<T> ratio = x / (size * rtol + atol);
      sum += ratio * ratio;
    }
    store(sums + r, sum);
  }
}

// Takes steps from `t` until one reaches `end`, or ends there exactly if it `lands`, and counts
// them. attempt(t0, t1) makes a step and returns its error ratio; accept() keeps the last one made.
// Returns the step to go on with. `result` gets the outcome, and of a failure t and dt.
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
  if (!std::isfinite(dt)) return fail(kNonFinite);
  dt = rounded(controller.clamp(dt));
  const std::int64_t before = result.accepted + result.rejected;
  double ratio = 0, non_finite_at = t;
  int non_finite = 0;
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

// --- the solver -----------------------------------------------------------------------------------

// What a thread needs to take a tile through a step.
template <class Field>
struct Workspace {
  using T = typename Field::T;
  Buffer<T> memory;
  T *input, *derivatives, *scratch, *values, *h, *sums, *row_weights;
  const T* k[Tableau::kMostStages];

  Workspace(const Field& field, int stages)
      : memory(kTileRows<T> * rows(field, stages)) {
    T* p = memory.get();
    auto take = [&](std::size_t rows) { return std::exchange(p, p + rows * kTileRows<T>); };
    input = take(Field::kInputRows + field.dim());
    derivatives = take(std::size_t(stages) * field.dim());
    scratch = take(field.scratch_rows());
    values = take(field.dim());
    h = take(1);
    sums = take(1);
    row_weights = take(Tableau::kMostStages);
  }

  static std::size_t rows(const Field& field, int stages) {
    return Field::kInputRows + std::size_t(stages + 2) * field.dim() + field.scratch_rows() + 2 +
           Tableau::kMostStages;
  }
};

template <class Field>
class Solver {
 public:
  using T = typename Field::T;

  // `trace` may be null; otherwise it gets the checkpoints.
  Solver(const Field& field, const Tableau& tableau, const Options& options, const Call<T>& call,
         Trace<T>* trace)
      : field_(field),
        method_(tableau),
        options_(options),
        controller_(options, tableau.order),
        call_(call),
        trace_(trace),
        tiles_{call.rows},
        dim_(field.dim()) {
    if (trace) {
      trace->rows = call.rows;
      trace->times.assign(call.times, call.times + call.num_times);
    }
  }

  Result solve() {
    result_ = {};
    switch (Control(options_.control)) {
      case Control::fixed:
        fixed();
        break;
      case Control::batch:
        adaptive();
        break;
      case Control::sample:
        by_row();
        break;
    }
    return result_;
  }

 private:
  using Loan = typename WorkspacePool<Workspace<Field>>::Loan;

  auto make_workspace() const {
    return [this] { return std::make_unique<Workspace<Field>>(field_, method_.stages); };
  }

  template <class F>
  void for_each_tile(F f) {
    parallel_for(tiles_.count(), [&](std::int64_t begin, std::int64_t end) {
      Loan loan(workspaces_, make_workspace());
      for (std::int64_t i = begin; i < end; ++i) f(tiles_[i], *loan);
    });
  }

  // derivative = f(t, y) with t the node c of the step; y null: the state is in the input tile. That
  // is the work space's, or the record's if one is wanted.
  void evaluate(const Tile& tile, Workspace<Field>& w, const Interval& at, double c, const T* y,
                T* derivative, T* record = nullptr) const {
    T* input = record ? record : w.input;
    if (y) std::copy_n(y, dim_ * tile.lanes, input + Field::kInputRows * tile.lanes);
    const bool adaptive = options_.control != std::int32_t(Control::fixed);
    fill_node(at, c, adaptive, input, tile.lanes);
    if (record) {
      field_.evaluate_recording(record, derivative, w.scratch, tile.vectors);
    } else {
      field_.evaluate(input, derivative, w.scratch, tile.vectors);
    }
  }

  // One step from y0 to y1. w.k[0] is the first stage; w.k gets the others, the last one in `last`
  // if that is evaluated at the solution. `records` gets the evaluations' if it is not null.
  void step(const Tile& tile, Workspace<Field>& w, const Interval& at, const T* y0, T* y1,
            bool end_stage, T* last, T* records = nullptr) const {
    auto record = [&](int stage) -> T* {
      if (!records) return nullptr;
      T* p = records + (stage - 1) * trace_->record_size;
      field_.prepare_record(p, tile.vectors);
      return p;
    };
    fill_sizes(at, w.h, tile.lanes);
    for (int i = 1; i < method_.inner; ++i) {
      T* k = w.derivatives + i * dim_ * tile.lanes;
      T* kept = record(i);
      T* state = (kept ? kept : w.input) + Field::kInputRows * tile.lanes;
      combine<T>(y0, w.h, method_.a[i], nullptr, w.k, state, dim_, tile.vectors);
      evaluate(tile, w, at, method_.c[i], nullptr, k, kept);
      w.k[i] = k;
    }
    combine<T>(y0, w.h, method_.b, nullptr, w.k, y1, dim_, tile.vectors);
    if (end_stage) {
      evaluate(tile, w, at, 1.0, y1, last, record(method_.stages - 1));
      w.k[method_.stages - 1] = last;
    }
  }

  // The output times in (t0, t1], the first output excepted.
  std::pair<std::int64_t, std::int64_t> outputs_inside(double t0, double t1) const {
    const double *begin = call_.times, *end = begin + call_.num_times;
    const auto first = std::upper_bound(begin, end, t0) - begin;
    return {std::max<std::int64_t>(first, 1), std::upper_bound(begin, end, t1) - begin};
  }

  T* out(std::int64_t index) const { return call_.out + index * call_.rows * dim_; }

  void write_interpolated(const Tile& tile, Workspace<Field>& w, const Interval& at, const T* y0,
                          std::int64_t index) const {
    const Terms<T> terms = method_.interpolant((call_.times[index] - at.t0) / (at.t1 - at.t0));
    combine<T>(y0, w.h, terms, nullptr, w.k, w.values, dim_, tile.vectors);
    write_rows(w.values, tile, out(index), dim_);
  }

  // Reads x into y and writes the first output. False if x is not finite.
  bool start(const Tile& tile, T* y) const {
    const bool finite = read_rows(call_.x, call_.x_stride, options_.data_dim, tile, y, dim_);
    write_rows(y, tile, out(0), dim_);
    return finite;
  }

  // --- fixed steps

  std::vector<Step<T>> plan_steps() {
    std::vector<Step<T>> steps;
    bool before = false;
    for (std::int64_t i = 0; i + 1 < call_.num_grid; ++i) {
      const double t0 = call_.grid[i], t1 = call_.grid[i + 1];
      const auto [first, end] = outputs_inside(t0, t1);
      const bool inside = first < end && call_.times[first] < t1;
      const bool end_stage = method_.last_on_demand && inside;
      steps.push_back({t0, t1, first, end, before, end_stage, nullptr, nullptr});
      result_.nfe += method_.inner - before + end_stage;
      before = end_stage;
    }
    result_.accepted = std::int64_t(steps.size());
    return steps;
  }

  void fixed() {
    std::vector<Step<T>> steps = plan_steps();
    bool keeps_derivative = false;
    for (const Step<T>& step : steps) keeps_derivative |= step.takes_first;
    const std::size_t tile_size = std::size_t(keeps_derivative ? 2 : 1) * dim_ * kTileRows<T>;
    if (trace_) {
      trace_->tile_size = tile_size;
      for (std::size_t i = 0; i <= steps.size(); ++i) {
        trace_->states.emplace_back(tile_size * tiles_.count());
        if (i < steps.size()) steps[i].state = trace_->states[i].get();
      }
    }
    std::vector<std::int64_t> first_bad(tiles_.count(), call_.num_times);
    std::atomic<bool> bad_input{false};
    for_each_tile([&](const Tile& tile, Workspace<Field>& w) {
      // Without a trace two states change places.
      const Buffer<T> own(trace_ ? 0 : 2 * tile_size);
      auto state = [&](std::size_t i) {
        return trace_ ? trace_->states[i].get() + tile.index * tile_size
                      : own.get() + i % 2 * tile_size;
      };
      if (!start(tile, state(0))) bad_input = true;
      for (std::size_t i = 0; i < steps.size(); ++i) {
        const Step<T>& s = steps[i];
        const Interval at{s.t0, s.t1};
        T *y0 = state(i), *y1 = state(i + 1);
        T *f0 = w.derivatives, *f1 = w.derivatives + (method_.stages - 1) * dim_ * tile.lanes;
        if (s.takes_first) f0 = y0 + dim_ * tile.lanes;
        if (i + 1 < steps.size() && s.end_stage) f1 = y1 + dim_ * tile.lanes;
        if (!s.takes_first) evaluate(tile, w, at, 0.0, y0, f0);
        w.k[0] = f0;
        step(tile, w, at, y0, y1, s.end_stage, f1);
        for (std::int64_t o = s.first_output; o < s.end_output; ++o) {
          const bool at_end = call_.times[o] == s.t1;
          if (at_end) {
            write_rows(y1, tile, out(o), dim_);
          } else {
            write_interpolated(tile, w, at, y0, o);
          }
          if (!all_finite(at_end ? y1 : w.values, dim_ * tile.lanes)) {
            first_bad[tile.index] = std::min(first_bad[tile.index], o);
          }
        }
      }
    });
    if (bad_input) return fail(kNonFiniteInput);
    for (std::int64_t o : first_bad) {
      if (o == call_.num_times) continue;
      result_.output = result_.status ? std::min(result_.output, o) : o;
      result_.status = kNonFinite;
    }
    if (trace_) trace_->steps = std::move(steps);
  }

  void fail(Status status) { result_.status = status; }

  // --- adaptive steps

  // Sum over the tile's rows of the squares in w.sums.
  double total(const Tile& tile, const Workspace<Field>& w) const {
    double sum = 0;
    for (int r = 0; r < tile.rows; ++r) sum += double(w.sums[r]);
    return sum;
  }

  double rms(const std::vector<double>& sums) const {
    double sum = 0;
    for (double s : sums) sum += s;
    return std::sqrt(sum / double(std::max<std::int64_t>(call_.rows * dim_, 1)));
  }

  void adaptive() {
    const std::size_t tile_size = 2 * std::size_t(dim_) * kTileRows<T>;
    std::vector<Buffer<T>> own;
    std::vector<Buffer<T>>& states = trace_ ? trace_->states : own;
    if (trace_) trace_->tile_size = tile_size;
    auto make_state = [&](std::size_t i) {
      if (!trace_) i %= 2;
      while (states.size() <= i) states.emplace_back(tile_size * tiles_.count());
      return states[i].get();
    };
    const T rtol = T(options_.rtol), atol = T(options_.atol);
    const double t_start = call_.times[0], t_end = call_.times[call_.num_times - 1];
    std::vector<double> sums0(tiles_.count()), sums1(tiles_.count());
    std::atomic<bool> bad_input{false};

    // The first derivative and the first step.
    T* current = make_state(0);
    T* start_records = make_records(0) ? make_start_records() : nullptr;
    const bool choose = options_.first_step == 0;
    for_each_tile([&](const Tile& tile, Workspace<Field>& w) {
      T *y = current + tile.index * tile_size, *f = y + dim_ * tile.lanes;
      if (!start(tile, y)) bad_input = true;
      T* record = start_records ? start_records + tile.index * trace_->record_size : nullptr;
      if (record) field_.prepare_record(record, tile.vectors);
      evaluate(tile, w, {t_start, t_start}, 0.0, y, f, record);
      if (!choose) return;
      scaled_squares<T>(y, nullptr, y, nullptr, rtol, atol, dim_, tile.lanes, w.sums);
      sums0[tile.index] = total(tile, w);
      scaled_squares<T>(f, nullptr, y, nullptr, rtol, atol, dim_, tile.lanes, w.sums);
      sums1[tile.index] = total(tile, w);
    });
    if (bad_input) return fail(kNonFiniteInput);
    result_.nfe = 1;
    double dt = options_.first_step;
    if (choose) {
      const double d1 = rms(sums1), h0 = first_guess(rms(sums0), d1);
      if (h0 > 0) {
        for_each_tile([&](const Tile& tile, Workspace<Field>& w) {
          const T *y = current + tile.index * tile_size, *f = y + dim_ * tile.lanes;
          const double t1 = t_start + h0;
          w.k[0] = f;
          const double one = 1;
          std::fill_n(w.h, tile.lanes, T(h0));
          combine<T>(y, w.h, Terms<T>(&one, 1), nullptr, w.k,
                     w.input + Field::kInputRows * tile.lanes, dim_, tile.vectors);
          evaluate(tile, w, {t1, t1}, 0.0, nullptr, w.derivatives);
          scaled_squares<T>(w.derivatives, f, y, nullptr, rtol, atol, dim_, tile.lanes, w.sums);
          sums0[tile.index] = total(tile, w);
        });
        ++result_.nfe;
        dt = initial_step(h0, d1, rms(sums0) / h0, method_.order);
      } else {
        dt = std::nan("");
      }
    }
    T* next = nullptr;
    Step<T> made{};
    auto attempt = [&](double t0, double t1) {
      next = make_state(std::size_t(result_.accepted) + 1);
      T* records = make_records(std::size_t(result_.accepted));
      const auto [first, end] = outputs_inside(t0, t1);
      made = {t0, t1, first, end, true, method_.last_at_solution, current, records};
      for_each_tile([&, first = first, end = end](const Tile& tile, Workspace<Field>& w) {
        const Interval at{t0, t1};
        const T* y0 = current + tile.index * tile_size;
        T *y1 = next + tile.index * tile_size, *f1 = y1 + dim_ * tile.lanes;
        w.k[0] = y0 + dim_ * tile.lanes;
        step(tile, w, at, y0, y1, method_.last_at_solution, f1,
             records ? records + tile.index * (method_.stages - 1) * trace_->record_size : nullptr);
        if (!method_.last_at_solution) {
          std::copy_n(w.k[method_.stages - 1], dim_ * tile.lanes, f1);
        }
        combine<T>(nullptr, w.h, method_.b_err, nullptr, w.k, w.values, dim_, tile.vectors);
        scaled_squares<T>(w.values, nullptr, y0, y1, rtol, atol, dim_, tile.lanes, w.sums);
        sums0[tile.index] = total(tile, w);
        // Before it is known whether the step stands: another attempt writes them again.
        for (std::int64_t o = first; o < end; ++o) write_interpolated(tile, w, at, y0, o);
      });
      result_.nfe += method_.stages - 1;
      return rms(sums0);
    };
    auto accept = [&] {
      if (trace_) trace_->steps.push_back(made);
      current = next;
    };
    take_steps(controller_, options_, t_start, t_end, false, dt, attempt, accept, result_);
    if (result_.status) leave(current);
  }

  // Memory for the records of a step, null if there is to be none.
  T* make_records(std::size_t step) const {
    if (!trace_) return nullptr;
    trace_->record_size = field_.record_rows() * kTileRows<T>;
    const std::size_t size = trace_->record_size * (method_.stages - 1) * tiles_.count();
    if ((step + 1) * size * sizeof(T) > kMostRecordBytes) return nullptr;
    if (trace_->records.size() <= step) trace_->records.emplace_back(size);
    return trace_->records[step].get();
  }

  T* make_start_records() const {
    trace_->start_records = Buffer<T>(trace_->record_size * tiles_.count());
    return trace_->start_records.get();
  }

  // Leaves the state and the derivative from which the solve could not go on.
  void leave(const T* state) const {
    const std::size_t tile_size = 2 * std::size_t(dim_) * kTileRows<T>;
    for (std::int64_t i = 0; i < tiles_.count(); ++i) {
      const Tile tile = tiles_[i];
      write_rows(state + i * tile_size, tile, out(0), dim_);
      if (call_.num_times > 1) {
        write_rows(state + i * tile_size + dim_ * tile.lanes, tile, out(1), dim_);
      }
    }
  }

  // --- adaptive steps by row

  void by_row();

  struct TileResult {
    Status status = kSuccess;
    std::int64_t attempts = 0, accepted = 0, rejected = 0, row = 0, rows = 0;
    double t = 0, dt = 0;
  };
  TileResult solve_rows(const Tile& tile, Workspace<Field>& w);

  const Field& field_;
  const Method<T> method_;
  const Options& options_;
  const Controller controller_;
  const Call<T>& call_;
  Trace<T>* trace_;
  const Tiles<T> tiles_;
  const int dim_;
  WorkspacePool<Workspace<Field>> workspaces_;
  Result result_{};
};

// Every tile makes its own attempts; a row that is done stays where it is.
template <class Field>
auto Solver<Field>::solve_rows(const Tile& tile, Workspace<Field>& w) -> TileResult {
  const int lanes = tile.lanes, size = dim_ * lanes;
  const T rtol = T(options_.rtol), atol = T(options_.atol);
  const double t_end = call_.times[call_.num_times - 1];
  const Buffer<T> memory(std::size_t(4) * size);
  T *y0 = memory.get(), *f0 = y0 + size, *y1 = f0 + size, *f1 = y1 + size;
  std::vector<double> t(lanes, call_.times[0]), dt(lanes, options_.first_step), t1(lanes),
      ratio(lanes, 0.0), d0(lanes), d1(lanes);
  std::vector<std::int64_t> accepted(lanes), rejected(lanes);
  std::vector<char> accept(lanes);
  const double features = dim_;
  TileResult result;

  if (!start(tile, y0)) {
    result.status = kNonFiniteInput;
    return result;
  }
  evaluate(tile, w, {call_.times[0], call_.times[0]}, 0.0, y0, f0);
  if (options_.first_step == 0) {
    auto norms = [&](const T* value, const T* minus, std::vector<double>& norm) {
      scaled_squares<T>(value, minus, y0, nullptr, rtol, atol, dim_, lanes, w.sums);
      for (int r = 0; r < lanes; ++r) norm[r] = std::sqrt(double(w.sums[r]) / features);
    };
    norms(y0, nullptr, d0);
    norms(f0, nullptr, d1);
    for (int r = 0; r < lanes; ++r) {
      dt[r] = first_guess(d0[r], d1[r]);
      t1[r] = t[r] + dt[r];
      w.h[r] = T(dt[r]);
    }
    w.k[0] = f0;
    const double one = 1;
    combine<T>(y0, w.h, Terms<T>(&one, 1), nullptr, w.k, w.input + Field::kInputRows * lanes, dim_,
               tile.vectors);
    evaluate(tile, w, {0, 0, t1.data(), t1.data()}, 0.0, nullptr, w.derivatives);
    norms(w.derivatives, f0, d0);
    for (int r = 0; r < lanes; ++r) {
      const double d2 = d0[r] / dt[r];
      dt[r] = std::isnan(d2) ? d2 : initial_step(dt[r], d1[r], d2, method_.order);
    }
  }
  for (double& step : dt) step = controller_.clamp(step);

  auto running = [&](int r) { return t[r] < t_end; };
  auto any_running = [&] {
    for (int r = 0; r < tile.rows; ++r) {
      if (running(r)) return true;
    }
    return false;
  };
  while (any_running()) {
    auto stop = [&](Status status, int row) {
      if (!result.rows++) {
        result.status = status;
        result.row = tile.first + row;
        result.t = t[row];
        result.dt = dt[row];
      }
      result.t = status == kMaxSteps ? std::min(result.t, t[row]) : result.t;
    };
    if (result.attempts >= options_.max_num_steps) {
      for (int r = 0; r < tile.rows; ++r) {
        if (running(r)) stop(kMaxSteps, r);
      }
      break;
    }
    for (int r = 0; r < tile.rows; ++r) {
      const bool failing = !std::isfinite(ratio[r]) && dt[r] <= controller_.min_step;
      if (!running(r) || (t[r] + dt[r] > t[r] && !failing)) continue;
      bool field_failed = false;
      for (int i = 0; i < dim_; ++i) field_failed |= !std::isfinite(f0[i * lanes + r]);
      const bool non_finite = field_failed || !std::isfinite(dt[r] + ratio[r]);
      stop(non_finite ? kNonFinite : kUnderflow, r);
    }
    if (result.status) break;
    ++result.attempts;
    for (int r = 0; r < lanes; ++r) t1[r] = running(r) ? t[r] + dt[r] : t[r];
    const Interval at{0, 0, t.data(), t1.data()};
    w.k[0] = f0;
    step(tile, w, at, y0, y1, method_.last_at_solution, f1);
    if (!method_.last_at_solution) std::copy_n(w.k[method_.stages - 1], size, f1);
    combine<T>(nullptr, w.h, method_.b_err, nullptr, w.k, w.values, dim_, tile.vectors);
    scaled_squares<T>(w.values, nullptr, y0, y1, rtol, atol, dim_, lanes, w.sums);
    bool any = false;
    double low = kInfinity, high = -kInfinity;
    for (int r = 0; r < lanes; ++r) {
      accept[r] = false;
      if (!running(r)) continue;
      ratio[r] = std::sqrt(double(w.sums[r]) / features);
      accept[r] = controller_.accepts(dt[r], ratio[r]);
      ++(accept[r] ? accepted : rejected)[r];
      dt[r] = controller_.next_step(dt[r], ratio[r]);
      if (!accept[r]) continue;
      any = true;
      low = std::min(low, t[r]);
      high = std::max(high, t1[r]);
    }
    if (!any) continue;
    if (trace_) {
      RowStep<T> step{t, t1, Buffer<T>(2 * std::size_t(size))};
      for (int r = 0; r < lanes; ++r) {
        if (!accept[r]) step.t1[r] = t[r];
      }
      std::copy_n(y0, 2 * size, step.state.get());
      trace_->row_steps[tile.index].push_back(std::move(step));
    }
    const auto [first, end] = outputs_inside(low, high);
    for (std::int64_t o = first; o < end; ++o) {
      const double time = call_.times[o];
      for (int r = 0; r < lanes; ++r) {
        const bool here = accept[r] && t[r] < time && time <= t1[r];
        const double x = here ? (time - t[r]) / (t1[r] - t[r]) : 0.0;
        for (int j = 0; j < method_.stages; ++j) {
          w.row_weights[j * lanes + r] = T(method_.interpolant(j, x));
        }
      }
      combine<T>(y0, w.h, method_.all_stages(), w.row_weights, w.k, w.values, dim_, tile.vectors);
      for (int r = 0; r < tile.rows; ++r) {
        if (!(accept[r] && t[r] < time && time <= t1[r])) continue;
        T* row = out(o) + (tile.first + r) * dim_;
        for (int i = 0; i < dim_; ++i) row[i] = w.values[i * lanes + r];
      }
    }
    for (int r = 0; r < lanes; ++r) {
      if (!accept[r]) continue;
      t[r] = t1[r];
      for (int i = 0; i < 2 * dim_; ++i) y0[i * lanes + r] = y1[i * lanes + r];
    }
  }
  result.accepted = *std::max_element(accepted.begin(), accepted.begin() + tile.rows);
  result.rejected = *std::max_element(rejected.begin(), rejected.begin() + tile.rows);
  return result;
}

template <class Field>
void Solver<Field>::by_row() {
  if (trace_) trace_->row_steps.resize(tiles_.count());
  std::vector<TileResult> results(tiles_.count());
  for_each_tile([&](const Tile& tile, Workspace<Field>& w) {
    results[tile.index] = solve_rows(tile, w);
  });
  // All rows are at the same attempt in the reference: the first failure ends the solve.
  std::int64_t attempts = 0, failed_at = std::numeric_limits<std::int64_t>::max();
  for (const TileResult& tile : results) {
    attempts = std::max(attempts, tile.attempts);
    result_.accepted = std::max(result_.accepted, tile.accepted);
    result_.rejected = std::max(result_.rejected, tile.rejected);
    if (tile.status) failed_at = std::min(failed_at, tile.attempts);
  }
  attempts = std::min(attempts, failed_at);
  for (const TileResult& tile : results) {
    if (!tile.status || tile.attempts != failed_at) continue;
    if (!result_.status) {
      result_.status = tile.status;
      result_.row = tile.row;
      result_.t = tile.t;
      result_.dt = tile.dt;
    }
    if (tile.status == kMaxSteps) result_.t = std::min(result_.t, tile.t);
    result_.rows += tile.rows;
  }
  const int first = options_.first_step == 0 ? 2 : 1;
  result_.nfe = first + attempts * (method_.stages - 1);
}

}  // namespace anode
