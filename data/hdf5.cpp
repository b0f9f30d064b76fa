#include "data/hdf5.h"

#include <hdf5.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace krait::data::hdf5 {
namespace {

using Lock = std::lock_guard<std::recursive_mutex>;

// Reads and writes go in pieces of this size, so that a checkpoint does not keep the loader waiting.
constexpr int64_t kPieceBytes = int64_t{8} << 20;

hid_t native_type(Type type) {
  switch (type) {
    case Type::u8:
      return H5T_NATIVE_UINT8;
    case Type::u16:
      return H5T_NATIVE_UINT16;
    case Type::u32:
      return H5T_NATIVE_UINT32;
    case Type::u64:
      return H5T_NATIVE_UINT64;
    case Type::i32:
      return H5T_NATIVE_INT32;
    case Type::i64:
      return H5T_NATIVE_INT64;
    case Type::f32:
      return H5T_NATIVE_FLOAT;
    case Type::f64:
      return H5T_NATIVE_DOUBLE;
    case Type::other:
      break;
  }
  throw_error("hdf5: this element type is not supported");
}

Type type_from(hid_t type) {
  const size_t size = H5Tget_size(type);
  const H5T_class_t kind = H5Tget_class(type);
  if (kind == H5T_INTEGER) {
    const bool is_signed = H5Tget_sign(type) == H5T_SGN_2;
    if (size == 1 && !is_signed) return Type::u8;
    if (size == 2 && !is_signed) return Type::u16;
    if (size == 4) return is_signed ? Type::i32 : Type::u32;
    if (size == 8) return is_signed ? Type::i64 : Type::u64;
  }
  if (kind == H5T_FLOAT && size == 4) return Type::f32;
  if (kind == H5T_FLOAT && size == 8) return Type::f64;
  return Type::other;
}

// H5Ewalk2 downward visits the failed API call first and the cause last: keep the last description. That of a failed
// system call is several lines; its part "error message = 'No space left on device'" says it all.
herr_t keep_last(unsigned, const H5E_error2_t* error, void* out) {
  if (!error->desc || !*error->desc) return 0;
  std::string_view cause = error->desc;
  constexpr std::string_view kSystem = "error message = '";
  if (const size_t at = cause.find(kSystem); at != std::string_view::npos) {
    cause.remove_prefix(at + kSystem.size());
    cause = cause.substr(0, cause.find('\''));
  }
  *static_cast<std::string*>(out) = cause;
  return 0;
}

template <auto close>
Handle own(Id id) {
  return Handle(id, [](Id open) -> int { return close(static_cast<hid_t>(open)); });
}

std::string join(const std::string& path, const std::string& name) {
  return path == "/" ? "/" + name : path + "/" + name;
}

Handle scalar_space() { return own<H5Sclose>(check(H5Screate(H5S_SCALAR), "cannot create a scalar")); }

void write_attribute(Id object, const std::string& where, const std::string& name, hid_t type, const void* value) {
  const Handle space = scalar_space();
  if (check(H5Aexists(object, name.c_str()), where)) check(H5Adelete(object, name.c_str()), where);
  const Handle attribute =
      own<H5Aclose>(check(H5Acreate2(object, name.c_str(), type, space.id(), H5P_DEFAULT, H5P_DEFAULT),
                          fmt::format("{}: cannot create the attribute {}", where, name)));
  check(H5Awrite(attribute.id(), type, value), fmt::format("{}: cannot write the attribute {}", where, name));
}

struct OpenAttribute {
  Handle attribute, type;
  H5T_class_t kind = H5T_NO_CLASS;
};

OpenAttribute open_attribute(Id object, const std::string& where, const std::string& name) {
  KRAIT_CHECK(check(H5Aexists(object, name.c_str()), where) > 0,
              "{}: the attribute {} is missing: the file was not written by Krait, or is damaged", where, name);
  OpenAttribute out;
  const std::string what = fmt::format("{}: cannot read the attribute {}", where, name);
  out.attribute = own<H5Aclose>(check(H5Aopen(object, name.c_str(), H5P_DEFAULT), what));
  out.type = own<H5Tclose>(check(H5Aget_type(out.attribute.id()), what));
  out.kind = H5Tget_class(out.type.id());
  const Handle space = own<H5Sclose>(check(H5Aget_space(out.attribute.id()), what));
  KRAIT_CHECK(H5Sget_simple_extent_npoints(space.id()) == 1, "{}: the attribute {} is not a single value", where, name);
  return out;
}

// Without times, the same contents give the same bytes.
Handle creation_list(hid_t kind) {
  Handle list = own<H5Pclose>(check(H5Pcreate(kind), "hdf5"));
  check(H5Pset_obj_track_times(list.id(), false), "hdf5");
  return list;
}

Handle file_access() {
  Handle list = own<H5Pclose>(check(H5Pcreate(H5P_FILE_ACCESS), "hdf5"));
  // Format 1.10: metadata carries checksums, so damage is found instead of followed.
  check(H5Pset_libver_bounds(list.id(), H5F_LIBVER_V110, H5F_LIBVER_LATEST), "hdf5");
  // No flock: it fails on some network file systems, and files here are published by rename.
  check(H5Pset_file_locking(list.id(), false, true), "hdf5");
  // Closing the file closes what is still open in it, so that a failed write leaves no open descriptor.
  check(H5Pset_fclose_degree(list.id(), H5F_CLOSE_STRONG), "hdf5");
  return list;
}

}  // namespace

