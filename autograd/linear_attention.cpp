#include "autograd/linear_attention.h"

#include <cmath>
#include <limits>

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "autograd/ssd.h"
#include "kernels/ssd.h"

namespace krait::autograd {

namespace {

// elu(x) + 1: x + 1 above 0, e^x below.
Variable elu1(const Variable& x) { return exp(clamp(x, -std::numeric_limits<double>::infinity(), 0.0)) + relu(x); }

// What the recurrence works on: queries and keys through the feature map, values with a last 1 that sums to z.
struct Features { Variable q, k, v; };
Features features_of(const Variable& q, const Variable& k, const Variable& v, FeatureMap feature) {
  if (feature == FeatureMap::identity) return {q * (1.0 / std::sqrt(static_cast<double>(q.size(-1)))), k, v};
  const Variable one(ones(v.shape().with(-1, 1), v.dtype(), v.device()));
  return {elu1(q), elu1(k), concat({v, one}, -1)};
}

// y of the recurrence's output: its last channel is the divisor.
Variable normalised(const Variable& out, const LinearAttentionOptions& options) {
  if (options.feature == FeatureMap::identity) return out;
  const int64_t dv = out.size(-1) - 1;
  return slice(out, -1, 0, dv) / (slice(out, -1, dv, dv + 1) + options.eps);
}

}  // namespace

LinearAttentionOut linear_attention(const Variable& q, const Variable& k, const Variable& v, const Variable& g,
                                    const Variable& initial_state, const LinearAttentionOptions& options) {
  KRAIT_CHECK(q.ndim() == 4 && k.shape() == q.shape() && v.ndim() == 4 &&
                  v.shape().drop_last() == q.shape().drop_last() && q.size(3) > 0 && v.size(3) > 0,
              "linear_attention: q is {}, k {}, v {}; expected (b, l, h, dk) twice and (b, l, h, dv)", q.shape(),
              k.shape(), v.shape());
  const Features in = features_of(q, k, v, options.feature);
  const Variable decay =
      g.defined() ? g : Variable(zeros(q.shape().drop_last(), accum_dtype(q.dtype()), q.device()));
  const SsdOut out = ssd_scan(in.v, decay, in.k, in.q, options.chunk, initial_state, options.segments,
                              options.pieces);
  return {normalised(out.y, options), out.final_state};
}

Tensor linear_attention_step(Tensor& state, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                             const LinearAttentionOptions& options) {
  const NoGrad guard;
  const Features in = features_of(Variable(q), Variable(k), Variable(v), options.feature);
  const Tensor decay = g.defined() ? g : zeros(q.shape().drop_last(), accum_dtype(q.dtype()), q.device());
  const Tensor out = kernels::ssd_step(state, in.v.data(), {}, decay, in.k.data(), in.q.data(), {});
  return normalised(Variable(out), options).data();
}

}  // namespace krait::autograd
