#include "kernels/cuda/few_queue.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "core/stream.h"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/few_attention.h"
#include "kernels/cuda/few_draw.h"
#include "kernels/cuda/few_map.h"
#include "kernels/cuda/few_mlstm.h"
#include "kernels/cuda/gathering.h"
#include "kernels/cuda/step_known.h"
#include "kernels/cuda/step_map.h"
#include "kernels/layer_norm.h"
#include "kernels/rms_norm.h"

namespace krait::kernels::cuda {

namespace {

struct WaitingMap {
  FewMap work;
  Tensor made;                // y, or the gated units
  std::vector<Tensor> holds;  // whose memory nobody else may take before the launch
};
struct WaitingNorm {
  bool centred;
  Tensor y, mean, rstd, x, w, b;
  double eps, weight_offset;
};

class FewQueue final : public Deferred {
 public:
  explicit FewQueue(Device device) : device_(device) {}

  /// Somebody asks for the stream; our own launches do so too.
  void flush() override {
    others_ = true;
    finish();
  }
  void finish() {
    run_map();
    std::optional<WaitingNorm> norm = std::exchange(norm_, {});
    if (!norm) return;
    plain_ = true;
    Tensor none;
    if (norm->centred)
      layer_norm_forward(norm->y, none, norm->mean, norm->rstd, norm->x, {}, norm->w, norm->b, norm->eps, norm->weight_offset);
    else
      rms_norm_forward(norm->y, none, norm->rstd, norm->x, {}, norm->w, norm->eps);
    plain_ = false;
    know(norm->y);
  }

  /// A norm of x, which is in memory or will have been made by what was launched.
  void wait(WaitingNorm norm) {
    finish();
    norm_ = std::move(norm);
  }
  void wait(WaitingMap map) {
    run_map();
    map_ = std::move(map);
  }
  /// The map that waits, when it makes t.
  WaitingMap* map_of(const Tensor& t) {
    return map_ && map_->made.raw_data() == t.raw_data() && map_->made.numel() == t.numel() ? &*map_ : nullptr;
  }
  /// The map that waits, when t is the first columns of what it makes.
  const FewMap* map_before(const Tensor& t) {
    return map_ && map_->made.raw_data() == t.raw_data() && map_->work.rows == t.size(0) && map_->work.y_row == t.stride(0) ? &map_->work : nullptr;
  }
  /// The map reads what the waiting norm makes, if it does and the kernel serves both.
  bool take_norm(WaitingMap& map) {
    if (!norm_ || norm_->y.raw_data() != map.work.x || norm_->y.numel() != int64_t{map.work.rows} * map.work.k || norm_->y.size(-1) != map.work.k) return false;
    FewMap work = map.work;
    work.x = norm_->x.data<bf16>();
    work.x_row = work.k;
    work.norm_weight = norm_->w.data<float>();
    work.norm_bias = pointer_or_null<float>(norm_->b);
    work.eps = static_cast<float>(norm_->eps);
    work.weight_offset = static_cast<float>(norm_->weight_offset);
    work.centred = norm_->centred;
    work.normed = norm_->y.data<bf16>();
    work.mean = pointer_or_null<float>(norm_->mean);
    work.rstd = norm_->rstd.data<float>();
    if (!few_map_fits(work)) return false;
    map.work = work;
    map.holds.insert(map.holds.end(), {norm_->x, norm_->w, norm_->b, norm_->y, norm_->mean, norm_->rstd});
    know(norm_->y);
    norm_.reset();
    return true;
  }
  bool draw(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits) {
    if (!map_ || !draws_from(map_->work, logits)) return false;
    const WaitingMap map = *std::exchange(map_, {});
    few_map_draw(map.work, std::exchange(begun_, true), made, last, position, step, logits, current_stream(device_));
    return true;
  }
  /// The map that waits, and what follows it.
  void run(const FewMlstm& work) {
    const WaitingMap map = std::move(*std::exchange(map_, {}));
    know(map.made);
    few_mlstm(map.work, work, std::exchange(begun_, true), current_stream(device_));
    others_ = false;
  }
  void launched(const Tensor& y) {
    know(y);
    others_ = false;
  }
  void run(StepAttention work) {
    finish();
    work.ahead = may_read_ahead(work.k_cache);
    work.early = std::exchange(begun_, true);
    few_attention(work, current_stream(device_));
    others_ = false;
  }

  /// What a later map may read: its memory is held.
  void know(const Tensor& t) {
    if (!known(t.raw_data()).defined()) known_[next_++ % known_.size()] = t;
  }
  Tensor known(const void* p) const {
    for (const Tensor& t : known_)
      if (t.defined() && t.raw_data() == p) return t;
    return {};
  }
  /// Whether the kernel in front is ours, and nothing in this scope wrote the cache.
  bool may_read_ahead(const void* cache) {
    const bool first = std::find(caches_.begin(), caches_.end(), cache) == caches_.end();
    if (first) caches_.push_back(cache);
    return first && begun_ && !others_;
  }
  bool plain() const { return plain_; }
  Device device() const { return device_; }

 private:
  void run_map() {
    if (const std::optional<WaitingMap> map = std::exchange(map_, {})) {
      know(map->made);
      few_map(map->work, std::exchange(begun_, true), current_stream(device_));
      others_ = false;
    }
  }

