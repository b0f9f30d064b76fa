#include "kernels/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "kernels/head_loss.h"
#include "kernels/logit_chunk.h"
#include "kernels/matmul.h"

namespace krait::kernels {

namespace {

int64_t valid_columns(int64_t v, const CrossEntropyOptions& o) {
  KRAIT_CHECK(o.valid_vocab >= 0 && o.valid_vocab <= v, "cross_entropy: valid_vocab {} with {} columns of logits",
              o.valid_vocab, v);
  KRAIT_CHECK(v > 0 && v < (int64_t{1} << 30), "cross_entropy: the logits have {} columns", v);
  KRAIT_CHECK(o.label_smoothing >= 0.0 && o.label_smoothing < 1.0, "cross_entropy: label_smoothing {} is not in [0, 1)",
              o.label_smoothing);
  KRAIT_CHECK(o.logit_cap >= 0.0 && std::isfinite(o.logit_cap), "cross_entropy: logit_cap {} is negative or infinite",
              o.logit_cap);
  return o.valid_vocab > 0 ? o.valid_vocab : v;
}

void check_targets(const Tensor& targets, const Shape& rows, Device device) {
  KRAIT_CHECK(targets.dtype() == DType::i64 || targets.dtype() == DType::i32,
              "cross_entropy: targets are {}, expected int64 or int32", targets.dtype());
  KRAIT_CHECK(targets.shape() == rows && targets.device() == device, "cross_entropy: targets are {}, expected {} on {}",
              describe(targets), rows, device);
}

void check_count(const Tensor& count, Device device) {
  KRAIT_CHECK(count.dtype() == DType::f32 && count.numel() == 1 && count.device() == device,
              "cross_entropy: count is {}, expected one float32 on {}", describe(count), device);
}

// The count that was given, or that of the targets. On a CPU they are looked at in any case: bad ones are an error.
Tensor count_or(const Tensor& given, const Tensor& targets, int64_t valid, int64_t ignore_index) {
  if (given.defined()) check_count(given, targets.device());
  if (given.defined() && targets.device().is_cuda()) return given;
  const Tensor counted = count_targets(targets, valid, ignore_index);
  return given.defined() ? given : counted;
}

Tensor reduce(const Tensor& rows, const Tensor& count, double scale) {
  Tensor out = empty({}, rows.dtype(), rows.device());
  KRAIT_DISPATCH(rows.device(), cross_entropy_reduce(out, rows, count, scale));
  return out;
}

}  // namespace

Tensor count_targets(const Tensor& targets, int64_t valid_vocab, int64_t ignore_index) {
  check_targets(targets, targets.shape(), targets.device());
  Tensor count = empty({}, DType::f32, targets.device());
  KRAIT_DISPATCH(targets.device(), cross_entropy_count(count, targets.contiguous(), valid_vocab, ignore_index));
  return count;
}

CrossEntropyOut cross_entropy_forward(const Tensor& logits_in, const Tensor& targets_in,
                                      const CrossEntropyOptions& options, const Tensor& count) {
  KRAIT_CHECK(logits_in.ndim() == 2, "cross_entropy: logits are {}, expected (t, v)", logits_in.shape());
  check_targets(targets_in, logits_in.shape().drop_last(), logits_in.device());
  const int64_t valid = valid_columns(logits_in.size(1), options);
  const Tensor logits = logits_in.contiguous(), targets = targets_in.contiguous();
  const DType accum = accum_dtype(logits.dtype());
  const Shape rows{logits.size(0)};
  CrossEntropyOut out{{}, empty(rows, accum, logits.device()), empty(rows, accum, logits.device()),
                      count_or(count, targets, valid, options.ignore_index)};
  Tensor losses = empty(rows, accum, logits.device()), no_gradient;
  KRAIT_DISPATCH(logits.device(), cross_entropy_rows(losses, out.nll, out.lse, no_gradient, logits, targets, out.count,
                                                     1.0, valid, options));
  out.loss = reduce(losses, out.count, 1.0);
  return out;
}

void cross_entropy_backward(Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                            const Tensor& lse, const Tensor& count, const CrossEntropyOptions& options) {
  check_same("cross_entropy backward", dlogits, logits);
  check_same("cross_entropy backward", dloss, lse);
  check_count(count, logits.device());
  KRAIT_CHECK(dlogits.shape() == logits.shape() && dlogits.is_contiguous() && dloss.numel() == 1,
              "cross_entropy backward: dlogits {} of logits {} and dloss {}", dlogits.shape(), logits.shape(),
              dloss.shape());
  const int64_t valid = valid_columns(logits.size(1), options);
  KRAIT_DISPATCH(logits.device(), cross_entropy_gradient(dlogits, dloss, logits.contiguous(), targets.contiguous(), lse,
                                                         count, VocabularyColumns{0, valid, valid}, options));
}

namespace {

struct Rows {
  Tensor losses, nll, count;
};

// cross_entropy_rows where every member of a group has some columns.
void sharded_rows(Tensor& losses, Tensor& nll, Tensor& lse, Tensor& gradient, const Tensor& logits, const Tensor& targets,
                  const Tensor& count, int64_t valid, const LinearCrossEntropyJob& job) {
  const int64_t first = job.shard.first;
  const VocabularyColumns columns{first, std::clamp<int64_t>(valid - first, 0, logits.size(1)), valid};
  const Device device = logits.device();
  Tensor own_top = empty_like(losses), sums = empty({3, losses.size(0)}, losses.dtype(), device);
  KRAIT_DISPATCH(device, cross_entropy_partial(own_top, sums, logits, targets, columns, job.options));
  const Tensor top = own_top.clone();
  job.shard.group->all_reduce(top, comm::Reduce::max).wait();
  KRAIT_DISPATCH(device, cross_entropy_rescale(sums, own_top, top));
  job.shard.group->all_reduce(sums.slice(0, 0, job.options.label_smoothing != 0.0 ? 3 : 2)).wait();
  KRAIT_DISPATCH(device, cross_entropy_finish(losses, nll, lse, top, sums, targets, valid, job.options));
  if (!gradient.defined()) return;
  const Tensor scale = full({}, job.loss_scale, losses.dtype(), device);
  KRAIT_DISPATCH(device, cross_entropy_gradient(gradient, scale, logits, targets, lse, count, columns, job.options));
}

// Everything per row, and the gradients that the job wants.
Rows linear_rows(Tensor& dx, const Tensor& x, const Tensor& w, const Tensor& targets_in,
                 const LinearCrossEntropyJob& job) {
  check_same("linear_cross_entropy", x, w);
  KRAIT_CHECK(x.ndim() == 2 && w.ndim() == 2 && x.size(1) == w.size(1) && x.size(1) > 0,
              "linear_cross_entropy: x is {}, w is {}; expected (t, d) and (v, d)", x.shape(), w.shape());
  check_targets(targets_in, x.shape().drop_last(), x.device());
  const Tensor rows = blas_ready(x), weight = blas_ready(w), targets = targets_in.contiguous();
  const VocabularyShard& shard = job.shard;
  const bool sharded = shard.group && shard.group->size() > 1;
  const int64_t t = x.size(0), v = w.size(0), whole = sharded ? shard.whole : v;
  KRAIT_CHECK(!sharded || (shard.first >= 0 && shard.first + v <= whole),
              "linear_cross_entropy: rows from {} of w {} do not lie in a vocabulary of {}", shard.first, w.shape(), whole);
  const int64_t valid = valid_columns(whole, job.options);
  const Device device = x.device();
  const DType accum = accum_dtype(x.dtype());
  Rows out{empty({t}, accum, device), empty({t}, accum, device),
           count_or(job.count, targets, valid, job.options.ignore_index)};
  if (job.want_dx) dx = empty({t, x.size(1)}, x.dtype(), device);
  Tensor dw = job.dw_sum;
  const bool gradients = job.want_dx || dw.defined();

  // Every member must cut the rows alike, also where its share of the vocabulary is smaller.
  const int64_t columns = sharded ? (whole + shard.group->size() - 1) / shard.group->size() : v;
  const int64_t chunk = job.chunk_rows > 0 ? std::min(t, job.chunk_rows) : logit_chunk_rows(t, columns * size_of(x.dtype()), device);
  bool done = false;
  if (!sharded)
    KRAIT_DISPATCH_GPU(device, head_loss(done, out.losses, out.nll, dx, dw, rows, weight, targets, out.count, valid, chunk,
                                         job.loss_scale, job.options));
  if (done) return out;
  const Tensor lse = empty({t}, accum, device), buffer = empty({chunk, v}, x.dtype(), device);
  for (int64_t begin = 0; begin < t; begin += chunk) {
    const int64_t end = std::min(t, begin + chunk);
    const auto part = [&](const Tensor& all) { return all.slice(0, begin, end); };
    Tensor logits = buffer.slice(0, 0, end - begin);
    matmul_out(logits, part(rows), weight, false, true);
    Tensor l = part(out.losses), n = part(out.nll), s = part(lse), gradient = gradients ? logits : Tensor{};
    if (sharded)
      sharded_rows(l, n, s, gradient, logits, part(targets), out.count, valid, job);
    else
      KRAIT_DISPATCH(device, cross_entropy_rows(l, n, s, gradient, logits, part(targets), out.count, job.loss_scale,
                                                valid, job.options));
    if (job.want_dx) {
      Tensor dx_part = part(dx);
      matmul_out(dx_part, logits, weight);
    }
    if (dw.defined()) matmul_out(dw, logits, part(rows), true, false, 1.0, 1.0);
  }
  return out;
}

}  // namespace

LinearCrossEntropyOut linear_cross_entropy(const Tensor& x, const Tensor& w, const Tensor& targets,
                                           const LinearCrossEntropyJob& job) {
  LinearCrossEntropyOut out;
  const Rows rows = linear_rows(out.dx, x, w, targets, job);
  out.count = rows.count;
  out.loss = reduce(rows.losses, rows.count, job.loss_scale);
  out.nll_sum = reduce(rows.nll, {}, 1.0);
  return out;
}

Tensor linear_cross_entropy_nll(const Tensor& x, const Tensor& w, const Tensor& targets,
                                const CrossEntropyOptions& options, int64_t chunk_rows, const VocabularyShard& shard) {
  Tensor none;
  return linear_rows(none, x, w, targets, {.options = options, .chunk_rows = chunk_rows, .shard = shard}).nll;
}

void scale_by(Tensor& t, const Tensor& factor, bool must_be_one) {
  KRAIT_CHECK(t.is_contiguous() && factor.numel() == 1 && factor.device() == t.device(), "scale_by: {} by {}",
              describe(t), describe(factor));
  if (t.numel() > 0) KRAIT_DISPATCH(t.device(), scale_by(t, factor, must_be_one));
}

}  // namespace krait::kernels
