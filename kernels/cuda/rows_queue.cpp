#include "kernels/cuda/rows_queue.h"

#include <optional>
#include <utility>
#include <vector>

#include "core/stream.h"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/draw_likeliest.h"
#include "kernels/cuda/few_draw.h"
#include "kernels/cuda/few_steps.h"
#include "kernels/cuda/gathering.h"
#include "kernels/cuda/rows_attention.h"
#include "kernels/cuda/rows_embedding.h"
#include "kernels/cuda/rows_head.h"
#include "kernels/cuda/rows_linear.h"
#include "kernels/cuda/rows_mamba.h"
#include "kernels/cuda/rows_mamba2.h"
#include "kernels/cuda/rows_scan.h"
#include "kernels/cuda/rows_state.h"
#include "kernels/cuda/step_known.h"
#include "kernels/cuda/step_map.h"

namespace krait::kernels::cuda {

namespace {

// y and rstd of what a kernel left unscaled (RowScale), for a linear map that scales its sums instead.
struct WaitingNorm {
  Tensor y, rstd, x, squares;
  double eps;
  RowScale scale() const {
    return {squares.data<float>(), static_cast<int>(squares.size(1)), static_cast<float>(eps), y.data<bf16>(),
            rstd.defined() ? rstd.data<float>() : nullptr};
  }
};
struct WaitingEmbedding {
  RowsEmbedding work;
  Tensor y;
  std::vector<Tensor> reads;
};
struct WaitingLinear {
  RowsLinear map;
  Tensor y;
  std::vector<Tensor> reads;  // whose memory nobody else may take before the launch
  Tensor normed;              // what map.scale leaves there
  Tensor pre;                 // of gated units
  bool head = false;          // of many columns: rows_head's
  std::optional<LikeliestDraw> draw = {};  // of its first `choices` columns
  int choices = 0;
};
// Layers of Mamba that wait for the next one: one kernel.
struct WaitingLayers {
  RowsMamba run;
  Tensor exchange, weighted, squares;
  std::vector<Tensor> reads, normed;  // `normed` of each layer, may be undefined
  RowsMambaLayer& last() { return run.layer[run.layers - 1]; }
};
// The same of Mamba-2.
struct WaitingMamba2 {
  RowsMamba2 run;
  Tensor exchange, weighted, squares, between, between_squares;
  std::vector<Tensor> reads, zxbcdt, normed, gated;  // of each layer, the last two what norms leave scaled; may be undefined
  RowsMamba2Layer& last() { return run.layer[run.layers - 1]; }
  /// Whether a layer whose in_proj is this may be the next: it keeps nothing that one of these keeps.
  bool continues(const RowsLinear& in, const RowsState& state) {
    for (int i = 0; i < run.layers; ++i)
      if (run.layer[i].h == state.h || run.layer[i].conv == in.conv || run.layer[i].recent_B == state.recent_B) return false;
    return last().out != nullptr && run.layers < kMamba2Layers && in.x == run.weighted && in.rows == run.rows && in.k == run.d && in.n == run.n &&
           state.narrow == run.narrow && state.heads == run.heads && state.D_columns == run.D_columns;
  }
};

class RowsQueue final : public Deferred {
 public:
  RowsQueue(Device device, bool few) : device_(device) {
    if (few) few_.emplace(device);
  }

