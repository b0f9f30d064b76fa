#pragma once
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/train/krait_command.h"

namespace krait::testing {

/// A text with structure to learn: repeated sentences with varying words.
inline std::string sample_text(int lines) {
  static const char* const who[] = {"the fox", "a bear", "my friend", "the old king"};
  static const char* const what[] = {"sees", "follows", "greets", "forgets"};
  std::string text;
  uint32_t r = 1;
  for (int i = 0; i < lines; ++i) {
    const auto next = [&] { return (r = r * 1664525u + 1013904223u) >> 28; };
    text += fmt::format("{} {} {}.\n", who[next() % 4], what[next() % 4], who[next() % 4]);
  }
  return text;
}

inline constexpr const char* kTinyConfig = R"(name: tiny
seed: 3
runtime: {{device: {device}, precision: {precision}}}
data: {{path: {data}, context: 32}}
model:
  d_model: 32
  n_layers: 2
  attention: {{n_heads: 2}}
  mlp: {{type: swiglu}}
  dropout: 0.1
optimizer: {{lr: 3e-3}}
lr_scheduler: {{warmup_steps: 5}}
train: {{steps: 30, micro_batch_size: 4, tokens_per_step: 256}}
eval: {{interval: 10}}
checkpoint: {{interval: 10, keep_latest: 3}}
logging: {{interval: 1}}
)";

/// A directory with a prepared token store and a config.
struct Workplace {
  explicit Workplace(const std::string& device = "cpu", const std::string& precision = "fp32") {
    write_text(tmp / "text.txt", sample_text(400));
    const Outcome prepared = krait_command(fmt::format("data prepare {} -o {} --tokenizer char -q", tmp / "text.txt", tmp / "tokens.h5"));
    REQUIRE(prepared.status == 0);
    write_text(config, fmt::format(fmt::runtime(kTinyConfig), fmt::arg("device", device),
                                   fmt::arg("precision", precision), fmt::arg("data", tmp / "tokens.h5")));
  }
  Outcome train(const std::string& run, const std::string& more = "") const {
    return krait_command(fmt::format("train {} --run-dir {} {}", config, tmp / run, more));
  }
  TemporaryDirectory tmp;
  std::string config = tmp / "tiny.yaml";
};

inline std::vector<nlohmann::json> metrics(const std::string& run) {
  std::vector<nlohmann::json> lines;
  std::ifstream file(run + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

/// Below a limit on file sizes, which stands for a full disk, no further line fits behind the last one.
inline void fill_metrics(const std::string& run, size_t limit) {
  const std::string begin = train::read_file(run + "/metrics.jsonl") + R"({"step":1,"note":")";
  write_text(run + "/metrics.jsonl", begin + std::string(limit - 100 - begin.size(), 'x') + "\"}\n");
}

/// Step, split and every number that must not depend on the clock.
inline std::vector<std::string> losses(const std::string& run) {
  std::vector<std::string> out;
  for (const nlohmann::json& m : metrics(run))
    out.push_back(m.contains("split") ? fmt::format("{} {}", m["step"].dump(), m["nll"].dump())
                                      : fmt::format("{} {} {} {}", m["step"].dump(), m["loss"].dump(),
                                                    m["grad_norm"].dump(), m["lr"].dump()));
  return out;
}

}  // namespace krait::testing
