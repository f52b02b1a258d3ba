#include "dove/allocator.h"

#include <cstdlib>  // defines __GLIBC__ where it is glibc's

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace dove {

bool keep_freed_memory() {
#ifdef __GLIBC__
  // Not a higher M_MMAP_THRESHOLD: it ends at 32 MiB, and larger blocks would still be mappings that end with free.
  constexpr int kTopPad = 64 << 20;
  // -1 becomes the largest size: the heap's end is never given back.
  return mallopt(M_MMAP_MAX, 0) != 0 && mallopt(M_TRIM_THRESHOLD, -1) != 0 && mallopt(M_TOP_PAD, kTopPad) != 0;
#else
  return false;
#endif
}

}  // namespace dove
