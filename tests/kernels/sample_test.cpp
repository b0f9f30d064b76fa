#include "kernels/sample.h"

#include <cmath>
#include <map>

#include "core/random.h"
#include "tests/testing/tensors.h"

using namespace krait;
using kernels::SampleOptions;

namespace {

Tensor step_at(int64_t step, Device device = kCpu) { return from_vector<int64_t>({step}).to(device); }

int64_t drawn(const Tensor& logits, const SampleOptions& o, int64_t step = 0) {
  return kernels::sample(logits, step_at(step), o).to_vector<int64_t>()[0];
}

}  // namespace

TEST_CASE("sample: temperature 0 takes the first of the largest") {
  const Tensor logits = from_vector<float>({1, 3, 2, 3}, {1, 4});
  for (int64_t step = 0; step < 5; ++step) CHECK(drawn(logits, {.temperature = 0}, step) == 1);
  const Tensor rows = from_vector<float>({1, 3, 2, 9, -1, -2}, {2, 3});
  CHECK(kernels::sample(rows, step_at(0), {.temperature = 0}).to_vector<int64_t>() == std::vector<int64_t>{1, 0});
}

TEST_CASE("sample: tokens come as often as they are likely") {
  const Tensor logits = from_vector<float>({std::log(0.1f), std::log(0.6f), std::log(0.3f)}, {1, 3});
  std::map<int64_t, int> seen;
  for (int64_t step = 0; step < 4000; ++step) ++seen[drawn(logits, {.key = 5}, step)];
  CHECK(seen[0] / 4000.0 == Approx(0.1).margin(0.03));
  CHECK(seen[1] / 4000.0 == Approx(0.6).margin(0.03));
  CHECK(seen[2] / 4000.0 == Approx(0.3).margin(0.03));
}

TEST_CASE("sample: top_p and top_k keep the likeliest") {
  const Tensor logits = from_vector<float>({std::log(0.1f), std::log(0.5f), std::log(0.15f), std::log(0.25f)}, {1, 4});
  const auto kept = [&](SampleOptions o) {
    std::map<int64_t, int> seen;
    o.key = 3;
    for (int64_t step = 0; step < 500; ++step) ++seen[drawn(logits, o, step)];
    std::vector<int64_t> all;
    for (const auto& [token, count] : seen) all.push_back(token);
    return all;
  };
  CHECK(kept({.top_p = 0.0}) == std::vector<int64_t>{1});
  CHECK(kept({.top_p = 0.4}) == std::vector<int64_t>{1});
  CHECK(kept({.top_p = 0.7}) == std::vector<int64_t>{1, 3});
  CHECK(kept({.top_p = 0.85}) == std::vector<int64_t>{1, 2, 3});
  CHECK(kept({.top_k = 1}) == std::vector<int64_t>{1});
  CHECK(kept({.top_k = 3}) == std::vector<int64_t>{1, 2, 3});
  CHECK(kept({.top_p = 0.7, .top_k = 1}) == std::vector<int64_t>{1});
  CHECK(kept({}) == std::vector<int64_t>{0, 1, 2, 3});
}

TEST_CASE("sample: the same key and step give the same token, others do not") {
  const Tensor logits = random_tensor({1, 1000}, Normal{}, 3, DType::f32);
  CHECK(drawn(logits, {.key = 1}, 7) == drawn(logits, {.key = 1}, 7));
  int equal = 0;
  for (int64_t step = 0; step < 20; ++step) equal += drawn(logits, {.key = 1}, step) == drawn(logits, {.key = 2}, step);
  CHECK(equal < 10);
}

TEST_CASE("sample_next: tokens are kept in order, and places count on") {
  Tensor made = zeros({2, 2}, DType::i64, kCpu), last = zeros({2, 1}, DType::i64, kCpu), position = from_vector<int32_t>({5, 5}), step = step_at(0);
  for (size_t i = 0; i < 3; ++i) {
    std::vector<float> logits(8, 0.0f);
    logits[i] = logits[4 + (i + 1) % 3] = 1;
    kernels::sample_next(made, last, position, step, from_vector(logits, {2, 4}), {.temperature = 0});
  }
  CHECK(made.to_vector<int64_t>() == std::vector<int64_t>{0, 1, 1, 2});
  CHECK(last.to_vector<int64_t>() == std::vector<int64_t>{2, 0});
  CHECK(position.to_vector<int32_t>() == std::vector<int32_t>{8, 8});
  CHECK(step.item() == 3);
}

TEST_CASE("sample: cuda draws what the cpu draws", "[cuda]") {
  for (const int64_t v : {int64_t{1}, int64_t{33}, int64_t{5000}, int64_t{50257}}) {
    const Tensor logits = random_tensor({3, v}, Normal{.std = 3}, static_cast<uint64_t>(v), DType::bf16).to(DType::bf16);
    for (const SampleOptions& o : {SampleOptions{.temperature = 0}, SampleOptions{.key = 4}, SampleOptions{.top_p = 0.9, .key = 4},
                                   SampleOptions{.temperature = 0.7, .top_p = 0.5, .top_k = 40, .key = 9}}) {
      int differ = 0;
      for (int64_t step = 0; step < 20; ++step) {
        const auto cpu = kernels::sample(logits, step_at(step), o).to_vector<int64_t>();
        const auto gpu = kernels::sample(logits.to(cuda_device()), step_at(step, cuda_device()), o).cpu().to_vector<int64_t>();
        for (size_t r = 0; r < cpu.size(); ++r) differ += cpu[r] != gpu[r];
      }
      INFO("vocabulary " << v << " temperature " << o.temperature << " top_p " << o.top_p << " top_k " << o.top_k);
      CHECK(differ <= 2);  // exponentials differ in their last digit: a draw at a border may fall to the neighbour
    }
  }
}
