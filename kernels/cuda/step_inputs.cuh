#pragma once
#include "kernels/cuda/step_ring.cuh"

// What linear maps do to their input rows: every block makes all of them, in shared memory.
namespace krait::kernels::cuda::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Eight weights of a norm; with one vector a row they are there before the row is.
__device__ __forceinline__ void read_weights(float (&w)[8], const float* from) {
  const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
  w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w, w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
}

// kernels/cuda/norm.cuh
template <int kHeld>
__device__ __forceinline__ void normalise(const StepOp& op, Shared& shared) {
  const NormStep& a = op.norm;
  const int k = op.linear.k, warps = warps_of_row(op.rows), row = warp_of() / warps, step = warps * 256;
  const int first = (worker() - row * warps * 32) * 8;
  const bool alive = row < op.rows, writes = blockIdx.x == 0;
  const int64_t at = int64_t{row} * k;
  float weight[8] = {}, bias[8] = {};
  const auto read_both = [&](int c) {
    read_weights(weight, a.w + c);
    if (a.b != nullptr) read_weights(bias, a.b + c);
  };
  if (kHeld == 1 && first < k) read_both(first);
  wait(shared);
  float v[kHeld][8] = {};
#pragma unroll
  for (int q = 0; q < kHeld; ++q) {
    const int c = first + q * step;
    if (!alive || c >= k) continue;
    const uint4 x = __ldcg(reinterpret_cast<const uint4*>(a.x + at + c));
    if (a.residual != nullptr) {
      float other[8];
      fresh8(other, a.residual + at + c);
      unpack8(v[q], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[q][i] = rounded(v[q][i] + other[i]);
      if (writes) write8(a.sum + at + c, v[q]);
    } else {
      unpack8(v[q], x);
    }
  }
  const float width = static_cast<float>(k);
  float mu = 0, squares = 0;
  if (a.centred != 0) {
    float mean[1] = {};
#pragma unroll
    for (int q = 0; q < kHeld; ++q)
#pragma unroll
      for (int i = 0; i < 8; ++i) mean[0] += v[q][i];
    warps_sum(mean, warps, 0, shared);
    mean[0] /= width;
    float s[2] = {};  // deviations correct the mean's own rounding
#pragma unroll
    for (int q = 0; q < kHeld; ++q)
      if (first + q * step < k)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float d = v[q][i] - mean[0];
          s[0] += d;
          s[1] += d * d;
        }
    warps_sum(s, warps, 1, shared);
    const float shift = s[0] / width;
    mu = mean[0] + shift;
    squares = fmaxf(s[1] / width - shift * shift, 0.0f);
  } else {
    float s[1] = {};
#pragma unroll
    for (int q = 0; q < kHeld; ++q)
#pragma unroll
      for (int i = 0; i < 8; ++i) s[0] += v[q][i] * v[q][i];
    warps_sum(s, warps, 0, shared);
    squares = s[0] / width;
  }
  const float scale = 1.0f / sqrtf(squares + a.eps);
  if (!alive) return;
  if (writes && first == 0) {
    if (a.centred != 0) a.mean[row] = mu;
    a.rstd[row] = scale;
  }
  bf16* const out = reinterpret_cast<bf16*>(shared.rows);
#pragma unroll
  for (int q = 0; q < kHeld; ++q) {
    const int c = first + q * step;
    if (c >= k) continue;
    if (kHeld > 1) read_both(c);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[q][i] = (v[q][i] - mu) * scale * weight[i] + bias[i];
    write8(out + at + c, v[q]);
    if (writes) write8(a.y + at + c, v[q]);
  }
}

// Eight channels of Mamba's convolution, packed.
struct Taps {
  uint4 weight[4], bias, past[3];
};
__device__ __forceinline__ void fetch_taps(Taps& t, const ConvolvedStep& a, int e, int row, int c) {
#pragma unroll
  for (int i = 0; i < 4; ++i) t.weight[i] = *reinterpret_cast<const uint4*>(a.weight + 4 * c + 8 * i);
  t.bias = a.bias != nullptr ? *reinterpret_cast<const uint4*>(a.bias + c) : uint4{0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < 3; ++j) t.past[j] = __ldcg(reinterpret_cast<const uint4*>(a.conv + (int64_t{row} * 3 + j) * e + c));
}
__device__ __forceinline__ void convolve(const Taps& t, const ConvolvedStep& a, int e, int row, int c, bf16* out) {
  float p[8], past[3][8], now[8];
  fresh8(now, a.xz + int64_t{row} * 2 * e + c);
  unpack8(p, t.bias);
#pragma unroll
  for (int j = 0; j < 3; ++j) unpack8(past[j], t.past[j]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // a piece has the taps of two channels
    float w[8];
    unpack8(w, t.weight[i]);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int at = 2 * i + v;
      now[at] = silu(p[at] + w[4 * v] * past[0][at] + w[4 * v + 1] * past[1][at] + w[4 * v + 2] * past[2][at] + w[4 * v + 3] * now[at]);
    }
  }
  write8(out + int64_t{row} * e + c, now);
}

