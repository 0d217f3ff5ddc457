// main() of a kernel test: reads arrays from a file, hands them to run(), writes them back; tests/native/runner.py is
// the other end. Each array lies in its own allocation of exactly its size, so that ASan sees one byte too far.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "portable.h"

struct Array {
    char* data = nullptr;  // 16-byte aligned
    int64_t bytes = 0;

    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(data);
    }
    template <typename T>
    int64_t count() const {
        return bytes / int64_t(sizeof(T));
    }
};

cudaError_t run(std::vector<Array>& arrays);  // a kernel test defines it

int main(int, char** argv) {
    FILE* file = fopen(argv[1], "rb");
    int64_t count = 0;
    if (!file || fread(&count, sizeof count, 1, file) != 1) return 2;
    std::vector<Array> arrays(count);
    for (Array& a : arrays) {
        if (fread(&a.bytes, sizeof a.bytes, 1, file) != 1) return 2;
        a.data = static_cast<char*>(malloc(a.bytes));
        if (fread(a.data, 1, a.bytes, file) != size_t(a.bytes)) return 2;
    }
    fclose(file);
    const cudaError_t error = run(arrays);
    if (error != cudaSuccess) {
        fprintf(stderr, "launch failed with error %d\n", int(error));
        return 3;
    }
    file = fopen(argv[1], "wb");
    for (const Array& a : arrays)
        if (fwrite(a.data, 1, a.bytes, file) != size_t(a.bytes)) return 2;
    fclose(file);
    for (const Array& a : arrays) free(a.data);
    return 0;
}
