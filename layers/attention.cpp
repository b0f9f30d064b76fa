#include "layers/attention.h"

#include "autograd/attention.h"
#include "autograd/rope.h"
#include "autograd/sequence_attention.h"
#include "autograd/shape.h"
#include "autograd/shared_rows.h"
#include "core/random.h"
#include "core/stream.h"
#include "kernels/attention_append.h"
#include "layers/whole_sequences.h"

namespace krait::layers {

Attention::Attention(const AttentionConfig& config, const LayerContext& context)
    : config_(config),
      group_(context.parallel.tensor),
      q_(owned(group_, config.n_heads, "model.attention.n_heads", "heads")),
      kv_(owned_or_copied(group_, config.n_kv_heads, "model.attention.n_kv_heads", "key/value heads")),
      sequence_(context.parallel.sequence),
      stream_(context.stream("attention")) {
  const int64_t d = config.head_dim, q = config.n_heads * d, kv = config.n_kv_heads * d;
  const Shard q_rows = q_.rows(d), kv_rows = kv_.rows(d);
  const Initializer init = normal(context.init_std);
  qkv_weight_ = stacked_parameter(
      {{"wq.weight", q, init, q_rows}, {"wk.weight", kv, init, kv_rows}, {"wv.weight", kv, init, kv_rows}},
      {context.d_model});
  if (config.bias) {
    const Initializer zero = constant(0.0);
    qkv_bias_ = stacked_parameter(
        {{"wq.bias", q, zero, q_rows}, {"wk.bias", kv, zero, kv_rows}, {"wv.bias", kv, zero, kv_rows}}, {},
        {.decay = false});
  }
  if (config.qk_norm) {
    q_norm_ = child<Norm>("q_norm", d, NormConfig{"rms", context.norm_eps}, group_);
    k_norm_ = child<Norm>("k_norm", d, NormConfig{"rms", context.norm_eps}, group_);
  }
  out_ = child<Linear>("wo", q, context.d_model, config.bias, context.residual_std, LinearSplit{group_, q_.columns(d)});
}

// Weight and bias of this member's heads.
std::pair<Variable, Variable> Attention::projection() const {
  Variable weight = qkv_weight_, bias = qkv_bias_.defined() ? qkv_bias_.variable() : Variable();
  if (group_->size() > config_.n_kv_heads) {
    const int64_t d = config_.head_dim, k = q_.count() * d, v = k + kv_.count() * d, all = config_.n_kv_heads * d;
    const std::vector<SharedRows> copies{{k, v, kv_.begin * d}, {v, heads() * d, all + kv_.begin * d}};
    share_rows({{weight, copies}, {bias, copies}}, 2 * all, group_);
  }
  return {weight, bias};
}

// x (b, l, d) -> this member's heads side by side (b, l, heads head_dim).
Variable Attention::qkv(const Variable& x) const {
  const auto [weight, bias] = projection();
  return linear(copy_to_group(x, group_), weight, bias);
}

kernels::AttentionOptions Attention::options(Device device) const {
  kernels::AttentionOptions o;
  o.window = config_.window;
  if (config_.alibi) {
    if (!slopes_.defined() || slopes_.device() != device)
      slopes_ = kernels::alibi_slopes(config_.n_heads).slice(0, q_.begin, q_.end).contiguous().to(device);
    o.alibi_slopes = slopes_;
  }
  return o;
}

// At least so many positions, for inputs like x.
void Attention::make_rope_table(int64_t needed, const Tensor& x) {
  if (cos_.defined() && cos_.size(0) >= needed && cos_.device() == x.device()) return;
  const int64_t length = std::max<int64_t>(needed, cos_.defined() ? 2 * cos_.size(0) : needed);
  const auto table = kernels::rope_table(length, config_.rotary_dim, config_.rope_base, x.device(), accum_dtype(x.dtype()));
  cos_ = table.cos;
  sin_ = table.sin;
}

// x (b, l, d) -> normalised and rotated heads (b, l, hq + 2 hkv, head_dim).
Variable Attention::project(const Variable& x, const Tensor& positions, int64_t before) {
  const int64_t b = x.size(0), l = x.size(1), hq = q_.count(), hkv = kv_.count();
  const auto style = config_.rope_style == "half" ? RopeStyle::half : RopeStyle::interleaved;
  // Positions are those of the whole sequence, and so are those that are counted here.
  const int64_t offset = before + (positions.defined() ? 0 : sequence_->rank() * l);
  if (config_.rope) make_rope_table(before + sequence_->size() * l, x.data());
  if (config_.rope && !config_.qk_norm && !positions.defined()) {
    const auto [weight, bias] = projection();
    return linear_rope(copy_to_group(x, group_), weight, bias, heads(), hq + hkv, cos_, sin_, style, offset);
  }
  Variable all = reshape(qkv(x), {b, l, heads(), config_.head_dim});
  if (config_.qk_norm)
    all = concat({q_norm_->forward(slice(all, 2, 0, hq)), k_norm_->forward(slice(all, 2, hq, hq + hkv)),
                  slice(all, 2, hq + hkv, heads())},
                 2);
  if (!config_.rope) return all;
  return rope_heads_(all, hq + hkv, cos_, sin_, style, positions, offset);
}

Variable Attention::forward(const Variable& x, const SequenceInfo& info, LayerState* state) {
  require_no_state("attention", state, *sequence_);
  const Variable all = project(x, info.positions, state ? state->length : 0);
  const Shape joined{x.size(0), x.size(1), q_.count() * config_.head_dim};
  if (state) {
    require_no_grad("attention with a cache", {all});
    return out_->forward(Variable(with_cache(all.data(), info, *state).view(joined)));
  }
  kernels::AttentionOptions o = options(x.device());
  o.q_segments = info.segments;
  if (training() && config_.dropout > 0) {
    const RandomSource& source = current_random();
    o.dropout = {config_.dropout, random_key(source.seed, stream_), source.step, source.batch_offset};
    o.part.head = q_.begin;
    o.part.heads = config_.n_heads;
  }
  const Variable packed = reshape(all, {x.size(0), x.size(1), heads() * config_.head_dim});
  if (sequence_->size() > 1) {
    const auto way = choose_sequence_attention(config_.sequence_parallel, q_.count(), x.size(1), o, *sequence_);
    return out_->forward(sequence_attention(way, packed, q_.count(), kv_.count(), o, sequence_));
  }
  return out_->forward(attention_qkv(packed, q_.count(), kv_.count(), o));
}

// Attends over the cached positions and the new ones, and leaves the new ones in the cache.
Tensor Attention::with_cache(const Tensor& all, const SequenceInfo& info, LayerState& state) {
  const int64_t hq = q_.count(), hkv = kv_.count(), l = all.size(1);
  const Tensor q = all.slice(2, 0, hq);
  Tensor& k_cache = state.tensors.at("k");
  Tensor& v_cache = state.tensors.at("v");
  KRAIT_CHECK(!info.segments.defined(), "attention with a cache does not take document boundaries; "
              "set data.documents: ignore or data.state: reset");
  kernels::AttentionOptions o = options(all.device());
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
  copy_(k_new, all.slice(2, hq, hq + hkv));
  copy_(v_new, all.slice(2, hq + hkv, heads()));
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

// With a place on the device the whole step is one kernel between the projections, and may be captured.
Tensor Attention::step(const Tensor& x, LayerState& state) {
  const NoGrad guard;
  const auto place = state.tensors.find("position");
  if (place == state.tensors.end()) {
    KRAIT_ASSERT(!is_capturing(x.device()), "this attention's step reads its position on the host");
    return forward(Variable(x), {}, &state).data();
  }
  Tensor &k_cache = state.tensors.at("k"), &v_cache = state.tensors.at("v");
  const int64_t b = x.size(0), capacity = k_cache.size(1);
  KRAIT_CHECK(is_capturing(x.device()) || state.length < capacity,
              "the key/value cache holds {} positions, {} are needed; raise max_length", capacity, state.length + 1);
  const Tensor all = qkv(Variable(x)).data().view({b, heads(), config_.head_dim});
  // Tables and positions only now: a norm may wait for the projection (kernels/step_scope.h), and what is captured is to run
  // as the same kernels as what is not.
  if (!is_capturing(x.device())) fill_(place->second, static_cast<double>(state.length));
  kernels::AttentionAppend a;
  a.hq = q_.count();
  a.hkv = kv_.count();
  a.alibi_slopes = options(x.device()).alibi_slopes;
  if (config_.rope) {
    make_rope_table(capacity, x);
    a.cos = cos_;
    a.sin = sin_;
    a.style = config_.rope_style == "half" ? RopeStyle::half : RopeStyle::interleaved;
  }
  const Tensor o = kernels::attention_append(all, k_cache, v_cache, place->second, a);
  ++state.length;
  return out_->forward(Variable(o.view({b, 1, a.hq * config_.head_dim}))).data();
}

LayerState Attention::initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const {
  const int64_t capacity = config_.window > 0 ? std::min(config_.window, max_length) : max_length;
  const Shape shape{batch, capacity, kv_.count(), config_.head_dim};
  LayerState s;
  s.tensors["k"] = empty(shape, dtype, device);
  s.tensors["v"] = empty(shape, dtype, device);
  if (device.is_cuda() && config_.window == 0 && !config_.qk_norm &&
      kernels::attention_append_serves(dtype, device, config_.head_dim, capacity))
    s.tensors["position"] = zeros({batch}, DType::i32, device);
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
  const int64_t hq = q_.count(), hkv = kv_.count();
  kernels::AttentionOptions o = options(device);
  o.dropout.p = config_.dropout;
  if (has_segments) o.q_segments = o.k_segments = zeros({batch, context}, DType::i32, device);
  if (sequence_->size() > 1) {
    const auto way = choose_sequence_attention(config_.sequence_parallel, hq, context / sequence_->size(), o, *sequence_);
    return fmt::format("{} over {} ranks", name_of(way), sequence_->size());
  }
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
