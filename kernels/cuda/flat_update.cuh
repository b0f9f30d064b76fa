#pragma once
#include "core/cuda/launch.cuh"
#include "kernels/flat_update.h"

namespace krait::kernels::cuda {

template <class T>
struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Four {
  T at[4];
};

// One block per chunk, four elements per thread and turn: 16-byte accesses for fp32. A chunk begins at a multiple
// of 64 elements and lies in one segment, so the settings are the block's.
// Bound by memory: AdamW with fp32 gradients moves 28 bytes per element, +4 for zeroing, +2 for the bf16 copy.
template <class Rule, class P, class G>
__global__ void __launch_bounds__(256)
    flat_update_kernel(P* __restrict__ param, G* __restrict__ grad, P* __restrict__ state0, P* __restrict__ state1,
                       bf16* __restrict__ compute, const double* hyper, const double* clip, const int64_t* chunks,
                       const double* settings, typename Rule::Options options, bool zero_grad) {
  const int64_t* const chunk = chunks + 3 * int64_t{blockIdx.x};
  const int64_t begin = chunk[0], end = chunk[1], segment = chunk[2];
  const bool skip = clip && clip[2] == 0;
  const P scale = clip ? static_cast<P>(clip[1]) : P{1};
  const Rule rule(options, hyper, settings[2 * segment], settings[2 * segment + 1]);

  for (int64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * blockDim.x) {
    const bool whole = i + 4 <= end;
    const int count = whole ? 4 : static_cast<int>(end - i);
    if (!skip) {
      Four<P> p{}, a{}, b{};
      Four<G> g{};
      Four<bf16> q{};
      if (whole) {
        p = *reinterpret_cast<const Four<P>*>(param + i);
        g = *reinterpret_cast<const Four<G>*>(grad + i);
        if constexpr (Rule::kStates > 0) a = *reinterpret_cast<const Four<P>*>(state0 + i);
        if constexpr (Rule::kStates > 1) b = *reinterpret_cast<const Four<P>*>(state1 + i);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j >= count) break;
          p.at[j] = param[i + j];
          g.at[j] = grad[i + j];
          if constexpr (Rule::kStates > 0) a.at[j] = state0[i + j];
          if constexpr (Rule::kStates > 1) b.at[j] = state1[i + j];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        rule(p.at[j], static_cast<P>(g.at[j]) * scale, a.at[j], b.at[j]);
        q.at[j] = bf16(static_cast<float>(p.at[j]));
      }
      if (whole) {
        *reinterpret_cast<Four<P>*>(param + i) = p;
        if constexpr (Rule::kStates > 0) *reinterpret_cast<Four<P>*>(state0 + i) = a;
        if constexpr (Rule::kStates > 1) *reinterpret_cast<Four<P>*>(state1 + i) = b;
        if (compute) *reinterpret_cast<Four<bf16>*>(compute + i) = q;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j >= count) break;
          param[i + j] = p.at[j];
          if constexpr (Rule::kStates > 0) state0[i + j] = a.at[j];
          if constexpr (Rule::kStates > 1) state1[i + j] = b.at[j];
          if (compute) compute[i + j] = q.at[j];
        }
      }
    }
    if (zero_grad) {
      if (whole)
        *reinterpret_cast<Four<G>*>(grad + i) = Four<G>{};
      else
        for (int j = 0; j < count; ++j) grad[i + j] = G(0.0f);
    }
  }
}

template <class Rule, class P, class G>
void flat_update(const FlatUpdate& u, const Tensor& first_state, const Tensor& second_state,
                 const OptimizerSegments& segments, const typename Rule::Options& options) {
  launch(flat_update_kernel<Rule, P, G>,
         {.grid = segments.chunks.size(0), .block = 256, .stream = current_stream(u.param.device())},
         u.param.data<P>(), u.grad.data<G>(), Rule::kStates > 0 ? first_state.data<P>() : nullptr,
         Rule::kStates > 1 ? second_state.data<P>() : nullptr, u.compute.defined() ? u.compute.data<bf16>() : nullptr,
         u.hyper.data<double>(), u.clip.defined() ? u.clip.data<double>() : nullptr, segments.chunks.data<int64_t>(),
         segments.settings.data<double>(), options, u.zero_grad);
}

}  // namespace krait::kernels::cuda
