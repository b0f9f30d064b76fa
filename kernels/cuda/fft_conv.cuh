#pragma once
// The parts of fft_conv on CUDA. Spectra are tensors (rows, n, 2) of the dtype of sums, in the order of ring_fft.cuh.
#include "core/tensor.h"

namespace krait::kernels::cuda {

/// Longest transform (log2) that one block does in shared memory: 132 KB, which compute capability 8.0 has.
inline int max_shared_log2(DType dtype) { return dtype == DType::f64 ? 13 : 14; }

/// Roots for transforms up to 2^log2n. Made once per device and dtype and kept; while a graph is captured and none is
/// there, made by the graph itself.
Tensor ring_table(DType dtype, int log2n, Device device);

/// Transforms every row of z (rows, n, 2) in place; the inverse is times n. What one block cannot hold is first split
/// into factors in global memory, two levels a pass.
void ring_transform(Tensor& z, int log2n, bool inverse);

/// Spectra of channels [c0, c1): (K + D at lag 0 - i K1 reversed) / n.
Tensor kernel_spectrum(const Tensor& K, const Tensor& K1, const Tensor& D, int64_t c0, int64_t c1, int log2n);
/// z (groups, c1 - c0, n, 2), spectra of reversed(dy) * u: writes their sum over groups to rows [c0, c1) of dK and dK1.
void kernel_gradient(Tensor& dK, Tensor& dK1, Tensor& z, int64_t l, int64_t c0, int64_t c1, int log2n);

// Sequences beyond shared memory: transforms through global memory, some channels of one sequence at a time.
void fft_conv_long_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D);
void fft_conv_long_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u, const Tensor& K,
                            const Tensor& K1, const Tensor& D);

// Transforms of 1024 and 4096 points with sums in fp32: in registers.
inline bool serves_registers(int log2n, DType sums) { return (log2n == 10 || log2n == 12) && sums == DType::f32; }
void fft_conv_registers_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D);
void fft_conv_registers_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u,
                                 const Tensor& K, const Tensor& K1, const Tensor& D);

// Packed documents: the sum as it stands, O(length of the document) per value.
void document_conv_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D,
                           const Tensor& segments);
void document_conv_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u, const Tensor& K,
                            const Tensor& K1, const Tensor& D, const Tensor& segments);

}  // namespace krait::kernels::cuda
