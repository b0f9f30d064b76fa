#include <random>

#include "tests/testing/catch.h"
#include "train/config.h"

using namespace krait;
using namespace krait::train;

// Whatever the text: a config or a ConfigError, never another exception, a crash or a hang.
TEST_CASE("config: mangled text is read or refused") {
  const std::string seed_text = R"(name: x
runtime: {device: cpu, threads: 2}
data: {path: "a b.h5", context: 64} # comment
model: &m
  d_model: 128
  n_layers: 4
  layers: [attention]
  attention: {n_heads: 4, rotary_dim: 16}
optimizer: {betas: [0.9, 0.95], lr: 6e-4}
train: {steps: 100, micro_batch_size: 12}
eval: {stride: 32}
)";
  const std::string alphabet = "{}[]:,&*#!|>'\"%@`-?\n\t 019.eE~\xff\x00xkd_";
  std::mt19937 random(7);
  const auto pick = [&](size_t n) { return static_cast<size_t>(random() % n); };
  int read = 0, refused = 0;
  for (int i = 0; i < 4000; ++i) {
    std::string text = seed_text;
    for (size_t edits = 1 + pick(4); edits > 0; --edits) {
      const size_t at = pick(text.size());
      switch (pick(4)) {
        case 0: text[at] = alphabet[pick(alphabet.size())]; break;
        case 1: text.insert(at, 1, alphabet[pick(alphabet.size())]); break;
        case 2: text.erase(at, 1 + pick(8)); break;
        default: text.insert(at, text.substr(pick(text.size()), pick(20))); break;
      }
    }
    try {
      const Config config = parse_config(text, "fuzz.yaml");
      ++read;
      REQUIRE(parse_config(config.to_yaml(), "again.yaml").to_yaml() == config.to_yaml());
    } catch (const ConfigError& e) {
      ++refused;
      if (!std::string(e.what()).starts_with("fuzz.yaml")) FAIL("message without a place: " << e.what() << "\n" << text);
    }
  }
  CHECK(read > 50);
  CHECK(refused > 100);
}
