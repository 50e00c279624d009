// How a function of the compiled library is made one that Python can call.

#pragma once

#include <cstdint>
#include <new>

#define EXPORTED extern "C" __attribute__((visibility("default")))

// `name` does what a structure says by run(structure), and returns 0, or 1 if memory ran out; `name_version` changes with the
// structure, so that a library built from other sources is not used. `Function` in hardy/compiled.py calls them.
#define ENTRY(name, structure, version) \
    EXPORTED int64_t name##_version() { return version; } \
    EXPORTED int name(const structure* given) { \
        try { \
            return run(*given); \
        } catch (const std::bad_alloc&) { \
            return 1; \
        } \
    }