std::recursive_mutex& mutex() {
  static std::recursive_mutex& instance = *[] {
    // The library's own clean-up at exit follows stale pointers after a failed close (full disk) and crashes.
    // Files here are closed by their owners.
    H5dont_atexit();
    return new std::recursive_mutex;  // outlives every static object that holds a file
  }();
  // In a thread-safe build of the library each thread has its own setting.
  thread_local const bool quiet = [] {
    const std::lock_guard lock(instance);
    return H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0;
  }();
  (void)quiet;
  return instance;
}

std::string_view name_of(Type type) {
  static constexpr std::string_view kNames[] = {
      "uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32", "float64", "an unsupported type"};
  return kNames[static_cast<size_t>(type)];
}

int64_t size_of(Type type) {
  static constexpr int64_t kSizes[] = {1, 2, 4, 8, 4, 8, 4, 8, 0};
  return kSizes[static_cast<size_t>(type)];
}

Id check(Id status, std::string_view what, std::source_location where) {
  if (status >= 0) return status;
  std::string cause;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, keep_last, &cause);
  H5Eclear2(H5E_DEFAULT);
  throw_error(fmt::format("{}: {} (HDF5, {}:{})", what, cause.empty() ? "the library call failed" : cause,
                          std::filesystem::path(where.file_name()).filename().string(), where.line()));
}

Handle& Handle::operator=(Handle&& other) noexcept {
  if (this != &other) {
    reset();
    id_ = std::exchange(other.id_, -1);
    close_ = other.close_;
  }
  return *this;
}

int Handle::reset() noexcept {
  if (id_ < 0) return 0;
  const Lock lock(mutex());
  // Closing a file closes its objects: an identifier may be dead already.
  const Id id = std::exchange(id_, -1);
  return H5Iis_valid(id) > 0 ? close_(id) : 0;
}

bool Node::has_attribute(const std::string& name) const {
  const Lock lock(mutex());
  return check(H5Aexists(id(), name.c_str()), where()) > 0;
}

void Node::set_attribute(const std::string& name, int64_t value) {
  const Lock lock(mutex());
  write_attribute(id(), where(), name, H5T_NATIVE_INT64, &value);
}

void Node::set_attribute(const std::string& name, double value) {
  const Lock lock(mutex());
  write_attribute(id(), where(), name, H5T_NATIVE_DOUBLE, &value);
}

