#pragma once
#include "kernels/cuda/flow_ring.cuh"

// What linear maps do to their input rows. A warp makes its share of the inputs of all rows, in shared memory; no other
// warp reads it.
namespace krait::kernels::cuda::flow::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// Inputs [begin, begin + count) of every row belong to a warp.
struct Slice {
  int begin, count;
};
__device__ __forceinline__ Slice slice_of(int warp, int k) {
  const int each = chunks_of_warp(k) * kStepChunk, begin = min(warp * each, k);
  return {begin, min(each, k - begin)};
}

/// Pieces of 8 values of the input rows, which the lanes of a warp take in passes. `lanes` neighbours share a row.
struct Pieces {
  int begin, pieces, shift, lanes, turns, rows, passes;
  __device__ __forceinline__ Pieces(int k, int row_count) : rows(row_count) {
    const Slice slice = slice_of(warp_of(), k);
    const unsigned most = static_cast<unsigned>(chunks_of_warp(k) * (kStepChunk / 8));  // of any warp
    begin = slice.begin;
    pieces = slice.count / 8;
    shift = most >= 32 ? 5 : 32 - __clz(static_cast<int>(most) - 1);
    lanes = 1 << shift;
    turns = static_cast<int>((most + 31) / 32);
    passes = rows == 1 ? turns : turns > 1 ? rows * turns : (rows * lanes + 31) / 32;
  }
};
/// Of a pass: its row, which part of it, and the first of the lane's values.
struct Place {
  int row, part, column;
  bool alive;
  __device__ __forceinline__ Place(const Pieces& p, int pass) {
    if (p.turns > 1) {
      row = static_cast<int>(static_cast<unsigned>(pass) / static_cast<unsigned>(p.turns));
      part = pass - row * p.turns;
    } else {
      row = (pass * 32 + lane_of()) >> p.shift;
      part = 0;
    }
    const int piece = part * 32 + (lane_of() & (p.lanes - 1));
    column = p.begin + piece * 8;
    alive = pass < p.passes && row < p.rows && piece < p.pieces;
  }
  /// Leaves sums over the lanes of a row where all warps find them.
  __device__ __forceinline__ void leave(const Pieces& p, float v, float w) const {
    if ((lane_of() & (p.lanes - 1)) == 0 && row < p.rows) here().statistics[row][kParts * warp_of() + part] = make_float2(v, w);
  }
};

// Values that a warp's pass of a row has; neighbouring passes may lie in one row.
__device__ __forceinline__ int values_of(int warp, int part, int k) {
  return max(min(slice_of(warp, k).count - part * 256, 256), 0);
}
// Of a row: the sum over all warps.
__device__ __forceinline__ float total(int row, int parts) {
  const float2* const s = here().statistics[row];
  float sum[2] = {};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum[w % 2] += s[kParts * w].x;
  for (int part = 1; part < parts; ++part)
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) sum[0] += s[kParts * w + part].x;
  return sum[0] + sum[1];
}

// Eight weights of a norm; with one pass they are there before the row is.
__device__ __forceinline__ void read_weights(float (&w)[8], const float* from) {
  const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
  w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w, w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
}

/// What a norm subtracts and multiplies with: a lane's own row, and rows of its warp.
struct Moments {
  float mu, scale;
  __device__ __forceinline__ Moments of(int row, int rows) const {
    if (rows == 1) return *this;
    return {__shfl_sync(0xffffffffu, mu, min(row, rows - 1)), __shfl_sync(0xffffffffu, scale, min(row, rows - 1))};
  }
};
__device__ __forceinline__ int own_row(int rows) { return rows == 1 ? 0 : min(lane_of() % kMaxStepRows, rows - 1); }

