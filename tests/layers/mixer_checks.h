#pragma once
#include "autograd/elementwise.h"
#include "layers/mixer.h"
#include "layers/parameter_store.h"
#include "tests/testing/tensors.h"

// What every recurrent mixer is held to, whatever its family. Layer: a struct with a mixer and its store.
namespace krait::layers {

inline Tensor mixer_input(int64_t b, int64_t l, int64_t width, DType dtype = DType::f64, uint64_t seed = 5) {
  return random_tensor({b, l, width}, Normal{}, seed, dtype);
}

/// Documents packed into a row are the documents apart, outputs and gradients; a state passed in belongs to the first.
/// Two layers with the same initial values, in fp64.
template <class Layer>
void check_documents(Layer& packed, Layer& apart, int64_t width) {
  const std::vector<int64_t> lengths{6, 1, 10};
  const Tensor x = mixer_input(1, 17, width), dy = mixer_input(1, 17, width, DType::f64, 8);
  SequenceInfo info;
  std::vector<int32_t> ids;
  for (size_t d = 0; d < lengths.size(); ++d) ids.insert(ids.end(), static_cast<size_t>(lengths[d]), static_cast<int32_t>(d));
  info.segments = from_vector(ids, {1, 17});
  const Variable in(x, true);
  const Variable y = packed.mixer->forward(in, info, nullptr);
  backward(y, dy);
  int64_t at = 0;
  for (const int64_t n : lengths) {
    const Variable piece(x.slice(1, at, at + n), true);
    const Variable part = apart.mixer->forward(piece, {}, nullptr);
    CHECK(relative_error(y.data().slice(1, at, at + n), part.data()) < 1e-12);
    backward(part, dy.slice(1, at, at + n));
    CHECK(relative_error(in.grad().slice(1, at, at + n), piece.grad()) < 1e-10);
    at += n;
  }
  CHECK(relative_error(packed.store.grad(), apart.store.grad()) < 1e-10);

  const NoGrad guard;
  LayerState one = packed.mixer->initial_state(1, 64, DType::f64, kCpu), two = packed.mixer->initial_state(1, 64, DType::f64, kCpu);
  const Tensor before = mixer_input(1, 4, width, DType::f64, 9);
  for (LayerState* s : {&one, &two}) packed.mixer->forward(Variable(before), {}, s);
  const Tensor all = packed.mixer->forward(Variable(x), info, &one).data();
  const Tensor first = packed.mixer->forward(Variable(x.slice(1, 0, 6)), {}, &two).data();
  CHECK(relative_error(all.slice(1, 0, 6), first) < 1e-12);
  CHECK(relative_error(all.slice(1, 6, 17), y.data().slice(1, 6, 17)) < 1e-12);
}

/// Four positions of x and then single steps are the whole sequence, outputs and states.
template <class Layer>
void check_steps(Layer& layer, const Tensor& x, double tolerance) {
  const NoGrad guard;
  const auto state_of = [&] { return layer.mixer->initial_state(x.size(0), 64, x.dtype(), x.device()); };
  LayerState state = state_of(), steps = state_of();
  const Tensor whole = layer.mixer->forward(Variable(x), {}, &state).data();
  layer.mixer->forward(Variable(x.slice(1, 0, 4)), {}, &steps);
  for (int64_t t = 4; t < x.size(1); ++t)
    CHECK(relative_error(layer.mixer->step(x.slice(1, t, t + 1), steps), whole.slice(1, t, t + 1)) < tolerance);
  CHECK(steps.length == x.size(1));
  for (const auto& [name, value] : state.tensors)
    if (value.numel() > 0) CHECK(relative_error(steps.tensors.at(name), value) < tolerance);
}

/// What comes later does not change what came before.
template <class Layer>
void check_causal(Layer& layer, int64_t width) {
  const NoGrad guard;
  Tensor x = mixer_input(2, 12, width);
  const Tensor before = layer.mixer->forward(Variable(x), {}, nullptr).data();
  Tensor rest = x.slice(1, 7, 12);
  fill_(rest, 9.0);
  CHECK(relative_error(layer.mixer->forward(Variable(x), {}, nullptr).data().slice(1, 0, 7), before.slice(1, 0, 7)) == 0.0);
}

}  // namespace krait::layers
