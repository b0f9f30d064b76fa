#include "train/decode.h"

#include "kernels/step_scope.h"
#include "layers/decoder.h"

namespace krait::train {

DecodeLoop::DecodeLoop(layers::LanguageModel& model, const layers::StoreOptions& store, int64_t batch, int64_t max_length,
                       int64_t max_new, const kernels::SampleOptions& sampling, bool graphs, DType states,
                       int64_t ids)
    : model_(model), device_(store.device), sampling_(sampling), states_(states), graphs_(graphs && store.device.is_cuda()),
      ids_(ids > 0 ? ids : model.vocab_size()),
      state_(model.initial_state(batch, max_length, store)), tokens_(zeros({batch, 1}, DType::i64, device_)),
      position_(zeros({batch}, DType::i32, device_)), step_(zeros({1}, DType::i64, device_)),
      made_(zeros({batch, max_new}, DType::i64, device_)), pool_(device_) {
  for (layers::LayerState& layer : state_.layers) {
    scans_ = scans_ && layer.tensors.contains("ssm");
    if (!layer.tensors.contains("k")) continue;
    // One position for all layers. Attention without it reads its position on the host: no graph serves two steps.
    if (layer.tensors.contains("position"))
      layer.tensors["position"] = position_;
    else
      graphs_ = false;
  }
}

DecodeLoop::~DecodeLoop() {
  try {  // the graph's memory may go only when the device has finished with it
    synchronize(device_);
  } catch (const Error&) {  // the failure has been reported where it happened
  }
}

void DecodeLoop::prefill(const Tensor& prompts) {
  KRAIT_CHECK(count_ == 0 && prompts.ndim() == 2 && prompts.size(0) == tokens_.size(0) && prompts.size(1) > 0,
              "prompts are {}, expected ({}, length), once", prompts.shape(), tokens_.size(0));
  const NoGrad guard;
  const Tensor logits = model_.next_logits(prompts.to(device_), state_);
  for (layers::LayerState& layer : state_.layers)
    for (auto& [name, value] : layer.tensors)
      // From here on tensors are written in place: none may be shared with anybody else.
      if (name != "k" && name != "v" && name != "position") value = value.clone();
  bool kept = states_ == DType::f32;
  if (!kept || tokens_.size(0) > kernels::kFewScanRows)
    kept |= model_.decoder().keep_recent_positions(state_, states_);
  KRAIT_CHECK(kept, "states in {}: kept so on a GPU, in bf16, for mamba2 with d_state 128, head_dim 8 to 64 and a multiple of 8 heads, and for mlstm with more than 8 sequences; keep them in fp32", states_);
  fill_(position_, static_cast<double>(prompts.size(1) - 1));
  draw(logits);
  count_ = 1;
}

void DecodeLoop::draw(const Tensor& logits) {
  kernels::sample_next(made_, tokens_, position_, step_, logits.slice(-1, 0, ids_), sampling_);
}

// What a layer replaced is written back to where the graph reads it; what it made new stays as it is.
void DecodeLoop::keep(const layers::DecoderState& after) {
  for (size_t i = 0; i < state_.layers.size(); ++i) {
    layers::LayerState& own = state_.layers[i];
    for (const auto& [name, value] : after.layers[i].tensors) {
      const auto at = own.tensors.find(name);
      if (at == own.tensors.end())
        own.tensors[name] = value;
      else if (at->second.raw_data() != value.raw_data())
        copy_(at->second, value);
    }
    own.length = after.layers[i].length;
  }
  state_.length = after.length;
}

void DecodeLoop::run_step() {
  const NoGrad guard;
  kernels::StepScope together(device_, tokens_.size(0), scans_);
  layers::DecoderState now = state_;
  now.positions = position_.view({position_.size(0), 1});
  {
    const Tensor logits = model_.next_logits(tokens_, now);
    keep(now);
    draw(logits);
  }  // what nobody holds need not be written
  together.finish();
}

void DecodeLoop::step() {
  KRAIT_CHECK(count_ > 0, "a step needs a prompt before it");
  KRAIT_CHECK(count_ < made_.size(1), "{} tokens were asked for, and all are there", made_.size(1));
  if (graphs_ && !graph_ && plain_steps_ >= 2) {  // all tables, plans and constants have been made
    const layers::DecoderState before = state_;   // capturing runs nothing, but counts
    auto graph = std::make_unique<CapturedGraph>(device_);
    const MemoryPool::Scope scope(pool_);
    graph->begin();
    run_step();
    graph->end();
    state_ = before;
    graph_ = std::move(graph);
  }
  if (graph_) {
    graph_->replay();
    ++state_.length;
  } else {
    run_step();
    ++plain_steps_;
  }
  ++count_;
}

Tensor DecodeLoop::drawn() const { return made_.slice(1, 0, count_).contiguous().cpu(); }

}  // namespace krait::train
