#pragma once
#include <string>

#include "train/session.h"

namespace krait::train {

struct EvalOptions {
  int64_t context = 0;
  int64_t stride = 0;            // context: windows do not overlap; less: every token sees at least context - stride
  int64_t micro_batch_size = 1;
  int64_t max_tokens = 0;        // 0: all
  data::Documents documents = data::Documents::ignore;
};

/// Held-out likelihood of a split, in nats, with the conventions that make it comparable.
struct EvalResult {
  double nll = 0;         // mean per predicted token
  double ppl = 0;         // exp(nll)
  double bpb = 0;         // total nll / ln 2 / bytes of the predicted tokens; 0 without a text tokenizer
  double byte_ppl = 0;    // 2^bpb
  double word_ppl = 0;    // exp(total nll / (words + line ends)); 0 unless the whole split was evaluated
  double total_nll = 0;
  int64_t tokens = 0;     // predicted
  int64_t bytes = 0;      // of those
  int64_t words = 0;      // words + line ends of the split
  double seconds = 0;
  bool whole_split = true;
};

/// Runs the model over `tokens` without gradients. Every token but the first (of each document when packed) is
/// predicted exactly once. Sums are made on the device in fp32 per token and in fp64 over tokens.
EvalResult evaluate(Session& session, const data::TokensPtr& tokens, const EvalOptions& options);

/// What the numbers mean, for people: "sliding windows of 1024, stride 512: ...".
std::string describe_convention(const EvalOptions& options);

}  // namespace krait::train