  void flush() override { launch(false); }
  /// `beside`: RowsLinear's.
  void launch(bool beside) {  // the launches ask for the stream themselves
    take_few_map();
    if (few_)
      if (const Tensor made = few_->flush(); made.defined()) known_ = made;
    const std::optional<WaitingEmbedding> embedding = std::exchange(embedding_, {});  // or one of the others
    std::optional<WaitingLayers> layers = std::exchange(layers_, {});
    std::optional<WaitingMamba2> mamba2 = std::exchange(mamba2_, {});  // at most one of the two
    std::optional<WaitingLinear> linear = std::exchange(linear_, {});
    const std::optional<WaitingNorm> norm = std::exchange(norm_, {});  // at most one of the two
    if (embedding) rows_embedding(embedding->work, current_stream(device_));
    if (linear) known_ = linear->head ? Tensor{} : linear->y;
    if (layers) {
      for (int i = 0; i < layers->run.layers; ++i)  // what nobody holds nobody reads
        layers->run.layer[i].normed = layers->normed[i].use_count() > 1 ? layers->normed[i].data<bf16>() : nullptr;
      const Tensor counters = zeros({mamba_counters(layers->run.layers)}, DType::i32, device_);
      layers->run.counters = reinterpret_cast<unsigned*>(counters.data<int32_t>());
      rows_mamba(layers->run, current_stream(device_));
    }
    if (mamba2) launch_mamba2(*mamba2);
    if (linear && linear->head) launch_head(*linear);
    if (linear && !linear->head) {
      linear->map.beside = beside;
      rows_linear(linear->map, current_stream(device_));
    }
    if (norm)
      scale_rows(norm->scale(), norm->x.data<bf16>(), static_cast<int>(norm->squares.size(0)), static_cast<int>(norm->x.size(-1)), current_stream(device_));
  }

  void wait(WaitingEmbedding embedding) {
    flush();
    embedding_ = std::move(embedding);
  }
  /// The embedding that waits, when it makes t.
  std::optional<WaitingEmbedding> take_embedding(const Tensor& t) {
    if (!embedding_ || embedding_->y.raw_data() != t.raw_data() || embedding_->y.numel() != t.numel()) return {};
    return std::exchange(embedding_, {});
  }
  void wait(WaitingNorm norm) {
    if (linear_ || norm_ || few_) flush();
    norm_ = std::move(norm);
  }
  void wait(WaitingLinear linear) {
    if (linear_ || norm_ || few_) flush();
    linear_ = std::move(linear);
  }
  /// What waits in front of a map or a norm.
  std::optional<WaitingLayers>& layers() { return layers_; }
  std::optional<WaitingMamba2>& mamba2() { return mamba2_; }
  /// What the thread's next linear map may read: its memory is held.
  void know(const Tensor& t) { known_ = t; }
  const Tensor& known() const { return known_; }
  std::optional<WaitingNorm>& norm() { return norm_; }
  /// The map that waits, when it makes t.
  std::optional<WaitingLinear> take_linear(const Tensor& t) {
    if (!linear_ || linear_->head || linear_->map.units != nullptr || linear_->y.raw_data() != t.raw_data() || linear_->y.numel() != t.numel()) return {};
    return std::exchange(linear_, {});
  }
  /// The head that waits, when these are its logits, or the first columns of them.
  WaitingLinear* head_of(const Tensor& logits) {
    if (!linear_ || !linear_->head || linear_->draw) return nullptr;
    const RowsLinear& map = linear_->map;
    return are_logits_of(map.y, map.rows, map.n, map.y_row, logits) ? &*linear_ : nullptr;
  }
  void give_back(std::optional<WaitingLinear> linear) { linear_ = std::move(linear); }
  /// What serves layers of few rows first; null: nothing does. When something waits there, nothing else waits here.
  FewSteps* few() { return few_ ? &*few_ : nullptr; }
  bool makes(const void* data) const { return linear_ && linear_->y.raw_data() == data; }
  /// A map that waits there and that no layer of few rows follows waits here.
  void take_few_map() {
    FewSteps::Map map{};
    if (!few_ || !few_->take_map(map)) return;
    known_ = map.x;
    linear_ = WaitingLinear{map.alone, map.y, {map.x}, {}, {}};
  }
  Device device() const { return device_; }

