#include "tests/testing/golden.h"

#include <hdf5.h>

#include <cmath>
#include <cstdlib>

#include "tests/testing/tensors.h"

namespace krait::testing {

namespace {

// Closes an HDF5 handle of any kind.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t), const std::string& what) : id_(id), close_(close) {
    KRAIT_CHECK(id >= 0, "golden: cannot open {}", what);
  }
  ~Handle() { close_(id_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }  // NOLINT

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

void check_h5(herr_t status, const std::string& what) { KRAIT_CHECK(status >= 0, "golden: cannot read {}", what); }

std::vector<std::string> names_in(hid_t group) {
  std::vector<std::string> names;
  check_h5(H5Literate_by_name(
               group, ".", H5_INDEX_NAME, H5_ITER_INC, nullptr,
               [](hid_t, const char* name, const H5L_info_t*, void* out) -> herr_t {
                 static_cast<std::vector<std::string>*>(out)->emplace_back(name);
                 return 0;
               },
               &names, H5P_DEFAULT),
           "group");
  return names;
}

std::optional<double> read_number(hid_t object, const std::string& attribute) {
  if (H5Aexists(object, attribute.c_str()) <= 0) return std::nullopt;
  const Handle a(H5Aopen(object, attribute.c_str(), H5P_DEFAULT), H5Aclose, attribute);
  const Handle type(H5Aget_type(a), H5Tclose, attribute);
  if (H5Tget_class(type) == H5T_STRING) return std::nullopt;
  double value = 0;
  check_h5(H5Aread(a, H5T_NATIVE_DOUBLE, &value), attribute);
  return value;
}

}  // namespace

bool GoldenCase::has(const std::string& path) const {
  const Handle file(H5Fopen(file_.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, file_);
  std::string at = "/" + name_;
  size_t from = 0;
  while (from <= path.size()) {
    const size_t slash = std::min(path.find('/', from), path.size());
    at += "/" + path.substr(from, slash - from);
    if (H5Lexists(file, at.c_str(), H5P_DEFAULT) <= 0) return false;
    from = slash + 1;
  }
  return true;
}

Tensor GoldenCase::tensor(const std::string& path) const {
  const std::string full = "/" + name_ + "/" + path;
  const Handle file(H5Fopen(file_.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, file_);
  const Handle set(H5Dopen2(file, full.c_str(), H5P_DEFAULT), H5Dclose, file_ + full);
  const Handle space(H5Dget_space(set), H5Sclose, full);
  const Handle type(H5Dget_type(set), H5Tclose, full);
  std::vector<hsize_t> dims(static_cast<size_t>(H5Sget_simple_extent_ndims(space)));
  H5Sget_simple_extent_dims(space, dims.data(), nullptr);
  const Shape shape(std::vector<int64_t>(dims.begin(), dims.end()));
  const bool integer = H5Tget_class(type) == H5T_INTEGER;
  Tensor out = empty(shape, integer ? DType::i64 : DType::f64, kCpu);
  if (out.numel() > 0)
    check_h5(H5Dread(set, integer ? H5T_NATIVE_INT64 : H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT,
                     out.raw_data()),
             full);
  return out;
}

std::vector<std::string> GoldenCase::list(const std::string& group) const {
  if (!has(group)) return {};
  const Handle file(H5Fopen(file_.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, file_);
  const Handle g(H5Gopen2(file, ("/" + name_ + "/" + group).c_str(), H5P_DEFAULT), H5Gclose, group);
  return names_in(g);
}

std::optional<double> GoldenCase::find_number(const std::string& attribute) const {
  const Handle file(H5Fopen(file_.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, file_);
  const Handle g(H5Gopen2(file, ("/" + name_).c_str(), H5P_DEFAULT), H5Gclose, name_);
  return read_number(g, attribute);
}

double GoldenCase::number(const std::string& attribute) const {
  const auto value = find_number(attribute);
  KRAIT_CHECK(value.has_value(), "golden case {} has no setting '{}'", name_, attribute);
  return *value;
}

std::string GoldenCase::text(const std::string& attribute) const {
  const Handle file(H5Fopen(file_.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, file_);
  const Handle g(H5Gopen2(file, ("/" + name_).c_str(), H5P_DEFAULT), H5Gclose, name_);
  const Handle a(H5Aopen(g, attribute.c_str(), H5P_DEFAULT), H5Aclose, attribute);
  const Handle type(H5Aget_type(a), H5Tclose, attribute);
  std::string value(H5Tget_size(type), '\0');
  check_h5(H5Aread(a, type, value.data()), attribute);
  return value.substr(0, value.find('\0'));
}

double GoldenCase::tolerance(const std::string& path, DType dtype) const {
  if (dtype == DType::f64) return 1e-10;
  const std::string full = "/" + name_ + "/" + path;
  const Handle file(H5Fopen(file_.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, file_);
  const Handle set(H5Dopen2(file, full.c_str(), H5P_DEFAULT), H5Dclose, file_ + full);
  const auto value = read_number(set, dtype == DType::bf16 ? "tol_bf16" : "tol_f32");
  KRAIT_CHECK(value.has_value(), "golden {} has no tolerance", full);
  return *value;
}

void GoldenCase::check(const std::string& path, const Tensor& value) const {
  check_within(path, value, tolerance(path, value.dtype()));
}

void GoldenCase::check_within(const std::string& path, const Tensor& value, double allowed) const {
  const Tensor reference = tensor(path);
  INFO(name_ << "/" << path << " " << describe(value));
  CHECK(relative_error(value, reference) <= allowed);
}

std::string golden_dir() {
  const char* dir = std::getenv("KRAIT_GOLDEN_DIR");
  return dir && *dir ? dir : KRAIT_TEST_SOURCE_DIR "/tests/golden";
}

void for_each_golden(const std::string& file, const std::string& prefix,
                     const std::function<void(const GoldenCase&)>& body) {
  const std::string path = golden_dir() + "/" + file;
  const Handle h(H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, path);
  int64_t count = 0;
  for (const std::string& name : names_in(h)) {
    if (!name.starts_with(prefix)) continue;
    ++count;
    body(GoldenCase(path, name));
  }
  INFO("golden cases in " << path << " that start with '" << prefix << "'");
  REQUIRE(count > 0);
}

}  // namespace krait::testing