void Node::set_attribute(const std::string& name, std::string_view value) {
  const Lock lock(mutex());
  const std::string terminated(value);
  const Handle type = own<H5Tclose>(check(H5Tcopy(H5T_C_S1), "hdf5"));
  check(H5Tset_size(type.id(), terminated.size() + 1), "hdf5");
  check(H5Tset_cset(type.id(), H5T_CSET_UTF8), "hdf5");
  write_attribute(id(), where(), name, type.id(), terminated.c_str());
}

int64_t Node::int_attribute(const std::string& name) const {
  const Lock lock(mutex());
  const OpenAttribute open = open_attribute(id(), where(), name);
  KRAIT_CHECK(open.kind == H5T_INTEGER, "{}: the attribute {} is not an integer", where(), name);
  int64_t value = 0;
  check(H5Aread(open.attribute.id(), H5T_NATIVE_INT64, &value), where());
  return value;
}

double Node::double_attribute(const std::string& name) const {
  const Lock lock(mutex());
  const OpenAttribute open = open_attribute(id(), where(), name);
  KRAIT_CHECK(open.kind == H5T_FLOAT || open.kind == H5T_INTEGER, "{}: the attribute {} is not a number", where(),
              name);
  double value = 0;
  check(H5Aread(open.attribute.id(), H5T_NATIVE_DOUBLE, &value), where());
  return value;
}

std::string Node::string_attribute(const std::string& name) const {
  const Lock lock(mutex());
  const OpenAttribute open = open_attribute(id(), where(), name);
  KRAIT_CHECK(open.kind == H5T_STRING, "{}: the attribute {} is not a string", where(), name);
  if (check(H5Tis_variable_str(open.type.id()), where()) > 0) {  // as h5py writes them
    char* text = nullptr;
    check(H5Aread(open.attribute.id(), open.type.id(), &text), where());
    std::string out = text ? text : "";
    check(H5free_memory(text), where());
    return out;
  }
  std::string out(H5Tget_size(open.type.id()), '\0');
  check(H5Aread(open.attribute.id(), open.type.id(), out.data()), where());
  out.resize(std::strlen(out.c_str()));
  return out;
}

Dataset::Dataset(Handle handle, std::string file, std::string path)
    : Node(std::move(handle), std::move(file), std::move(path)) {
  const Handle type = own<H5Tclose>(check(H5Dget_type(id()), where()));
  type_ = type_from(type.id());
  const Handle space = own<H5Sclose>(check(H5Dget_space(id()), where()));
  const int ndim = static_cast<int>(check(H5Sget_simple_extent_ndims(space.id()), where()));
  std::vector<hsize_t> sizes(static_cast<size_t>(ndim));
  check(H5Sget_simple_extent_dims(space.id(), sizes.data(), nullptr), where());
  shape_.assign(sizes.begin(), sizes.end());
}

int64_t Dataset::row_size() const {
  int64_t n = 1;
  for (size_t i = 1; i < shape_.size(); ++i) n *= shape_[i];
  return n;
}

int64_t Dataset::numel() const { return rows() * row_size(); }

void Dataset::expect_size(int64_t rows, int64_t values) const {
  KRAIT_CHECK(values == rows * row_size(), "{}: {} values were passed for {} rows of {}", where(), values, rows,
              row_size());
}

namespace {

// Calls io(memory_space, file_space, byte offset) for rows [first, first + count) in pieces, under the lock.
template <class Io>
void for_pieces(const Dataset& set, int64_t first, int64_t count, int64_t row_bytes, Io&& io) {
  const auto& shape = set.shape();
  KRAIT_CHECK(first >= 0 && count >= 0 && first + count <= set.rows(), "{}: rows [{}, {}) of {} do not exist",
              set.where(), first, first + count, set.rows());
  if (count == 0 || row_bytes == 0) return;
  if (shape.empty()) {
    const Lock lock(mutex());
    io(H5S_ALL, H5S_ALL, 0);
    return;
  }
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / row_bytes);
  for (int64_t done = 0; done < count; done += piece) {
    const Lock lock(mutex());
    const int64_t n = std::min(piece, count - done);
    std::vector<hsize_t> start(shape.size(), 0), extent(shape.begin(), shape.end());
    start[0] = static_cast<hsize_t>(first + done);
    extent[0] = static_cast<hsize_t>(n);
    const Handle file_space = own<H5Sclose>(check(H5Dget_space(set.id()), set.where()));
    check(H5Sselect_hyperslab(file_space.id(), H5S_SELECT_SET, start.data(), nullptr, extent.data(), nullptr),
          set.where());
    const Handle memory_space =
        own<H5Sclose>(check(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr), set.where()));
    io(memory_space.id(), file_space.id(), done * row_bytes);
  }
}

}  // namespace