 private:
  void launch_head(const WaitingLinear& linear) const {
    const Stream stream = current_stream(device_);
    RowsHead head = rows_head_of(linear.map);
    // What nobody holds nobody reads: the norm's result, and logits of which only the largest is asked for.
    if (head.scale.squares != nullptr && linear.normed.use_count() > 1) scale_rows(head.scale, head.x, head.rows, head.k, stream);
    if (!linear.draw) return rows_head(head, stream);
    const Tensor likeliest = empty({head.rows, kHeadBlocks}, DType::i64, device_);
    LikeliestDraw draw = *linear.draw;
    draw.likeliest = head.likeliest = reinterpret_cast<uint64_t*>(likeliest.data<int64_t>());
    head.choices = linear.choices;
    if (linear.y.use_count() == 1) head.y = nullptr;
    rows_head(head, stream);
    draw_likeliest(draw, stream);
  }
  void launch_mamba2(WaitingMamba2& layers) {
    RowsMamba2& run = layers.run;
    const auto held = [](const Tensor& t) { return t.use_count() > 1 ? t.data<bf16>() : nullptr; };  // what nobody holds nobody reads
    for (size_t i = 0; i < layers.normed.size(); ++i)
      if (layers.normed[i].defined()) run.layer[i].normed = held(layers.normed[i]);
    for (size_t i = 0; i < layers.gated.size(); ++i) run.layer[i].gated = held(layers.gated[i]);
    for (size_t i = 0; i < layers.zxbcdt.size(); ++i) run.layer[i].zxbcdt = held(layers.zxbcdt[i]);
    const Tensor counters = zeros({mamba2_counters(run.layers)}, DType::i32, device_);
    run.counters = reinterpret_cast<unsigned*>(counters.data<int32_t>());
    rows_mamba2(run, current_stream(device_));
  }

