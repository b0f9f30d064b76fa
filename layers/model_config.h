#pragma once
#include <string>
#include <vector>

#include "core/option_reader.h"
#include "layers/mlp_config.h"

namespace krait::layers {

/// The section `model` of a config: what every model has. Options of a layer kind are a map under the kind's name
/// that the kind reads itself (layers/registry.h).
struct ModelConfig {
  std::string type = "language_model";  // language_model | classifier | regressor
  int64_t d_model = 0;                  // required
  int64_t n_layers = 0;                 // required
  int64_t vocab_size = 0;               // 0: from the data
  int64_t pad_vocab_multiple = 1;       // rows of embedding and head; columns past vocab_size are masked
  std::vector<std::string> layers{"attention"};  // a pattern, repeated over n_layers; xlstm[a:b] is expanded
  MlpConfig mlp;
  std::string norm = "rms";  // rms | layer | layer_1p
  double norm_eps = 1e-5;
  std::string norm_position = "pre";  // pre: x + f(norm(x)), and a norm before the head | post: norm(x + f(x))
  std::string position = "none";  // none | learned: an embedding of the position is added
  int64_t max_positions = 0;      // of learned positions; 0: the longest context of data and eval
  bool tie_embeddings = true;     // the head uses the embedding's matrix
  double dropout = 0;             // after attention and MLP projections; default of attention.dropout too
  double embedding_dropout = 0;   // after the embedding of tokens; default: dropout
  // gpt2 | llama: init_std, divided by sqrt(2 n_layers) into the residual stream (spec/transformer.md, section 6)
  // xlstm: the same names with "small" and "wang" (layers/xlstm_init.h)
  std::string init = "gpt2";
  double init_std = 0.02;         // of embedding, head and other matrices; default for xlstm: sqrt(2 / (5 d_model))
  double logit_cap = 0;           // of a language model: logits are cap tanh(x / cap); 0: none
  std::string head = "last";  // last | pooled: what classifiers and regressors look at
  int64_t n_classes = 0;      // outputs of classifiers and regressors; 0: from the data

  /// Standard deviation of what writes into the residual stream.
  double residual_std() const;
  /// The kind of layer i.
  const std::string& kind_of(int64_t i) const { return layers[static_cast<size_t>(i) % layers.size()]; }
  /// vocab_size rounded up to pad_vocab_multiple.
  int64_t padded_vocab(int64_t vocab) const { return (vocab + pad_vocab_multiple - 1) / pad_vocab_multiple * pad_vocab_multiple; }
  /// The options of a kind, complete; a kind without options of its own has an empty map.
  const ConfigNode& options_of(const std::string& kind) const;

  ConfigNode section;  // as read, complete
};

/// Reads and completes the section. Checks everything that the section alone can tell.
ModelConfig read_model_config(ConfigNode& section);

}  // namespace krait::layers
