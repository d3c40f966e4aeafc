// Gradients of a solve.
//
// The discrete gradient is exact for the computed solution, step sizes being constants: every tile
// goes through the checkpoints from the last step to the first, makes the stages again (unless their
// records were kept), and takes the vector-Jacobian product of each. Weight gradients of a tile's step are accumulated at once,
// over its stages; those of groups of tiles are added in the order of groups, so that results do
// not depend on the number of threads.
#pragma once

#include "runge_kutta.hpp"

namespace anode {

// Memory of all groups' weight gradients, and the most and least groups.
constexpr std::size_t kMostGradientBytes = std::size_t(8) << 20;
constexpr std::int64_t kMostGroups = 64, kLeastGroups = 8;

// Groups of tiles, at least one, whose sums take `bytes` each.
inline std::int64_t gradient_groups(std::int64_t tiles, std::size_t bytes) {
  std::int64_t groups = std::clamp<std::int64_t>(tiles, 1, kMostGroups);
  while (groups > kLeastGroups && groups * bytes > kMostGradientBytes) groups /= 2;
  return groups;
}

template <class Field>
class DiscreteGradient {
 public:
  using T = typename Field::T;

  DiscreteGradient(const Field& field, const Tableau& tableau, const Options& options,
                   const Trace<T>& trace)
      : field_(field),
        method_(tableau),
        options_(options),
        trace_(trace),
        tiles_{trace.rows},
        dim_(field.dim()) {}

  // grad: of the outputs, [times, rows, dim]. x_grad [rows, data_dim] and the parameters' gradients
  // are written where they are not null.
  Result run(const T* grad, T* x_grad, T* const* parameter_grads) {
    const std::int64_t tiles = tiles_.count();
    const std::size_t size = field_.gradient_size();
    const std::int64_t groups = gradient_groups(tiles, size * sizeof(T));
    Buffer<T> sums;
    if (parameter_grads) {
      sums = Buffer<T>(groups * size);
      std::fill_n(sums.get(), groups * size, T(0));
    }
    std::vector<std::int64_t> evaluations(groups);
    parallel_for(groups, [&](std::int64_t begin, std::int64_t end) {
      typename WorkspacePool<Workspace>::Loan loan(workspaces_, [&] {
        return std::make_unique<Workspace>(field_, method_.stages);
      });
      for (std::int64_t g = begin; g < end; ++g) {
        T* sum = parameter_grads ? sums.get() + g * size : nullptr;
        for (std::int64_t i = g * tiles / groups; i < (g + 1) * tiles / groups; ++i) {
          evaluations[g] = std::max(evaluations[g], tile(tiles_[i], *loan, grad, x_grad, sum));
        }
      }
    });
    Result result{};
    for (std::int64_t count : evaluations) result.nfe = std::max(result.nfe, count);
    if (parameter_grads) {
      for (std::int64_t g = 1; g < groups; ++g) {
        for (std::size_t i = 0; i < size; ++i) sums.get()[i] += sums.get()[g * size + i];
      }
      field_.unpack_gradient(sums.get(), parameter_grads);
    }
    return result;
  }

 private:
  // A record and deltas for every stage.
  struct Workspace {
    Buffer<T> memory;
    T *derivatives, *adj_k, *adj_y, *adj_y1, *adj_f, *values, *h, *row_weights, *scratch;
    T* records[Tableau::kMostStages];
    T* deltas[Tableau::kMostStages];
    const T* k[Tableau::kMostStages];
    std::vector<Pair<T>> evaluations;
    int vectors = 0;  // for which records and deltas are prepared

    Workspace(const Field& field, int stages) {
      const std::size_t dim = field.dim();
      const std::size_t each = 2 * dim + field.record_rows() + field.delta_rows();
      memory = Buffer<T>((stages * each + 4 * dim + 1 + Tableau::kMostStages +
                          field.scratch_rows()) * kTileRows<T>);
      T* p = memory.get();
      auto take = [&](std::size_t rows) { return std::exchange(p, p + rows * kTileRows<T>); };
      derivatives = take(stages * dim);
      adj_k = take(stages * dim);
      adj_y = take(dim);
      adj_y1 = take(dim);
      adj_f = take(dim);
      values = take(dim);
      h = take(1);
      row_weights = take(Tableau::kMostStages);
      scratch = take(field.scratch_rows());
      for (int i = 0; i < stages; ++i) {
        records[i] = take(field.record_rows());
        deltas[i] = take(field.delta_rows());
      }
    }
  };

