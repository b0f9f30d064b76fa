#pragma once
#include <functional>
#include <string>

#include "train/session.h"

namespace krait::train {

struct GenerateOptions {
  std::string prompt;
  int64_t max_tokens = 200;
  double temperature = 1.0;  // 0: always the likeliest token
  double top_p = 1.0;        // nucleus sampling (Holtzman et al. 2020): the smallest set with this probability
  int64_t top_k = 0;         // 0: all
  uint64_t seed = 0;
  DType states = DType::f32;  // DecodeLoop
};

/// Writes text as it comes, through the parallel form for the prompt and the step form after it. Stops at the
/// tokenizer's end-of-document token. Returns the number of new tokens. The same seed gives the same text.
int64_t generate(Session& session, const GenerateOptions& options, const std::function<void(const std::string&)>& write);

}  // namespace krait::train
