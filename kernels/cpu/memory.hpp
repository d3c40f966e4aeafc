// Aligned memory that frees itself, and is kept for the next call that asks for as much.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "simd.hpp"

namespace anode {

// Blocks that were freed, up to a total size. A training loop asks for the same sizes again and
// again, and fresh memory costs a page fault for every 4 kB: as much as the arithmetic on it.
class BlockCache {
 public:
  static constexpr std::size_t kMostBytes = std::size_t(8) << 20, kMostBlocks = 64;

  void* take(std::size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (std::size_t i = free_.size(); i-- > 0;) {
        if (free_[i].bytes != bytes) continue;
        void* block = free_[i].block;
        free_.erase(free_.begin() + std::ptrdiff_t(i));
        held_ -= bytes;
        return block;
      }
    }
    void* block = std::aligned_alloc(kAlignment, bytes);
    if (!block) throw std::bad_alloc();
    return block;
  }

  // Keeps the block; the oldest ones make room for it.
  void give_back(void* block, std::size_t bytes) noexcept {
    if (bytes > kMostBytes) return std::free(block);
    std::lock_guard<std::mutex> lock(mutex_);
    while (held_ + bytes > kMostBytes || free_.size() == kMostBlocks) {
      std::free(free_.front().block);
      held_ -= free_.front().bytes;
      free_.erase(free_.begin());
    }
    free_.push_back({block, bytes});
    held_ += bytes;
  }

  // Around a fork, so that the child does not inherit a locked mutex.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Free {
    void* block;
    std::size_t bytes;
  };

  BlockCache() { free_.reserve(kMostBlocks); }
  ~BlockCache() {
    for (const Free& free : free_) std::free(free.block);
  }
  friend BlockCache& block_cache();

  std::mutex mutex_;
  std::vector<Free> free_;
  std::size_t held_ = 0;
};

inline BlockCache& block_cache() {
  static BlockCache cache;
  return cache;
}

// `count` numbers, not initialised, aligned for vectors.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t count) {
    if (count == 0) return;
    const std::size_t bytes = (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    data_ = {static_cast<T*>(block_cache().take(bytes)), GiveBack{bytes}};
  }

  T* get() const { return data_.get(); }
  explicit operator bool() const { return bool(data_); }

 private:
  struct GiveBack {
    std::size_t bytes = 0;
    void operator()(T* p) const { block_cache().give_back(p, bytes); }
  };
  std::unique_ptr<T, GiveBack> data_;
};

}  // namespace anode
