#pragma once
#include <bit>
#include <cstring>

#include "core/parallel.h"
#include "kernels/flat_update.h"

namespace krait::kernels::cpu {

/// GCC does not vectorise loads and stores of a class: these two work on the bits. Same rounding as bf16's own.
inline void widen(float* __restrict to, const bf16* from, int64_t n) {
  const auto* const bits = reinterpret_cast<const uint16_t*>(from);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(uint32_t{bits[i]} << 16);
}
template <class T>
void narrow(bf16* to, const T* __restrict from, int64_t n) {
  auto* const bits = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const auto u = std::bit_cast<uint32_t>(static_cast<float>(from[i]));
    const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    bits[i] = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16) | 0x40u : rounded);
  }
}

template <class Rule, class P>
void update_chunk(const Rule rule, int64_t n, P* __restrict p, const P* __restrict g, P scale, P* __restrict s0,
                  P* __restrict s1) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    P value = p[i], a = 0, b = 0;
    if constexpr (Rule::kStates > 0) a = s0[i];
    if constexpr (Rule::kStates > 1) b = s1[i];
    rule(value, g[i] * scale, a, b);
    p[i] = value;
    if constexpr (Rule::kStates > 0) s0[i] = a;
    if constexpr (Rule::kStates > 1) s1[i] = b;
  }
}

/// Runs a Rule (see adamw.h) over the chunks. Bound by memory: a chunk of every buffer stays in the L2 cache, so
/// the rounded copy and the zeroing cost only their own writes.
template <class Rule, class P, class G>
void flat_update(const FlatUpdate& u, const Tensor& first_state, const Tensor& second_state,
                 const OptimizerSegments& segments, const typename Rule::Options& options) {
  P* const param = u.param.data<P>();
  G* const grad = u.grad.data<G>();
  bf16* const compute = u.compute.defined() ? u.compute.data<bf16>() : nullptr;
  P* const state0 = Rule::kStates > 0 ? first_state.data<P>() : nullptr;
  P* const state1 = Rule::kStates > 1 ? second_state.data<P>() : nullptr;
  const double* const clip = u.clip.defined() ? u.clip.data<double>() : nullptr;
  const bool skip = clip && clip[2] == 0;
  const P scale = clip ? static_cast<P>(clip[1]) : P{1};
  const double* const hyper = u.hyper.data<double>();
  const double* const settings = segments.settings.data<double>();
  const int64_t* const chunks = segments.chunks.data<int64_t>();

  parallel_for(0, segments.chunks.size(0), 2, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = chunks[3 * c], n = chunks[3 * c + 1] - begin, s = chunks[3 * c + 2];
      G* const g = grad + begin;
      if (!skip) {
        const Rule rule(options, hyper, settings[2 * s], settings[2 * s + 1]);
        P* const p = param + begin;
        if constexpr (std::is_same_v<G, bf16>) {
          alignas(64) float wide[kUpdateChunk];
          widen(wide, g, n);
          update_chunk(rule, n, p, wide, scale, state0 ? state0 + begin : nullptr, state1 ? state1 + begin : nullptr);
        } else {
          update_chunk(rule, n, p, g, scale, state0 ? state0 + begin : nullptr, state1 ? state1 + begin : nullptr);
        }
        if (compute) narrow(compute + begin, p, n);
      }
      if (u.zero_grad) std::memset(static_cast<void*>(g), 0, static_cast<size_t>(n) * sizeof(G));
    }
  });
}

}  // namespace krait::kernels::cpu
