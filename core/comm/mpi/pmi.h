#pragma once
#include "core/comm/mpi/star.h"

namespace krait::comm {

/// PMI-1, by which MPI learns of a job from whatever has started it, over a Star: MPI finds the functions PMI_* in this
/// program. Before MPI is started; the star stays.
void serve_pmi(Star& star, int rank, int size);

}  // namespace krait::comm

// Balaji et al., PMI: A Scalable Parallel Process-Management Interface for Extreme-Scale Systems, 2010. 0 is success.
extern "C" {
int PMI_Init(int* spawned);
int PMI_Initialized(int* initialized);
int PMI_Finalize();
int PMI_Abort(int status, const char* message);
int PMI_Get_size(int* size);
int PMI_Get_rank(int* rank);
int PMI_Get_universe_size(int* size);
int PMI_Get_appnum(int* number);
int PMI_Get_clique_size(int* size);
int PMI_Get_clique_ranks(int* ranks, int length);
int PMI_Barrier();
int PMI_KVS_Get_my_name(char* name, int length);
int PMI_KVS_Get_name_length_max(int* length);
int PMI_KVS_Get_key_length_max(int* length);
int PMI_KVS_Get_value_length_max(int* length);
int PMI_KVS_Put(const char* name, const char* key, const char* value);
int PMI_KVS_Commit(const char* name);
int PMI_KVS_Get(const char* name, const char* key, char* value, int length);
}