  Device device_;
  std::optional<FewSteps> few_;
  std::optional<WaitingEmbedding> embedding_;
  std::optional<WaitingNorm> norm_;
  std::optional<WaitingLinear> linear_;  // at most one of the two
  std::optional<WaitingLayers> layers_;
  std::optional<WaitingMamba2> mamba2_;
  Tensor known_;
};

// What in_proj of a run's first layer reads.
template <class Run>
void set_input(Run& run, const RowsLinear& in) {
  run.rows = in.rows;
  run.d = in.k;
  run.x = in.x;
  run.x_row = in.x_row;
  run.x_squares = in.scale.squares;
  run.x_parts = in.scale.parts;
}

WaitingLayers first_layer(const RowsLinear& in, int64_t e, int64_t r, Device device) {
  WaitingLayers layers{};
  RowsMamba& run = layers.run;
  set_input(run, in);
  run.e = static_cast<int>(e);
  run.r = static_cast<int>(r);
  layers.exchange = empty({mamba_exchange() / 4}, DType::f32, device);
  layers.weighted = empty({run.rows, run.d}, DType::bf16, device);
  layers.squares = empty({run.rows, mamba_squares(run.d)}, DType::f32, device);
  run.exchange = layers.exchange.data<float>();
  run.weighted = layers.weighted.data<bf16>();
  run.squares = layers.squares.data<float>();
  return layers;
}

// in_proj to scan of one more.
void add_layer(WaitingLayers& layers, const WaitingLinear& linear, const RowsLinear& in, const Tensor& y, const Tensor& h, const Tensor& conv,
               const Tensor& xz, const MambaStepWeights& w) {
  RowsMambaLayer& layer = layers.run.layer[layers.run.layers++];
  layer = {.in = in.w, .conv_weight = in.conv_weight, .conv_bias = in.conv_bias, .project = in.project, .conv = in.conv, .xz = in.y,
           .rstd = in.scale.rstd, .eps = in.scale.eps, .dt_proj = w.dt_proj.data<bf16>(), .dt_bias = w.dt_bias.data<float>(),
           .A_log = w.A_log.data<float>(), .D = w.D.data<float>(), .h = h.data<float>(), .y = y.data<bf16>()};
  layers.normed.push_back(linear.normed);
  layers.reads.insert(layers.reads.end(), linear.reads.begin(), linear.reads.end());
  layers.reads.insert(layers.reads.end(), {y, h, conv, xz});
}

template <class Layer>
void set_out(Layer& layer, const RowsLinear& map, const Tensor& sum, const Tensor& residual, const Tensor& w) {
  layer.out = map.w;
  layer.residual = residual.data<bf16>();
  layer.weight = w.data<float>();
  layer.made = map.y;
  layer.sum = sum.data<bf16>();
}

// Whether the layers that wait took the map behind their last scan, with the sum and the weight of the norm behind it.
bool take_out(WaitingLayers& layers, const WaitingLinear& linear, const Tensor& sum, const Tensor& residual, const Tensor& w) {
  RowsMamba& run = layers.run;
  RowsMambaLayer& layer = layers.last();
  const RowsLinear& map = linear.map;
  const bool fits = layer.out == nullptr && map.x == layer.y && map.k == run.e && map.n == run.d && map.rows == run.rows && map.x_row == run.e &&
                    map.y_row == run.d && map.bias == nullptr && map.epilogue == Epilogue::none && map.scale.squares == nullptr &&
                    (run.layers == 1 || residual.data<bf16>() == run.layer[run.layers - 2].sum);
  if (!fits) return false;
  set_out(layer, map, sum, residual, w);
  layers.reads.insert(layers.reads.end(), {linear.y, residual, w, sum});
  return true;
}

WaitingMamba2 first_mamba2(const RowsLinear& in, const RowsState& state, Device device) {
  WaitingMamba2 layers{};
  RowsMamba2& run = layers.run;
  set_input(run, in);
  run.n = in.n;
  run.heads = state.heads;
  run.D_columns = state.D_columns;
  run.narrow = state.narrow;
  layers.weighted = empty({run.rows, run.d}, DType::bf16, device);
  layers.squares = empty({run.rows, mamba2_squares(run.d)}, DType::f32, device);
  layers.between = empty({run.rows, state.heads * state.p}, DType::bf16, device);
  layers.between_squares = empty({run.rows, mamba2_state_squares(run.heads)}, DType::f32, device);
  layers.exchange = empty({mamba2_exchange() / 4}, DType::f32, device);
  run.exchange = layers.exchange.data<float>();
  run.weighted = layers.weighted.data<bf16>();
  run.squares = layers.squares.data<float>();
  run.between = layers.between.data<bf16>();
  run.between_squares = layers.between_squares.data<float>();
  return layers;
}

// in_proj and states of one more.
void add_layer(WaitingMamba2& layers, const WaitingLinear& linear, const RowsLinear& in, const RowsState& state, const Mamba2StepWeights& w) {
  RowsMamba2Layer& layer = layers.run.layer[layers.run.layers++];
  layer = {.in = in.w, .conv_weight = in.conv_weight, .conv_bias = in.conv_bias, .conv = in.conv, .rstd = in.scale.rstd,
           .eps = in.scale.eps, .h = state.h, .dt_bias = state.dt_bias, .A_log = state.A_log, .D = state.D, .norm = state.norm,
           .low = state.low, .high = state.high, .gated_eps = static_cast<float>(w.eps), .recent_x = state.recent_x, .recent_B = state.recent_B,
           .recent_steps = state.recent_steps, .count = state.count};
  layers.normed.push_back(linear.normed);
  layers.reads.insert(layers.reads.end(), linear.reads.begin(), linear.reads.end());
}

// As take_out() above, with the gated norm in front of the map.
bool take_out(WaitingMamba2& layers, const WaitingLinear& linear, const Tensor& sum, const Tensor& residual, const Tensor& w) {
  RowsMamba2& run = layers.run;
  RowsMamba2Layer& layer = layers.last();
  const RowsLinear& map = linear.map;
  const bool fits = layer.out == nullptr && map.x == run.between && map.scale.squares == run.between_squares && map.k == run.heads * kHeadChannels &&
                    map.n == run.d && map.rows == run.rows && map.x_row == map.k && map.y_row == run.d && map.bias == nullptr &&
                    map.epilogue == Epilogue::none && (run.layers == 1 || residual.data<bf16>() == run.layer[run.layers - 2].sum);
  if (!fits) return false;
  set_out(layer, map, sum, residual, w);
  layers.gated.push_back(linear.normed);
  layers.reads.insert(layers.reads.end(), {linear.y, residual, w, sum});
  return true;
}

}  // namespace

std::unique_ptr<Deferred> gather_rows(Device device, bool few) {
  return std::make_unique<RowsQueue>(device, few);
}

bool gather_rows_embedding(Tensor& y, const Tensor& table, const Tensor& tokens, const Tensor& places, const Tensor& positions) {
  RowsQueue* const queue = gathering<RowsQueue>(table.device());
  if (queue == nullptr || queue->few() != nullptr || table.dtype() != DType::bf16 || table.size(1) % 8 != 0 || !aligned(y, table, places)) return false;
  queue->wait(WaitingEmbedding{
      {y.data<bf16>(), table.data<bf16>(), tokens.data<int64_t>(), pointer_or_null<bf16>(places), pointer_or_null<int32_t>(positions), table.size(0),
       places.defined() ? places.size(0) : 0, static_cast<int>(tokens.numel()), static_cast<int>(table.size(1)), nullptr, nullptr, nullptr},
      y,
      {table, tokens, places, positions}});
  return true;
}

bool gather_rows_norm(Tensor& y, Tensor& sum, Tensor& rstd, const Tensor& x, const Tensor& residual, const Tensor& w, double eps) {
  RowsQueue* const queue = gathering<RowsQueue>(x.device());
  if (queue == nullptr || x.dtype() != DType::bf16) return false;
  queue->take_few_map();
  if (queue->few() != nullptr && !queue->makes(x.raw_data()) && queue->few()->norm(y, sum, rstd, x, residual, w, eps)) return true;
  if (!residual.defined() && aligned(w)) {
    if (std::optional<WaitingEmbedding> embedding = queue->take_embedding(x)) {
      const Tensor weighted = empty(y.shape(), DType::bf16, y.device()), squares = empty({y.numel() / y.size(-1), 1}, DType::f32, y.device());
      embedding->work.weight = w.data<float>();
      embedding->work.weighted = weighted.data<bf16>();
      embedding->work.squares = squares.data<float>();
      rows_embedding(embedding->work, current_stream(x.device()));
      queue->wait(WaitingNorm{y, rstd, weighted, squares, eps});
      return true;
    }
  }
  std::optional<WaitingLinear> linear;
  if (residual.defined() && residual.dtype() == DType::bf16 && aligned(residual, w)) linear = queue->take_linear(x);
  if (!linear) {
    queue->flush();
    queue->know(y);
    return false;
  }
  RowsLinear& map = linear->map;
  if (std::optional<WaitingLayers>& layers = queue->layers(); layers && take_out(*layers, *linear, sum, residual, w)) {
    queue->wait(WaitingNorm{y, rstd, layers->weighted, layers->squares, eps});
    return true;
  }
  if (std::optional<WaitingMamba2>& layers = queue->mamba2(); layers && take_out(*layers, *linear, sum, residual, w)) {
    queue->wait(WaitingNorm{y, rstd, layers->weighted, layers->squares, eps});
    return true;
  }
  const Tensor weighted = empty(y.shape(), DType::bf16, y.device());
  const Tensor squares = empty({map.rows, rows_linear_blocks(map)}, DType::f32, y.device());
  map.residual = residual.data<bf16>();
  map.weight = w.data<float>();
  map.sum = sum.data<bf16>();
  map.weighted = weighted.data<bf16>();
  map.squares = squares.data<float>();
  rows_linear(map, current_stream(x.device()));
  queue->wait(WaitingNorm{y, rstd, weighted, squares, eps});
  return true;
}

namespace {

// Whether the map may wait, with the norm in front of it where one waits for it.
bool wait_for_map(RowsQueue& queue, WaitingLinear linear, const Gemm& g) {
  constexpr int64_t kMaxRows = 128, kMaxColumns = 8192;  // beyond, products read their weights too often here
  if (g.ldb != g.k || g.ldc != g.n || g.m > kMaxRows) return false;
  linear.head = g.n > kMaxColumns && linear.map.units == nullptr;
  if (queue.makes(g.a)) queue.flush();
  RowsLinear& map = linear.map;
  std::optional<WaitingNorm>& norm = queue.norm();
  const bool scaled = norm && norm->y.raw_data() == g.a && norm->y.size(-1) == g.k && norm->squares.size(0) == g.m;
  if (scaled) {
    map.x = norm->x.data<bf16>();
    map.x_row = g.k;
    map.scale = norm->scale();
    linear.reads = {norm->x, norm->squares, norm->rstd};
    linear.normed = norm->y;
  } else if (queue.known().defined() && queue.known().raw_data() == g.a) {
    linear.reads = {queue.known()};
  } else {
    return false;
  }
  if (!(linear.head ? rows_head_fits(map, g.device) : g.n <= kMaxColumns && rows_linear_fits(map))) return false;
  if (scaled) {
    queue.know(norm->y);  // further maps may read it
    norm.reset();
  }
  queue.wait(std::move(linear));
  return true;
}

}  // namespace

bool gather_rows_linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  RowsQueue* const queue = gathering<RowsQueue>(g.device);
  if (queue == nullptr) return false;
  if (queue->few() != nullptr && queue->few()->linear(y, g, bias, epilogue)) return true;
  queue->take_few_map();
  if (g.dtype != DType::bf16) return false;
  return wait_for_map(*queue, {step_map_of<RowsLinear>(g, y, bias, epilogue), y, {}, {}, {}}, g);
}

