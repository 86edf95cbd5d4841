// The simulated GPU that the operators see on this CPU.
#pragma once

#include <cstdint>

namespace host {

extern int64_t n_processors;

}  // namespace host
