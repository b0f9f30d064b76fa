#include "train/decode.h"

#include <cmath>

#include "tests/testing/catch.h"
#include "tests/testing/tensors.h"
#include "train/bench_models.h"

using namespace krait;
using namespace krait::train;

namespace {

constexpr int64_t kBatch = 3, kPrompt = 7, kNew = 12;

struct Setup {
  explicit Setup(const std::string& base, Device device, int64_t rows = kBatch)
      : batch(rows), config(bench::bench_config({base, base, rows, kPrompt + kNew, false, 0}, device)), session(bench::bench_session(config)),
        model(session.language_model("the test")), prompts(bench::random_batch(config, 3).tokens.slice(1, 0, kPrompt).contiguous()) {
    model.set_training(false);
  }
  std::vector<int64_t> decode(const kernels::SampleOptions& sampling, bool graphs) {
    DecodeLoop loop(model, session.parameters->options(), batch, kPrompt + kNew, kNew, sampling, graphs);
    loop.prefill(prompts);
    while (loop.count() < kNew) loop.step();
    captured = loop.captured();
    return loop.drawn().to_vector<int64_t>();
  }
  int64_t batch;
  Config config;
  Session session;
  layers::LanguageModel& model;
  Tensor prompts;  // (b, l) int32
  bool captured = false;
};

}  // namespace

TEST_CASE("decoding draws what the whole sequence would, for every family") {
  for (const char* base : {"char-gpt", "mamba-small", "mamba2-small", "xlstm-small"}) {
    INFO(base);
    Setup s(base, kCpu);
    const std::vector<int64_t> tokens = s.decode({.temperature = 0}, true);
    // Greedy again, from scratch at every length.
    std::vector<std::vector<int32_t>> rows;
    for (int64_t r = 0; r < kBatch; ++r) rows.push_back(s.prompts.select(0, r).to_vector<int32_t>());
    for (int64_t n = 0; n < kNew; ++n) {
      std::vector<int32_t> all;
      for (const auto& row : rows) all.insert(all.end(), row.begin(), row.end());
      layers::ModelInput input;
      input.tokens = from_vector(all, {kBatch, kPrompt + n});
      const NoGrad guard;
      const Tensor last = s.model.logits(input).data().select(1, -1).contiguous();
      const auto next = kernels::sample(last, zeros({1}, DType::i64, kCpu), {.temperature = 0}).to_vector<int64_t>();
      for (int64_t r = 0; r < kBatch; ++r) {
        CHECK(tokens[static_cast<size_t>(r * kNew + n)] == next[static_cast<size_t>(r)]);
        rows[static_cast<size_t>(r)].push_back(static_cast<int32_t>(next[static_cast<size_t>(r)]));
      }
    }
  }
}

TEST_CASE("a captured decoding step draws the same tokens as plain launches", "[cuda]") {
  for (const char* base : {"char-gpt", "gpt2-124m", "mamba-small", "mamba2-small", "xlstm-small"}) {
    INFO(base);
    Setup s(base, cuda_device());
    for (const kernels::SampleOptions& o : {kernels::SampleOptions{.temperature = 0}, kernels::SampleOptions{.top_p = 0.9, .key = 3}}) {
      const auto plain = s.decode(o, false);
      CHECK_FALSE(s.captured);
      CHECK(s.decode(o, true) == plain);
      CHECK(s.captured);
    }
  }
}

TEST_CASE("captured steps of several sequences draw the same tokens as plain launches", "[cuda]") {
  for (const char* base : {"mamba-130m", "mamba2-130m", "llama-124m", "gpt2-124m", "xlstm-125m"})
    for (const int64_t rows : {5, 9, 65}) {
      INFO(base << ", " << rows << " sequences");
      Setup s(base, cuda_device(), rows);
      const auto plain = s.decode({.temperature = 0}, false);
      CHECK(s.decode({.temperature = 0}, true) == plain);
      CHECK(s.captured);
    }
}

TEST_CASE("captured steps of the other families draw the same tokens as plain launches", "[cuda]") {
  for (const char* base : {"s4d-24x768", "s4-24x768", "lstm-2x1024", "gru-2x1024", "linear-24x768", "gated-cnn-24x768"})
    for (const int64_t rows : {1, 5, 65}) {
      INFO(base << ", " << rows << " sequences");
      Setup s(base, cuda_device(), rows);
      const auto plain = s.decode({.temperature = 0}, false);
      CHECK(s.decode({.temperature = 0}, true) == plain);
      CHECK(s.captured);
    }
}

TEST_CASE("states of Mamba-2 and mLSTM rounded to bf16 once in 16 positions change logits by little") {
  constexpr int64_t kLength = 256;
  struct Family { const char *base, *state; double bound; };
  for (const Family& f : {Family{"mamba2-small", "ssm", 1e-3}, Family{"xlstm-small", "c", 1e-3}}) {
    Setup s(f.base, kCpu);
    const Tensor tokens = random_tensor({kBatch, kLength}, Uniform{0, 65}, 5, f32).to(DType::i64);
    const auto logits = [&](bool rounded) {
      layers::DecoderState state = s.model.initial_state(kBatch, kLength, s.session.parameters->options());
      std::vector<double> all;
      for (int64_t t = 0; t < kLength; ++t) {
        const auto now = s.model.next_logits(tokens.slice(1, t, t + 1).contiguous(), state).to(DType::f64).to_vector<double>();
        all.insert(all.end(), now.begin(), now.end());
        if (!rounded || t % 16 != 15) continue;
        for (layers::LayerState& layer : state.layers)
          if (const auto at = layer.tensors.find(f.state); at != layer.tensors.end()) at->second = at->second.to(DType::bf16).to(DType::f32);
      }
      return all;
    };
    const NoGrad guard;
    const std::vector<double> exact = logits(false), rounded = logits(true);
    double difference = 0, square = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      difference += (rounded[i] - exact[i]) * (rounded[i] - exact[i]);
      square += exact[i] * exact[i];
    }
    INFO(f.base << ", of the logits' root mean square: " << std::sqrt(difference / square));
    CHECK(difference > 0);
    CHECK(std::sqrt(difference / square) < f.bound);
  }
}

TEST_CASE("states in bf16 are refused where they are not served") {
  Setup s("mamba-small", kCpu);
  DecodeLoop loop(s.model, s.session.parameters->options(), kBatch, kPrompt + 2, 2, {.temperature = 0}, true, DType::bf16);
  CHECK(contains(error_of([&] { loop.prefill(s.prompts); }), "for mamba2 with d_state 128"));
}

TEST_CASE("decoding refuses a second prompt and more tokens than asked for") {
  Setup s("mamba-small", kCpu);
  DecodeLoop loop(s.model, s.session.parameters->options(), kBatch, kPrompt + 2, 2, {.temperature = 0});
  CHECK(contains(error_of([&] { loop.step(); }), "a step needs a prompt before it"));
  loop.prefill(s.prompts);
  CHECK(contains(error_of([&] { loop.prefill(s.prompts); }), "once"));
  loop.step();
  CHECK(contains(error_of([&] { loop.step(); }), "2 tokens were asked for"));
  CHECK(loop.drawn().shape() == Shape{kBatch, 2});
}