bool gather_rows_gated_units(Tensor& h, Tensor& pre, const Gemm& g) {
  RowsQueue* const queue = gathering<RowsQueue>(g.device);
  if (queue == nullptr || g.dtype != DType::bf16) return false;
  queue->take_few_map();
  WaitingLinear linear{step_map_of<RowsLinear>(g, pre, {}, Epilogue::none), h, {}, {}, pre};
  linear.map.units = h.data<bf16>();
  return wait_for_map(*queue, std::move(linear), g);
}

bool gather_rows_attention(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a) {
  RowsQueue* const queue = gathering<RowsQueue>(qkv.device());
  if (queue == nullptr || qkv.dtype() != DType::bf16 || a.alibi_slopes.defined()) return false;
  StepAttention work = step_attention_of(o, qkv, k_cache, v_cache, position, a);
  if (!step_attention_fits(work)) return false;
  queue->take_few_map();
  // With the map right in front of it, all that older kernels wrote may be read ahead.
  work.ahead = queue->makes(qkv.raw_data());
  rows_attention(work, current_stream(qkv.device()));
  queue->know(o);
  return true;
}

bool gather_rows_mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w) {
  RowsQueue* const queue = gathering<RowsQueue>(xz.device());
  const int64_t rows = xz.size(0), e = w.A_log.size(0), n = w.A_log.size(1), r = w.dt_proj.size(1), outputs = r + 2 * n;
  if (queue == nullptr || xz.dtype() != DType::bf16) return false;
  if (queue->few() != nullptr && queue->few()->mamba_step(y, conv, h, xz, w)) return true;
  queue->take_few_map();
  if (n != kScanStates || r > kScanMaxRank || r % 4 != 0 || w.conv_weight.size(1) != 4 ||
      !aligned(h, w.A_log, w.dt_proj, w.conv_weight, conv))
    return false;
  std::optional<WaitingLinear> linear = queue->take_linear(xz);
  if (!linear) return false;
  RowsLinear map = linear->map;
  convolve(map, conv, w, 0, e);
  map.project = w.x_proj.data<bf16>();
  map.outputs = static_cast<int>(outputs);
  if (!rows_linear_fits(map)) {
    queue->give_back(std::move(linear));
    return false;
  }
  if (rows_mamba_fits(map, e, r, xz.device())) {
    std::optional<WaitingLayers>& layers = queue->layers();
    if (queue->mamba2()) queue->flush();
    if (layers && !(layers->last().out != nullptr && layers->run.layers < kMambaLayers && map.x == layers->run.weighted && map.rows == layers->run.rows &&
                    map.k == layers->run.d && e == layers->run.e && r == layers->run.r))
      queue->flush();
    if (!layers) layers = first_layer(map, e, r, xz.device());
    add_layer(*layers, *linear, map, y, h, conv, xz, w);
    queue->know(y);
    return true;
  }
  const int64_t parts = e / projected_columns(map);
  const Tensor mixed = empty({rows, e}, DType::bf16, xz.device()), part = empty({rows, parts, outputs}, DType::f32, xz.device());
  map.mixed = mixed.data<bf16>();
  map.part = part.data<float>();
  const Stream stream = current_stream(xz.device());
  rows_linear(map, stream);
  rows_scan(rows_scan_of(y, h, mixed, xz, part, w), stream);
  queue->know(y);
  return true;
}