// kernels/cuda/norm.cuh. Warps exchange the mean and the squares about it of their shares (Chan, Golub & LeVeque 1983).
// kTogether: passes whose values are asked for at once.
template <int kTogether>
__device__ __forceinline__ void normalise(const StepOp& op, int k) {
  const NormStep& a = op.norm;
  const bool writes = blockIdx.x == 0, adds = a.residual.from != nullptr, centred = a.centred != 0;
  const Pieces pieces(k, op.rows);
  const Source x = source_of(a.x), residual = source_of(a.residual);
  bf16* const out = reinterpret_cast<bf16*>(here().rows);
  float weight[8] = {}, bias[8] = {}, v[8] = {};
  const auto read_both = [&](int c) {
    read_weights(weight, a.w + c);
    if (a.b != nullptr) read_weights(bias, a.b + c);
  };
  if (const Place at(pieces, 0); kTogether == 1 && at.alive) read_both(at.column);
#pragma unroll 1
  for (int pass = 0; pass < pieces.passes; pass += kTogether) {
    uint4 in[kTogether], other[kTogether];
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const Place at(pieces, pass + q);
      in[q] = other[q] = {0, 0, 0, 0};
      if (!at.alive) continue;
      if (adds) other[q] = look8(residual.at + at.row * a.residual.row + at.column);
      in[q] = look8(x.at + at.row * a.x.row + at.column);
    }
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const Place at(pieces, pass + q);
      if (at.alive) {
        if (adds) await8(other[q], residual.at + at.row * a.residual.row + at.column, residual.awaited);
        await8(in[q], x.at + at.row * a.x.row + at.column, x.awaited);
      }
      unpack8(v, in[q]);
      if (adds) {
        float more[8];
        unpack8(more, other[q]);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += more[i];
        in[q] = pack8(v);
        unpack8(v, in[q]);
      }
      if (at.alive) {
        *reinterpret_cast<uint4*>(out + at.row * k + at.column) = in[q];
        if (adds && writes) give8(a.sum, at.row, at.column, in[q]);
      }
      float first = 0, second = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) first += centred ? v[i] : v[i] * v[i];
      first = lanes_sum(first, pieces.lanes);
      if (centred) {
        const int count = values_of(warp_of(), at.part, k);
        first = count > 0 ? __fdividef(first, static_cast<float>(count)) : 0.0f;
        if (at.alive)
#pragma unroll
          for (int i = 0; i < 8; ++i) second += (v[i] - first) * (v[i] - first);
        second = lanes_sum(second, pieces.lanes);
      }
      if (pass + q < pieces.passes) at.leave(pieces, first, second);
    }
  }
  sync_workers();
  const float inverse = 1.0f / static_cast<float>(k);
  Moments own{0, 0};
  float squares = 0;
  if (!centred) {
    squares = total(own_row(op.rows), pieces.turns);
  } else {
    const float2* const s = here().statistics[own_row(op.rows)];
#pragma unroll 1
    for (int part = 0; part < pieces.turns; ++part)
#pragma unroll 4
      for (int w = 0; w < kWarps; ++w) own.mu += static_cast<float>(values_of(w, part, k)) * s[kParts * w + part].x;
    own.mu *= inverse;
#pragma unroll 1
    for (int part = 0; part < pieces.turns; ++part)
#pragma unroll 4
      for (int w = 0; w < kWarps; ++w) {
        const float2 one = s[kParts * w + part];
        squares += one.y + static_cast<float>(values_of(w, part, k)) * (one.x - own.mu) * (one.x - own.mu);
      }
  }
  own.scale = rsqrtf(squares * inverse + a.eps);
  if (writes && worker() < op.rows) {
    if (centred) a.mean[worker()] = own.mu;
    a.rstd[worker()] = own.scale;
  }
#pragma unroll 1
  for (int pass = 0; pass < pieces.passes; ++pass) {
    const Place at(pieces, pass);
    const Moments m = own.of(at.row, op.rows);
    if (!at.alive) continue;
    uint4* const here_at = reinterpret_cast<uint4*>(out + at.row * k + at.column);
    if (kTogether > 1) {
      read_both(at.column);
      unpack8(v, *here_at);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = (v[i] - m.mu) * m.scale * weight[i] + bias[i];
    const uint4 y = pack8(v);
    *here_at = y;
    if (writes) give8(a.y, at.row, at.column, y);
  }
}

