// What neon.h has, and products of 8-bit matrices (FEAT_I8MM: optional from Armv8.2 on, in every CPU from Armv8.6 on).
// Included in its place: what follows in a file is compiled for that target, neon.h's own functions are not.
#pragma once

#include "neon.h"

#if defined(__clang__)
#pragma clang attribute pop  // neon.h's: a function has one target
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif
