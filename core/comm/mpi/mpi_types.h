#pragma once
#include <mpi.h>

#include <string>

#include "core/comm/process_group.h"

namespace krait::comm {

/// MPI returns a bare int; `call` names what failed. Ends the job.
void check_mpi(int status, const char* call);

/// Type of one element for moving it, and (bf16: with an operation of our own) for adding it up.
MPI_Datatype mpi_type(DType dtype);
MPI_Op mpi_op(DType dtype, Reduce op);

/// `count` elements as one element, for counts beyond 32 bits.
class BlockType {
 public:
  BlockType(MPI_Datatype element, int64_t element_bytes, int64_t count);
  ~BlockType() { MPI_Type_free(&type_); }  // calls that use it go on
  BlockType(const BlockType&) = delete;
  BlockType& operator=(const BlockType&) = delete;
  MPI_Datatype get() const { return type_; }

 private:
  MPI_Datatype type_;
};

}  // namespace krait::comm
