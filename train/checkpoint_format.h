#pragma once
#include "core/dtype.h"
#include "data/hdf5.h"

/// What writer and reader of checkpoints agree on.
namespace krait::train::checkpoint {

inline constexpr const char* kFormat = "krait.checkpoint";
inline constexpr int64_t kVersion = 2;  // 1: a single file, of whole tensors
inline constexpr const char* kManifest = "manifest.json";

/// HDF5 has no bfloat16: the bits are stored as integers of the same size.
inline data::hdf5::Type storage_type(DType dtype) {
  using data::hdf5::Type;
  switch (dtype) {
    case DType::f32: return Type::f32;
    case DType::f64: return Type::f64;
    case DType::bf16:
    case DType::f16: return Type::u16;
    case DType::i32: return Type::i32;
    case DType::i64: return Type::i64;
    case DType::u8:
    case DType::boolean: return Type::u8;
  }
  throw_error("invalid dtype");
}

}  // namespace krait::train::checkpoint
