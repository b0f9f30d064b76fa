#include "train/carried_state.h"

#include "kernels/elementwise.h"

namespace krait::train {

CarriedState::CarriedState(const layers::Decoder& decoder, int64_t batch, int64_t context, DType dtype, Device device)
    : state_(decoder.initial_state(batch, context, dtype, device)), added_(state_.layers.size()),
      going_on_(zeros({batch}, DType::boolean, device)), uploader_(device) {
  for (const Named& t : named())
    KRAIT_ASSERT(t.value.ndim() >= 1 && t.value.size(0) == batch, "state {} is {}, not one part for each of {} rows",
                 t.name, t.value.shape(), batch);
}

void CarriedState::set_resets(const Tensor& resets) {
  Tensor going_on = empty(resets.shape(), DType::boolean, kCpu);
  for (int64_t row = 0; row < resets.numel(); ++row)
    going_on.data<bool>()[row] = !resets.data<bool>()[row];
  uploader_.upload(going_on_, going_on);
}

layers::DecoderState CarriedState::begin() const {
  layers::DecoderState state = state_;
  for (size_t i = 0; i < state.layers.size(); ++i) {
    layers::LayerState& layer = state.layers[i];
    for (auto& [name, value] : layer.tensors) {
      Shape per_row = Shape{value.size(0)};
      while (per_row.ndim() < value.ndim()) per_row = per_row.append(1);
      value = kernels::where(going_on_.view(per_row), value, zeros({}, value.dtype(), value.device()));
    }
    layer.tensors.insert(added_[i].begin(), added_[i].end());
  }
  return state;
}

void CarriedState::keep(const layers::DecoderState& after) {
  for (size_t i = 0; i < state_.layers.size(); ++i) {
    auto& own = state_.layers[i].tensors;
    added_[i].clear();
    for (const auto& [name, value] : after.layers[i].tensors) {
      if (const auto at = own.find(name); at != own.end())
        copy_(at->second, value);
      else
        added_[i][name] = value;
    }
  }
}

std::vector<CarriedState::Named> CarriedState::named() const {
  std::vector<Named> all;
  for (size_t i = 0; i < state_.layers.size(); ++i)
    for (const auto& [name, value] : state_.layers[i].tensors)
      all.push_back({fmt::format("layers.{}.{}", i, name), value});
  return all;
}

}  // namespace krait::train
