#pragma once
#include <string>
#include <utility>
#include <vector>

#include "train/files.h"

namespace krait::train {

/// An event file that TensorBoard reads: TFRecord frames around protobuf messages, both written here by hand
///   frame    u64 length, u32 masked crc32c(length), message, u32 masked crc32c(message); little endian
///   Event    1 wall_time (double), 2 step (int64), 3 file_version (string), 5 summary, 7 session_log
///   Summary  1 value: { 1 tag (string), 2 simple_value (float) }
class TensorBoardWriter {
 public:
  /// Makes a new file in the directory. `resumed_after` >= 0 makes TensorBoard forget what earlier files say of
  /// later steps.
  explicit TensorBoardWriter(const std::string& directory, int64_t resumed_after = -1);
  /// Values that are not finite are shown by TensorBoard as such.
  void write(int64_t step, const std::vector<std::pair<std::string, double>>& scalars);
  const std::string& path() const { return path_; }

 private:
  void event(int64_t step, const std::string& fields);
  std::string path_;
  AppendFile file_;
};

/// The frame around one message.
std::string tfrecord_frame(std::string_view message);

}  // namespace krait::train