  Device device_;
  std::optional<WaitingMap> map_;
  std::optional<WaitingNorm> norm_;  // at most one of the two
  bool plain_ = false;               // a norm that no map follows is on its way to its own kernel
  // The first kernel lets the next begin only when all in front of it have finished: from there on, memory that older
  // kernels wrote may be read ahead, while the others let the next begin at once.
  bool begun_ = false;
  bool others_ = true;  // may have launched since our last kernel
  std::array<Tensor, 3> known_;
  size_t next_ = 0;
  std::vector<const void*> caches_;
};

bool suits(const Gemm& g) { return g.dtype == DType::bf16 && g.ldb == g.k && g.m <= kFewRows && g.n < (int64_t{1} << 30); }

int splits_of(int64_t capacity, int64_t d) {
  return static_cast<int>(std::clamp<int64_t>((capacity * d + kFewShare - 1) / kFewShare, kFewestSplits, kFewSplits));
}

}  // namespace

std::unique_ptr<Deferred> gather_few(Device device) {
  return std::make_unique<FewQueue>(device);
}

bool gather_few_norm(bool centred, Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& residual,
                     const Tensor& w, const Tensor& b, double eps, double weight_offset) {
  FewQueue* const queue = gathering<FewQueue>(x.device());
  if (queue == nullptr || queue->plain() || x.dtype() != DType::bf16 || x.size(-1) % 256 != 0 || !aligned(x, y, w, b)) return false;
  if (residual.defined()) {
    WaitingMap* const map = queue->map_of(x);
    if (map == nullptr || map->work.units != nullptr || residual.dtype() != DType::bf16 || !aligned(sum)) return false;
    map->work.added = residual.data<bf16>();
    map->work.total = sum.data<bf16>();
    map->holds.insert(map->holds.end(), {residual, sum});
  }
  queue->wait(WaitingNorm{centred, y, mean, rstd, residual.defined() ? sum : x, w, b, eps, weight_offset});
  return true;
}

bool gather_few_linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  FewQueue* const queue = gathering<FewQueue>(g.device);
  if (queue == nullptr || !suits(g)) return false;
  WaitingMap map{step_map_of<FewMap>(g, y, bias, epilogue), y, {bias}};
  if (!queue->take_norm(map)) {
    queue->finish();
    const Tensor x = queue->known(g.a);
    if (!x.defined() || !few_map_fits(map.work)) return false;
    map.holds.push_back(x);
  }
  queue->wait(std::move(map));
  return true;
}

bool gather_few_gated_units(Tensor& h, Tensor& pre, const Gemm& g) {
  FewQueue* const queue = gathering<FewQueue>(g.device);
  if (queue == nullptr || !suits(g)) return false;
  WaitingMap map{step_map_of<FewMap>(g, pre, {}, Epilogue::none), h, {pre}};
  map.work.n /= 2;
  map.work.units = h.data<bf16>();
  if (!queue->take_norm(map)) return false;
  queue->wait(std::move(map));
  return true;
}

bool gather_few_attention(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a) {
  FewQueue* const queue = gathering<FewQueue>(qkv.device());
  if (queue == nullptr || qkv.dtype() != DType::bf16 || a.alibi_slopes.defined() || qkv.size(0) > kFewRows) return false;
  StepAttention work = step_attention_of(o, qkv, k_cache, v_cache, position, a);
  work.splits = splits_of(k_cache.size(1), qkv.size(2));
  if (!step_attention_fits(work)) return false;
  queue->run(work);
  queue->know(o);
  return true;
}

bool gather_few_draw(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits) {
  FewQueue* const queue = gathering<FewQueue>(logits.device());
  return queue != nullptr && queue->draw(made, last, position, step, logits);
}

void gather_few_known(const Tensor& t) {
  if (FewQueue* const queue = gathering<FewQueue>(t.device())) queue->know(t);
}

bool gather_few_mlstm_maps(MlstmStepMaps& out, Tensor& conv, const Tensor& x_m, const MlstmStepMapsWeights& w) {
  FewQueue* const queue = gathering<FewQueue>(x_m.device());
  const FewMap* const map = queue == nullptr ? nullptr : queue->map_before(x_m);
  const int64_t e = x_m.size(1), n = w.maps.g.size(0);
  if (map == nullptr || map->units != nullptr || map->total != nullptr || map->epilogue != Epilogue::none) return false;
  const int parts = few_mlstm_parts(*map, e, n);
  if (parts == 0) return false;
  out.gates = empty({x_m.size(0), parts, n}, DType::f32, x_m.device());
  queue->run(FewMlstm{out.q.data<bf16>(), out.k.data<bf16>(), out.v.data<bf16>(), out.x_c.data<bf16>(), conv.data<bf16>(), out.gates.data<float>(),
                      w.conv_weight.data<bf16>(), pointer_or_null<bf16>(w.conv_bias), w.maps.w_q.data<bf16>(), w.maps.w_k.data<bf16>(),
                      w.maps.w_v.data<bf16>(), w.maps.g.data<bf16>(), static_cast<int>(e), static_cast<int>(n), queue->may_read_ahead(conv.raw_data())});
  return true;
}

bool few_reads_ahead(Device device, const Tensor& state) {
  FewQueue* const queue = gathering<FewQueue>(device);
  if (queue == nullptr) return false;
  queue->finish();
  return queue->may_read_ahead(state.raw_data());
}

void few_launched(const Tensor& y) {
  if (FewQueue* const queue = gathering<FewQueue>(y.device())) queue->launched(y);
}

}  // namespace krait::kernels::cuda
