#include <hdf5.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "train/commands.h"
#include "train/evaluate.h"
#include "train/files.h"
#include "train/progress.h"
#include "train/run_state.h"

namespace krait::train {

namespace {

// A token store made with the run's tokenizer, or plain text to be encoded with it.
data::TokensPtr tokens_to_evaluate(const Session& session, const std::string& file, const std::string& split) {
  if (H5Fis_hdf5(file.c_str()) <= 0) return data::encode_text(read_file(file), *session.data.tokenizer, file);
  const data::TokenStorePtr store = data::TokenStore::open(file);
  KRAIT_CHECK(store->tokenizer()->serialize() == session.data.tokenizer->serialize(),
              "{} was made with another tokenizer ({}, {} ids) than the run's ({}, {} ids); prepare it with "
              "--tokenizer-from the run's data",
              file, store->tokenizer()->name(), store->vocab_size(), session.data.tokenizer->name(),
              session.data.tokenizer->vocab_size());
  return split_of(session.config, *store, "eval.split", split);
}

void print_text(const EvalResult& r, const LoadedRun& run, const std::string& where, const EvalOptions& options) {
  fmt::print("{} (step {}) on {}\n", run.checkpoint, run.step, where);
  if (!r.whole_split)
    fmt::print("  only the first {} of {} tokens, as eval.max_tokens asks for; eval.max_tokens=0 takes all\n", r.tokens, r.split_tokens);
  fmt::print("  tokens {}   nll {:.6f} nats/token   perplexity {}\n", r.tokens, r.nll, human_ppl(r.ppl, 4));
  if (r.bytes > 0)
    fmt::print("  bytes {}   bits per byte {:.4f}   byte perplexity {}\n", r.bytes, r.bpb, human_ppl(r.byte_ppl, 4));
  if (r.word_ppl > 0) fmt::print("  words and line ends {}   word perplexity {}\n", r.words, human_ppl(r.word_ppl, 3));
  fmt::print("  {}\n  {:.1f} s, {:.0f} tokens/s\n", describe_convention(options, r), r.seconds,
             static_cast<double>(r.tokens) / r.seconds);
}

void print_json(const EvalResult& r, const LoadedRun& run, const std::string& where, const EvalOptions& options) {
  nlohmann::ordered_json j{{"checkpoint", run.checkpoint}, {"step", run.step},     {"data", where},
                           {"tokens", r.tokens},           {"nll", r.nll},         {"ppl", r.ppl},
                           {"context", options.context},   {"stride", options.stride}};
  if (!r.whole_split) j["split_tokens"] = r.split_tokens;
  if (r.bytes > 0) {
    j["bytes"] = r.bytes;
    j["bpb"] = r.bpb;
    j["byte_ppl"] = r.byte_ppl;
  }
  if (r.word_ppl > 0) {
    j["words"] = r.words;
    j["word_ppl"] = r.word_ppl;
  }
  j["convention"] = describe_convention(options, r);
  j["seconds"] = r.seconds;
  fmt::print("{}\n", j.dump());
}

// Beside the result, which is standard output's.
EvalProgress shown_progress(const Config& config) {
  return [progress = std::make_shared<Progress>(0, 0, stderr), split = config.eval.split](double share) {
    progress->evaluating(split, share);
    return true;
  };
}

int eval_task(LoadedRun& run, const EvalCommand& command) {
  const Config& c = run.session.config;
  KRAIT_CHECK(command.data.empty(), "--data is for text; this run learned the task {}", c.data.type);
  const std::string& split = c.eval.split;
  const EvalResult r = evaluate_task(
      run.session, c.data.task->split(split, c.eval.micro_batch_size, static_cast<uint64_t>(c.seed), run.session.data.directory),
      shown_progress(c));
  if (command.json) {
    nlohmann::ordered_json j{{"checkpoint", run.checkpoint}, {"step", run.step}, {"task", c.data.type}, {"split", split},
                             {"examples", r.tokens}, {"nll", r.nll}};
    if (r.accuracy) j["accuracy"] = *r.accuracy;
    if (r.rmse) j["rmse"] = *r.rmse;
    j["seconds"] = r.seconds;
    fmt::print("{}\n", j.dump());
    return 0;
  }
  EvalMetrics m;
  m.nll = r.nll;
  m.accuracy = r.accuracy;
  m.rmse = r.rmse;
  fmt::print("{} (step {}) on {}, split {}\n  answers {}   {}\n  {:.1f} s\n", run.checkpoint, run.step, c.data.type, split,
             r.tokens, describe(m), r.seconds);
  return 0;
}

}  // namespace

int run_eval(const EvalCommand& command) {
  std::vector<std::string> overrides = command.overrides;
  if (command.context > 0) {
    overrides.push_back(fmt::format("eval.context={}", command.context));
    if (command.stride == 0) overrides.push_back(fmt::format("eval.stride={}", command.context));
  }
  if (command.stride > 0) overrides.push_back(fmt::format("eval.stride={}", command.stride));
  if (!command.split.empty()) overrides.push_back(fmt::format("eval.split=\"{}\"", command.split));
  LoadedRun run = load_finished_run(command.run_dir, overrides);
  const Config& c = run.session.config;
  if (c.data.task) return eval_task(run, command);
  const std::string file = command.data.empty() ? find_data_file(c) : command.data;
  if (std::error_code none; !std::filesystem::exists(file, none)) throw ConfigError(fmt::format("--data: no such file: {}", file));
  const data::TokensPtr tokens = tokens_to_evaluate(run.session, file, c.eval.split);
  const EvalOptions options = eval_options(c);
  const EvalResult result = evaluate(run.session, tokens, options, shown_progress(c));
  (command.json ? print_json : print_text)(result, run, tokens->where(), options);
  return 0;
}

}  // namespace krait::train
