// VECTOR_CLONES before a function of plain loops compiles it for AVX-512, AVX2 and any CPU; loading chooses one.
// What such a function calls in its loops is ALWAYS_INLINE, so as to be compiled with it.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "GCC 12 or newer is needed, or clang"
#endif

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define VECTOR_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("no-trapping-math", "no-thread-jumps")))
#define ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define VECTOR_CLONES
#define ALWAYS_INLINE inline
#endif

// Beside VECTOR_CLONES: products are rounded before they are added, on every CPU, as PyTorch's are. Clang contracts none
// for the baseline of a CPU.
#if defined(__GNUC__) && !defined(__clang__)
#define UNCONTRACTED __attribute__((optimize("fp-contract=off")))
#else
#define UNCONTRACTED
#endif
