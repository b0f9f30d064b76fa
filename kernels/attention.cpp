#include "kernels/attention.h"

#include <bit>
#include <cmath>

#include "kernels/rows.h"

namespace krait::kernels {

namespace {

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  check_same("attention", q, k, v);
  KRAIT_CHECK(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4,
              "attention: q {}, k {}, v {}: expected (b, l, heads, d) each", q.shape(), k.shape(), v.shape());
  KRAIT_CHECK(k.shape() == v.shape() && k.size(0) == q.size(0) && k.size(3) == q.size(3),
              "attention: q {} does not fit k {} and v {}: expected (b, lq, hq, d) and twice (b, lk, hkv, d)",
              q.shape(), k.shape(), v.shape());
  KRAIT_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0,
              "attention: {} query heads are not a multiple of {} key heads", q.size(2), k.size(2));
  KRAIT_CHECK(q.size(3) >= 1 && q.size(3) <= 256, "attention: head_dim {} is outside 1 ... 256", q.size(3));
  KRAIT_CHECK(options.window >= 0 && (options.window == 0 || options.causal),
              "attention: window {} needs causal attention and a positive size", options.window);
}

// The step may be missing where only the kernel's name is asked for.
void check_dropout(const AttentionOptions& options, const Tensor& q) {
  const DropoutMask& mask = options.dropout;
  KRAIT_CHECK(mask.p >= 0.0 && mask.p < 1.0, "attention: dropout p is {}, expected 0 <= p < 1", mask.p);
  if (mask.p == 0.0) return;
  KRAIT_CHECK(options.part.key % 4 == 0, "attention: with dropout a part's keys begin at a multiple of 4, not at {}",
              options.part.key);
  KRAIT_CHECK(mask.offset >= 0, "attention: dropout from sequence {}, expected at least 0", mask.offset);
  KRAIT_CHECK(mask.step.defined() && mask.step.dtype() == DType::i64 && mask.step.numel() == 1 &&
                  mask.step.device() == q.device(),
              "attention: the step of dropout is {}, expected an int64 scalar on {}; set current_random().step",
              describe(mask.step), q.device());
}

// Everything the backends need, spelled out and on the right device.
AttentionOptions complete(AttentionOptions options, const Tensor& q, const Tensor& k) {
  const int64_t b = q.size(0), lq = q.size(1), lk = k.size(1);
  if (options.scale == 0) options.scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  if (options.alibi_slopes.defined()) {
    KRAIT_CHECK(options.alibi_slopes.shape() == Shape{q.size(2)}, "attention: alibi_slopes {} for {} query heads",
                options.alibi_slopes.shape(), q.size(2));
    options.alibi_slopes = options.alibi_slopes.to(q.device()).to(DType::f32).contiguous();
  }
  KRAIT_CHECK(options.q_segments.defined() || !options.k_segments.defined(),
              "attention: k_segments without q_segments");
  if (options.q_segments.defined()) {
    if (!options.k_segments.defined() && lq == lk) options.k_segments = options.q_segments;
    KRAIT_CHECK(options.k_segments.defined(), "attention: {} queries over {} keys need k_segments", lq, lk);
    KRAIT_CHECK(options.q_segments.shape() == (Shape{b, lq}) && options.k_segments.shape() == (Shape{b, lk}),
                "attention: segments {} and {}, expected ({}, {}) and ({}, {})", options.q_segments.shape(),
                options.k_segments.shape(), b, lq, b, lk);
    options.q_segments = options.q_segments.to(q.device()).to(DType::i32).contiguous();
    options.k_segments = options.k_segments.to(q.device()).to(DType::i32).contiguous();
  }
  if (options.k_length.defined()) {
    const int64_t n = options.k_length.numel();
    KRAIT_CHECK(n == 1 || options.k_length.shape() == Shape{b}, "attention: k_length {}, expected one value or ({})",
                options.k_length.shape(), b);
    KRAIT_CHECK(options.k_length.device() == q.device(), "attention: k_length is on {}, q on {}",
                options.k_length.device(), q.device());
    options.k_length = options.k_length.to(DType::i64).reshape(Shape{n}).expand(Shape{b}).contiguous();
  } else if (!options.q_offset) {
    options.q_offset = lk - lq;
  }
  return options;
}