  // y += weight * h * x; h has one entry a row.
  void add_scaled(T* y, T weight, const T* h, const T* x, int lanes) const {
    for (int e = 0; e < dim_ * lanes; e += lanes) {
      for (int r = 0; r < lanes; r += kLanes<T>) {
        store(y + e + r, load(y + e + r) + weight * load(h + r) * load(x + e + r));
      }
    }
  }

  void add(T* y, const T* x, int lanes) const {
    for (int e = 0; e < dim_ * lanes; e += kLanes<T>) store(y + e, load(y + e) + load(x + e));
  }

  // The stage's argument into its record, then its derivative.
  void evaluate(const Tile& tile, Workspace& w, int stage, const Interval& at, double c) {
    T* record = w.records[stage];
    fill_node(at, c, options_.control != std::int32_t(Control::fixed), record, tile.lanes);
    T* k = w.derivatives + stage * dim_ * tile.lanes;
    field_.evaluate_recording(record, k, w.scratch, tile.vectors);
    w.k[stage] = k;
  }

  T* argument(const Tile& tile, Workspace& w, int stage) const {
    return w.records[stage] + Field::kInputRows * tile.lanes;
  }

  // Cotangent of a stage's argument from that of its derivative, into w.values.
  void vjp(const Tile& tile, Workspace& w, int stage, const T* adj_k, const T* record) {
    std::copy_n(adj_k, dim_ * tile.lanes, field_.cotangent(w.deltas[stage]));
    field_.vjp(record, w.deltas[stage], w.values, w.scratch, tile.vectors);
    w.evaluations.push_back({w.deltas[stage], record});
  }

  // Adds the gradients of the outputs inside a step to the cotangents of its start, end and stages.
  void add_outputs(const Tile& tile, Workspace& w, const Interval& at, std::int64_t first,
                   std::int64_t end, const T* grad) {
    const int lanes = tile.lanes, size = dim_ * lanes;
    const bool exact_end = options_.control == std::int32_t(Control::fixed);
    for (std::int64_t o = first; o < end; ++o) {
      const double time = trace_.times[o];
      read_cotangent(tile, grad + o * trace_.rows * dim_, dim_, w.values);
      if (at.rows0) {
        for (int r = 0; r < lanes; ++r) {
          const double t0 = at.rows0[r], t1 = at.rows1[r];
          const bool here = t0 < time && time <= t1;
          const double x = here ? (time - t0) / (t1 - t0) : 0.0;
          for (int i = 0; i < (here ? 0 : dim_); ++i) w.values[i * lanes + r] = 0;
          for (int j = 0; j < method_.stages; ++j) {
            w.row_weights[j * lanes + r] = w.h[r] * T(method_.interpolant(j, x));
          }
        }
        add(w.adj_y, w.values, lanes);
        for (int j = 0; j < method_.stages; ++j) {
          add_scaled(w.adj_k + j * size, T(1), w.row_weights + j * lanes, w.values, lanes);
        }
      } else if (exact_end && time == at.t1) {
        add(w.adj_y1, w.values, lanes);
      } else {
        const Terms<T> terms = method_.interpolant((time - at.t0) / (at.t1 - at.t0));
        add(w.adj_y, w.values, lanes);
        for (int i = 0; i < terms.count; ++i) {
          add_scaled(w.adj_k + terms.stage[i] * size, terms.weight[i], w.h, w.values, lanes);
        }
      }
    }
  }

