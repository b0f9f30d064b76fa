#include "kernels/attention_append.h"

#include <limits>

#include "kernels/attention.h"

namespace krait::kernels::cpu {

void attention_append(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a) {
  const int64_t b = qkv.size(0);
  for (int64_t i = 0; i < b; ++i) {  // rows may stand at different positions
    const int64_t p = position.data<int32_t>()[i];
    Tensor out = o.slice(0, i, i + 1);
    if (p < 0 || p >= k_cache.size(1)) {
      fill_(out, std::numeric_limits<double>::quiet_NaN());
      continue;
    }
    Tensor row = qkv.slice(0, i, i + 1).unsqueeze(1).clone();  // (1, 1, heads, d)
    if (a.cos.defined()) {
      Tensor turned = row.slice(2, 0, a.hq + a.hkv);
      rope_into(turned, turned, a.cos, a.sin, a.style, {}, p);
    }
    Tensor k = k_cache.slice(0, i, i + 1).slice(1, p, p + 1), v = v_cache.slice(0, i, i + 1).slice(1, p, p + 1);
    copy_(k, row.slice(2, a.hq, a.hq + a.hkv));
    copy_(v, row.slice(2, a.hq + a.hkv, a.hq + 2 * a.hkv));
    AttentionOptions options;
    options.scale = a.scale;
    options.alibi_slopes = a.alibi_slopes;
    const auto past = [&](const Tensor& cache) { return cache.slice(0, i, i + 1).slice(1, 0, p + 1); };
    copy_(out, kernels::attention_forward(row.slice(2, 0, a.hq), past(k_cache), past(v_cache), options).o.view(out.shape()));
  }
}

}  // namespace krait::kernels::cpu
