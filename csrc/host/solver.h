// The budget solver: one level a group, total cost within the capacity, largest total value.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sensibert {

// costs[g][l] >= 0 and values[g][l] of level l of group g -> the level of each group; empty where no choice fits.
// Ties: the smallest total cost, then in each group from the last to the first the lowest level.
std::vector<int64_t> solve_levels(const std::vector<std::vector<int64_t>>& costs,
                                  const std::vector<std::vector<double>>& values, int64_t capacity);

}  // namespace sensibert