  void read_cotangent(const Tile& tile, const T* rows, int columns, T* to) const {
    read_rows(rows, columns, columns, tile, to, dim_);
    // Lanes beyond the batch repeat its last row: they must not count.
    for (int i = 0; i < columns; ++i) {
      std::fill(to + i * tile.lanes + tile.rows, to + (i + 1) * tile.lanes, T(0));
    }
  }

  // A tile's part of a step.
  struct TileStep {
    Interval at;
    const T* state;
    const T* records;  // null: the stages are made again
    bool takes_first, end_stage;
    std::int64_t first_output, end_output;
  };

  // Makes the stages of a step again, for their records. Returns the number of evaluations.
  std::int64_t make_stages(const Tile& tile, Workspace& w, const TileStep& s) {
    const int size = dim_ * tile.lanes, last = method_.stages - 1;
    w.k[0] = s.state + size;
    if (!s.takes_first) {
      std::copy_n(s.state, size, argument(tile, w, 0));
      evaluate(tile, w, 0, s.at, 0.0);
    }
    for (int i = 1; i < method_.inner; ++i) {
      T* argument_i = argument(tile, w, i);
      combine<T>(s.state, w.h, method_.a[i], nullptr, w.k, argument_i, dim_, tile.vectors);
      evaluate(tile, w, i, s.at, method_.c[i]);
    }
    if (s.end_stage) {
      T* y1 = argument(tile, w, last);
      combine<T>(s.state, w.h, method_.b, nullptr, w.k, y1, dim_, tile.vectors);
      evaluate(tile, w, last, s.at, 1.0);
    }
    return method_.inner - s.takes_first + s.end_stage;
  }

  // Takes w.adj_y1 and w.adj_f, cotangents of the step's end, to w.adj_y and w.adj_f, of its start.
  // Returns the number of evaluations.
  std::int64_t step_back(const Tile& tile, Workspace& w, const TileStep& s, const T* grad) {
    const Interval& at = s.at;
    const int lanes = tile.lanes, size = dim_ * lanes, last = method_.stages - 1;
    fill_sizes(at, w.h, lanes);
    const std::int64_t evaluations = s.records ? 0 : make_stages(tile, w, s);
    auto record = [&](int stage) -> const T* {
      return s.records ? s.records + (stage - 1) * trace_.record_size : w.records[stage];
    };
    w.evaluations.clear();

    // Cotangents: of the outputs, of the derivative handed on, of the solution.
    std::fill_n(w.adj_y, size, T(0));
    std::fill_n(w.adj_k, method_.stages * size, T(0));
    add_outputs(tile, w, at, s.first_output, s.end_output, grad);
    T* adj_last = w.adj_k + last * size;
    if (at.rows0) {  // only rows that moved handed on a new derivative
      for (int i = 0; i < dim_; ++i) {
        for (int r = 0; r < lanes; ++r) {
          T& kept = w.adj_f[i * lanes + r];
          if (at.rows1[r] > at.rows0[r]) adj_last[i * lanes + r] += std::exchange(kept, T(0));
        }
      }
    } else {
      add(adj_last, w.adj_f, lanes);
      std::fill_n(w.adj_f, size, T(0));
    }
    if (s.end_stage) {
      vjp(tile, w, last, adj_last, record(last));
      add(w.adj_y1, w.values, lanes);
    }
    add(w.adj_y, w.adj_y1, lanes);
    spread(w, method_.b, w.adj_y1, lanes);
    for (int i = method_.inner - 1; i >= (s.takes_first ? 1 : 0); --i) {
      vjp(tile, w, i, w.adj_k + i * size, record(i));
      add(w.adj_y, w.values, lanes);
      spread(w, method_.a[i], w.values, lanes);
    }
    if (s.takes_first) add(w.adj_f, w.adj_k, lanes);
    return evaluations;
  }

  // Takes w.adj_f, cotangent of the derivative at the first state, which the first step took over,
  // to that state. Returns the number of evaluations.
  std::int64_t start_back(const Tile& tile, Workspace& w, const T* state) {
    const T* record = w.records[0];
    if (trace_.start_records) {
      record = trace_.start_records.get() + tile.index * trace_.record_size;
    } else {
      const double t = trace_.times.front();
      std::copy_n(state, dim_ * tile.lanes, argument(tile, w, 0));
      evaluate(tile, w, 0, {t, t}, 0.0);
    }
    vjp(tile, w, 0, w.adj_f, record);
    add(w.adj_y, w.values, tile.lanes);
    return trace_.start_records ? 0 : 1;
  }

