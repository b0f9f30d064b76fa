#pragma once
#include "train/ablation.h"

namespace krait::train {

/// One line per run: name, the varied settings, status, metric and the numbers of summary.json.
std::string results_csv(const Ablation& ablation, const std::vector<VariantResult>& results);

/// A page that needs no other file: claim and verdict, table of mean and standard deviation over seeds, learning
/// curves, what each variant changes in the base config, failures. `command`: what reproduces it.
std::string report_html(const Ablation& ablation, const std::vector<VariantResult>& results, const std::string& command);

/// The table of the report as plain text, for the terminal.
std::string results_table(const Ablation& ablation, const std::vector<GroupResult>& groups);

}  // namespace krait::train
