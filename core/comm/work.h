#pragma once
#include "core/comm/process_group.h"

namespace krait::comm {

/// What a backend knows of a collective under way; it holds the tensors. wait() may be called again, and is
/// called before the state dies; a failure in it ends the job.
struct Work::State {
  virtual ~State() = default;
  virtual void wait() = 0;
};

/// The same checks in every backend, before anything is sent. `parts`: how often `piece` fits into `whole`.
void check_tensor(const char* collective, const ProcessGroup& group, const Tensor& t);
void check_parts(const char* collective, const ProcessGroup& group, const Tensor& whole, const Tensor& piece, int parts);
void check_exchange(const ProcessGroup& group, const Tensor& send, int to, const Tensor& receive, int from);
void check_root(const char* collective, const ProcessGroup& group, int root);

}  // namespace krait::comm
