#include "kernels/head_loss.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/cluster_launch.cuh"
#include "kernels/cuda/head_loss.cuh"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/matmul.h"

namespace krait::kernels::cuda {

namespace {

constexpr int64_t kCachedBytes = int64_t{16} << 20;  // of x, while all columns pass by

LaunchConfig in_clusters(int64_t clusters, Stream stream) {
  return {.grid = kHeadCluster * clusters, .block = kHeadThreads, .shared = kHeadShared, .stream = stream};
}

// How many clusters the GPU holds at once; 0 where the kernel is not for it.
int resident_clusters(Device device) {
  static std::mutex mutex;
  static auto* known = new std::map<int, int>;
  const std::lock_guard lock(mutex);
  const auto [at, fresh] = known->try_emplace(device.index, 0);
  if (!fresh) return at->second;
  const int multiprocessors = hopper_multiprocessors(device, reinterpret_cast<const void*>(head_exponentials_kernel));
  if (multiprocessors == 0) return 0;
  at->second = most_clusters(head_exponentials_kernel, kHeadCluster, in_clusters(multiprocessors / kHeadCluster, {}));
  return at->second;
}

// e (rows, v), which may be undefined, the sums of its column tiles (tiles, rows), and e of targets.
void exponentials(const Tensor& e, const Tensor& partial, const Tensor& target_e, const Tensor& x, const Tensor& w,
                  const Tensor& reference, const Tensor& target, int64_t valid) {
  const int64_t rows = x.size(0), v = w.size(0), d = x.size(1);
  const int64_t x_sizes[] = {d, rows}, x_strides[] = {d};
  const int x_box[] = {kHeadDepth, kHeadRows};
  const CUtensorMap x_map = tensor_map(x.raw_data(), DType::bf16, x_sizes, x_strides, x_box);
  // Of 32 rows of w, row 8 c + 2 j + i comes to place 8 j + 2 c + i: a thread's columns of a product, 2 c and 2 c + 1 of
  // every 8, are then eight neighbours.
  const int64_t w_sizes[] = {d, 2, 4, 4, v / 32}, w_strides[] = {d, 8 * d, 2 * d, 32 * d};
  const int w_box[] = {kHeadDepth, 2, 4, 4, kHeadColumns / kHeadCluster / 32};
  const CUtensorMap w_map = tensor_map(w.raw_data(), DType::bf16, w_sizes, w_strides, w_box);
  const int64_t row_tiles = ceil_div(rows, kHeadCluster * kHeadRows), column_tiles = ceil_div(v, kHeadColumns);
  const int64_t tile_bytes = kHeadCluster * kHeadRows * d * 2;
  const HeadProduct job{.rows = static_cast<int>(rows),
                        .columns = static_cast<int>(v),
                        .valid = static_cast<int>(valid),
                        .depth = static_cast<int>(ceil_div(d, kHeadDepth)),
                        .row_tiles = static_cast<int>(row_tiles),
                        .column_tiles = static_cast<int>(column_tiles),
                        .group = static_cast<int>(std::clamp<int64_t>(kCachedBytes / tile_bytes, 1, row_tiles)),
                        .reference = reference.data<float>(),
                        .target = target.data<int32_t>(),
                        .target_e = target_e.data<float>(),
                        .partial = partial.data<float>(),
                        .e = e.defined() ? e.data<bf16>() : nullptr};
  const int64_t clusters = std::min<int64_t>(resident_clusters(x.device()), row_tiles * column_tiles);
  launch_clusters(head_exponentials_kernel, kHeadCluster, in_clusters(clusters, current_stream(x.device())), x_map, w_map, job);
}

}  // namespace

void head_loss(bool& done, Tensor& losses, Tensor& nll, Tensor& dx, Tensor& dw, const Tensor& x_in, const Tensor& w_in,
               const Tensor& targets, const Tensor& count, int64_t valid, int64_t chunk, double scale,
               const CrossEntropyOptions& options) {
  const int64_t t = x_in.size(0), d = x_in.size(1), v = w_in.size(0), tiles = ceil_div(v, kHeadColumns);
  const Device device = x_in.device();
  done = x_in.dtype() == DType::bf16 && d % 8 == 0 && v % 32 == 0 && options.logit_cap == 0.0 &&
         options.label_smoothing == 0.0 && (!dw.defined() || dw.dtype() == DType::f32) && resident_clusters(device) > 0;
  if (!done || t == 0) return;
  const Tensor x_given = x_in.contiguous(), w_given = w_in.contiguous();  // bulk copies want addresses on 16 bytes
  const Tensor x = aligned(x_given) ? x_given : x_given.clone(), w = aligned(w_given) ? w_given : w_given.clone();
  const Stream stream = current_stream(device);
  const bool gradients = dx.defined() || dw.defined();
  const Tensor reference = empty({t}, DType::f32, device), target = empty({t}, DType::i32, device);
  const Tensor target_e = empty({chunk}, DType::f32, device), partial = empty({tiles, chunk}, DType::f32, device);
  Tensor e, factors, scaled, product;
  if (gradients) e = empty({chunk, v}, DType::bf16, device), factors = empty({chunk}, DType::f32, device);
  if (dw.defined()) scaled = empty({chunk, d}, DType::bf16, device);
  if (dx.defined()) product = empty({chunk, d}, DType::f32, device);

  visit_index(targets.dtype(), [&]<class I>() {
    launch(head_reference_kernel<I>, {.grid = ceil_div(t, 8), .block = 256, .stream = stream}, reference.data<float>(),
           target.data<int32_t>(), x.data<bf16>(), w.data<bf16>(), targets.data<I>(), t, valid, options.ignore_index, d);
  });
  for (int64_t begin = 0; begin < t; begin += chunk) {
    const int64_t rows = std::min(chunk, t - begin);
    const auto part = [&](const Tensor& all) { return all.slice(0, begin, begin + rows); };
    const auto first = [&](const Tensor& all) { return all.defined() ? all.slice(0, 0, rows) : all; };
    const Tensor x_part = part(x), reference_part = part(reference), target_part = part(target), e_part = first(e);
    exponentials(e_part, partial, target_e, x_part, w, reference_part, target_part, valid);
    const HeadFinish job{.rows = rows, .columns = v, .valid = valid, .d = d, .column_tiles = tiles,
                         .partial = partial.data<float>(), .reference = reference_part.data<float>(),
                         .target_e = target_e.data<float>(), .count = count.data<float>(),
                         .target = target_part.data<int32_t>(), .x = x_part.data<bf16>(), .w = w.data<bf16>(),
                         .losses = losses.data<float>() + begin, .nll = nll.data<float>() + begin, .scale = scale,
                         .z_loss = options.z_loss, .e = gradients ? e.data<bf16>() : nullptr,
                         .factors = gradients ? factors.data<float>() : nullptr,
                         .scaled = dw.defined() ? scaled.data<bf16>() : nullptr};
    launch(head_finish_kernel, {.grid = ceil_div(rows, kFinishRows), .block = kFinishWarps * 32, .stream = stream}, job);
    if (dx.defined()) {
      Tensor product_part = first(product);
      matmul_out(product_part, e_part, w);
      launch(head_scale_kernel, {.grid = ceil_div(rows * d, 8 * 256), .block = 256, .stream = stream},
             dx.data<bf16>() + begin * d, product.data<float>(), factors.data<float>(), rows * d, d);
    }
    if (dw.defined()) matmul_out(dw, e_part, first(scaled), true, false, 1.0, 1.0);
  }
}

}  // namespace krait::kernels::cuda
