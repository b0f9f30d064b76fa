#include "core/comm/mpi/mpi_types.h"

#include "core/comm/job.h"

namespace krait::comm {
namespace {

// MPI knows no bfloat16: its values travel as 16-bit integers and meet here. Sums are rounded once per addition.
template <class F>
void combine(void* in, void* inout, int* count, F f) {
  const auto* a = static_cast<const bf16*>(in);
  auto* b = static_cast<bf16*>(inout);
  for (int i = 0; i < *count; ++i) b[i] = bf16(f(float(a[i]), float(b[i])));
}
void sum_bf16(void* in, void* inout, int* count, MPI_Datatype*) {
  combine(in, inout, count, [](float a, float b) { return a + b; });
}
void max_bf16(void* in, void* inout, int* count, MPI_Datatype*) {
  combine(in, inout, count, [](float a, float b) { return a > b ? a : b; });
}

MPI_Op make_op(MPI_User_function* function) {
  MPI_Op op;
  check_mpi(MPI_Op_create(function, 1, &op), "MPI_Op_create");
  return op;
}

}  // namespace

void check_mpi(int status, const char* call) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(status, text, &length);
  abort_job(fmt::format("{}: {}", call, text));
}

MPI_Datatype mpi_type(DType dtype) {
  switch (dtype) {
    case DType::f32: return MPI_FLOAT;
    case DType::f64: return MPI_DOUBLE;
    case DType::bf16:
    case DType::f16: return MPI_UINT16_T;
    case DType::i32: return MPI_INT32_T;
    case DType::i64: return MPI_INT64_T;
    case DType::u8:
    case DType::boolean: return MPI_UINT8_T;
  }
  throw_error("invalid dtype");
}

MPI_Op mpi_op(DType dtype, Reduce op) {
  static const MPI_Op sum = make_op(sum_bf16), max = make_op(max_bf16);
  KRAIT_CHECK(dtype != DType::f16 && dtype != DType::boolean, "{} values cannot be reduced; cast them first", dtype);
  if (dtype == DType::bf16) return op == Reduce::sum ? sum : max;
  return op == Reduce::sum ? MPI_SUM : MPI_MAX;
}

BlockType::BlockType(MPI_Datatype element, int64_t element_bytes, int64_t count) {
  constexpr int64_t kChunk = int64_t{1} << 30;
  MPI_Datatype chunk, chunks, rest;
  check_mpi(MPI_Type_contiguous(static_cast<int>(kChunk), element, &chunk), "MPI_Type_contiguous");
  check_mpi(MPI_Type_contiguous(static_cast<int>(count / kChunk), chunk, &chunks), "MPI_Type_contiguous");
  check_mpi(MPI_Type_contiguous(static_cast<int>(count % kChunk), element, &rest), "MPI_Type_contiguous");
  const int lengths[] = {1, 1};
  const MPI_Aint places[] = {0, static_cast<MPI_Aint>(count / kChunk * kChunk * element_bytes)};
  const MPI_Datatype types[] = {chunks, rest};
  check_mpi(MPI_Type_create_struct(2, lengths, places, types, &type_), "MPI_Type_create_struct");
  check_mpi(MPI_Type_commit(&type_), "MPI_Type_commit");
  for (MPI_Datatype* t : {&chunk, &chunks, &rest}) MPI_Type_free(t);
}

}  // namespace krait::comm
