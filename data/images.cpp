#include "data/images.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "core/error.h"
#include "data/child_process.h"

namespace krait::data {
namespace {

namespace fs = std::filesystem;

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored);
}

std::vector<uint8_t> read_bytes(const std::string& path) {
  std::vector<uint8_t> bytes;
  if (path.ends_with(".gz")) {
    const ProcessResult result = run_process(
        {"gzip", "-dc", "--", path}, [&](std::string_view piece) { bytes.insert(bytes.end(), piece.begin(), piece.end()); });
    KRAIT_CHECK(result.status == 0, "{}: gzip cannot unpack it: {}", path, result.errors);
    return bytes;
  }
  std::ifstream in(path, std::ios::binary | std::ios::ate);
  KRAIT_CHECK(in, "{}: {}", path, std::strerror(errno));
  bytes.resize(static_cast<size_t>(in.tellg()));
  in.seekg(0);
  in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  KRAIT_CHECK(in, "{}: cannot be read", path);
  return bytes;
}

// Where a file of a data set is: under one of the names, plain or packed.
std::string find_file(const std::vector<std::string>& places, const char* dataset) {
  for (const std::string& place : places) {
    if (exists(place)) return place;
    if (exists(place + ".gz")) return place + ".gz";
  }
  throw_error(fmt::format("{}: no such file{}; get it with `krait data fetch {}`, and let data.path name its directory",
                          places.front(), places.size() > 1 ? ", nor " + places[1] : std::string(), dataset));
}

void check_labels(const Images& images, const std::string& path) {
  const auto wrong = std::find_if(images.labels.begin(), images.labels.end(), [](uint8_t label) { return label > 9; });
  KRAIT_CHECK(wrong == images.labels.end(), "{}: label {} of image {} is not below 10", path, *wrong,
              wrong - images.labels.begin());
}

Images read_idx_images(const std::string& image_path, const std::string& label_path, int64_t side) {
  IdxArray values = read_idx(image_path), labels = read_idx(label_path);
  KRAIT_CHECK(values.shape.size() == 3 && values.shape[1] == side && values.shape[2] == side,
              "{}: holds ({}) values, expected images of {} x {}", image_path, fmt::join(values.shape, ", "), side, side);
  KRAIT_CHECK(labels.shape.size() == 1 && labels.shape[0] == values.shape[0], "{}: holds ({}) labels for the {} images of {}",
              label_path, fmt::join(labels.shape, ", "), values.shape[0], image_path);
  Images images{side * side, 1, std::move(values.bytes), std::move(labels.bytes)};
  check_labels(images, label_path);
  return images;
}

void append_batch(Images& images, const std::string& path) {
  constexpr int64_t kPixels = 1024, kRecord = 1 + 3 * kPixels;
  const std::vector<uint8_t> bytes = read_bytes(path);
  const auto size = static_cast<int64_t>(bytes.size());
  KRAIT_CHECK(size > 0 && size % kRecord == 0,
              "{}: {} bytes are not whole records of {} (a label and 3 x 1024 pixels); it is cut short or another format",
              path, size, kRecord);
  for (int64_t i = 0; i < size / kRecord; ++i) {
    const uint8_t* record = bytes.data() + i * kRecord;
    images.labels.push_back(record[0]);
    for (int64_t p = 0; p < kPixels; ++p)
      for (int64_t c = 0; c < 3; ++c) images.values.push_back(record[1 + c * kPixels + p]);
  }
}

void to_gray(Images& images) {
  const size_t n = images.values.size() / 3;
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* v = images.values.data() + 3 * i;
    images.values[i] = static_cast<uint8_t>((19595u * v[0] + 38470u * v[1] + 7471u * v[2] + 0x8000u) >> 16);
  }
  images.values.resize(n);
  images.channels = 1;
}

}  // namespace

IdxArray read_idx(const std::string& path) {
  const std::string file = !exists(path) && exists(path + ".gz") ? path + ".gz" : path;
  std::vector<uint8_t> bytes = read_bytes(file);
  KRAIT_CHECK(bytes.size() >= 4 && bytes[0] == 0 && bytes[1] == 0 && bytes[2] == 8 && bytes[3] >= 1 && bytes[3] <= 8,
              "{}: not an IDX file of bytes (it begins with {:02x}, expected 00 00 08 and the number of dimensions)", file,
              fmt::join(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(std::min<size_t>(bytes.size(), 4)), " "));
  IdxArray array;
  const size_t dims = bytes[3], header = 4 + 4 * dims;
  KRAIT_CHECK(bytes.size() >= header, "{}: cut short inside its header", file);
  uint64_t values = 1;
  for (size_t d = 0; d < dims; ++d) {
    const uint8_t* b = bytes.data() + 4 + 4 * d;
    const uint64_t size = uint64_t{b[0]} << 24 | uint64_t{b[1]} << 16 | uint64_t{b[2]} << 8 | b[3];
    KRAIT_CHECK(size == 0 || values <= (uint64_t{1} << 40) / size, "{}: its header asks for more than 2^40 values", file);
    values *= size;
    array.shape.push_back(static_cast<int64_t>(size));
  }
  KRAIT_CHECK(bytes.size() - header == values, "{}: holds {} values where its header ({}) promises {}{}", file,
              bytes.size() - header, fmt::join(array.shape, " x "), values,
              bytes.size() - header < values ? "; it is cut short" : "");
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(header));
  array.bytes = std::move(bytes);
  return array;
}

Images read_mnist(const std::string& directory, bool train) {
  const std::string stem = directory + (train ? "/train-" : "/t10k-");
  return read_idx_images(find_file({stem + "images-idx3-ubyte"}, "mnist"), find_file({stem + "labels-idx1-ubyte"}, "mnist"), 28);
}

Images read_cifar10(const std::string& directory, bool train, bool gray) {
  for (const std::string& place : {directory + "/cifar10-gray", directory}) {
    const std::string stem = place + (train ? "/train-" : "/test-");
    if (gray && exists(stem + "images-idx3-ubyte"))
      return read_idx_images(stem + "images-idx3-ubyte", stem + "labels-idx1-ubyte", 32);
  }
  Images images{.pixels = 1024, .channels = 3, .values = {}, .labels = {}};
  for (int i = 1; i <= (train ? 5 : 1); ++i) {
    const std::string name = train ? fmt::format("data_batch_{}.bin", i) : "test_batch.bin";
    const std::string path = find_file({directory + "/" + name, directory + "/cifar-10-batches-bin/" + name}, "cifar10");
    append_batch(images, path);
    check_labels(images, path);
  }
  if (gray) to_gray(images);
  return images;
}

}  // namespace krait::data