// Mamba-2's gated norm, one group.
template <int kTogether>
__device__ __forceinline__ void gate(const StepOp& op, int k) {
  const GatedStep& a = op.gated;
  const Pieces pieces(k, op.rows);
  const Source u = source_of(a.u), z = source_of(a.z);
  bf16* const out = reinterpret_cast<bf16*>(here().rows);
  bf16* const gates_at = out + op.rows * k;
  float weight[8] = {}, v[8] = {}, gates[8] = {};
  if (const Place at(pieces, 0); kTogether == 1 && at.alive) read_weights(weight, a.w + at.column);
  const auto open = [&](uint4 packed) {
    unpack8(gates, packed);
#pragma unroll
    for (int i = 0; i < 8; ++i) gates[i] = silu(gates[i]);
  };
#pragma unroll 1
  for (int pass = 0; pass < pieces.passes; pass += kTogether) {
    uint4 in[kTogether], by[kTogether];
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const Place at(pieces, pass + q);
      in[q] = by[q] = {0, 0, 0, 0};
      if (!at.alive) continue;
      by[q] = look8(z.at + at.row * a.z.row + at.column);
      in[q] = look8(u.at + at.row * a.u.row + at.column);
    }
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const Place at(pieces, pass + q);
      if (at.alive) await8(by[q], z.at + at.row * a.z.row + at.column, z.awaited);
      open(by[q]);
      if (at.alive) {
        await8(in[q], u.at + at.row * a.u.row + at.column, u.awaited);
        if (kTogether > 1) {
          *reinterpret_cast<uint4*>(out + at.row * k + at.column) = in[q];
          *reinterpret_cast<uint4*>(gates_at + at.row * k + at.column) = by[q];
        }
      }
      unpack8(v, in[q]);
      float s = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float gated = v[i] * gates[i], counted = a.norm_first != 0 ? v[i] : gated;
        s += counted * counted;
        v[i] = gated;
      }
      s = lanes_sum(s, pieces.lanes);
      if (pass + q < pieces.passes) at.leave(pieces, s, 0);
    }
  }
  sync_workers();
  Moments own{0, rsqrtf(total(own_row(op.rows), pieces.turns) * (1.0f / static_cast<float>(k)) + a.eps)};
#pragma unroll 1
  for (int pass = 0; pass < pieces.passes; ++pass) {
    const Place at(pieces, pass);
    const Moments m = own.of(at.row, op.rows);
    if (!at.alive) continue;
    uint4* const here_at = reinterpret_cast<uint4*>(out + at.row * k + at.column);
    if (kTogether > 1) {
      read_weights(weight, a.w + at.column);
      open(*reinterpret_cast<const uint4*>(gates_at + at.row * k + at.column));
      unpack8(v, *here_at);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= gates[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= m.scale * weight[i];
    const uint4 y = pack8(v);
    *here_at = y;
    if (blockIdx.x == 0) give8(a.y, at.row, at.column, y);
  }
}

template <int kTogether>
__device__ __forceinline__ void copy(const StepOp& op, int k) {
  const LinearStep& l = op.linear;
  const Pieces pieces(k, op.rows);
  const Source x = source_of(l.x);
#pragma unroll 1
  for (int pass = 0; pass < pieces.passes; pass += kTogether) {
    uint4 in[kTogether];
#pragma unroll
    for (int q = 0; q < kTogether; ++q)
      if (const Place at(pieces, pass + q); at.alive) in[q] = look8(x.at + at.row * l.x.row + at.column);
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      const Place at(pieces, pass + q);
      if (!at.alive) continue;
      await8(in[q], x.at + at.row * l.x.row + at.column, x.awaited);
      *reinterpret_cast<uint4*>(reinterpret_cast<bf16*>(here().rows) + at.row * k + at.column) = in[q];
    }
  }
}

template <int kTogether>
__device__ __forceinline__ void prepare(int operation_at) {
  const StepOp& op = operation(operation_at);
  const int k = op.linear.k;
  if (op.linear.input == StepInput::plain)
    copy<2 * kTogether>(op, k);
  else if (op.linear.input == StepInput::norm)
    normalise<kTogether>(op, k);
  else
    gate<kTogether>(op, k);
  __syncwarp();
}

// Several rows are kept apart: a step of one row should fit the cache of instructions.
__device__ __noinline__ void prepare_rows(int operation_at) { prepare<2>(operation_at); }

/// What can be asked for in advance.
__device__ __forceinline__ void touch_input(const StepOp& op) {
  if (op.linear.input == StepInput::norm) {
    touch_share(op.norm.w, op.linear.k);
    touch_share(op.norm.b, op.linear.k);
  } else if (op.linear.input == StepInput::gated) {
    touch_share(op.gated.w, op.linear.k);
  }
}

#endif

}  // namespace krait::kernels::cuda::flow::step
