// The choice of matrix product, for the boundaries to torch.
#pragma once

#include "panel_gemm.h"

namespace nrt_fast {

// ATen's brgemm (oneDNN), which knows AVX-512 and AMX; the portable product where torch has none, where the CPU is too
// old, or where oneDNN is disabled.
template <typename T>
PanelProduct<T> choose_product();

// What a thread calls when it is done with products: gives the AMX tiles back.
void release_product();

}  // namespace nrt_fast
