#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace krait::data {

/// An array of bytes from an IDX file: magic 00 00 08 <dimensions>, big-endian sizes, then the values, row-major.
struct IdxArray {
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};
/// Reads `path`, or `path`.gz where only that exists. Checks magic, sizes and that not a byte is missing or left over.
IdxArray read_idx(const std::string& path);

/// Labelled pictures; the channels of a pixel lie side by side.
struct Images {
  int64_t pixels = 0, channels = 0;
  std::vector<uint8_t> values;  // (images, pixels, channels)
  std::vector<uint8_t> labels;  // (images), below 10
  int64_t size() const { return static_cast<int64_t>(labels.size()); }
};

/// The four files of MNIST, plain or .gz.
Images read_mnist(const std::string& directory, bool train);
/// The binary version of CIFAR-10 (data_batch_1..5.bin, test_batch.bin) in `directory` or its cifar-10-batches-bin.
/// Grey: the IDX files of `directory` or its cifar10-gray if they are there, else made from the colours
/// (0.299 R + 0.587 G + 0.114 B, rounded as Pillow does).
Images read_cifar10(const std::string& directory, bool train, bool gray);

}  // namespace krait::data
