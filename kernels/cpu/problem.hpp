// What one call is: plain data that crosses the C ABI, and what it leaves behind.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.hpp"

namespace anode {

// As `Status` in anode_fast/stats.py; the last three never leave the binding.
enum Status : std::int32_t {
  kSuccess = 0,
  kMaxSteps = 1,
  kUnderflow = 2,
  kNonFinite = 3,
  kNonFiniteInput = 4,
  kOutOfMemory = 5,
  kFieldDiffers = 6,
};

enum class Control : std::int32_t { fixed = 0, batch = 1, sample = 2 };

// An explicit Runge-Kutta method. See anode_fast/tableau.py for the conventions.
struct Tableau {
  static constexpr int kMostStages = 16;
  std::int32_t stages;
  std::int32_t order;
  // Whether the last stage is evaluated at the solution, so that it can be the next step's first.
  std::int32_t last_at_solution;
  // Whether the last stage serves interpolation only: it is left out where nothing is interpolated.
  std::int32_t last_on_demand;
  double c[kMostStages];
  double a[kMostStages][kMostStages];
  double b[kMostStages];
  double b_err[kMostStages];
  // The solution at t0 + x h is y0 + h sum_j w_j(x) k_j; row j holds w_j's coefficients of x to x^4.
  double interpolant[kMostStages][4];
};

struct Options {
  std::int32_t control;     // Control
  std::int32_t backwards;   // whether the user's time is minus the solver's
  std::int32_t float_time;  // whether times of steps are rounded to float
  std::int32_t data_dim;    // columns of x; the other columns of the state start at zero
  double rtol, atol;
  double first_step;  // 0: chosen by the solver
  double safety, ifactor, dfactor, min_step, max_step;
  std::int64_t max_num_steps;
};

// Counts and outcome of a solve or a gradient.
struct Result {
  std::int32_t status;
  std::int32_t field_failed;  // for kNonFinite: the field's value, not only a trial step's
  std::int64_t nfe, accepted, rejected;
  double t, dt;            // solver time and step at which a solve failed
  std::int64_t row, rows;  // first row that failed, and how many
  std::int64_t output;     // for fixed steps: first output that is not finite
  double deviation;        // for kFieldDiffers: the largest difference
};

// The arguments of a solve.
template <class T>
struct Call {
  std::int64_t rows;
  const T* x;  // [rows, data_dim], rows `x_stride` numbers apart
  std::int64_t x_stride;
  const double* times;  // output times, increasing solver time
  std::int64_t num_times;
  const double* grid;  // fixed steps: their ends
  std::int64_t num_grid;
  T* out;  // [num_times, rows, dim]; if the solve fails, [0] is the last state and [1] its derivative
};

// A step as the gradient makes it again.
template <class T>
struct Step {
  double t0, t1;
  std::int64_t first_output, end_output;  // the output times in (t0, t1]
  bool takes_first;                       // the first stage is the one before's last
  bool end_stage;                         // the last stage was evaluated
  const T* state;                         // y and, if taken over, f at t0, of every tile
  const T* records = nullptr;             // of the stages but the first, of every tile, if kept
};

// A step of one tile under step control by row: rows that it does not move have t1 = t0.
template <class T>
struct RowStep {
  std::vector<double> t0, t1;
  Buffer<T> state;
};

// The checkpoints of a solve.
template <class T>
struct Trace {
  std::int64_t rows = 0;
  std::vector<double> times;
  std::vector<Step<T>> steps;
  std::vector<Buffer<T>> states;  // before each step: y and, if taken over, f, of every tile
  std::size_t tile_size = 0;      // numbers a tile has in a state
  std::vector<Buffer<T>> records;
  Buffer<T> start_records;      // of the evaluation before the first step
  std::size_t record_size = 0;  // numbers an evaluation has in the records
  std::vector<std::vector<RowStep<T>>> row_steps;  // of each tile

  // Whether the gradient has to evaluate nothing.
  bool has_all_records() const {
    return start_records && std::all_of(steps.begin(), steps.end(),
                                        [](const Step<T>& step) { return step.records; });
  }
};

}  // namespace anode
