#pragma once

namespace dove {

// Makes malloc keep freed blocks of any size for the process, instead of giving them back to the kernel. Returns
// whether it did: glibc alone can be told.
bool keep_freed_memory();

}  // namespace dove
