#pragma once
#include "core/upload.h"
#include "layers/decoder.h"

namespace krait::train {

/// The recurrent state that each row of a batch carries from one window to the next, at fixed addresses, so that a
/// captured step can be replayed. Gradients stop at the window's edge (truncated backpropagation through time).
class CarriedState {
 public:
  CarriedState(const layers::Decoder& decoder, int64_t batch, int64_t context, DType dtype, Device device);

  /// Which rows begin anew: resets (b) bool on the CPU. Outside of capture.
  void set_resets(const Tensor& resets);
  /// The state a window starts from, to give to the model; rows that begin anew are zero.
  layers::DecoderState begin() const;
  /// Keeps what the model left in it. Tensors that a layer added (constants it made from its parameters) are handed
  /// back as they are by begin().
  void keep(const layers::DecoderState& after);

  struct Named {
    std::string name;  // "layers.<i>.<tensor>"
    Tensor value;
  };
  /// All tensors, for checkpoints.
  std::vector<Named> named() const;

 private:
  layers::DecoderState state_;
  std::vector<std::map<std::string, Tensor>> added_;  // by layer
  Tensor going_on_;  // (b) bool: false where a row begins anew
  Uploader uploader_;
};

}  // namespace krait::train
