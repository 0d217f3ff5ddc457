// sensibert::masked_adamw_ on CUDA: checks what the kernel relies on, packs pointers, launches. The pair hold / run does
// the same for arguments that stay the same from step to step: a list of a thousand tensors costs more to pass than to
// check, so they are passed once. What is held is tensors, not pointers: every run reads and checks them as they are.
#include "../kernels/masked_adamw.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "common.h"

namespace sensibert {
namespace {

constexpr const char* kOp = "masked_adamw";

// The place of `word` among `words`: the order of the enum that it becomes.
template <typename Enum, size_t n>
Enum enum_of(const std::string& word, const char* const (&words)[n], const char* name) {
    const auto found = std::find(std::begin(words), std::end(words), word);
    STD_TORCH_CHECK(found != std::end(words), kOp, ": ", name, " is ", word, ", want one of the documented words");
    return Enum(found - std::begin(words));
}

void want(const Tensor& t, ScalarType dtype, int64_t numel, const Tensor& lr, const char* name, size_t index) {
    const bool fits = t.scalar_type() == dtype && t.numel() == numel && t.is_contiguous() && t.is_cuda() &&
                      t.get_device_index() == lr.get_device_index();
    STD_TORCH_CHECK(fits, kOp, ": ", name, "[", index, "] is not ", numel,
                    " contiguous elements of the documented dtype on the device of lr (it has ", t.numel(), ")");
}

void want_alike(const Tensor& t, const Tensor& like, ScalarType dtype, int64_t numel, const Tensor& lr,
                const char* name, size_t index) {
    want(t, dtype, numel, lr, name, index);
    const auto ours = t.sizes(), theirs = like.sizes();
    STD_TORCH_CHECK(std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end()), kOp, ": ", name, "[", index,
                    "] is not of the shape of its param");
}

void want_entries(size_t count, const std::vector<int64_t>& of, const std::vector<int64_t>& blocks, size_t num_params,
                  const char* name) {
    STD_TORCH_CHECK(of.size() == count && blocks.size() == 2 * count, kOp, ": ", name, " has ", count,
                    " entries, want as many positions and twice as many block sizes");
    for (int64_t t : of)
        STD_TORCH_CHECK(t >= 0 && size_t(t) < num_params, kOp, ": ", name, "_of holds ", t, ", of ", num_params);
}

int64_t num_blocks(const AdamWTensor& t, int64_t rows, int64_t cols) {
    const auto along = [](int64_t axis, int64_t block) {
        return block ? (axis + block - 1) / block : int64_t(axis > 0);
    };
    return along(t.N, rows) * along(t.K, cols);
}

// The arguments of a step but for those that every run is given.
struct Held {
    std::vector<Tensor> exp_avg, exp_avg_sq, step;
    std::vector<int64_t> group;
    std::vector<double> beta1, beta2, eps, weight_decay;
    std::vector<Tensor> keep;
    std::vector<int64_t> keep_of, keep_blocks;
    std::vector<Tensor> copy;
    std::vector<int64_t> copy_of;
    std::vector<Tensor> row_map;
    std::vector<int64_t> row_map_of;
    std::vector<Tensor> col_map;
    std::vector<int64_t> col_map_of;
    std::vector<Tensor> score;
    std::vector<int64_t> score_of, score_blocks;
    std::string reduce, finish;
    double decay, scale;
};

template <typename... Arguments>
Held held_from(Arguments&... arguments) {
    return {std::move(arguments)...};
}

struct Packed {
    std::vector<AdamWTensor> tensors;
    std::vector<AdamWGroup> groups;
    Reduce reduce;
    Finish finish;
};

// Gradients with gaps are replaced by contiguous ones, which the caller keeps until the launch.
Packed pack(const std::vector<Tensor>& param, std::vector<Tensor>& grad, const Tensor& lr,
            const std::optional<Tensor>& grad_factor, const Held& held) {
    const auto& [exp_avg, exp_avg_sq, step, group, beta1, beta2, eps, weight_decay, keep, keep_of, keep_blocks, copy,
                 copy_of, row_map, row_map_of, col_map, col_map_of, score, score_of, score_blocks, reduce, finish,
                 decay, scale] = held;
    Packed packed{{},
                  {},
                  enum_of<Reduce>(reduce, {"signed", "abs", "square", "grad_square", "weight_square"}, "reduce"),
                  enum_of<Finish>(finish, {"none", "square", "abs"}, "finish")};
    const size_t num_params = param.size(), num_groups = beta1.size();
    for (size_t count : {grad.size(), exp_avg.size(), exp_avg_sq.size(), step.size(), group.size()})
        STD_TORCH_CHECK(count == num_params, kOp, ": a list has ", count, " entries, want ", num_params, " as param");
    for (size_t count : {beta2.size(), eps.size(), weight_decay.size()})
        STD_TORCH_CHECK(count == num_groups, kOp, ": a setting has ", count, " entries, want ", num_groups,
                        " as beta1");
    STD_TORCH_CHECK(num_groups < 1 << 16, kOp, ": ", num_groups, " groups, want fewer than 65536");
    want(lr, ScalarType::Float, int64_t(num_groups), lr, "lr", 0);
    if (grad_factor) want(*grad_factor, ScalarType::Float, 1, lr, "grad_factor", 0);
    want_entries(keep.size(), keep_of, keep_blocks, num_params, "keep");
    want_entries(score.size(), score_of, score_blocks, num_params, "score");
    want_entries(copy.size(), copy_of, std::vector<int64_t>(2 * copy.size()), num_params, "working_copy");
    want_entries(row_map.size(), row_map_of, std::vector<int64_t>(2 * row_map.size()), num_params, "row_map");
    want_entries(col_map.size(), col_map_of, std::vector<int64_t>(2 * col_map.size()), num_params, "col_map");

    for (size_t g = 0; g < num_groups; ++g) packed.groups.push_back({beta1[g], beta2[g], eps[g], weight_decay[g]});
    packed.tensors.resize(num_params);
    for (size_t t = 0; t < num_params; ++t) {
        const ScalarType dtype = param[t].scalar_type();
        const int64_t numel = param[t].numel();
        want(param[t], dtype, numel, lr, "param", t);
        if (!grad[t].is_contiguous()) grad[t] = torch::stable::contiguous(grad[t]);
        want_alike(grad[t], param[t], dtype, numel, lr, "grad", t);
        want_alike(exp_avg[t], param[t], dtype, numel, lr, "exp_avg", t);
        want_alike(exp_avg_sq[t], param[t], dtype, numel, lr, "exp_avg_sq", t);
        want(step[t], ScalarType::Float, 1, lr, "step", t);
        STD_TORCH_CHECK(group[t] >= 0 && size_t(group[t]) < num_groups, kOp, ": group[", t, "] is ", group[t]);
        AdamWTensor& entry = packed.tensors[t];
        entry.param = param[t].mutable_data_ptr();
        entry.grad = grad[t].const_data_ptr();
        entry.exp_avg = exp_avg[t].mutable_data_ptr();
        entry.exp_avg_sq = exp_avg_sq[t].mutable_data_ptr();
        entry.step = static_cast<const float*>(step[t].const_data_ptr());
        entry.N = param[t].dim() ? param[t].size(0) : 1;
        entry.K = entry.N ? numel / entry.N : 0;
        entry.dtype = dtype_of(param[t], kOp, "param", t);
        entry.group = int(group[t]);
    }
    for (size_t i = 0; i < keep.size(); ++i) {
        AdamWTensor& entry = packed.tensors[keep_of[i]];
        entry.keep_rows = keep_blocks[2 * i], entry.keep_cols = keep_blocks[2 * i + 1];
        want(keep[i], ScalarType::Bool, num_blocks(entry, entry.keep_rows, entry.keep_cols), lr, "keep", i);
        entry.keep = static_cast<const uint8_t*>(keep[i].const_data_ptr());
    }
    for (size_t i = 0; i < row_map.size(); ++i) {
        AdamWTensor& entry = packed.tensors[row_map_of[i]];
        want(row_map[i], ScalarType::Int, entry.N, lr, "row_map", i);
        entry.row_map = static_cast<const int32_t*>(row_map[i].const_data_ptr());
    }
    for (size_t i = 0; i < col_map.size(); ++i) {
        AdamWTensor& entry = packed.tensors[col_map_of[i]];
        if (entry.N == 0) continue;  // no element, so no K
        want(col_map[i], ScalarType::Int, entry.K, lr, "col_map", i);
        entry.col_map = static_cast<const int32_t*>(col_map[i].const_data_ptr());
    }
    for (size_t i = 0; i < copy.size(); ++i) {
        AdamWTensor& entry = packed.tensors[copy_of[i]];
        if (entry.row_map || entry.col_map) {
            STD_TORCH_CHECK(copy[i].dim() == 2, kOp, ": working_copy[", i, "] has a map, but is not a matrix");
            entry.copy_rows = copy[i].size(0), entry.copy_cols = copy[i].size(1);
            const bool fits = (entry.row_map ? entry.copy_rows <= entry.N : entry.copy_rows == entry.N) &&
                              (entry.col_map ? entry.copy_cols <= entry.K : entry.copy_cols == entry.K);
            STD_TORCH_CHECK(fits, kOp, ": working_copy[", i, "] is not of the shape that its maps leave");
            want(copy[i], ScalarType::BFloat16, copy[i].numel(), lr, "working_copy", i);
        } else {
            want(copy[i], ScalarType::BFloat16, param[copy_of[i]].numel(), lr, "working_copy", i);
        }
        entry.copy = static_cast<__nv_bfloat16*>(copy[i].mutable_data_ptr());
    }
    for (size_t i = 0; i < score.size(); ++i) {
        AdamWTensor& entry = packed.tensors[score_of[i]];
        entry.score_rows = score_blocks[2 * i], entry.score_cols = score_blocks[2 * i + 1];
        want(score[i], ScalarType::Float, num_blocks(entry, entry.score_rows, entry.score_cols), lr, "score", i);
        entry.score = static_cast<float*>(score[i].mutable_data_ptr());
    }
    return packed;
}

void launch(const Packed& packed, const Tensor& lr, const std::optional<Tensor>& grad_factor, const Held& held) {
    const AdamWProblem problem{packed.tensors.data(),
                               int64_t(packed.tensors.size()),
                               packed.groups.data(),
                               int64_t(packed.groups.size()),
                               static_cast<const float*>(lr.const_data_ptr()),
                               grad_factor ? static_cast<const float*>(grad_factor->const_data_ptr()) : nullptr,
                               packed.reduce,
                               packed.finish,
                               float(held.decay),
                               float(held.scale)};
    const torch::stable::accelerator::DeviceGuard guard(lr.get_device_index());
    const int64_t scratch_floats = int64_t(masked_adamw_scratch_bytes(problem) / sizeof(float));
    const Tensor scratch = torch::stable::new_empty(lr, {scratch_floats}, ScalarType::Float);
    check_launch(launch_masked_adamw(problem, static_cast<float*>(scratch.mutable_data_ptr()),
                                     current_stream(lr.get_device_index())),
                 kOp);
}

void masked_adamw_cuda(std::vector<Tensor> param, std::vector<Tensor> grad, std::vector<Tensor> exp_avg,
                       std::vector<Tensor> exp_avg_sq, std::vector<Tensor> step, Tensor lr, std::vector<int64_t> group,
                       std::vector<double> beta1, std::vector<double> beta2, std::vector<double> eps,
                       std::vector<double> weight_decay, std::optional<Tensor> grad_factor, std::vector<Tensor> keep,
                       std::vector<int64_t> keep_of, std::vector<int64_t> keep_blocks, std::vector<Tensor> copy,
                       std::vector<int64_t> copy_of, std::vector<Tensor> row_map, std::vector<int64_t> row_map_of,
                       std::vector<Tensor> col_map, std::vector<int64_t> col_map_of, std::vector<Tensor> score,
                       std::vector<int64_t> score_of, std::vector<int64_t> score_blocks, std::string reduce,
                       std::string finish, double decay, double scale) {
    const Held held = held_from(exp_avg, exp_avg_sq, step, group, beta1, beta2, eps, weight_decay, keep, keep_of,
                                keep_blocks, copy, copy_of, row_map, row_map_of, col_map, col_map_of, score, score_of,
                                score_blocks, reduce, finish, decay, scale);
    launch(pack(param, grad, lr, grad_factor, held), lr, grad_factor, held);
}

// A tensor that owns the arguments, in host memory.
Tensor masked_adamw_hold_cuda(std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq, std::vector<Tensor> step,
                              std::vector<int64_t> group, std::vector<double> beta1, std::vector<double> beta2,
                              std::vector<double> eps, std::vector<double> weight_decay, std::vector<Tensor> keep,
                              std::vector<int64_t> keep_of, std::vector<int64_t> keep_blocks, std::vector<Tensor> copy,
                              std::vector<int64_t> copy_of, std::vector<Tensor> row_map,
                              std::vector<int64_t> row_map_of, std::vector<Tensor> col_map,
                              std::vector<int64_t> col_map_of, std::vector<Tensor> score, std::vector<int64_t> score_of,
                              std::vector<int64_t> score_blocks, std::string reduce, std::string finish, double decay,
                              double scale) {
    Held* const held = new Held(held_from(exp_avg, exp_avg_sq, step, group, beta1, beta2, eps, weight_decay, keep,
                                          keep_of, keep_blocks, copy, copy_of, row_map, row_map_of, col_map, col_map_of,
                                          score, score_of, score_blocks, reduce, finish, decay, scale));
    const int64_t size = sizeof(Held), stride = 1;
    return torch::stable::from_blob(held, {&size, 1}, {&stride, 1},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
                                    [](void* owned) { delete static_cast<Held*>(owned); });
}

// The step with what is held. False, and nothing has been written, where the arguments do not fit as they are now.
bool masked_adamw_run_cuda(Tensor holder, std::vector<Tensor> param, std::vector<Tensor> grad, Tensor lr,
                           std::optional<Tensor> grad_factor) {
    STD_TORCH_CHECK(holder.is_cpu() && holder.numel() == sizeof(Held), kOp,
                    ": held is not what masked_adamw_hold returned");
    const Held& held = *static_cast<const Held*>(holder.const_data_ptr());
    Packed packed;
    try {
        packed = pack(param, grad, lr, grad_factor, held);
    } catch (const std::exception&) {
        return false;
    }
    launch(packed, lr, grad_factor, held);
    return true;
}

}  // namespace
}  // namespace sensibert

STABLE_TORCH_LIBRARY_IMPL(sensibert, CUDA, m) {
    m.impl("masked_adamw_", TORCH_BOX(&sensibert::masked_adamw_cuda));
    m.impl("masked_adamw_hold", TORCH_BOX(&sensibert::masked_adamw_hold_cuda));
    m.impl("masked_adamw_run_", TORCH_BOX(&sensibert::masked_adamw_run_cuda));
}
