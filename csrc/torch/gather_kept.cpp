// sensibert::gather_kept_ on CUDA: checks what the kernel relies on, packs pointers, launches.
#include "../kernels/gather_kept.h"

#include "common.h"

namespace sensibert {
namespace {

constexpr const char* kOp = "gather_kept";

void want(const Tensor& t, int64_t numel, const Tensor& like, const char* name, size_t index) {
    const bool fits =
        t.numel() == numel && t.is_contiguous() && t.is_cuda() && t.get_device_index() == like.get_device_index();
    STD_TORCH_CHECK(fits, kOp, ": ", name, "[", index, "] is not ", numel,
                    " contiguous elements on the device of weight[0] (it has ", t.numel(), ")");
}

// Row or column numbers.
const int64_t* index_of(const Tensor& t, const Tensor& like, const char* name, size_t i) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, kOp, ": ", name, "[", i, "] is not int64");
    want(t, t.numel(), like, name, i);
    return static_cast<const int64_t*>(t.const_data_ptr());
}

void want_entries(const std::vector<Tensor>& given, const std::vector<int64_t>& of, size_t num_weights,
                  const char* name) {
    STD_TORCH_CHECK(of.size() == given.size(), kOp, ": ", name, " has ", given.size(), " entries, ", name, "_of ",
                    of.size());
    for (int64_t t : of)
        STD_TORCH_CHECK(t >= 0 && size_t(t) < num_weights, kOp, ": ", name, "_of holds ", t, ", of ", num_weights);
}

void gather_kept_cuda(std::vector<Tensor> out, std::vector<Tensor> weight, std::vector<Tensor> rows,
                      std::vector<int64_t> rows_of, std::vector<Tensor> cols, std::vector<int64_t> cols_of,
                      std::vector<Tensor> bits, std::vector<int64_t> bits_of) {
    STD_TORCH_CHECK(out.size() == weight.size(), kOp, ": out has ", out.size(), " entries, want ", weight.size(),
                    " as weight");
    want_entries(rows, rows_of, weight.size(), "rows");
    want_entries(cols, cols_of, weight.size(), "cols");
    want_entries(bits, bits_of, weight.size(), "bits");
    if (weight.empty()) return;
    const Tensor& first = weight[0];
    std::vector<GatherTensor> tensors(weight.size());
    for (size_t t = 0; t < weight.size(); ++t) {
        STD_TORCH_CHECK(weight[t].dim() == 2, kOp, ": weight[", t, "] has ", weight[t].dim(), " axes, want 2");
        want(weight[t], weight[t].numel(), first, "weight", t);
        GatherTensor& entry = tensors[t];
        entry.weight = weight[t].const_data_ptr();
        entry.N = entry.n = weight[t].size(0);
        entry.K = entry.k = weight[t].size(1);
        entry.dtype = dtype_of(weight[t], kOp, "weight", t);
        entry.out = out[t].mutable_data_ptr();
        entry.out_dtype = dtype_of(out[t], kOp, "out", t);
    }
    for (size_t i = 0; i < rows.size(); ++i) {
        tensors[rows_of[i]].rows = index_of(rows[i], first, "rows", i);
        tensors[rows_of[i]].n = rows[i].numel();
    }
    for (size_t i = 0; i < cols.size(); ++i) {
        tensors[cols_of[i]].cols = index_of(cols[i], first, "cols", i);
        tensors[cols_of[i]].k = cols[i].numel();
    }
    for (size_t i = 0; i < bits.size(); ++i) {
        GatherTensor& entry = tensors[bits_of[i]];
        STD_TORCH_CHECK(bits[i].scalar_type() == ScalarType::Char, kOp, ": bits[", i, "] is not int8");
        want(bits[i], entry.n * entry.k, first, "bits", i);
        entry.bits = static_cast<const int8_t*>(bits[i].const_data_ptr());
    }
    for (size_t t = 0; t < out.size(); ++t) want(out[t], tensors[t].n * tensors[t].k, first, "out", t);
    const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
    check_launch(launch_gather_kept(tensors.data(), int64_t(tensors.size()), current_stream(first.get_device_index())),
                 kOp);
}

}  // namespace
}  // namespace sensibert

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) { m.impl("gather_kept_", TORCH_BOX(&sensibert::gather_kept_cuda)); }
