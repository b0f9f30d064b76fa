#pragma once
#include <functional>
#include <optional>
#include <string>

#include "train/session.h"

namespace krait::train {

struct EvalOptions {
  int64_t context = 0;
  int64_t stride = 0;            // context: windows do not overlap; less: every token sees at least context - stride
  int64_t micro_batch_size = 1;
  int64_t max_tokens = 0;        // 0: all
  data::Documents documents = data::Documents::ignore;
  bool carry = false;            // windows follow one another and the recurrent state goes on: streaming
};

/// Held-out likelihood of a split, in nats, with the conventions that make it comparable.
struct EvalResult {
  double nll = 0;         // mean per predicted token, or per example of a classifier; of a regressor: squared error
  double ppl = 0;         // exp(nll)
  double bpb = 0;         // total nll / ln 2 / bytes of the predicted tokens; 0 where their bytes are not known
  double byte_ppl = 0;    // 2^bpb
  double word_ppl = 0;    // exp(total nll / (words + line ends)); 0 unless all tokens of the split but its first were predicted
  double total_nll = 0;
  std::optional<double> accuracy;  // of a task: share of right answers
  std::optional<double> rmse;      // of a regressor
  int64_t tokens = 0;     // predicted; examples of a classifier or regressor
  int64_t bytes = 0;      // of those; 0 where some are unknown
  int64_t unknown = 0;    // predicted tokens that stand for text of any length (data::Tokenizer::unknown_id)
  int64_t words = 0;      // words + line ends of the split
  double seconds = 0;
  int64_t split_tokens = 0;  // that could be predicted in the split; fewer were when whole_split is false
  bool whole_split = true;
  bool stopped = false;  // by its progress: there are no numbers
};

/// Is told which share of an evaluation is done: 0 at its beginning, 1 at its end. Before that, false stops it there. All
/// ranks of the job ask at the same places and must get the same answer.
using EvalProgress = std::function<bool(double share)>;

/// Runs the model over `tokens` without gradients. Every token but the first (of each document when packed) is
/// predicted exactly once. Sums are made on the device in fp32 per token and in fp64 over tokens.
/// With `carry` each of micro_batch_size rows streams through its part of the split in constant memory.
EvalResult evaluate(Session& session, const data::TokensPtr& tokens, const EvalOptions& options, const EvalProgress& progress = {});

/// Runs the model over one pass of a task's split.
EvalResult evaluate_task(Session& session, const data::DatasetPtr& split, const EvalProgress& progress = {});

/// What the section `eval` of a config asks for.
EvalOptions eval_options(const Config& config);

/// What the numbers mean, for people: "sliding windows of 1024, stride 512: ...".
std::string describe_convention(const EvalOptions& options, const EvalResult& result);

}  // namespace krait::train