// Mamba-2's gated norm, one group.
template <int kHeld>
__device__ __forceinline__ void gate(const StepOp& op, Shared& shared) {
  const GatedStep& a = op.gated;
  const int k = op.linear.k, warps = warps_of_row(op.rows), row = warp_of() / warps, step = warps * 256;
  const int first = (worker() - row * warps * 32) * 8;
  const bool alive = row < op.rows;
  const int64_t at = int64_t{row} * k;
  float weight[8] = {};
  if (kHeld == 1 && first < k) read_weights(weight, a.w + first);
  wait(shared);
  float v[kHeld][8] = {}, s[1] = {};
#pragma unroll
  for (int q = 0; q < kHeld; ++q) {
    const int c = first + q * step;
    if (!alive || c >= k) continue;
    const uint4 u = __ldcg(reinterpret_cast<const uint4*>(a.u + at + c));
    float z[8];
    fresh8(z, a.zxbcdt + int64_t{row} * a.input + c);
    unpack8(v[q], u);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float gated = v[q][i] * silu(z[i]), counted = a.norm_first != 0 ? v[q][i] : gated;
      s[0] += counted * counted;
      v[q][i] = gated;
    }
  }
  warps_sum(s, warps, 0, shared);
  const float scale = 1.0f / sqrtf(s[0] / static_cast<float>(k) + a.eps);
  if (!alive) return;
  bf16* const out = reinterpret_cast<bf16*>(shared.rows);
#pragma unroll
  for (int q = 0; q < kHeld; ++q) {
    const int c = first + q * step;
    if (c >= k) continue;
    if (kHeld > 1) read_weights(weight, a.w + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[q][i] *= scale * weight[i];
    write8(out + at + c, v[q]);
    if (blockIdx.x == 0) write8(a.y + at + c, v[q]);
  }
}

// A warp: the state of Mamba-2's convolution moves on by one position, when all have read it.
__device__ __forceinline__ void shift(const StepOp& op) {
  const GatedStep& a = op.gated;
  const Range own = share(int64_t{op.rows} * a.channels);
  for (int at = own.begin + lane_of(); at < own.end; at += 32) {
    const int row = at / a.channels, c = at % a.channels;
    bf16* const conv = a.conv + int64_t{row} * 3 * a.channels + c;
    const float second = fresh(conv + a.channels), third = fresh(conv + 2 * a.channels);
    const float now = fresh(a.zxbcdt + int64_t{row} * a.input + op.linear.k + c);
    conv[0] = static_cast<bf16>(second);
    conv[a.channels] = static_cast<bf16>(third);
    conv[2 * a.channels] = static_cast<bf16>(now);
  }
}

/// Leaves the input rows (rows, k) in shared memory where this block `needs` them. Waits for the operation before.
__device__ __noinline__ void prepare(int operation_at, bool needs) {
  Shared& shared = here();
  const StepOp& op = operation(operation_at);
  const LinearStep& l = op.linear;
  bf16* const out = reinterpret_cast<bf16*>(shared.rows);
  switch (l.input) {
    case StepInput::plain: {
      wait(shared);
      for (int r = 0; needs && r < op.rows; ++r)
        for (int c = worker() * 8; c < l.k; c += kWorkers * 8)
          *reinterpret_cast<uint4*>(out + r * l.k + c) = __ldcg(reinterpret_cast<const uint4*>(l.x + r * l.x_row + c));
      break;
    }
    case StepInput::norm:
      if (!needs)
        wait(shared);
      else if (op.rows == 1)
        normalise<1>(op, shared);
      else
        normalise<kStepVectors>(op, shared);
      break;
    case StepInput::convolved: {
      const int first = worker() * 8;
      Taps taps;
      if (needs && first < l.k) fetch_taps(taps, op.convolved, l.k, 0, first);
      wait(shared);
      for (int r = 0; needs && r < op.rows; ++r)
        for (int c = first; c < l.k; c += kWorkers * 8) {
          if (r > 0 || c > first) fetch_taps(taps, op.convolved, l.k, r, c);
          convolve(taps, op.convolved, l.k, r, c, out);
        }
      break;
    }
    case StepInput::gated:
      if (!needs)
        wait(shared);
      else if (op.rows == 1)
        gate<1>(op, shared);
      else
        gate<kStepVectors>(op, shared);
      break;
  }
  sync_workers();
  if (l.input == StepInput::gated && warp_of() == kWarps - 1) shift(op);  // the others go on
}

/// The same, as far as it can be asked for in advance.
__device__ __forceinline__ void touch_input(const StepOp& op) {
  const int k = op.linear.k;
  switch (op.linear.input) {
    case StepInput::plain: break;
    case StepInput::norm:
      touch_share(op.norm.w, k);
      touch_share(op.norm.b, k);
      break;
    case StepInput::convolved:
      touch_share(op.convolved.weight, int64_t{4} * k);
      touch_share(op.convolved.bias, k);
      touch_share(op.convolved.conv, int64_t{3} * op.rows * k);
      break;
    case StepInput::gated:
      touch_share(op.gated.w, k);
      break;
  }
}

#endif

}  // namespace krait::kernels::cuda::step