  // adj_k[j] += h * weight_j * cotangent.
  void spread(Workspace& w, const Terms<T>& terms, const T* cotangent, int lanes) const {
    for (int i = 0; i < terms.count; ++i) {
      add_scaled(w.adj_k + terms.stage[i] * dim_ * lanes, terms.weight[i], w.h, cotangent, lanes);
    }
  }

  // One tile from its last step to its first. Returns the number of evaluations.
  std::int64_t tile(const Tile& tile, Workspace& w, const T* grad, T* x_grad, T* sum) {
    const int size = dim_ * tile.lanes;
    if (w.vectors != tile.vectors) {
      for (int i = 0; i < method_.stages; ++i) {
        field_.prepare_record(w.records[i], tile.vectors);
        field_.prepare_deltas(w.deltas[i], tile.vectors);
      }
      w.vectors = tile.vectors;
    }
    std::fill_n(w.adj_y, size, T(0));
    std::fill_n(w.adj_f, size, T(0));
    std::int64_t evaluations = 0;
    if (!trace_.row_steps.empty()) {
      const auto& steps = trace_.row_steps[tile.index];
      for (std::size_t i = steps.size(); i-- > 0;) {
        const RowStep<T>& s = steps[i];
        const auto [low, high] = bounds(s);
        std::swap(w.adj_y, w.adj_y1);
        const Interval at{0, 0, s.t0.data(), s.t1.data()};
        const bool end_stage = method_.last_at_solution;
        const TileStep back{at, s.state.get(), nullptr, true, end_stage, low, high};
        evaluations += step_back(tile, w, back, grad);
        if (i == 0) evaluations += start_back(tile, w, s.state.get());
        if (sum) field_.accumulate_gradient(w.evaluations, tile.vectors, sum);
      }
    } else {
      for (std::size_t i = trace_.steps.size(); i-- > 0;) {
        const Step<T>& s = trace_.steps[i];
        const T* state = s.state + tile.index * trace_.tile_size;
        const std::size_t of_records = (method_.stages - 1) * trace_.record_size;
        const T* records = s.records ? s.records + tile.index * of_records : nullptr;
        std::swap(w.adj_y, w.adj_y1);
        const TileStep back{{s.t0, s.t1},  state,          records,     s.takes_first,
                            s.end_stage, s.first_output, s.end_output};
        evaluations += step_back(tile, w, back, grad);
        if (i == 0 && s.takes_first) evaluations += start_back(tile, w, state);
        if (sum) field_.accumulate_gradient(w.evaluations, tile.vectors, sum);
      }
    }
    read_cotangent(tile, grad, dim_, w.values);
    add(w.adj_y, w.values, tile.lanes);
    if (x_grad) write_rows(w.adj_y, tile, x_grad, options_.data_dim);
    return evaluations;
  }

  // Output times inside some row's step.
  std::pair<std::int64_t, std::int64_t> bounds(const RowStep<T>& s) const {
    double low = kInfinity, high = -kInfinity;
    for (std::size_t r = 0; r < s.t0.size(); ++r) {
      if (!(s.t1[r] > s.t0[r])) continue;
      low = std::min(low, s.t0[r]);
      high = std::max(high, s.t1[r]);
    }
    const auto begin = trace_.times.begin(), end = trace_.times.end();
    const auto first = std::upper_bound(begin, end, low) - begin;
    return {std::max<std::int64_t>(first, 1), std::upper_bound(begin, end, high) - begin};
  }

  const Field& field_;
  const Method<T> method_;
  const Options& options_;
  const Trace<T>& trace_;
  const Tiles<T> tiles_;
  const int dim_;
  WorkspacePool<Workspace> workspaces_;
};

}  // namespace anode