void check_gradient(const char* name, const Tensor& gradient, const Tensor& of) {
  check_same("attention_backward", gradient, of);
  KRAIT_CHECK(gradient.shape() == of.shape(), "attention_backward: {} is {}, expected {}", name, gradient.shape(),
              of.shape());
  KRAIT_CHECK(gradient.size(-1) == 1 || gradient.stride(-1) == 1,
              "attention_backward: the last dimension of {} is not contiguous", name);
}

}  // namespace

AttentionOut attention_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                               const AttentionOptions& options) {
  check_shapes(q_in, k_in, v_in, options);
  check_dropout(options, q_in);
  const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in);
  AttentionOut out{empty(q.shape(), q.dtype(), q.device()),
                   empty({q.size(0), q.size(2), q.size(1)}, accum_dtype(q.dtype()), q.device())};
  if (q.numel() == 0) return out;
  KRAIT_DISPATCH(q.device(), attention_forward(out.o, out.lse, q, k, v, complete(options, q, k)));
  return out;
}

AttentionGrad attention_backward(const Tensor& do_, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                                 const Tensor& lse, const AttentionOptions& options) {
  AttentionGrad out{empty_like(q), empty_like(k), empty_like(v)};
  attention_backward_into(out.dq, out.dk, out.dv, do_, q, k, v, o, lse, options);
  return out;
}

void attention_backward_into(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& do_, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& o, const Tensor& lse, const AttentionOptions& options) {
  check_shapes(q, k, v, options);
  check_dropout(options, q);
  check_gradient("dq", dq, q);
  check_gradient("dk", dk, k);
  check_gradient("dv", dv, v);
  check_same("attention_backward", do_, o, q);
  KRAIT_CHECK(do_.shape() == q.shape() && o.shape() == q.shape(),
              "attention_backward: do {} and o {}, expected {} as q", do_.shape(), o.shape(), q.shape());
  KRAIT_CHECK(lse.shape() == (Shape{q.size(0), q.size(2), q.size(1)}) && lse.dtype() == accum_dtype(q.dtype()),
              "attention_backward: lse {} does not fit q {}", describe(lse), describe(q));
  if (q.numel() == 0 || k.numel() == 0) {
    zero_(dq);
    zero_(dk);
    zero_(dv);
    return;
  }
  KRAIT_DISPATCH(q.device(), attention_backward(dq, dk, dv, last_contiguous(do_), last_contiguous(q),
                                                last_contiguous(k), last_contiguous(v), last_contiguous(o),
                                                lse.contiguous(), complete(options, q, k)));
}

Tensor attention_step(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_length,
                      const AttentionOptions& options) {
  KRAIT_CHECK(q.ndim() == 4 && q.size(1) == 1, "attention_step: q is {}, expected (b, 1, heads, d)", q.shape());
  KRAIT_CHECK(k_length.defined(), "attention_step: no k_length");
  AttentionOptions step = options;
  step.k_length = k_length;
  step.q_offset.reset();
  return attention_forward(q, k_cache, v_cache, step).o;
}

std::string attention_kernel_name(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  check_shapes(q, k, v, options);
  std::string name;
  KRAIT_DISPATCH(q.device(), attention_kernel_name(name, q, k, v, complete(options, q, k)));
  return name;
}

Tensor alibi_slopes(int64_t n_heads) {
  KRAIT_CHECK(n_heads >= 1, "alibi_slopes: {} heads", n_heads);
  const auto m = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n_heads)));
  std::vector<float> slopes;
  for (int64_t h = 0; h < m; ++h)
    slopes.push_back(static_cast<float>(std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(m))));
  for (int64_t h = 0; h < n_heads - m; ++h)
    slopes.push_back(static_cast<float>(std::exp2(-4.0 * static_cast<double>(2 * h + 1) / static_cast<double>(m))));
  return from_vector(slopes);
}

}  // namespace krait::kernels
