#pragma once
#include <string>

#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kind `attention`. What is 0 in the YAML is filled in by the reader.
struct AttentionConfig {
  int64_t n_heads = 0;     // default: heads of 64 channels
  int64_t n_kv_heads = 0;  // default: n_heads; fewer share keys and values (GQA), 1 is MQA
  bool rope = true;        // default: false with alibi
  double rope_base = 10000;
  std::string rope_style = "half";  // half: pairs (i, i + d/2) | interleaved: pairs (2i, 2i + 1)
  int64_t rotary_dim = 0;           // channels of a head that rotate; default: all
  int64_t window = 0;               // keys seen, the own one included; 0: all
  bool alibi = false;
  bool bias = false;     // of the projections
  bool qk_norm = false;  // RMSNorm over each head of q and k
  double dropout = 0;    // of the attention probabilities, in training; default: model.dropout
  // With parallelism.sequence above 1: auto | ring | all_to_all, see autograd/sequence_attention.h
  std::string sequence_parallel = "auto";
  int64_t head_dim = 0;  // derived: d_model / n_heads
};

/// Throws ConfigError with the place of the option at fault; completes the section. `dropout`: that of the model.
AttentionConfig read_attention_config(ConfigNode& section, int64_t d_model, double dropout = 0);

}  // namespace krait::layers
