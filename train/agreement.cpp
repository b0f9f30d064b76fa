#include "train/agreement.h"

#include <algorithm>

#include "core/error.h"

namespace krait::train {

std::string from_rank(comm::ProcessGroup& group, int root, const std::string& text) {
  if (group.size() == 1) return text;
  const Tensor length = full({1}, static_cast<double>(text.size()), DType::i64, kCpu);
  group.broadcast(length, root).wait();
  if (length.data<int64_t>()[0] == 0) return {};
  const Tensor bytes = empty({length.data<int64_t>()[0]}, DType::u8, kCpu);
  if (group.rank() == root) std::copy(text.begin(), text.end(), bytes.data<uint8_t>());
  group.broadcast(bytes, root).wait();
  return {bytes.data<uint8_t>(), bytes.data<uint8_t>() + bytes.numel()};
}

void throw_together(comm::ProcessGroup& group, const std::exception_ptr& own_failure) {
  if (group.size() == 1) {
    if (own_failure) std::rethrow_exception(own_failure);
    return;
  }
  // The lowest rank that failed, found as a maximum.
  const Tensor first = full({1}, own_failure ? group.size() - group.rank() : 0, DType::i32, kCpu);
  group.all_reduce(first, comm::Reduce::max).wait();
  if (first.data<int32_t>()[0] == 0) return;
  const int root = group.size() - first.data<int32_t>()[0];
  std::string message;
  try {
    if (own_failure) std::rethrow_exception(own_failure);
  } catch (const std::exception& e) {
    message = e.what();
  }
  message = from_rank(group, root, message);
  throw Error(root == 0 ? message : fmt::format("on rank {}: {}", root, message));
}

}  // namespace krait::train
