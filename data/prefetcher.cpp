#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "core/error.h"
#include "data/dataset.h"

namespace krait::data {

struct Prefetcher::Impl {
  DatasetPtr dataset;
  int64_t step, rank, world, stride;
  size_t depth;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Batch> ready;
  std::exception_ptr failure;
  bool ended = false, stop = false;
  std::thread worker;

  void work() {
    try {
      for (; dataset->steps() < 0 || step < dataset->steps(); step += stride) {
        {
          std::unique_lock lock(mutex);
          changed.wait(lock, [&] { return stop || ready.size() < depth; });
          if (stop) return;
        }
        Batch batch = dataset->get(step, rank, world);
        const std::lock_guard lock(mutex);
        ready.push_back(std::move(batch));
        changed.notify_all();
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
    const std::lock_guard lock(mutex);
    ended = true;
    changed.notify_all();
  }
};

Prefetcher::Prefetcher(DatasetPtr dataset, int64_t first_step, int64_t rank, int64_t world, int64_t depth,
                       int64_t stride)
    : impl_(std::make_unique<Impl>()) {
  KRAIT_CHECK(depth > 0 && stride > 0, "prefetch depth and stride must be positive, not {} and {}", depth, stride);
  impl_->dataset = std::move(dataset);
  impl_->step = first_step;
  impl_->rank = rank;
  impl_->world = world;
  impl_->stride = stride;
  impl_->depth = static_cast<size_t>(depth);
  impl_->worker = std::thread([impl = impl_.get()] { impl->work(); });
}

Prefetcher::~Prefetcher() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->changed.notify_all();
  impl_->worker.join();
}

std::optional<Batch> Prefetcher::next() {
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait(lock, [&] { return impl_->ended || !impl_->ready.empty(); });
  if (!impl_->ready.empty()) {
    Batch batch = std::move(impl_->ready.front());
    impl_->ready.pop_front();
    impl_->changed.notify_all();
    return batch;
  }
  if (impl_->failure) std::rethrow_exception(impl_->failure);
  return std::nullopt;
}

}  // namespace krait::data
