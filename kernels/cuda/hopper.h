#pragma once
#include "core/device.h"

namespace krait::kernels::cuda {

/// Multiprocessors of a Hopper; 0 elsewhere, and where `kernel` was compiled for anything but sm_90a: its body is empty
/// then, which its registers tell. Found out once for a kernel and device.
int hopper_multiprocessors(Device device, const void* kernel);

/// Whether the GPUs here are sm_90 or later and run code that was compiled for that: kernels compiled for less lack their
/// clusters and waits for one another, also where a newer GPU runs them.
bool runs_sm90(Device device);

}  // namespace krait::kernels::cuda
