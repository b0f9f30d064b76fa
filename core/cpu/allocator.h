#pragma once
#include "core/allocator.h"

namespace krait {
inline namespace core {
Allocator& cpu_allocator();
}
}  // namespace krait
