// Threads: torch's own pool, through the functions that the Python side hands over at load.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace anode {

struct ThreadPool {
  using Body = void (*)(std::int64_t begin, std::int64_t end, void* context);
  int (*parallel_for)(std::int64_t begin, std::int64_t end, std::int64_t grain, Body, void*);
  int (*num_threads)(std::uint32_t* count);
};

// Null pointers mean one thread: so in a forked child, which has none of the pool's threads.
inline ThreadPool thread_pool{nullptr, nullptr};

inline int num_threads() {
  std::uint32_t count = 1;
  if (thread_pool.num_threads) thread_pool.num_threads(&count);
  return int(count);
}

// Calls f(begin, end) for parts of [0, count) on the threads of the pool. A result must not depend
// on how the range is divided.
//
// Throws std::bad_alloc if some part did.
template <class F>
void parallel_for(std::int64_t count, F f) {
  if (count <= 1 || !thread_pool.parallel_for || num_threads() == 1) {
    if (count > 0) f(std::int64_t(0), count);
    return;
  }
  struct Context {
    F& f;
    std::atomic<bool> failed;
  } context{f, {false}};
  // No exception may pass through the pool.
  auto body = [](std::int64_t begin, std::int64_t end, void* p) {
    Context& c = *static_cast<Context*>(p);
    try {
      c.f(begin, end);
    } catch (const std::bad_alloc&) {
      c.failed = true;
    }
  };
  thread_pool.parallel_for(0, count, 1, body, &context);
  if (context.failed) throw std::bad_alloc();
}

// Work spaces that threads borrow: as many are made as work at the same time.
template <class Workspace>
class WorkspacePool {
 public:
  // A work space, given back when the loan ends. `make` returns a std::unique_ptr to a new one.
  class Loan {
   public:
    template <class Make>
    Loan(WorkspacePool& pool, Make make) : pool_(pool) {
      {
        std::lock_guard<std::mutex> lock(pool_.mutex_);
        if (!pool_.free_.empty()) {
          workspace_ = std::move(pool_.free_.back());
          pool_.free_.pop_back();
        }
      }
      if (!workspace_) workspace_ = make();
    }
    ~Loan() {
      std::lock_guard<std::mutex> lock(pool_.mutex_);
      pool_.free_.push_back(std::move(workspace_));
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    Workspace& operator*() const { return *workspace_; }

   private:
    WorkspacePool& pool_;
    std::unique_ptr<Workspace> workspace_;
  };

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

}  // namespace anode
