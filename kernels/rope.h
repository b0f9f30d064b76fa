#pragma once
#include "kernels/linear.h"

namespace krait {
namespace kernels {

/// Which channels form a pair (a, b): half pairs i with i + rotary_dim/2 (NeoX, Llama in the transformers layout),
/// interleaved pairs 2i with 2i + 1 (GPT-J, the original Llama).
enum class RopeStyle : uint8_t { half, interleaved };

/// cos and sin of position * base^(-2i/rotary_dim), both (max_len, rotary_dim/2), computed in fp64 and then rounded
/// to fp32 (or kept, with dtype f64, for fp64 inputs).
struct RopeTable { Tensor cos, sin; };
RopeTable rope_table(int64_t max_len, int64_t rotary_dim, double base, Device device, DType dtype = DType::f32);

/// Rotary embedding (Su et al. 2021): pair i at position p becomes
///   (a cos - b sin, a sin + b cos)  with cos[p, i], sin[p, i];
/// channels from rotary_dim = 2 cos.size(1) on pass through. `inverse` rotates back, which is also the backward.
/// x (b, l, h, d) of any strides with contiguous last dimension (q, k, or both as one slice of a fused projection);
/// fp32, bf16 or fp64. Tables fp32 (fp64 for fp64 x). The position of (b, l) is offset + positions[b, l], or
/// offset + l when positions are undefined; positions (b, l) or (l), int32 or int64.
/// A position outside the table: an error on a CPU and for offsets; NaN in the rotated channels on a GPU.
Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, RopeStyle style, const Tensor& positions,
            int64_t offset, bool inverse = false);
/// The same into y of x's shape and dtype, any strides with contiguous last dimension; y may be x itself.
void rope_into(Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin, RopeStyle style,
               const Tensor& positions, int64_t offset, bool inverse = false);

/// x w^T + bias as heads (b, l, h, d), the first `rotated` of which are rotated by 2 cos.size(1) = d channels' angles or
/// fewer: x (b, l, in), w (h d, in), bias (h d) or undefined. The product is rounded to x's dtype before it is rotated.
/// The position of (b, l) is offset + l.
Tensor linear_rope(const Tensor& x, const Tensor& w, const Tensor& bias, int64_t heads, int64_t rotated, const Tensor& cos,
                   const Tensor& sin, RopeStyle style, int64_t offset);

// Backends: positions (b, l) of any strides, or undefined.
KRAIT_BACKENDS(void rope(Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin, RopeStyle style,
                         const Tensor& positions, int64_t offset, bool inverse);
               void linear_rope(Tensor& y, const Gemm& product, const Tensor& bias, int64_t rotated, const Tensor& cos,
                                const Tensor& sin, RopeStyle style, int64_t offset))

}  // namespace kernels
}  // namespace krait
