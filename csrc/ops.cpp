// The passes over latents of ngrpo_kernels/reference.py, for the CPU. Their schemas are in ngrpo_kernels/_registry.py;
// arguments are validated and flattened by the caller, as for the reference.
//
// P prompts (or prompt-step rows), B anchors, G candidates, D latent elements.
// x_i candidate; x_j the anchor's own candidate; y_i = x_i - x_j; a the old policy's point; delta = x_theta - a.
//
// Within a tile of D sums are float (double if an input is); tiles are added in double, in order. Threads are PyTorch's
// own: torch.set_num_threads holds, and there is one OpenMP runtime in the process. NaN must propagate: no -ffast-math.

#include <cmath>
#include <optional>
#include <tuple>

#include "tiles.h"

namespace ngrpo {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// Candidates, or anchors, that are treated together and share the loads of all else.
constexpr int64_t BLOCK = 4;

// Calls visit(first, size) for blocks of items 0 .. count - 1; `size` is BLOCK or, for the rest, 1, a constant type.
template <typename Visit>
void in_blocks(int64_t count, const Visit& visit) {
  int64_t first = 0;
  for (; first + BLOCK <= count; first += BLOCK) visit(first, std::integral_constant<int64_t, BLOCK>());
  for (; first < count; ++first) visit(first, std::integral_constant<int64_t, 1>());
}

// The candidates that the mask keeps, for every prompt.
std::vector<std::vector<int64_t>> valid_candidates(const Tensor& candidates, const std::optional<Tensor>& mask) {
  const int64_t prompts = candidates.size(0), group = candidates.size(1);
  std::optional<Tensor> flags;
  if (mask) flags = contiguous(*mask);
  std::vector<std::vector<int64_t>> valid(prompts);
  for (int64_t p = 0; p < prompts; ++p) {
    for (int64_t g = 0; g < group; ++g) {
      if (!flags || flags->const_data_ptr<bool>()[p * group + g]) valid[p].push_back(g);
    }
  }
  return valid;
}

// The own candidate of every anchor, [P, B]. An index outside G is clamped here, and its row made NaN by the caller.
std::vector<int64_t> own_candidates(const Tensor& candidates, const Tensor& anchor_index) {
  const Tensor index = contiguous(anchor_index);
  const int64_t* from = index.const_data_ptr<int64_t>();
  std::vector<int64_t> own(from, from + index.numel());
  for (int64_t& j : own) j = std::clamp<int64_t>(j, 0, candidates.size(1) - 1);
  return own;
}

// products[i] += <y_i, y_i - away>, and moved[i] += <y_i, delta> where there is a delta, for the candidates in `valid`
// from its item `start` on.
template <typename T>
void add_products(const TileOf<T>& x, const std::vector<int64_t>& valid, int64_t start, const T* own, const T* away,
                  const T* delta, int64_t count, double* products, double* moved) {
  in_blocks(valid.size() - start, [&](int64_t first, auto size) {
    constexpr int64_t N = decltype(size)::value;
    first += start;
    const T* rows[N];
    for (int64_t i = 0; i < N; ++i) rows[i] = x[valid[first + i]];
    Vector<T> product[N] = {}, along[N] = {};
    if (delta) {
      for (int64_t d = 0; d < count; d += LANES<T>) {
        const Vector<T> own_d = load(own + d), away_d = load(away + d), delta_d = load(delta + d);
        for (int64_t i = 0; i < N; ++i) {
          const Vector<T> y = load(rows[i] + d) - own_d;
          product[i] += y * (y - away_d);
          along[i] += y * delta_d;
        }
      }
    } else {
      for (int64_t d = 0; d < count; d += LANES<T>) {
        const Vector<T> own_d = load(own + d), away_d = load(away + d);
        for (int64_t i = 0; i < N; ++i) {
          const Vector<T> y = load(rows[i] + d) - own_d;
          product[i] += y * (y - away_d);
        }
      }
    }
    for (int64_t i = 0; i < N; ++i) {
      products[valid[first + i]] += sum_of_lanes<T>(product[i]);
      if (delta) moved[valid[first + i]] += sum_of_lanes<T>(along[i]);
    }
  });
}

// result[b] = sum_i weights[b, i] (x_i - origin_b), for all anchors b of a prompt; `weights` is [B, G].
template <typename T, typename Origin>
void add_weighted(const TileOf<T>& x, const std::vector<int64_t>& valid, const T* weights, const Origin& origin_of,
                  int64_t anchors, int64_t group, int64_t count, T* result) {
  in_blocks(anchors, [&](int64_t first, auto size) {
    constexpr int64_t N = decltype(size)::value;
    for (int64_t d = 0; d < count; d += LANES<T>) {
      Vector<T> origin[N], sum[N] = {};
      for (int64_t i = 0; i < N; ++i) origin[i] = load(origin_of(first + i) + d);
      for (const int64_t g : valid) {
        const Vector<T> x_d = load(x[g] + d);
        for (int64_t i = 0; i < N; ++i) sum[i] += weights[(first + i) * group + g] * (x_d - origin[i]);
      }
      for (int64_t i = 0; i < N; ++i) store(result + (first + i) * TILE + d, sum[i]);
    }
  });
}

// Fills away = 2 (a - x_j) and delta for a tile of one anchor of x_theta = start + slope * moving, start being zero
// where there is none. The old point is a = start + slope * old; without `old` it is x_j if `literal`, else x_theta.
// Two states of one trajectory, start and x_j, are subtracted first, and delta comes from velocities.
template <typename T>
void displace(const T* moving, const T* old, bool literal, const T* start, T slope, const T* own, int64_t count,
              T* away, T* delta) {
  for (int64_t d = 0; d < count; d += LANES<T>) {
    const Vector<T> base = start ? load(start + d) - load(own + d) : -load(own + d);
    const Vector<T> moving_d = load(moving + d);
    if (literal) {
      store(away + d, Vector<T>{});
      store(delta + d, base + slope * moving_d);
    } else if (old) {
      const Vector<T> old_d = load(old + d);
      store(away + d, 2 * (base + slope * old_d));
      store(delta + d, slope * (moving_d - old_d));
    } else {
      store(away + d, 2 * (base + slope * moving_d));
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> measure(Tensor moving, std::optional<Tensor> old, bool literal,
                                           std::optional<Tensor> latents, Tensor slope, Tensor candidates,
                                           Tensor anchor_index, std::optional<Tensor> mask) {
  const int64_t prompts = moving.size(0), anchors = moving.size(1), group = candidates.size(1);
  const int64_t pairs = anchors * group;
  const Split split(prompts, moving.size(2));
  const auto valid = valid_candidates(candidates, mask);
  const auto own = own_candidates(candidates, anchor_index);
  const Rows candidate_rows(candidates), moving_rows(moving), old_rows(old.value_or(moving)),
      start_rows(latents.value_or(moving));
  const bool moved = old || literal;

  const Tensor slopes = contiguous(slope);
  Tensor old_logits = new_empty(slope, {prompts, anchors, group});
  Tensor projections = new_empty(slope, {prompts, anchors, group});
  Tensor sqdist = new_empty(slope, {prompts, group, group});
  with_sum_type(slope.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* slope_of = slopes.const_data_ptr<T>();

    // Sums of a prompt: products [B, G], projections [B, G], distances [G, G] of candidates to the valid ones after.
    const int64_t width = 2 * pairs + group * group;
    const std::vector<double> sums = split.sum_tiles(width, [&] {
      return [&, x = TileOf<T>(group), scratch = std::vector<T>(6 * TILE)](int64_t p, int64_t begin, int64_t count,
                                                                          double* sums) mutable {
        T *away = &scratch[0], *delta = &scratch[TILE];
        const T* no_offset = &scratch[2 * TILE];
        x.read(candidate_rows, p, begin, count);
        for (size_t i = 0; i < valid[p].size(); ++i) {
          const int64_t g = valid[p][i];
          add_products<T>(x, valid[p], i + 1, x[g], no_offset, nullptr, count, sums + 2 * pairs + g * group, nullptr);
        }
        for (int64_t b = 0; b < anchors; ++b) {
          const T* own_b = x[own[p * anchors + b]];
          const T* moving_b = moving_rows.tile(p, b, begin, count, &scratch[3 * TILE]);
          const T* old_b = old ? old_rows.tile(p, b, begin, count, &scratch[4 * TILE]) : nullptr;
          const T* start_b = latents ? start_rows.tile(p, b, begin, count, &scratch[5 * TILE]) : nullptr;
          displace(moving_b, old_b, literal, start_b, slope_of[p * anchors + b], own_b, count, away, delta);
          add_products(x, valid[p], 0, own_b, away, moved ? delta : nullptr, count, sums + b * group,
                       sums + pairs + b * group);
        }
      };
    });

    for (int64_t p = 0; p < prompts; ++p) {
      const double* of_prompt = sums.data() + p * width;
      for (int64_t i = 0; i < pairs; ++i) {
        old_logits.mutable_data_ptr<T>()[p * pairs + i] = static_cast<T>(-of_prompt[i]);
        projections.mutable_data_ptr<T>()[p * pairs + i] = static_cast<T>(of_prompt[pairs + i]);
      }
      const double* of_group = of_prompt + 2 * pairs;
      T* table = sqdist.mutable_data_ptr<T>() + p * group * group;
      for (int64_t g = 0; g < group; ++g) {
        for (int64_t k = g; k < group; ++k) {
          table[g * group + k] = table[k * group + g] = static_cast<T>(of_group[g * group + k]);
        }
      }
    }
  });
  return {old_logits, projections, sqdist};
}

// Writes the tile `from` to row (p, b) of a contiguous [P, B, D] tensor, in its dtype.
template <typename T>
void write(const T* from, const Tensor& tensor, int64_t p, int64_t b, int64_t begin, int64_t count) {
  with_type(tensor.scalar_type(), [&](auto element) {
    using Element = decltype(element);
    Element* to = tensor.mutable_data_ptr<Element>() + (p * tensor.size(1) + b) * tensor.size(2) + begin;
    for (int64_t d = 0; d < count; ++d) to[d] = convert<Element>(from[d]);
  });
}

Tensor weighted_differences(Tensor weights, std::optional<Tensor> scale, Tensor candidates, Tensor anchor_index,
                            std::optional<Tensor> mask, ScalarType dtype) {
  const int64_t prompts = weights.size(0), anchors = weights.size(1), group = weights.size(2);
  const Split split(prompts, candidates.size(2));
  const auto valid = valid_candidates(candidates, mask);
  const auto own = own_candidates(candidates, anchor_index);
  const Rows candidate_rows(candidates);
  const Tensor weight_rows = contiguous(weights);
  Tensor result = new_empty(weights, {prompts, anchors, split.dim}, dtype);
  with_sum_type(weights.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> weights_of(weight_rows.const_data_ptr<T>(), weight_rows.const_data_ptr<T>() + weights.numel());
    if (scale) {
      for (T& weight : weights_of) weight *= *scale->const_data_ptr<T>();
    }
    split.for_each_tile([&] {
      return [&, x = TileOf<T>(group), sums = std::vector<T>(anchors * TILE)](int64_t, int64_t p, int64_t begin,
                                                                             int64_t count) mutable {
        x.read(candidate_rows, p, begin, count);
        const auto origin_of = [&](int64_t b) { return x[own[p * anchors + b]]; };
        add_weighted(x, valid[p], weights_of.data() + p * anchors * group, origin_of, anchors, group, count, sums.data());
        for (int64_t b = 0; b < anchors; ++b) write(&sums[b * TILE], result, p, b, begin, count);
      };
    });
  });
  return result;
}

Tensor pairwise_sqdist(Tensor anchors, Tensor candidates, ScalarType dtype) {
  const int64_t prompts = anchors.size(0), rows = anchors.size(1), group = candidates.size(1);
  const Split split(prompts, anchors.size(2));
  const auto valid = valid_candidates(candidates, std::nullopt);
  const Rows anchor_rows(anchors), candidate_rows(candidates);
  Tensor result = new_empty(anchors, {prompts, rows, group}, dtype);
  with_sum_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> no_offset(TILE);
    const std::vector<double> sums = split.sum_tiles(rows * group, [&] {
      return [&, x = TileOf<T>(group), scratch = std::vector<T>(TILE)](int64_t p, int64_t begin, int64_t count,
                                                                       double* sums) mutable {
        x.read(candidate_rows, p, begin, count);
        for (int64_t b = 0; b < rows; ++b) {
          const T* anchor = anchor_rows.tile(p, b, begin, count, scratch.data());
          add_products<T>(x, valid[p], 0, anchor, no_offset.data(), nullptr, count, sums + b * group, nullptr);
        }
      };
    });
    for (size_t i = 0; i < sums.size(); ++i) result.mutable_data_ptr<T>()[i] = static_cast<T>(sums[i]);
  });
  return result;
}

