#include "layers/attention.h"

#include "autograd/attention.h"
#include "autograd/rope.h"
#include "autograd/shape.h"
#include "core/random.h"

namespace krait::layers {

Attention::Attention(const AttentionConfig& config, const LayerContext& context) : config_(config), stream_(context.stream("attention")) {
  const int64_t q = config.n_heads * config.head_dim, kv = config.n_kv_heads * config.head_dim;
  const Initializer init = normal(context.init_std);
  qkv_weight_ = stacked_parameter({{"wq.weight", q, init}, {"wk.weight", kv, init}, {"wv.weight", kv, init}},
                                  {context.d_model});
  if (config.bias) {
    const Initializer zero = constant(0.0);
    qkv_bias_ = stacked_parameter({{"wq.bias", q, zero}, {"wk.bias", kv, zero}, {"wv.bias", kv, zero}}, {},
                                  {.decay = false});
  }
  if (config.qk_norm) {
    q_norm_ = child<Norm>("q_norm", config.head_dim, NormConfig{"rms", context.norm_eps});
    k_norm_ = child<Norm>("k_norm", config.head_dim, NormConfig{"rms", context.norm_eps});
  }
  out_ = child<Linear>("wo", q, context.d_model, config.bias, context.residual_std);
}

kernels::AttentionOptions Attention::options(Device device) const {
  kernels::AttentionOptions o;
  o.window = config_.window;
  if (config_.alibi) {
    if (!slopes_.defined() || slopes_.device() != device)
      slopes_ = kernels::alibi_slopes(config_.n_heads).to(device);
    o.alibi_slopes = slopes_;
  }
  return o;
}

// x (b, l, d) -> normalised and rotated heads (b, l, hq + 2 hkv, head_dim).
Variable Attention::project(const Variable& x, const Tensor& positions, int64_t offset) {
  const int64_t b = x.size(0), l = x.size(1), hq = config_.n_heads, hkv = config_.n_kv_heads;
  Variable qkv = linear(x, qkv_weight_, qkv_bias_.defined() ? qkv_bias_.variable() : Variable());
  qkv = reshape(qkv, {b, l, heads(), config_.head_dim});
  if (config_.qk_norm)
    qkv = concat({q_norm_->forward(slice(qkv, 2, 0, hq)), k_norm_->forward(slice(qkv, 2, hq, hq + hkv)),
                  slice(qkv, 2, hq + hkv, heads())},
                 2);
  if (!config_.rope) return qkv;
  const int64_t needed = offset + l;
  if (!cos_.defined() || cos_.size(0) < needed || cos_.device() != x.device()) {
    const int64_t length = std::max<int64_t>(needed, cos_.defined() ? 2 * cos_.size(0) : needed);
    const auto table = kernels::rope_table(length, config_.rotary_dim, config_.rope_base, x.device(),
                                           accum_dtype(x.dtype()));
    cos_ = table.cos;
    sin_ = table.sin;
  }
  const auto style = config_.rope_style == "half" ? RopeStyle::half : RopeStyle::interleaved;
  return rope_heads_(qkv, hq + hkv, cos_, sin_, style, positions, offset);
}

Variable Attention::forward(const Variable& x, const SequenceInfo& info, LayerState* state) {
  const Variable qkv = project(x, info.positions, state ? state->length : 0);
  const Shape joined{x.size(0), x.size(1), config_.n_heads * config_.head_dim};
  if (state) {
    require_no_grad("attention with a cache", {qkv});
    return out_->forward(Variable(with_cache(qkv.data(), info, *state).view(joined)));
  }
  kernels::AttentionOptions o = options(x.device());
  o.q_segments = info.segments;
  if (training() && config_.dropout > 0) {
    const RandomSource& source = current_random();
    o.dropout = {config_.dropout, random_key(source.seed, stream_), source.step, source.batch_offset};
  }
  const Variable packed = reshape(qkv, {x.size(0), x.size(1), heads() * config_.head_dim});
  return out_->forward(attention_qkv(packed, config_.n_heads, config_.n_kv_heads, o));
}

// Attends over the cached positions and the new ones, and leaves the new ones in the cache.
Tensor Attention::with_cache(const Tensor& qkv, const SequenceInfo& info, LayerState& state) {
  const int64_t hq = config_.n_heads, hkv = config_.n_kv_heads, l = qkv.size(1);
  const Tensor q = qkv.slice(2, 0, hq);
  Tensor& k_cache = state.tensors.at("k");
  Tensor& v_cache = state.tensors.at("v");
  KRAIT_CHECK(!info.segments.defined(), "attention with a cache does not take document boundaries; "
              "set data.documents: ignore or data.state: reset");
  kernels::AttentionOptions o = options(qkv.device());
  // With a window only the last window - 1 positions matter: the cache holds those and the block in work.
  const int64_t capacity = k_cache.size(1);
  int64_t kept = std::min(state.length, config_.window > 0 ? std::min(config_.window - 1, capacity) : state.length);
  if (config_.window > 0 && kept + l > capacity) {
    for (Tensor* cache : {&k_cache, &v_cache}) {
      Tensor grown = empty(cache->shape().with(1, kept + l), cache->dtype(), cache->device());
      Tensor head = grown.slice(1, 0, kept);
      copy_(head, cache->slice(1, 0, kept));
      *cache = grown;
    }
  }
  KRAIT_CHECK(kept + l <= k_cache.size(1), "the key/value cache holds {} positions, {} are needed; raise max_length",
              k_cache.size(1), kept + l);
  Tensor k_new = k_cache.slice(1, kept, kept + l), v_new = v_cache.slice(1, kept, kept + l);
  copy_(k_new, qkv.slice(2, hq, hq + hkv));
  copy_(v_new, qkv.slice(2, hq + hkv, heads()));
  const Tensor out =
      kernels::attention_forward(q, k_cache.slice(1, 0, kept + l), v_cache.slice(1, 0, kept + l), o).o;
  state.length += l;
  if (const int64_t keep = std::min(config_.window - 1, kept + l); config_.window > 0 && keep < kept + l) {
    for (Tensor* cache : {&k_cache, &v_cache}) {
      Tensor head = cache->slice(1, 0, keep);
      copy_(head, cache->slice(1, kept + l - keep, kept + l).clone());
    }
  }
  return out;
}

Tensor Attention::step(const Tensor& x, LayerState& state) {
  const NoGrad guard;
  return forward(Variable(x), {}, &state).data();
}

LayerState Attention::initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const {
  const int64_t capacity = config_.window > 0 ? std::min(config_.window, max_length) : max_length;
  const Shape shape{batch, capacity, config_.n_kv_heads, config_.head_dim};
  LayerState s;
  s.tensors["k"] = empty(shape, dtype, device);
  s.tensors["v"] = empty(shape, dtype, device);
  return s;
}

double Attention::extra_flops_per_token(int64_t context) const {
  const int64_t keys = config_.window > 0 ? std::min(config_.window, context) : context;
  return 2.0 * static_cast<double>(keys * config_.n_heads * config_.head_dim);  // 4 per key, half of them seen
}

std::string Attention::kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                                   bool has_segments) const {
  // A shape-only probe: the tensors are never read.
  const Tensor qkv = empty({batch, context, heads(), config_.head_dim}, dtype, device);
  const int64_t hq = config_.n_heads, hkv = config_.n_kv_heads;
  kernels::AttentionOptions o = options(device);
  o.dropout.p = config_.dropout;
  if (has_segments) o.q_segments = o.k_segments = zeros({batch, context}, DType::i32, device);
  return kernels::attention_kernel_name(qkv.slice(2, 0, hq), qkv.slice(2, hq, hq + hkv),
                                        qkv.slice(2, hq + hkv, heads()), o);
}

LayerKind attention_kind() {
  return {"attention",
          [](ConfigNode& section, const ModelConfig& model) {
            read_attention_config(section, model.d_model, model.dropout);
          },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<Attention>(read_attention_config(options, context.d_model, context.dropout),
                                               context);
          }};
}

}  // namespace krait::layers
