#include "kernels/flat_update.h"

#include <algorithm>

namespace krait::kernels {

OptimizerSegments make_optimizer_segments(const std::vector<SegmentSpec>& specs, int64_t numel, Device device) {
  KRAIT_CHECK(numel >= 0 && (numel == 0 || !specs.empty()), "optimizer: {} elements without a segment", numel);
  std::vector<int64_t> chunks;
  std::vector<double> settings;
  int64_t end_of_last = 0, segments = 0;
  for (size_t i = 0; i < specs.size(); ++i) {
    const SegmentSpec& s = specs[i];
    const int64_t end = i + 1 < specs.size() ? specs[i + 1].offset : numel;
    KRAIT_CHECK(s.offset >= end_of_last && s.length >= 0 && s.offset + s.length <= numel && (i > 0 || s.offset == 0),
                "optimizer: segment {} is [{}, {}) after {} in a buffer of {} elements", i, s.offset,
                s.offset + s.length, end_of_last, numel);
    KRAIT_CHECK(s.offset % kSegmentAlignment == 0, "optimizer: segment {} begins at {}, not at a multiple of {}", i,
                s.offset, kSegmentAlignment);
    end_of_last = s.offset + s.length;
    const size_t last = settings.size();
    if (last == 0 || settings[last - 2] != s.lr_scale || settings[last - 1] != s.weight_decay) {
      settings.insert(settings.end(), {s.lr_scale, s.weight_decay});
      ++segments;
    }
    int64_t begin = s.offset;
    if (!chunks.empty() && chunks.back() == segments - 1) {  // fill up the last chunk of the same segment first
      int64_t* const chunk = &chunks[chunks.size() - 3];
      begin = chunk[1] = std::min(chunk[0] + kUpdateChunk, end);
    }
    for (; begin < end; begin += kUpdateChunk)
      chunks.insert(chunks.end(), {begin, std::min(begin + kUpdateChunk, end), segments - 1});
  }
  return {numel, from_vector(chunks, {static_cast<int64_t>(chunks.size()) / 3, 3}).to(device),
          from_vector(settings, {segments, 2}).to(device)};
}

void check_flat_update(std::string_view op, const FlatUpdate& u, const std::vector<Tensor>& states,
                       const OptimizerSegments& segments) {
  const DType p = u.param.dtype(), g = u.grad.dtype();
  KRAIT_CHECK(p == DType::f32 || p == DType::f64, "{}: parameters are {}, expected float32 or float64", op, p);
  KRAIT_CHECK(g == p || (g == DType::bf16 && p == DType::f32), "{}: {} gradients for {} parameters", op, g, p);
  KRAIT_CHECK(segments.numel == u.param.numel(), "{}: segments of {} elements for {}", op, segments.numel,
              describe(u.param));
  const auto check_flat = [&](const char* what, const Tensor& t) {
    KRAIT_CHECK(t.ndim() == 1 && t.numel() == u.param.numel() && t.is_contiguous() && t.device() == u.param.device(),
                "{}: {} is {}, expected a contiguous flat buffer like the parameters {}", op, what, describe(t),
                describe(u.param));
    KRAIT_CHECK(t.numel() == 0 || reinterpret_cast<uintptr_t>(t.raw_data()) % 16 == 0,
                "{}: {} is not aligned to 16 bytes", op, what);
  };
  check_flat("param", u.param);
  check_flat("grad", u.grad);
  for (const Tensor& s : states) {
    check_flat("state", s);
    check_same(op, u.param, s);
  }
  if (u.compute.defined()) {
    check_flat("compute", u.compute);
    KRAIT_CHECK(u.compute.dtype() == DType::bf16, "{}: the compute copy is {}, expected bfloat16", op,
                u.compute.dtype());
  }
  const auto check_scalars = [&](const char* what, const Tensor& t, int64_t n) {
    KRAIT_CHECK(t.dtype() == DType::f64 && t.shape() == Shape{n} && t.device() == u.param.device(),
                "{}: {} is {}, expected float64 ({}) on {}", op, what, describe(t), n, u.param.device());
  };
  check_scalars("hyper", u.hyper, 3);
  if (u.clip.defined()) check_scalars("clip", u.clip, 4);
}

}  // namespace krait::kernels