void Dataset::read_rows(int64_t first, int64_t count, Type memory_type, void* out) const {
  KRAIT_CHECK(type_ != Type::other, "{}: holds elements of an unsupported type", where());
  for_pieces(*this, first, count, row_size() * size_of(memory_type), [&](Id memory, Id file_space, int64_t at) {
    check(H5Dread(id(), native_type(memory_type), memory, file_space, H5P_DEFAULT, static_cast<char*>(out) + at),
          fmt::format("{}: cannot read; the file is damaged or cut short, make it again", where()));
  });
}

void Dataset::write_rows(int64_t first, int64_t count, Type memory_type, const void* in) {
  for_pieces(*this, first, count, row_size() * size_of(memory_type), [&](Id memory, Id file_space, int64_t at) {
    check(H5Dwrite(id(), native_type(memory_type), memory, file_space, H5P_DEFAULT, static_cast<const char*>(in) + at),
          fmt::format("{}: cannot write; is the disk full?", where()));
  });
}

void Dataset::append_rows(int64_t count, Type memory_type, const void* in) {
  if (count == 0) return;
  const int64_t first = rows();
  {
    const Lock lock(mutex());
    std::vector<hsize_t> sizes(shape_.begin(), shape_.end());
    sizes[0] += static_cast<hsize_t>(count);
    check(H5Dset_extent(id(), sizes.data()), fmt::format("{}: cannot grow", where()));
  }
  shape_[0] += count;
  write_rows(first, count, memory_type, in);
}

bool Group::has(const std::string& name) const {
  const Lock lock(mutex());
  return check(H5Lexists(id(), name.c_str(), H5P_DEFAULT), where()) > 0;
}

std::vector<std::string> Group::names() const {
  const Lock lock(mutex());
  H5G_info_t info;
  check(H5Gget_info(id(), &info), where());
  std::vector<std::string> out;
  for (hsize_t i = 0; i < info.nlinks; ++i) {
    const auto length =
        check(H5Lget_name_by_idx(id(), ".", H5_INDEX_NAME, H5_ITER_INC, i, nullptr, 0, H5P_DEFAULT), where());
    std::string name(static_cast<size_t>(length) + 1, '\0');
    check(H5Lget_name_by_idx(id(), ".", H5_INDEX_NAME, H5_ITER_INC, i, name.data(), name.size(), H5P_DEFAULT), where());
    name.pop_back();
    out.push_back(std::move(name));
  }
  std::sort(out.begin(), out.end());
  return out;
}

Group Group::create_group(const std::string& name) {
  const Lock lock(mutex());
  const Handle creation = creation_list(H5P_GROUP_CREATE);
  Handle handle = own<H5Gclose>(check(H5Gcreate2(id(), name.c_str(), H5P_DEFAULT, creation.id(), H5P_DEFAULT),
                                      fmt::format("{}: cannot create the group {}", where(), name)));
  return Group(std::move(handle), file_, join(path_, name));
}

Group Group::group(const std::string& name) const {
  const Lock lock(mutex());
  KRAIT_CHECK(has(name), "{}: the group {} is missing: the file was not written by Krait, or is damaged", where(),
              name);
  Handle handle =
      own<H5Gclose>(check(H5Gopen2(id(), name.c_str(), H5P_DEFAULT), fmt::format("{}: cannot open {}", where(), name)));
  return Group(std::move(handle), file_, join(path_, name));
}

