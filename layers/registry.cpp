#include "layers/registry.h"

#include "layers/attention.h"
#include "layers/gated_cnn.h"
#include "layers/linear_attention.h"
#include "layers/mamba.h"
#include "layers/mlstm.h"
#include "layers/recurrent.h"
#include "layers/slstm.h"
#include "layers/s4.h"
#include "layers/mamba2.h"
#include "layers/kan.h"

namespace krait::layers {

const std::vector<LayerKind>& layer_kinds() {
  static const std::vector<LayerKind> kinds{
      attention_kind(),
      mamba_kind(),
      mlstm_kind(),
      mlstm_large_kind(),
      slstm_kind(),
      rnn_kind(),
      lstm_kind(),
      gru_kind(),
      s4_kind(),
      s4d_kind(),
      mamba2_kind(),
      kan_kind(),
      gated_cnn_kind(),
      linear_attention_kind(),
  };
  return kinds;
}

std::shared_ptr<Mixer> make_mixer(const std::string& kind, const ConfigNode& options, const LayerContext& context) {
  for (const LayerKind& k : layer_kinds())
    if (k.name == kind) return k.make(options, context);
  throw_error(fmt::format("no layer is called '{}'", kind));
}

}  // namespace krait::layers
