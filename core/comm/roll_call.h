#pragma once
#include <string>

#include "core/tensor.h"

namespace krait::comm {

/// What this process is doing, for the ranks that wait for it in vain.
void note_call(const char* collective, const std::string& group, const Tensor& t);
/// While alive this process waits for a collective of CPU tensors.
class Waiting {
 public:
  Waiting();
  ~Waiting();
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;
};

/// Asks all ranks what they are doing, gives them a few seconds, and names those that keep the others waiting: the ones
/// that do not answer, that compute, or that are behind. Lines that begin with "\n       "; called when time is up.
std::string roll_call();

}  // namespace krait::comm
