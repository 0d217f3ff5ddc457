// Runs select_threshold.cu. arrays: options int64 {k, scores to skip in front}; shapes int64 [T, 2] (size, dtype);
// threshold; num_nan; then scores, keep of each tensor.
#define SENSIBERT_SELECT_THREADS 64
#include "../../csrc/kernels/select_threshold.cu"

#include "harness.h"

cudaError_t run(std::vector<Array>& a) {
    using namespace sensibert;
    const int64_t* option = a[0].as<int64_t>();
    std::vector<SelectTensor> tensors(a[1].count<int64_t>() / 2);
    for (size_t t = 0; t < tensors.size(); ++t) {
        const int64_t* shape = a[1].as<int64_t>() + 2 * t;
        const Array* arrays = &a[4 + 2 * t];
        const DType dtype = DType(shape[1]);
        tensors[t] = {arrays[0].data + option[1] * element_size(dtype), arrays[1].as<uint8_t>(), shape[0], dtype};
    }
    const SelectProblem problem = {tensors.data(), int64_t(tensors.size()), option[0], a[2].as<float>(),
                                   a[3].as<int64_t>()};
    size_t bytes = 0;
    if (cudaError_t error = select_threshold_scratch_bytes(problem, &bytes)) return error;
    void* scratch = malloc(bytes);
    memset(scratch, 0xa5, bytes);  // not initialised, as the header says
    const cudaError_t error = launch_select_threshold(problem, scratch, nullptr);
    free(scratch);
    return error;
}
