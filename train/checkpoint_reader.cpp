#include <algorithm>
#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "data/hdf5.h"
#include "train/checkpoint.h"
#include "train/checkpoint_format.h"
#include "train/crc32c.h"
#include "train/files.h"
#include "train/progress.h"

namespace krait::train {
namespace fs = std::filesystem;
namespace hdf5 = data::hdf5;
namespace {

struct Manifest {
  int64_t step = 0, bytes = 0;
  std::vector<std::string> files;
};

std::optional<int64_t> step_of_name(const std::string& name) {
  constexpr std::string_view kPrefix = "step-";
  if (!name.starts_with(kPrefix)) return {};
  int64_t step = 0;
  const char* end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  if (error != std::errc{} || stop != end || step < 0) return {};
  return step;
}

/// Reads the manifest and compares the files' sizes with it, and their checksums if asked.
Manifest check_files(const std::string& path, bool checksums) {
  if (!fs::is_directory(path)) throw Error(path + ": no such checkpoint");
  const std::string manifest_path = path + "/" + checkpoint::kManifest;
  const auto damaged = [&](const std::string& file, const std::string& what) {
    throw Error(fmt::format("{}: damaged checkpoint: {}", file, what));
  };
  if (!fs::exists(manifest_path)) damaged(manifest_path, "the file is missing");
  Manifest manifest;
  try {
    const auto json = nlohmann::json::parse(read_file(manifest_path));
    if (json.at("format") != checkpoint::kFormat) damaged(manifest_path, "not a manifest of a checkpoint");
    if (json.at("format_version") != checkpoint::kVersion) {
      throw Error(fmt::format("{}: format version {}, this build reads {}", manifest_path, json.at("format_version").dump(),
                              checkpoint::kVersion));
    }
    manifest.step = json.at("step").get<int64_t>();
    for (const auto& entry : json.at("files")) {
      const auto name = entry.at("name").get<std::string>();
      const auto bytes = entry.at("bytes").get<int64_t>();
      const std::string file = path + "/" + name;
      if (name.find('/') != std::string::npos) damaged(manifest_path, "a file name with a slash");
      if (!fs::is_regular_file(file)) damaged(file, "the file is missing");
      const auto found = static_cast<int64_t>(fs::file_size(file));
      if (found != bytes) damaged(file, fmt::format("{} bytes, expected {}", found, bytes));
      if (checksums) {
        const std::string crc = fmt::format("{:08x}", crc32c_file(file));
        if (entry.at("crc32c") != crc) damaged(file, fmt::format("checksum {}, expected {}", crc, entry.at("crc32c").get<std::string>()));
      }
      manifest.files.push_back(name);
      manifest.bytes += bytes;
    }
  } catch (const nlohmann::json::exception& e) {
    damaged(manifest_path, e.what());
  }
  if (manifest.files.size() != 1) damaged(manifest_path, fmt::format("{} shards, this build reads 1", manifest.files.size()));
  return manifest;
}

}  // namespace

std::string checkpoint_name(int64_t step) { return fmt::format("step-{:08d}", step); }

struct CheckpointReader::Shard {
  hdf5::File file;
  hdf5::Group tensors;
};

CheckpointReader::CheckpointReader(const std::string& path) : path_(path) {
  const Manifest manifest = check_files(path, true);
  step_ = manifest.step;
  const std::string shard = path + "/" + manifest.files.front();
  hdf5::File file = hdf5::File::open(shard, "a checkpoint's shard (made by `krait train`)");
  if (file.string_attribute("format") != checkpoint::kFormat) throw Error(shard + ": not a checkpoint's shard");
  meta_ = file.read_bytes("meta");
  hdf5::Group tensors = file.group("tensors");
  shard_ = std::make_unique<Shard>(Shard{std::move(file), std::move(tensors)});
}

CheckpointReader::~CheckpointReader() = default;
CheckpointReader::CheckpointReader(CheckpointReader&&) noexcept = default;

std::vector<std::string> CheckpointReader::names() const { return shard_->tensors.names(); }
bool CheckpointReader::has(const std::string& name) const { return shard_->tensors.has(name); }

namespace {

/// Opens the data set and makes sure that its bits are of the dtype it claims.
hdf5::Dataset open_tensor(const hdf5::Group& tensors, const std::string& name, DType* dtype) {
  hdf5::Dataset dataset = tensors.dataset(name);
  *dtype = dtype_from_name(dataset.string_attribute("dtype"));
  if (dataset.type() != checkpoint::storage_type(*dtype)) {
    throw Error(fmt::format("{}: {} holds {}, expected {}", dataset.where(), name, hdf5::name_of(dataset.type()),
                            hdf5::name_of(checkpoint::storage_type(*dtype))));
  }
  return dataset;
}

}  // namespace

Tensor CheckpointReader::read(const std::string& name) const {
  DType dtype{};
  const hdf5::Dataset dataset = open_tensor(shard_->tensors, name, &dtype);
  const Tensor value = empty(Shape(dataset.shape()), dtype, kCpu);
  if (value.numel() > 0) dataset.read_rows(0, dataset.rows(), dataset.type(), value.raw_data());
  return value;
}

void CheckpointReader::read_into(const std::vector<NamedTensor>& targets, const std::string& prefix) const {
  std::set<std::string> left_over;
  for (const std::string& name : names()) {
    if (name.starts_with(prefix)) left_over.insert(name);
  }
  for (const NamedTensor& target : targets) {
    const std::string name = prefix + target.name;
    if (left_over.erase(name) == 0) {
      throw Error(fmt::format("{}: holds no tensor {}, which the model has; was it made with another config?", path_, name));
    }
    DType dtype{};
    const Shape shape(open_tensor(shard_->tensors, name, &dtype).shape());
    if (shape != target.value.shape() || dtype != target.value.dtype()) {
      throw Error(fmt::format("{}: {} is {} {}, the model expects {} {}; was it made with another config?", path_, name,
                              dtype, shape, target.value.dtype(), target.value.shape()));
    }
  }
  if (!left_over.empty()) {
    throw Error(fmt::format("{}: holds tensor {}, which the model does not have; was it made with another config?", path_,
                            *left_over.begin()));
  }
  for (const NamedTensor& target : targets) {
    Tensor value = target.value;
    copy_(value, read(prefix + target.name));
  }
}

std::vector<CheckpointInfo> list_checkpoints(const std::string& directory, bool verify) {
  std::vector<CheckpointInfo> all;
  std::error_code none;
  const std::string best = fs::read_symlink(directory + "/best", none).filename().string();
  for (const fs::directory_entry& entry : fs::directory_iterator(directory, none)) {
    const std::string name = entry.path().filename().string();
    const std::optional<int64_t> step = step_of_name(name);
    if (!step) continue;
    CheckpointInfo info{*step, entry.path().string(), 0, name == best, {}};
    try {
      const Manifest manifest = check_files(info.path, verify);
      info.bytes = manifest.bytes;
      if (manifest.step != *step) info.problem = fmt::format("{}: damaged checkpoint: its manifest is of step {}", info.path, manifest.step);
    } catch (const std::exception& e) {
      info.problem = e.what();
    }
    all.push_back(std::move(info));
  }
  std::sort(all.begin(), all.end(), [](const CheckpointInfo& a, const CheckpointInfo& b) { return a.step < b.step; });
  return all;
}

namespace {

std::optional<CheckpointInfo> verified(CheckpointInfo info, std::vector<std::string>* skipped) {
  try {
    if (!info.problem.empty()) throw Error(info.problem);
    check_files(info.path, true);
    return info;
  } catch (const std::exception& e) {
    if (skipped) skipped->push_back(e.what());
    return {};
  }
}

}  // namespace

std::optional<CheckpointInfo> latest_checkpoint(const std::string& directory, std::vector<std::string>* skipped) {
  std::vector<CheckpointInfo> all = list_checkpoints(directory, false);
  for (auto info = all.rbegin(); info != all.rend(); ++info) {
    if (auto found = verified(*info, skipped)) return found;
  }
  return {};
}

std::optional<CheckpointInfo> best_checkpoint(const std::string& directory, std::vector<std::string>* skipped) {
  for (const CheckpointInfo& info : list_checkpoints(directory, false)) {
    if (!info.best) continue;
    if (auto found = verified(info, skipped)) return found;
  }
  return latest_checkpoint(directory, skipped);
}

}  // namespace krait::train
