#include "core/parallel.h"

#include <cblas.h>
#include <omp.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/limits.h"

extern "C" void openblas_set_num_threads(int);

namespace krait::core {

namespace {

int default_threads() {
  // The library knows on which processors we may run, but not of a share of their time.
  static const int n = std::getenv("OMP_NUM_THREADS") ? omp_get_max_threads() : std::min(omp_get_max_threads(), processors());
  return n;
}
int& current_num_threads() {
  static int n = default_threads();
  return n;
}

thread_local bool inside_piece = false;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Longer than most gaps between two parallel loops, much shorter than a time slice: whoever waits longer sleeps, because
// the thread it waits for may need this processor.
constexpr std::chrono::microseconds kSpin{100};

template <class T>
void wait_while(const std::atomic<T>& value, T old) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 16; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() - start < kSpin);
  value.wait(old, std::memory_order_acquire);
}

// Its threads live as long as the process.
class ThreadPool {
 public:
  void run(int64_t pieces, int threads, PieceFunction f, void* work) {
    while (static_cast<int>(shares_.size()) < threads) {
      shares_.push_back(std::make_unique<Share>());
      if (const int id = static_cast<int>(shares_.size()) - 1; id > 0) std::thread([this, id, seen = posted_.load()] { serve(id, seen); }).detach();
    }
    f_ = f;
    work_ = work;
    threads_ = threads;
    failure_ = nullptr;
    for (int i = 0; i < threads; ++i) {
      shares_[static_cast<size_t>(i)]->next.store(pieces * i / threads, std::memory_order_relaxed);
      shares_[static_cast<size_t>(i)]->end = pieces * (i + 1) / threads;
    }
    open_.store(true);
    posted_.fetch_add(1);
    posted_.notify_all();
    take(0);
    // From here on nobody begins: a thread that comes now counts itself, sees the work closed and goes.
    open_.store(false);
    for (int32_t n; (n = inside_.load()) != 0;) wait_while(inside_, n);
    if (failure_) std::rethrow_exception(failure_);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next = 0;
    int64_t end = 0;
  };

  void serve(int id, uint32_t seen) {
    for (;;) {
      wait_while(posted_, seen);
      seen = posted_.load();
      inside_.fetch_add(1);
      if (open_.load() && id < threads_) take(id);
      if (inside_.fetch_sub(1) == 1) inside_.notify_all();
    }
  }

  void take(int id) {
    inside_piece = true;
    for (int i = 0; i < threads_; ++i) {
      Share& share = *shares_[static_cast<size_t>((id + i) % threads_)];
      while (share.next.load(std::memory_order_relaxed) < share.end) {
        const int64_t piece = share.next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= share.end) break;
        try {
          f_(work_, piece, id);
        } catch (...) {
          const std::lock_guard lock(failure_mutex_);
          if (!failure_) failure_ = std::current_exception();
        }
      }
    }
    inside_piece = false;
  }

  std::mutex mutex_, failure_mutex_;
  std::vector<std::unique_ptr<Share>> shares_;
  PieceFunction f_ = nullptr;
  void* work_ = nullptr;
  int threads_ = 0;
  std::exception_ptr failure_;
  alignas(64) std::atomic<uint32_t> posted_ = 0;
  alignas(64) std::atomic<int32_t> inside_ = 0;
  alignas(64) std::atomic<bool> open_ = false;
};

ThreadPool& pool() {
  static auto* p = new ThreadPool;
  return *p;
}

}  // namespace

void set_num_threads(int n) {
  current_num_threads() = n < 1 ? default_threads() : n;
  openblas_set_num_threads(current_num_threads());
  omp_set_num_threads(current_num_threads());
}

int num_threads() { return current_num_threads(); }

bool in_parallel() { return inside_piece; }

void run_pieces(int64_t pieces, PieceFunction f, void* work) {
  const int threads = static_cast<int>(std::min<int64_t>(pieces, num_threads()));
  if (threads > 1 && !inside_piece) {
    if (const std::unique_lock lock(pool().mutex(), std::try_to_lock); lock) return pool().run(pieces, threads, f, work);
  }
  for (int64_t piece = 0; piece < pieces; ++piece) f(work, piece, 0);
}

}  // namespace krait::core
