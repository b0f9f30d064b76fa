#include "kernels/moe.h"

#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/visit_wide.h"

namespace krait::kernels::cpu {

namespace {

// The k best of a row by value, then lower slot. NaN is never chosen by value: slots 0, 1, ... stand in.
template <class A>
void best_of(int32_t* index, const A* row, int64_t n, int64_t k) {
  for (int64_t j = 0; j < k; ++j) {
    A best = -std::numeric_limits<A>::infinity();
    int64_t at = n;
    for (int64_t i = 0; i < n; ++i) {
      const bool open = j == 0 || row[i] < row[index[j - 1]] || (row[i] == row[index[j - 1]] && i > index[j - 1]);
      if (open && (row[i] > best || (row[i] == best && i < at))) {
        best = row[i];
        at = i;
      }
    }
    index[j] = static_cast<int32_t>(at == n ? j : at);
  }
}

// The experts' rows in order of expert, then token.
void sort_choices(MoeRouting& r, int64_t experts) {
  const int64_t choices = r.index.numel(), n = r.counts.numel();
  const int32_t* index = r.index.data<int32_t>();
  int32_t *counts = r.counts.data<int32_t>(), *offsets = r.groups.offsets.data<int32_t>();
  std::fill(counts, counts + n, 0);
  for (int64_t c = 0; c < choices; ++c) ++counts[index[c]];
  offsets[0] = 0;
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] = offsets[e] + counts[e];
  std::vector<int32_t> next(offsets, offsets + experts);
  for (int64_t c = 0; c < choices; ++c) {
    int32_t& position = r.position.data<int32_t>()[c];
    position = index[c] < experts ? next[static_cast<size_t>(index[c])]++ : -1;
    if (position >= 0) r.groups.order.data<int32_t>()[position] = static_cast<int32_t>(c);
  }
}

}  // namespace

void moe_route(MoeRouting& r, const Tensor& logits, const MoeOptions& options) {
  const int64_t t = logits.size(0), n = logits.size(1), k = options.top_k;
  visit_wide(logits.dtype(), [&]<class A>() {
    const A* all = logits.data<A>();
    parallel_for(0, t, std::max<int64_t>(1, 4096 / (n * (k + 2))), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const A* row = all + i * n;
        int32_t* index = r.index.data<int32_t>() + i * k;
        A* weight = r.weight.data<A>() + i * k;
        A largest = row[0], sum = 0;
        for (int64_t j = 1; j < n; ++j) largest = std::max(largest, row[j]);
        for (int64_t j = 0; j < n; ++j) sum += std::exp(row[j] - largest);
        const A lse = largest + std::log(sum);
        r.lse.data<A>()[i] = lse;
        best_of(index, row, n, k);
        // Renormalised weights are a softmax over the chosen real slots; the first of them has the largest logit.
        A base = lse, total = 0;
        for (int64_t j = k - 1; j >= 0; --j)
          if (options.renormalize && index[j] < options.experts) base = row[index[j]];
        for (int64_t j = 0; j < k; ++j) {
          weight[j] = index[j] < options.experts ? std::exp(row[index[j]] - base) : A(0);
          total += weight[j];
        }
        for (int64_t j = 0; j < k && options.renormalize && total > 0; ++j) weight[j] /= total;
      }
    });
  });
  sort_choices(r, options.experts);
}

void moe_part(MoeRouting& part, const MoeRouting& whole, int64_t first) {
  const int32_t* offsets = whole.groups.offsets.data<int32_t>() + first;
  const int64_t experts = part.groups.groups(), choices = whole.position.numel();
  const int32_t begin = offsets[0], end = offsets[experts];
  for (int64_t e = 0; e <= experts; ++e) part.groups.offsets.data<int32_t>()[e] = offsets[e] - begin;
  for (int64_t i = begin; i < end; ++i)
    part.groups.order.data<int32_t>()[i - begin] = whole.groups.order.data<int32_t>()[i];
  for (int64_t c = 0; c < choices; ++c) {
    const int32_t at = whole.position.data<int32_t>()[c];
    part.position.data<int32_t>()[c] = at >= begin && at < end ? at - begin : -1;
  }
}

void moe_counted(Tensor& mask, Tensor& counts_out, const Tensor& index_in, const Tensor& lengths, int64_t first) {
  const int64_t t = index_in.size(0), k = index_in.size(1), l = t / lengths.numel();
  int32_t* counts = counts_out.data<int32_t>();
  std::fill(counts, counts + counts_out.numel(), 0);
  visit_wide(mask.dtype(), [&]<class A>() {
    for (int64_t i = 0; i < t; ++i) {
      const bool counted = first + i % l < lengths.data<int32_t>()[i / l];
      mask.data<A>()[i] = counted ? A(1) : A(0);
      for (int64_t j = 0; j < k && counted; ++j) ++counts[index_in.data<int32_t>()[i * k + j]];
    }
  });
}

