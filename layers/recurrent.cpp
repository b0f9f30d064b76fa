#include "layers/recurrent.h"

#include <cmath>

#include "autograd/recurrent.h"
#include "core/comm/collectives.h"
#include "kernels/recurrent_step.h"
#include "layers/whole_sequences.h"

namespace krait::layers {

using kernels::RecurrentCell;

Recurrent::Recurrent(RecurrentCell cell, const RecurrentConfig& config, const LayerContext& context)
    : cell_(cell), hidden_(config.hidden), sequence_(context.parallel.sequence), copies_(context.parallel.tensor->size()) {
  const int64_t rows = kernels::gates_of(cell) * hidden_;
  const double bound = 1.0 / std::sqrt(static_cast<double>(hidden_));
  const Initializer init = uniform(-bound, bound);
  w_ih_ = parameter("w_ih", {rows, context.d_model}, init);
  w_hh_ = parameter("w_hh", {rows, hidden_}, init);
  const Initializer input_bias = [init, h = hidden_, add = config.forget_bias](Tensor& value, uint64_t key) {
    init(value, key);
    if (add == 0.0) return;  // rows i, f, g, o
    for (int64_t j = h; j < 2 * h; ++j) value.data<double>()[j] += add;
  };
  b_ih_ = parameter("b_ih", {rows}, input_bias, {.decay = false});
  b_hh_ = parameter("b_hh", {rows}, init, {.decay = false});
  if (hidden_ != context.d_model)
    out_ = child<Linear>("out_proj", hidden_, context.d_model, false, context.residual_std);
}

Variable Recurrent::forward(const Variable& x, const SequenceInfo& info, LayerState* state) {
  Tensor carried = state ? state->tensors.at("cell").transpose(0, 1).contiguous() : Tensor();
  Variable y;
  if (sequence_->size() > 1) {
    y = over_ranks(x, info, carried);
  } else {
    const auto [out, last] = recurrent(cell_, x, w_ih_, w_hh_, b_ih_, b_hh_, Variable(carried), info.segments);
    y = out;
    carried = last.data();
  }
  if (state) {
    state->tensors["cell"] = carried.transpose(0, 1).contiguous();
    state->length += x.size(1) * sequence_->size();
  }
  return out_ ? out_->forward(y) : y;
}

// The hidden state cannot be cut: whole sequences where the batch allows, else one rank after the other.
Variable Recurrent::over_ranks(const Variable& x, const SequenceInfo& info, Tensor& carried) const {
  const Recurrence cell = [this](const Variable& rows, const Tensor& segments, const Variable& from) {
    return recurrent(cell_, rows, w_ih_, w_hh_, b_ih_, b_hh_, from, segments);
  };
  if (x.size(0) % sequence_->size() != 0)
    return along_chain(x, info, sequence_, {kernels::states_of(cell_), 1, 1, hidden_}, cell, carried);
  return over_rows(x, info, sequence_, [&](const Variable& rows, const SequenceInfo& whole) {
    const auto [y, last] = cell(rows, whole.segments, Variable(own_part_of(carried, 1, *sequence_)));
    if (carried.defined()) carried = comm::all_gather(last.data(), 1, *sequence_);
    return y;
  });
}

Tensor Recurrent::step(const Tensor& x, LayerState& state) {
  const NoGrad guard;
  require_no_state(kernels::name_of(cell_).data(), &state, *sequence_);
  const auto data = [](const Parameter& p) { return p.variable().data(); };
  const Tensor y = kernels::recurrent_step(cell_, state.tensors.at("cell"), x.select(1, 0), {data(w_ih_), data(w_hh_), data(b_ih_), data(b_hh_)});
  ++state.length;
  const Variable out(y.unsqueeze(1));
  return (out_ ? out_->forward(out) : out).data();
}

LayerState Recurrent::initial_state(int64_t batch, int64_t, DType dtype, Device device) const {
  LayerState s;
  s.tensors["cell"] = zeros({batch, kernels::states_of(cell_), 1, hidden_}, accum_dtype(dtype), device);
  return s;
}

std::string Recurrent::kernel_name(int64_t batch, int64_t, DType, Device device, bool) const {
  if (copies_ > 1) return fmt::format("whole on each of {} ranks (parallelism.tensor): the hidden width is not split", copies_);
  if (const int ranks = sequence_->size(); ranks > 1)
    return batch % ranks == 0 ? fmt::format("whole sequences, all-to-all by rows over {} ranks", ranks)
                              : fmt::format("slow: one of {} ranks after the other, {} rows in a pipeline", ranks, batch);
  return device.is_cuda() ? "one persistent kernel over the sequence, weights spread over the multiprocessors"
                          : "recurrent loop over packed weights, batch in parallel";
}

namespace {

template <RecurrentCell kCell>
LayerKind kind_of() {
  return {std::string(kernels::name_of(kCell)),
          [](ConfigNode& section, const ModelConfig& model) {
            read_recurrent_config(section, model.d_model, kCell == RecurrentCell::lstm);
          },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<Recurrent>(
                kCell, read_recurrent_config(options, context.d_model, kCell == RecurrentCell::lstm), context);
          }};
}

}  // namespace

LayerKind rnn_kind() { return kind_of<RecurrentCell::rnn>(); }
LayerKind lstm_kind() { return kind_of<RecurrentCell::lstm>(); }
LayerKind gru_kind() { return kind_of<RecurrentCell::gru>(); }

}  // namespace krait::layers
