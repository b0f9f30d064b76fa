#include "kernels/sample.h"

namespace krait::kernels {

namespace {

void check_logits(const Tensor& logits, const Tensor& step, const SampleOptions& options) {
  KRAIT_CHECK(logits.ndim() == 2 && logits.size(1) > 0, "sample: logits are {}, expected (b, v)", logits.shape());
  KRAIT_CHECK(logits.size(1) < (int64_t{1} << 22), "sample: {} tokens, at most 4194303 are supported", logits.size(1));
  KRAIT_CHECK(step.dtype() == DType::i64 && step.numel() == 1, "sample: step is {}, expected one int64", describe(step));
  KRAIT_CHECK(options.temperature >= 0 && options.top_p >= 0 && options.top_k >= 0,
              "sample: temperature {}, top_p {} and top_k {} must not be negative", options.temperature, options.top_p, options.top_k);
}

}  // namespace

Tensor sample(const Tensor& logits, const Tensor& step, const SampleOptions& options) {
  check_logits(logits, step, options);
  Tensor tokens = empty({logits.size(0)}, DType::i64, logits.device());
  if (tokens.numel() == 0) return tokens;
  KRAIT_DISPATCH(logits.device(), sample(tokens, logits.stride(1) == 1 ? logits : logits.contiguous(), step, options));
  return tokens;
}

void sample_next(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits, const SampleOptions& options) {
  check_logits(logits, step, options);
  const int64_t b = logits.size(0);
  KRAIT_CHECK(made.ndim() == 2 && made.size(0) == b && made.dtype() == DType::i64 && made.is_contiguous() && position.numel() == b && last.numel() == b &&
                  last.dtype() == DType::i64 && last.is_contiguous() &&
                  position.dtype() == DType::i32 && position.is_contiguous(),
              "sample_next: made {}, last {}, position {} for logits {}", describe(made), describe(last), describe(position), describe(logits));
  if (b == 0) return;
  KRAIT_DISPATCH(logits.device(), sample_next(made, last, position, step, logits.stride(1) == 1 ? logits : logits.contiguous(), options));
}

}  // namespace krait::kernels
