#pragma once
#include <string>
#include <vector>

#include "data/documents.h"
#include "data/prepare.h"
#include "data/split_plan.h"
#include "data/tokenizer.h"

namespace krait::data {

/// The files of one option of `prepare`.
struct IdSource {
  std::vector<TextInput> files;
  Split whole = Split::train;  // else all of it belongs to valid or test
};

/// Bytes of an id in files of this format; 0 where it is a format of text.
int64_t bytes_of_id(const std::string& format);

/// `prepare` for ids that another program made: checks them all, then writes the store to `path`, and fills in all of
/// `summary` but its output, file_bytes and seconds. `given`: the tokenizer they are of, or null. Constant memory.
void store_ids(PrepareSummary& summary, const PrepareOptions& options, const std::vector<IdSource>& sources, double valid,
               const TokenizerPtr& given, int64_t total_bytes, const std::string& path, const std::string& source_names);

}  // namespace krait::data
