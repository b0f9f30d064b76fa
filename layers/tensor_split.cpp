#include "layers/tensor_split.h"

#include "layers/near_divisors.h"

namespace krait::layers {

Owned owned(const comm::GroupPtr& tensor, int64_t count, const std::string& key, const std::string& things) {
  const int64_t size = tensor->size(), rank = tensor->rank();
  KRAIT_CHECK(count % size == 0,
              "{}: {} {} do not split over {} processes (parallelism.tensor); set parallelism.tensor to {}, or change {}",
              key, count, things, size, near_divisors(count, size), key);
  return {rank * count / size, (rank + 1) * count / size};
}

Owned owned_or_copied(const comm::GroupPtr& tensor, int64_t count, const std::string& key, const std::string& things) {
  const int64_t size = tensor->size(), rank = tensor->rank();
  if (count >= size) return owned(tensor, count, key, things);
  KRAIT_CHECK(size % count == 0,
              "{}: {} processes (parallelism.tensor) cannot share {} {} evenly; set one to a multiple of the other", key,
              size, count, things);
  const int64_t copies = size / count;
  return {rank / copies, rank / copies + 1, rank % copies == 0};
}

Owned owned_uneven(const comm::GroupPtr& tensor, int64_t count) {
  return {tensor->rank() * count / tensor->size(), (tensor->rank() + 1) * count / tensor->size()};
}

}  // namespace krait::layers
