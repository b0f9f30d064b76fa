#include <algorithm>
#include <charconv>
#include <cstring>
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

struct NewerFormat : Error {
  using Error::Error;
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
    const auto& version = json.at("format_version");
    if (!version.is_number_integer() || version < 1 || version > checkpoint::kVersion) {
      const std::string message =
          fmt::format("{}: format version {}, this build reads 1 to {}", manifest_path, version.dump(), checkpoint::kVersion);
      if (version.is_number_integer() && version > checkpoint::kVersion) throw NewerFormat(message);
      throw Error(message);
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
  if (manifest.files.empty()) damaged(manifest_path, "it names no files");
  return manifest;
}

}  // namespace

std::string checkpoint_name(int64_t step) { return fmt::format("step-{:08d}", step); }

struct CheckpointReader::Shard {
  hdf5::File file;
  hdf5::Group tensors;
};

struct CheckpointReader::Stored {
  size_t shard = 0;
  std::optional<TensorPiece> piece;
  DType dtype{};
  Shape whole;
};

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

int64_t length_of(const Ranges& ranges) {
  int64_t n = 0;
  for (const auto& [begin, end] : ranges) n += end - begin;
  return n;
}

/// Ranges that ascend within [0, limit).
bool are_inside(const Ranges& ranges, int64_t limit) {
  int64_t last = 0;
  for (const auto& [begin, end] : ranges) {
    if (begin < last || end < begin || end > limit) return false;
    last = end;
  }
  return true;
}

std::optional<TensorPiece> read_piece(const hdf5::Dataset& dataset) {
  if (!dataset.has_attribute("piece")) return {};
  TensorPiece p;
  try {
    const auto json = nlohmann::json::parse(dataset.string_attribute("piece"));
    p.whole = Shape(json.at("shape").get<std::vector<int64_t>>());
    p.dim = json.at("dim");
    p.ranges = json.at("ranges").get<Ranges>();
    p.flat = json.at("flat").get<Ranges>();
  } catch (const nlohmann::json::exception& e) {
    throw Error(fmt::format("{}: damaged piece of a tensor: {}", dataset.where(), e.what()));
  }
  const bool scalar = p.whole.ndim() == 0;
  const int64_t width = length_of(p.ranges);
  const bool fits = p.dim >= 0 && (scalar ? width == 1 : p.dim < p.whole.ndim() && are_inside(p.ranges, p.whole[p.dim]));
  const int64_t local = scalar ? 1 : fits ? p.whole.with(p.dim, width).numel() : 0;
  if (!fits || !are_inside(p.flat, local) || length_of(p.flat) != dataset.numel())
    throw Error(fmt::format("{}: damaged piece of a tensor: it does not fit {}", dataset.where(), p.whole));
  return p;
}

/// f(first element in the whole, first element in the piece's values, how many): the runs in which both go on together.
template <class F>
void for_each_run(const TensorPiece& p, F f) {
  const bool scalar = p.whole.ndim() == 0;
  int64_t inner = 1;  // elements of one index of dimension dim
  for (int64_t d = p.dim + 1; d < p.whole.ndim(); ++d) inner *= p.whole[d];
  const int64_t outer_whole = (scalar ? 1 : p.whole[p.dim]) * inner, outer_local = length_of(p.ranges) * inner;
  if (outer_local == 0) return;
  int64_t at = 0;
  for (const auto& [begin, end] : p.flat) {
    for (int64_t e = begin; e < end;) {
      const int64_t outer = e / outer_local;
      int64_t within = e % outer_local, length = 0, place = 0, before = 0;
      for (const auto& [first, last] : p.ranges) {
        const int64_t run = (last - first) * inner;
        if (within < before + run) {
          place = outer * outer_whole + first * inner + within - before;
          length = std::min(before + run - within, end - e);
          break;
        }
        before += run;
      }
      f(place, at, length);
      at += length;
      e += length;
    }
  }
}

}  // namespace

CheckpointReader::CheckpointReader(const std::string& path, bool verify) : path_(path) {
  const Manifest manifest = check_files(path, verify);
  step_ = manifest.step;
  for (const std::string& name : manifest.files) {
    const std::string shard = path + "/" + name;
    hdf5::File file = hdf5::File::open(shard, "a checkpoint's shard (made by `krait train`)");
    if (file.string_attribute("format") != checkpoint::kFormat) throw Error(shard + ": not a checkpoint's shard");
    if (shards_.empty()) meta_ = file.read_bytes("meta");
    hdf5::Group tensors = file.group("tensors");
    for (const std::string& tensor : tensors.names()) {
      Stored stored{shards_.size(), {}, {}, {}};
      const hdf5::Dataset dataset = open_tensor(tensors, tensor, &stored.dtype);
      stored.piece = read_piece(dataset);
      stored.whole = stored.piece ? stored.piece->whole : Shape(dataset.shape());
      std::vector<Stored>& all = stored_[tensor];
      if (!all.empty() && (all.front().whole != stored.whole || all.front().dtype != stored.dtype))
        throw Error(fmt::format("{}: {} is {} {}, in another file {} {}", shard, tensor, stored.dtype, stored.whole,
                                all.front().dtype, all.front().whole));
      all.push_back(std::move(stored));
    }
    shards_.push_back({std::move(file), std::move(tensors)});
  }
  for (const auto& [name, all] : stored_) {
    int64_t n = 0;
    for (const Stored& s : all) n += s.piece ? length_of(s.piece->flat) : s.whole.numel();
    if (n != all.front().whole.numel())
      throw Error(fmt::format("{}: damaged checkpoint: {} of the {} elements of {} are there", path, n, all.front().whole.numel(), name));
  }
}

CheckpointReader::~CheckpointReader() = default;
CheckpointReader::CheckpointReader(CheckpointReader&&) noexcept = default;

std::vector<std::string> CheckpointReader::names() const {
  std::vector<std::string> all;
  for (const auto& [name, pieces] : stored_) all.push_back(name);
  return all;
}
bool CheckpointReader::has(const std::string& name) const { return stored_.count(name) > 0; }

Tensor CheckpointReader::read(const std::string& name) const {
  const auto it = stored_.find(name);
  if (it == stored_.end()) throw Error(fmt::format("{}: holds no tensor {}", path_, name));
  const Stored& first = it->second.front();
  const Tensor whole = empty(first.whole, first.dtype, kCpu);
  const int64_t size = size_of(first.dtype);
  for (const Stored& s : it->second) {
    const hdf5::Dataset dataset = shards_[s.shard].tensors.dataset(name);
    if (dataset.numel() == 0) continue;
    if (!s.piece) {
      dataset.read_rows(0, dataset.rows(), dataset.type(), whole.raw_data());
      continue;
    }
    const Tensor values = empty({dataset.numel()}, s.dtype, kCpu);
    dataset.read_rows(0, dataset.rows(), dataset.type(), values.raw_data());
    for_each_run(*s.piece, [&](int64_t place, int64_t at, int64_t length) {
      std::memcpy(static_cast<char*>(whole.raw_data()) + place * size, static_cast<const char*>(values.raw_data()) + at * size,
                  static_cast<size_t>(length * size));
    });
  }
  return whole;
}

void CheckpointReader::read_into(const std::vector<NamedTensor>& targets, const std::string& prefix) const {
  std::set<std::string> left_over;
  for (const auto& [name, pieces] : stored_) {
    if (name.starts_with(prefix)) left_over.insert(name);
  }
  for (const NamedTensor& target : targets) {
    const std::string name = prefix + target.name;
    if (left_over.erase(name) == 0) {
      throw Error(fmt::format("{}: holds no tensor {}, which the model has; was it made with another config?", path_, name));
    }
    const Stored& found = stored_.at(name).front();
    const Shape wanted = target.piece ? target.piece->whole : target.value.shape();
    if (found.whole != wanted || found.dtype != target.value.dtype()) {
      throw Error(fmt::format("{}: {} is {} {}, the model expects {} {}; was it made with another config?", path_, name,
                              found.dtype, found.whole, target.value.dtype(), wanted));
    }
  }
  if (!left_over.empty()) {
    throw Error(fmt::format("{}: holds tensor {}, which the model does not have; was it made with another config?", path_,
                            *left_over.begin()));
  }
  for (const NamedTensor& target : targets) {
    Tensor value = target.value;
    const Tensor whole = read(prefix + target.name);
    if (!target.piece) {
      copy_(value, whole);
      continue;
    }
    const Tensor own = empty({value.numel()}, whole.dtype(), kCpu);
    const int64_t size = size_of(whole.dtype());
    for_each_run(*target.piece, [&](int64_t place, int64_t at, int64_t length) {
      std::memcpy(static_cast<char*>(own.raw_data()) + at * size, static_cast<const char*>(whole.raw_data()) + place * size,
                  static_cast<size_t>(length * size));
    });
    copy_(value, own.view(value.shape()));
  }
}

std::vector<CheckpointInfo> list_checkpoints(const std::string& directory, bool verify) {
  std::vector<CheckpointInfo> all;
  std::error_code none;
  const std::string best = fs::read_symlink(directory + "/best", none).filename().string();
  std::error_code error;
  const fs::directory_iterator entries(directory, error);
  // A run that cannot see its checkpoints must not take itself for one that has none yet.
  const fs::file_type type = fs::symlink_status(directory, none).type();
  if (error && type != fs::file_type::not_found)
    throw Error(fmt::format("{}: cannot be read: {}{}", directory, error.message(), type == fs::file_type::symlink ? " (it is a link)" : ""));
  for (const fs::directory_entry& entry : entries) {
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
      info.newer = dynamic_cast<const NewerFormat*>(&e) != nullptr;
    }
    all.push_back(std::move(info));
  }
  std::sort(all.begin(), all.end(), [](const CheckpointInfo& a, const CheckpointInfo& b) { return a.step < b.step; });
  return all;
}

namespace {

std::optional<CheckpointInfo> verified(CheckpointInfo info, std::vector<std::string>* skipped) {
  if (info.newer)
    throw Error(info.problem + "\n       try the Krait that wrote it; to use an earlier checkpoint, move this one out of the run");
  try {
    if (!info.problem.empty()) throw Error(info.problem);
    check_files(info.path, true);
    return info;
  } catch (const std::exception& e) {
    if (skipped && std::find(skipped->begin(), skipped->end(), e.what()) == skipped->end()) skipped->push_back(e.what());
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
