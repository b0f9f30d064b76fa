#pragma once
#include "core/device.h"

namespace krait::kernels::cuda {

/// Multiprocessors of a Hopper; 0 elsewhere, and where `kernel` was compiled for anything but sm_90a: its body is empty
/// then, which its registers tell. Found out once for a kernel and device.
int hopper_multiprocessors(Device device, const void* kernel);

}  // namespace krait::kernels::cuda
