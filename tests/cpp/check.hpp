// What a test program needs: CHECK what has to hold, and end with `return failed;`.
#pragma once

#include <cstdio>

inline int failed = 0;

// Goes on after a failure, to show them all. Variadic for commas in template arguments.
#define CHECK(...)                                                         \
  do {                                                                     \
    if (!(__VA_ARGS__)) {                                                  \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #__VA_ARGS__); \
      failed = 1;                                                          \
    }                                                                      \
  } while (false)
