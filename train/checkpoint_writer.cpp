#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "data/hdf5.h"
#include "train/build_info.h"
#include "train/checkpoint.h"
#include "train/checkpoint_format.h"
#include "train/crc32c.h"
#include "train/files.h"
#include "train/progress.h"

namespace krait::train {
namespace fs = std::filesystem;
namespace hdf5 = data::hdf5;
namespace {

// Hidden names of what is not yet, or no longer, a checkpoint.
constexpr const char* kUnfinished = ".writing-";
constexpr const char* kRemoved = ".removed-";
constexpr const char* kShard = "shard-0000-of-0001.h5";

void remove_quietly(const std::string& path) {
  std::error_code ignored;
  fs::remove_all(path, ignored);
}

/// A checkpoint disappears at once, however long deleting its files takes.
void remove_checkpoint(const std::string& directory, const std::string& name) {
  const std::string doomed = directory + "/" + kRemoved + name;
  remove_quietly(doomed);
  if (::rename((directory + "/" + name).c_str(), doomed.c_str()) == 0) remove_quietly(doomed);
}

void check_space(const std::string& directory, const std::vector<NamedTensor>& tensors) {
  int64_t bytes = 1 << 16;
  for (const NamedTensor& t : tensors) bytes += t.value.nbytes();
  const fs::space_info space = fs::space(directory);
  if (space.available < static_cast<uintmax_t>(bytes)) {
    throw Error(fmt::format("{}: disk full: needs {}, {} free", directory, human_bytes(bytes),
                            human_bytes(static_cast<int64_t>(space.available))));
  }
}

void write_shard(const std::string& path, const std::vector<NamedTensor>& tensors, const std::string& meta) {
  hdf5::File file = hdf5::File::create(path);
  file.set_attribute("format", checkpoint::kFormat);
  file.set_attribute("format_version", checkpoint::kVersion);
  file.write_bytes("meta", meta);
  {
    hdf5::Group group = file.create_group("tensors");
    for (const NamedTensor& t : tensors) {
      const hdf5::Type type = checkpoint::storage_type(t.value.dtype());
      const Tensor value = t.value.cpu().contiguous();
      hdf5::Dataset dataset = group.create_dataset(t.name, type, value.shape().dims());
      dataset.set_attribute("dtype", name_of(value.dtype()));
      if (value.numel() > 0) dataset.write_rows(0, dataset.rows(), type, value.raw_data());
    }
  }
  file.close();
  FileDescriptor::open(path, O_RDONLY).sync();
}

void write_manifest(const std::string& directory, int64_t step, size_t n_tensors) {
  int64_t bytes = 0;
  const uint32_t crc = crc32c_file(directory + "/" + kShard, &bytes);
  nlohmann::ordered_json manifest;
  manifest["format"] = checkpoint::kFormat;
  manifest["format_version"] = checkpoint::kVersion;
  manifest["step"] = step;
  manifest["tensors"] = n_tensors;
  manifest["krait_version"] = kVersion;
  manifest["files"] = {{{"name", kShard}, {"bytes", bytes}, {"crc32c", fmt::format("{:08x}", crc)}}};
  write_file_atomic(directory + "/" + checkpoint::kManifest, manifest.dump(2) + "\n");
}

/// Renames `from` to `to`; a checkpoint already there is exchanged in the same instant and then removed.
void publish(const std::string& directory, const std::string& from, const std::string& name) {
  const std::string to = directory + "/" + name;
  if (::rename(from.c_str(), to.c_str()) < 0) {
    if (errno != EEXIST && errno != ENOTEMPTY) check_posix(-1, to + ": cannot be published");
    if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) {
      remove_quietly(from);
    } else {  // a file system without exchange
      remove_checkpoint(directory, name);
      check_posix(::rename(from.c_str(), to.c_str()), to + ": cannot be published");
    }
  }
  sync_directory(directory);
}

void point_best_at(const std::string& directory, const std::string& name) {
  const std::string temporary = directory + "/" + kUnfinished + "best";
  ::unlink(temporary.c_str());
  check_posix(::symlink(name.c_str(), temporary.c_str()), temporary + ": cannot be made");
  check_posix(::rename(temporary.c_str(), (directory + "/best").c_str()), directory + "/best: cannot be replaced");
  sync_directory(directory);
}

}  // namespace

CheckpointWriter::CheckpointWriter(std::string directory, const CheckpointOptions& options)
    : directory_(std::move(directory)), options_(options) {
  fs::create_directories(directory_);
  std::vector<std::string> leftovers;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory_)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with(kUnfinished) || name.starts_with(kRemoved)) leftovers.push_back(entry.path().string());
  }
  for (const std::string& path : leftovers) remove_quietly(path);
}

CheckpointWriter::~CheckpointWriter() {
  if (thread_.joinable()) thread_.join();
}

void CheckpointWriter::finish() {
  if (thread_.joinable()) thread_.join();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void CheckpointWriter::save(int64_t step, const std::vector<NamedTensor>& tensors, const std::string& meta, bool is_best) {
  finish();
  if (!options_.async) return write(step, tensors, meta, is_best);
  std::vector<NamedTensor> copies;
  copies.reserve(tensors.size());
  for (const NamedTensor& t : tensors) {
    copies.push_back({t.name, t.value.device().is_cpu() ? t.value.clone() : t.value.cpu()});
  }
  thread_ = std::thread([this, step, copies = std::move(copies), meta, is_best] {
    try {
      write(step, copies, meta, is_best);
    } catch (...) {
      error_ = std::current_exception();
    }
  });
}

void CheckpointWriter::write(int64_t step, const std::vector<NamedTensor>& tensors, const std::string& meta, bool is_best) {
  const std::string name = checkpoint_name(step);
  const std::string unfinished = directory_ + "/" + kUnfinished + name;
  try {
    check_space(directory_, tensors);
    remove_quietly(unfinished);
    fs::create_directory(unfinished);
    write_shard(unfinished + "/" + kShard, tensors, meta);
    write_manifest(unfinished, step, tensors.size());
    publish(directory_, unfinished, name);
  } catch (const std::exception& e) {
    remove_quietly(unfinished);
    throw Error(fmt::format("the checkpoint of step {} could not be written: {}\n"
                            "       earlier checkpoints are untouched; free space and continue with --resume", step, e.what()));
  }
  if (is_best) point_best_at(directory_, name);
  prune(step);
}

void CheckpointWriter::prune(int64_t newest) {
  std::error_code none;
  const std::string best = fs::read_symlink(directory_ + "/best", none).filename().string();
  int64_t kept = 0;
  std::vector<CheckpointInfo> all = list_checkpoints(directory_, false);
  for (auto info = all.rbegin(); info != all.rend(); ++info) {
    // Later ones were damaged when this run resumed before them; they are replaced when it gets there.
    if (info->step > newest || ++kept <= options_.keep_latest) continue;
    const std::string name = checkpoint_name(info->step);
    if (options_.keep_best && name == best) continue;
    remove_checkpoint(directory_, name);
  }
}

}  // namespace krait::train