bool gather_rows_mamba2_step(Tensor& y, Tensor& conv, Tensor& h, RecentPositions* recent, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  RowsQueue* const queue = gathering<RowsQueue>(zxbcdt.device());
  if (queue == nullptr) return false;
  if (queue->few() != nullptr && recent == nullptr && queue->few()->mamba2_step(y, conv, h, zxbcdt, w)) return true;
  queue->take_few_map();
  if (!rows_state_fits(h, zxbcdt, w) || !aligned(w.conv_weight, conv)) return false;
  std::optional<WaitingLinear> linear = queue->take_linear(zxbcdt);
  if (!linear) return false;
  const int64_t rows = h.size(0), heads = h.size(1), e = heads * h.size(2), channels = w.conv_weight.size(0);
  RowsLinear map = linear->map;
  convolve(map, conv, w, e, e + channels);
  if (!rows_linear_fits(map)) {
    queue->give_back(std::move(linear));
    return false;
  }
  if (recent != nullptr)
    if (const RowsState state = rows_state_of(y, {}, h, recent, zxbcdt, zxbcdt, w); rows_mamba2_fits(map, state, h.device())) {
      std::optional<WaitingMamba2>& layers = queue->mamba2();
      if (queue->layers() || (layers && !layers->continues(map, state))) queue->flush();
      if (!layers) layers = first_mamba2(map, state, h.device());
      add_layer(*layers, *linear, map, state, w);
      layers->reads.insert(layers->reads.end(), {conv, h, recent->x, recent->B, recent->steps, recent->count});
      layers->zxbcdt.push_back(zxbcdt);
      queue->wait(WaitingNorm{y, {}, layers->between, layers->between_squares, w.eps});
      return true;
    }
  const Tensor mixed = empty({rows, channels}, DType::bf16, h.device()), weighted = empty({rows, e}, DType::bf16, h.device());
  const Tensor squares = empty({rows, heads}, DType::f32, h.device());
  map.mixed = mixed.data<bf16>();
  const Stream stream = current_stream(h.device());
  rows_linear(map, stream);
  rows_state(rows_state_of(weighted, squares, h, recent, mixed, zxbcdt, w), stream);
  queue->wait(WaitingNorm{y, {}, weighted, squares, w.eps});
  return true;
}

bool gather_rows_draw(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits) {
  RowsQueue* const queue = gathering<RowsQueue>(logits.device());
  if (queue == nullptr) return false;
  if (queue->few() != nullptr && queue->few()->draw(made, last, position, step, logits)) return true;
  WaitingLinear* const head = queue->head_of(logits);
  if (head == nullptr) return false;
  head->draw = LikeliestDraw{nullptr, made.data<int64_t>(), last.data<int64_t>(), step.data<int64_t>(), position.data<int32_t>(), head->map.rows,
                             made.size(1), kHeadBlocks};
  head->choices = static_cast<int>(logits.size(1));
  head->reads.insert(head->reads.end(), {made, last, position, step});
  return true;
}

bool gather_rows_launch_beside(const Tensor& made) {
  RowsQueue* const queue = gathering<RowsQueue>(made.device());
  if (queue == nullptr) return false;
  const bool makes = queue->makes(made.raw_data());
  queue->launch(true);
  return makes;
}

void gather_rows_known(const Tensor& t) {
  if (RowsQueue* const queue = gathering<RowsQueue>(t.device())) queue->know(t);
}

}  // namespace krait::kernels::cuda
