#include "kernels/sample.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/random.h"

namespace krait::kernels::cpu {

namespace {

int64_t draw(const std::vector<float>& s, const SampleOptions& o, double u) {
  const auto first_largest = std::max_element(s.begin(), s.end());
  if (o.temperature == 0) return first_largest - s.begin();
  const float top = *first_largest;
  std::vector<uint64_t> w(s.size());
  for (size_t i = 0; i < s.size(); ++i)
    w[i] = static_cast<uint64_t>(std::exp((s[i] - top) / static_cast<float>(o.temperature)) * 1099511627776.0f);
  float least = -INFINITY;  // the smallest kept logit
  if (o.top_p < 1 || o.top_k > 0) {
    std::vector<size_t> order(s.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return s[a] > s[b]; });
    const uint64_t all = std::accumulate(w.begin(), w.end(), uint64_t{0});
    const auto wanted = static_cast<uint64_t>(o.top_p * static_cast<double>(all));
    const size_t limit = o.top_k > 0 ? std::min(static_cast<size_t>(o.top_k), s.size()) : s.size();
    uint64_t held = 0;
    size_t n = 0;
    do held += w[order[n++]];
    while (n < limit && held < wanted);
    least = s[order[n - 1]];
  }
  uint64_t kept = 0;
  for (size_t i = 0; i < s.size(); ++i) kept += s[i] >= least ? w[i] : 0;
  const auto target = static_cast<uint64_t>(u * static_cast<double>(kept));
  uint64_t passed = 0;
  for (size_t i = 0; i < s.size(); ++i) {
    passed += s[i] >= least ? w[i] : 0;
    if (passed > target) return static_cast<int64_t>(i);
  }
  return first_largest - s.begin();
}

}  // namespace

void sample(Tensor& tokens, const Tensor& logits, const Tensor& step, const SampleOptions& options) {
  for (int64_t r = 0; r < logits.size(0); ++r) {
    const Philox word = philox(options.key, static_cast<uint64_t>(step.data<int64_t>()[0]), static_cast<uint64_t>(r));
    tokens.data<int64_t>()[r] =
        draw(logits.select(0, r).to_vector<float>(), options, static_cast<double>(uniform_from_bits(word.word[0])));
  }
}

void sample_next(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits, const SampleOptions& options) {
  Tensor tokens = empty({logits.size(0)}, DType::i64, logits.device());
  sample(tokens, logits, step, options);
  int64_t& at = step.data<int64_t>()[0];
  for (int64_t r = 0; r < tokens.numel(); ++r) {
    last.data<int64_t>()[r] = tokens.data<int64_t>()[r];
    if (at < made.size(1)) made.data<int64_t>()[r * made.size(1) + at] = tokens.data<int64_t>()[r];
    ++position.data<int32_t>()[r];
  }
  ++at;
}

}  // namespace krait::kernels::cpu