void moe_route_backward(Tensor& dlogits, const Tensor& dweight, const Tensor& logits, const MoeRouting& r,
                        const MoeOptions& options, const MoePenalties& penalties) {
  const int64_t t = logits.size(0), n = logits.size(1), k = options.top_k, experts = options.experts;
  const int32_t* counts = penalties.counts.data<int32_t>();
  double tokens = 0;
  for (int64_t e = 0; e < n; ++e) tokens += counts[e];
  tokens /= static_cast<double>(k);
  std::vector<double> share(static_cast<size_t>(n));  // n f / t: what p_te counts for in the balance loss
  double nulls = 0;
  for (int64_t e = experts; e < n; ++e) nulls += counts[e];
  for (int64_t e = 0; e < n; ++e) {
    const double uses = e < experts ? counts[e] : nulls / static_cast<double>(n - experts);
    share[static_cast<size_t>(e)] = uses * static_cast<double>(n) / (tokens * tokens * static_cast<double>(k));
  }
  visit_wide(logits.dtype(), [&]<class A>() {
    parallel_for(0, t, std::max<int64_t>(1, 4096 / n), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const A *row = logits.data<A>() + i * n, *weight = r.weight.data<A>() + i * k;
        const A* dw = dweight.defined() ? dweight.data<A>() + i * k : nullptr;
        const int32_t* index = r.index.data<int32_t>() + i * k;
        const A lse = r.lse.data<A>()[i], counted = penalties.mask.defined() ? penalties.mask.data<A>()[i] : A(1);
        const A balance = counted * static_cast<A>(penalties.balance), z = counted * static_cast<A>(2 * penalties.router_z / tokens);
        A* d = dlogits.data<A>() + i * n;
        A mean_share = 0, inner = 0;
        for (int64_t e = 0; e < n; ++e) mean_share += std::exp(row[e] - lse) * static_cast<A>(share[static_cast<size_t>(e)]);
        for (int64_t j = 0; j < k && dw; ++j) inner += weight[j] * dw[j];
        for (int64_t e = 0; e < n; ++e) {
          const A p = std::exp(row[e] - lse);
          d[e] = p * (balance * (static_cast<A>(share[static_cast<size_t>(e)]) - mean_share) + z * lse -
                      (options.renormalize ? A(0) : inner));
        }
        for (int64_t j = 0; j < k && dw; ++j)
          if (index[j] < experts) d[index[j]] += weight[j] * (options.renormalize ? dw[j] - inner : dw[j]);
      }
    });
  });
}

void moe_combine(Tensor& y_out, const Tensor& rows, const Tensor& position_in, const Tensor& weight_in) {
  const int64_t t = y_out.size(0), m = y_out.size(1), k = position_in.size(1);
  visit_float(y_out.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    parallel_for(0, t, std::max<int64_t>(1, 8192 / (m * k)), [&](int64_t first, int64_t last) {
      std::vector<A> sum(static_cast<size_t>(m));
      A* __restrict acc = sum.data();
      for (int64_t i = first; i < last; ++i) {
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t j = 0; j < k; ++j) {
          const int64_t position = position_in.data<int32_t>()[i * k + j];
          if (position < 0) continue;
          const A w = weight_in.defined() ? weight_in.data<A>()[i * k + j] : A(1);
          const T* __restrict row = rows.data<T>() + position * m;
#pragma omp simd
          for (int64_t c = 0; c < m; ++c) acc[c] += w * static_cast<A>(row[c]);
        }
        T* __restrict y = y_out.data<T>() + i * m;
#pragma omp simd
        for (int64_t c = 0; c < m; ++c) put(y[c], acc[c]);
      }
    });
  });
}

void moe_hidden_backward(Tensor& dhidden_out, Tensor& weighted_out, Tensor& dweight_out, const Tensor& dh_in,
                         const Tensor& hidden_in, const Tensor& weight_in, const RowGroups& groups) {
  const int64_t f = dh_in.size(1), used = groups.offsets.data<int32_t>()[groups.groups()];
  const int32_t* order = groups.order.data<int32_t>();
  visit_float(dh_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    parallel_for(0, used, std::max<int64_t>(1, 4096 / f), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const T* __restrict gate = hidden_in.data<T>() + i * 2 * f;
        const T* __restrict up = gate + f;
        const T* __restrict dh = dh_in.data<T>() + i * f;
        T* __restrict dgate = dhidden_out.data<T>() + i * 2 * f;
        T* __restrict dup = dgate + f;
        T* __restrict weighted = weighted_out.data<T>() + i * f;
        const A w = weight_in.data<A>()[order[i]];
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < f; ++c) {
          const A g = static_cast<A>(gate[c]), u = static_cast<A>(up[c]), d = static_cast<A>(dh[c]);
          const auto [a, slope] = vsilu_and_slope(g);
          sum += d * a * u;
          put(dgate[c], w * d * u * slope);
          put(dup[c], w * d * a);
          put(weighted[c], w * a * u);
        }
        dweight_out.data<A>()[order[i]] = sum;
      }
    });
  });
}

}  // namespace krait::kernels::cpu
