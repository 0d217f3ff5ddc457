// best[c] = the largest value of the groups so far at total cost exactly c. Time groups * levels * capacity, memory
// groups * capacity * 4 bytes. sensibert/solver.py has the same recurrence in numpy: same additions, ties and bits.
#include "solver.h"

#include <limits>

namespace sensibert {

std::vector<int64_t> solve_levels(const std::vector<std::vector<int64_t>>& costs,
                                  const std::vector<std::vector<double>>& values, int64_t capacity) {
    constexpr double kNever = -std::numeric_limits<double>::infinity();
    const std::size_t num_groups = costs.size(), width = std::size_t(capacity) + 1;
    std::vector<double> best(width, kNever), next(width);
    std::vector<std::vector<int32_t>> chosen(num_groups, std::vector<int32_t>(width, -1));
    best[0] = 0.0;
    for (std::size_t g = 0; g < num_groups; ++g) {
        next.assign(width, kNever);
        for (std::size_t level = 0; level < costs[g].size(); ++level) {
            const int64_t cost = costs[g][level];
            for (int64_t c = cost; c <= capacity; ++c) {
                const double value = best[c - cost] + values[g][level];
                if (value > next[c]) {
                    next[c] = value;
                    chosen[g][c] = int32_t(level);
                }
            }
        }
        best.swap(next);
    }
    std::size_t at = 0;
    for (std::size_t c = 1; c < width; ++c)
        if (best[c] > best[at]) at = c;
    if (best[at] == kNever) return {};
    std::vector<int64_t> levels(num_groups);
    for (std::size_t g = num_groups; g-- > 0;) {
        levels[g] = chosen[g][at];
        at -= std::size_t(costs[g][levels[g]]);
    }
    return levels;
}

}  // namespace sensibert