Dataset Group::create_dataset(const std::string& name, Type type, const std::vector<int64_t>& shape,
                              const DatasetOptions& options) {
  const Lock lock(mutex());
  const std::string what = fmt::format("{}: cannot create the data set {}", where(), name);
  const bool chunked = !options.chunk.empty();
  KRAIT_CHECK(chunked || (!options.extendable && !options.checksum), "{}: growth and checksums need a chunk size",
              what);
  std::vector<hsize_t> sizes(shape.begin(), shape.end()), most = sizes;
  if (options.extendable) most.at(0) = H5S_UNLIMITED;
  const Handle space =
      shape.empty()
          ? scalar_space()
          : own<H5Sclose>(check(H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), most.data()), what));
  const Handle creation = creation_list(H5P_DATASET_CREATE);
  if (chunked) {
    const std::vector<hsize_t> chunk(options.chunk.begin(), options.chunk.end());
    check(H5Pset_chunk(creation.id(), static_cast<int>(chunk.size()), chunk.data()), what);
    if (options.checksum) check(H5Pset_fletcher32(creation.id()), what);
  }
  Handle handle = own<H5Dclose>(check(
      H5Dcreate2(id(), name.c_str(), native_type(type), space.id(), H5P_DEFAULT, creation.id(), H5P_DEFAULT), what));
  return Dataset(std::move(handle), file_, join(path_, name));
}

Dataset Group::dataset(const std::string& name) const {
  const Lock lock(mutex());
  KRAIT_CHECK(has(name), "{}: the data set {} is missing: the file was not written by Krait, or is damaged", where(),
              name);
  Handle handle =
      own<H5Dclose>(check(H5Dopen2(id(), name.c_str(), H5P_DEFAULT), fmt::format("{}: cannot open {}", where(), name)));
  return Dataset(std::move(handle), file_, join(path_, name));
}

void Group::write_bytes(const std::string& name, std::string_view bytes) {
  write(name, std::span(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()),
        {static_cast<int64_t>(bytes.size())});
}

std::string Group::read_bytes(const std::string& name) const {
  const Dataset set = dataset(name);
  KRAIT_CHECK(set.type() == Type::u8, "{}: holds {}, expected uint8", set.where(), name_of(set.type()));
  std::string out(static_cast<size_t>(set.numel()), '\0');
  set.read(std::span(reinterpret_cast<uint8_t*>(out.data()), out.size()));
  return out;
}

File File::create(const std::string& path) {
  const Lock lock(mutex());
  const Handle creation = creation_list(H5P_FILE_CREATE);
  const Handle access = file_access();
  Handle handle = own<H5Fclose>(check(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation.id(), access.id()),
                                      fmt::format("{}: cannot create the file", path)));
  return File(std::move(handle), path, "/");
}

File File::open(const std::string& path, std::string_view expected) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  KRAIT_CHECK(std::filesystem::exists(status), "{}: no such file; expected {}", path, expected);
  KRAIT_CHECK(!std::filesystem::is_directory(status), "{}: is a directory; expected {}", path, expected);
  KRAIT_CHECK(std::ifstream(path, std::ios::binary), "{}: cannot be opened: {}", path, std::strerror(errno));
  const Lock lock(mutex());
  const htri_t is_hdf5 = H5Fis_hdf5(path.c_str());
  KRAIT_CHECK(is_hdf5 > 0, "{}: is not an HDF5 file; expected {}", path, expected);
  const Handle access = file_access();
  Handle handle = own<H5Fclose>(check(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.id()),
                                      fmt::format("{}: is damaged or cut short; expected {}", path, expected)));
  return File(std::move(handle), path, "/");
}

void File::close() {
  if (!handle_.valid()) return;
  const Lock lock(mutex());
  check(H5Fflush(id(), H5F_SCOPE_GLOBAL), fmt::format("{}: cannot write; is the disk full?", file_));
  check(handle_.reset(), fmt::format("{}: cannot close; is the disk full?", file_));
}

}  // namespace krait::data::hdf5