// sum_i weights[b, i] (x_i - anchor_b) in the dtype of the anchors: pairwise_sqdist's gradient, for weights -2 grad.
Tensor weighted_sum_from(Tensor weights, Tensor anchors, Tensor candidates) {
  const int64_t prompts = anchors.size(0), rows = anchors.size(1), group = candidates.size(1);
  const Split split(prompts, anchors.size(2));
  const auto valid = valid_candidates(candidates, std::nullopt);
  const Rows anchor_rows(anchors), candidate_rows(candidates);
  const Tensor weight_rows = contiguous(weights);
  Tensor result = new_empty(anchors, {prompts, rows, split.dim});
  with_sum_type(weights.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* weights_of = weight_rows.const_data_ptr<T>();
    split.for_each_tile([&] {
      return [&, x = TileOf<T>(group), origins = TileOf<T>(rows), sums = std::vector<T>(rows * TILE)](
                 int64_t, int64_t p, int64_t begin, int64_t count) mutable {
        x.read(candidate_rows, p, begin, count);
        origins.read(anchor_rows, p, begin, count);
        const auto origin_of = [&](int64_t b) { return origins[b]; };
        add_weighted(x, valid[p], weights_of + p * rows * group, origin_of, rows, group, count, sums.data());
        for (int64_t b = 0; b < rows; ++b) write(&sums[b * TILE], result, p, b, begin, count);
      };
    });
  });
  return result;
}

}  // namespace
}  // namespace ngrpo

STABLE_TORCH_LIBRARY_IMPL(ngrpo_cpp, CPU, m) {
  m.impl("measure", TORCH_BOX(&ngrpo::measure));
  m.impl("weighted_differences", TORCH_BOX(&ngrpo::weighted_differences));
  m.impl("pairwise_sqdist", TORCH_BOX(&ngrpo::pairwise_sqdist));
  m.impl("weighted_sum_from", TORCH_BOX(&ngrpo::weighted_sum_from));
}
