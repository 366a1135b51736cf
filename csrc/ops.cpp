// The ops of ngrpo_kernels/reference.py, for the CPU. Their schemas are in ngrpo_kernels/_library.py; the caller
// validates and flattens arguments, as for the reference.
//
// P prompts (or prompt-step rows), B anchors, G candidates, D latent elements.
// x_i candidate; x_j the anchor's own candidate; y_i = x_i - x_j; a the old policy's point; delta = x_theta - a.
// M draws of an SDE, whose ops are the last ones.
//
// Within a tile of D, sums are float (double if an input is); tiles are added in double, in order. Threads are those of
// PyTorch: torch.set_num_threads applies, and the process has one OpenMP runtime. NaN must propagate: no -ffast-math.

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "algebra.h"
#include "tiles.h"

namespace ngrpo {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::select;

// Number of candidates, or of anchors, that a loop treats together, so that they share all other loads.
constexpr int64_t BLOCK = 4;

// Calls visit(first, size) for blocks of items 0 .. count - 1; `size` is BLOCK, or 1 for the rest: a constant.
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

// The own candidate of every anchor, [P, B]. An index outside 0 .. G - 1 is clamped; the caller makes its row NaN.
std::vector<int64_t> own_candidates(const Tensor& candidates, const Tensor& anchor_index) {
  const Tensor index = contiguous(anchor_index);
  const int64_t* from = index.const_data_ptr<int64_t>();
  std::vector<int64_t> own(from, from + index.numel());
  for (int64_t& j : own) j = std::clamp<int64_t>(j, 0, candidates.size(1) - 1);
  return own;
}

// result[i] += |x_i - origin|^2 for the candidates in `valid` from its item `start` on.
template <typename T>
void add_sqdist(const TileOf<T>& x, const std::vector<int64_t>& valid, int64_t start, const T* origin, int64_t count,
                double* result) {
  in_blocks(valid.size() - start, [&](int64_t first, auto size) {
    constexpr int64_t N = decltype(size)::value;
    const int64_t* g = &valid[start + first];
    Vector<T> sum[N] = {};
    for (int64_t d = 0; d < count; d += LANES<T>) {
      const Vector<T> origin_d = load(origin + d);
      for (int64_t i = 0; i < N; ++i) {
        const Vector<T> y = load(x[g[i]] + d) - origin_d;
        sum[i] += y * y;
      }
    }
    for (int64_t i = 0; i < N; ++i) result[g[i]] += sum_of_lanes<T>(sum[i]);
  });
}

// results[m][i] += <x_i - origin, directions[m]> for all valid candidates.
template <typename T, size_t M>
void add_projections(const TileOf<T>& x, const std::vector<int64_t>& valid, const T* origin,
                     const std::array<const T*, M>& directions, int64_t count,
                     const std::array<double*, M>& results) {
  in_blocks(valid.size(), [&](int64_t first, auto size) {
    constexpr int64_t N = decltype(size)::value;
    const int64_t* g = &valid[first];
    Vector<T> sum[M][N] = {};
    for (int64_t d = 0; d < count; d += LANES<T>) {
      const Vector<T> origin_d = load(origin + d);
      for (int64_t i = 0; i < N; ++i) {
        const Vector<T> y = load(x[g[i]] + d) - origin_d;
        for (size_t m = 0; m < M; ++m) sum[m][i] += y * load(directions[m] + d);
      }
    }
    for (size_t m = 0; m < M; ++m) {
      for (int64_t i = 0; i < N; ++i) results[m][g[i]] += sum_of_lanes<T>(sum[m][i]);
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

// Fills offset = a - x_j and delta for a tile of one anchor. x_theta = start + slope * moving; no `start` means zero.
// The old point is a = start + slope * old. Without `old` it is x_j if `literal`, and no offset is filled; otherwise it
// is x_theta, and no delta is filled. To keep digits, start and x_j are subtracted first, as states of one trajectory;
// with `old`, delta is formed from the difference of velocities.
template <typename T>
void displace(const T* moving, const T* old, bool literal, const T* start, T slope, const T* own, int64_t count,
              T* offset, T* delta) {
  for (int64_t d = 0; d < count; d += LANES<T>) {
    const Vector<T> base = start ? load(start + d) - load(own + d) : -load(own + d);
    const Vector<T> moving_d = load(moving + d);
    if (literal) {
      store(delta + d, base + slope * moving_d);
    } else if (old) {
      const Vector<T> old_d = load(old + d);
      store(offset + d, base + slope * old_d);
      store(delta + d, slope * (moving_d - old_d));
    } else {
      store(offset + d, base + slope * moving_d);
    }
  }
}

// Row `p` of a [P, G] tensor in any strides and any dtype.
Numbers numbers(const Tensor& tensor, int64_t p) {
  Numbers row(tensor.size(1));
  with_type(tensor.scalar_type(), [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(tensor.const_data_ptr()) + p * tensor.stride(0);
    for (size_t g = 0; g < row.size(); ++g) row[g] = convert<double>(from[g * tensor.stride(1)]);
  });
  return row;
}

// All sums over D that `objective` needs, in one pass: the arrays of Sums for every prompt, side by side.
template <typename T>
std::vector<double> sum_over_dim(const Split& split, const Tensor& moving, const std::optional<Tensor>& old,
                                 bool literal, const std::optional<Tensor>& latents, const T* slope_of,
                                 const Tensor& candidates, const std::vector<int64_t>& own,
                                 const std::vector<std::vector<int64_t>>& valid) {
  const int64_t anchors = moving.size(1), group = candidates.size(1), pairs = anchors * group;
  const Rows candidate_rows(candidates), moving_rows(moving), old_rows(old.value_or(moving)),
      start_rows(latents.value_or(moving));
  return split.sum_tiles(2 * pairs + group * group, [&] {
    return [&, x = TileOf<T>(group), scratch = std::vector<T>(5 * TILE)](int64_t p, int64_t begin, int64_t count,
                                                                        double* sums) mutable {
      T *offset = &scratch[0], *delta = &scratch[TILE];
      x.read(candidate_rows, p, begin, count);
      for (size_t i = 0; i < valid[p].size(); ++i) {
        const int64_t g = valid[p][i];
        add_sqdist(x, valid[p], i + 1, x[g], count, sums + 2 * pairs + g * group);
      }
      for (int64_t b = 0; b < anchors; ++b) {
        const T* own_b = x[own[p * anchors + b]];
        const T* moving_b = moving_rows.tile(p, b, begin, count, &scratch[2 * TILE]);
        const T* old_b = old ? old_rows.tile(p, b, begin, count, &scratch[3 * TILE]) : nullptr;
        const T* start_b = latents ? start_rows.tile(p, b, begin, count, &scratch[4 * TILE]) : nullptr;
        displace(moving_b, old_b, literal, start_b, slope_of[p * anchors + b], own_b, count, offset, delta);
        double *toward = sums + b * group, *along = sums + pairs + b * group;
        if (literal) {
          add_projections<T, 1>(x, valid[p], own_b, {delta}, count, {along});
        } else if (old) {
          add_projections<T, 2>(x, valid[p], own_b, {offset, delta}, count, {toward, along});
        } else {
          add_projections<T, 1>(x, valid[p], own_b, {offset}, count, {toward});
        }
      }
    };
  });
}

// Advantages of row `p`, as given or from rewards; zeros where neither is given, or fewer than two are valid.
Numbers used_advantages(const std::optional<Tensor>& advantages, const std::optional<Tensor>& rewards, int64_t p,
                        int64_t group, const std::vector<int64_t>& valid, double p_norm, double eps) {
  Numbers used(group, 0.0);
  if (advantages && valid.size() >= 2) {
    const Numbers given = numbers(*advantages, p);
    for (const int64_t g : valid) used[g] = given[g];
  } else if (rewards) {
    used = standardised(numbers(*rewards, p), valid, 0, eps);
    Numbers magnitude(used);
    for (double& term : magnitude) term = std::abs(term);
    divide_by_quasi_norm(used, magnitude, valid, p_norm, eps);
  }
  return used;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs objective(Tensor moving, std::optional<Tensor> old, bool literal, std::optional<Tensor> latents, Tensor slope,
                  Tensor candidates, Tensor anchor_index, std::optional<Tensor> advantages,
                  std::optional<Tensor> rewards, std::optional<Tensor> mask, double p_norm, double ratio_low,
                  double ratio_high, std::optional<double> temperature, double kl_coef) {
  const int64_t prompts = moving.size(0), anchors = moving.size(1), group = candidates.size(1);
  const Split split(prompts, moving.size(2));
  const auto valid = valid_candidates(candidates, mask);
  const auto own = own_candidates(candidates, anchor_index);
  const Tensor slopes = contiguous(slope), index = contiguous(anchor_index);
  const auto of_anchors = [&] { return new_empty(slope, {prompts, anchors}); };
  const auto of_candidates = [&] { return new_empty(slope, {prompts, anchors, group}); };
  Tensor loss = of_anchors(), weights = of_candidates(), log_ratio = of_candidates(), policy = of_candidates(),
         clip_fraction = of_anchors(), clamp_fraction = of_anchors(), kl = of_anchors(), entropy = of_anchors(),
         grad_norm = of_anchors(), spread = new_empty(slope, {prompts}), used = new_empty(slope, {prompts, group});

  with_sum_type(slope.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto put = [](Tensor& tensor, int64_t at, double value) {
      tensor.mutable_data_ptr<T>()[at] = static_cast<T>(value);
    };
    const auto put_row = [&](Tensor& tensor, int64_t at, const Numbers& values) {
      for (int64_t g = 0; g < group; ++g) put(tensor, at * group + g, values[g]);
    };
    const T* slope_of = slopes.const_data_ptr<T>();
    const std::vector<double> totals =
        sum_over_dim(split, moving, old, literal, latents, slope_of, candidates, own, valid);
    const int64_t pairs = anchors * group;
    for (int64_t p = 0; p < prompts; ++p) {
      const double* toward = totals.data() + p * (2 * pairs + group * group);
      const Sums sums{toward, toward + pairs, toward + 2 * pairs, group};
      const double mean = mean_sqdist(sums, valid[p]), tau = temperature.value_or(mean == 0 ? 1 : mean);
      const Numbers gain = used_advantages(advantages, rewards, p, group, valid[p], p_norm,
                                           std::numeric_limits<T>::epsilon());
      put(spread, p, mean);
      put_row(used, p, gain);
      for (int64_t b = 0; b < anchors; ++b) {
        const int64_t at = p * anchors + b;
        const bool anchor_is_valid = index.const_data_ptr<int64_t>()[at] == own[at] &&
                                     std::binary_search(valid[p].begin(), valid[p].end(), own[at]);
        const double factor = -2 * static_cast<double>(slope_of[at]) / tau / (prompts * anchors);
        const Anchor result = finish(sums, b, own[at], anchor_is_valid, valid[p], tau, factor, gain,
                                     {ratio_low, ratio_high, kl_coef});
        put(loss, at, result.loss);
        put_row(weights, at, result.weights);
        put_row(log_ratio, at, result.log_ratio);
        put_row(policy, at, result.policy);
        put(clip_fraction, at, result.clip_fraction);
        put(clamp_fraction, at, result.clamp_fraction);
        put(kl, at, result.kl);
        put(entropy, at, result.entropy);
        put(grad_norm, at, result.grad_norm);
      }
    }
  });
  return {loss, weights, log_ratio, policy, clip_fraction, clamp_fraction, kl, entropy, grad_norm, spread, used};
}

Tensor quasi_norm_advantages(Tensor rewards, double p_norm, Tensor weights, Tensor min_reward_std,
                             std::optional<Tensor> mask) {
  const int64_t number = rewards.size(0), prompts = rewards.size(1), group = rewards.size(2);
  const bool wide = rewards.scalar_type() == ScalarType::Double;
  Tensor result = new_empty(rewards, {prompts, group}, wide ? ScalarType::Double : ScalarType::Float);
  with_sum_type(result.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const double eps = std::numeric_limits<T>::epsilon();
    if (prompts == 0) return;
    const auto valid = valid_candidates(select(rewards, 0, 0), mask);
    for (int64_t p = 0; p < prompts; ++p) {
      Numbers combined(group, 0.0), magnitude(group, 0.0);
      for (int64_t r = 0; r < number; ++r) {
        const double weight = weights.const_data_ptr<T>()[r * weights.stride(0)];
        const double min_std = min_reward_std.const_data_ptr<T>()[r * min_reward_std.stride(0)];
        const Numbers term = standardised(numbers(select(rewards, 0, r), p), valid[p], min_std, eps);
        for (int64_t g = 0; g < group; ++g) {
          combined[g] += weight * term[g];
          magnitude[g] += std::abs(weight * term[g]);
        }
      }
      divide_by_quasi_norm(combined, magnitude, valid[p], p_norm, eps);
      for (int64_t g = 0; g < group; ++g) {
        result.mutable_data_ptr<T>()[p * group + g] = static_cast<T>(combined[g]);
      }
    }
  });
  return result;
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
        const T* weights_p = weights_of.data() + p * anchors * group;
        add_weighted(x, valid[p], weights_p, origin_of, anchors, group, count, sums.data());
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
    const std::vector<double> sums = split.sum_tiles(rows * group, [&] {
      return [&, x = TileOf<T>(group), scratch = std::vector<T>(TILE)](int64_t p, int64_t begin, int64_t count,
                                                                       double* sums) mutable {
        x.read(candidate_rows, p, begin, count);
        for (int64_t b = 0; b < rows; ++b) {
          const T* anchor = anchor_rows.tile(p, b, begin, count, scratch.data());
          add_sqdist(x, valid[p], 0, anchor, count, sums + b * group);
        }
      };
    });
    for (size_t i = 0; i < sums.size(); ++i) result.mutable_data_ptr<T>()[i] = static_cast<T>(sums[i]);
  });
  return result;
}

// sum_i weights[b, i] (x_i - anchor_b) in the dtype of the anchors: with weights -2 grad, pairwise_sqdist's gradient.
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

// A tile of one draw, and what it is made of in units of the standard deviation, as in the reference's `whitened`.
template <typename T>
class Whitened {
 public:
  struct Parts {
    Vector<T> shift;  // mean(moving) - mean(old)
    Vector<T> drift;  // mean(moving) - the mean that x' was drawn around
    Vector<T> rest;   // x' - mean(moving)
  };

  Whitened(const Tensor& moving, const std::optional<Tensor>& old, const std::optional<Tensor>& rollout,
           const std::optional<Tensor>& noise)
      : moving_(moving), scratch_(4 * TILE) {
    if (old) old_.emplace(*old);
    if (rollout) rollout_.emplace(*rollout);
    if (noise) noise_.emplace(*noise);
  }

  void read(int64_t m, T scale, int64_t begin, int64_t count) {
    const auto tile = [&](const std::optional<Rows>& rows, int64_t number) -> const T* {
      return rows ? rows->tile(m, 0, begin, count, &scratch_[number * TILE]) : nullptr;
    };
    scale_ = scale;
    moving_d_ = moving_.tile(m, 0, begin, count, &scratch_[0]);
    old_d_ = tile(old_, 1);
    rollout_d_ = tile(rollout_, 2);
    noise_d_ = tile(noise_, 3);
  }

  Parts operator[](int64_t d) const {
    const Vector<T> moving = load(moving_d_ + d);
    // without `old` 0, but NaN where `moving` is not finite
    const Vector<T> shift = scale_ * (moving - (old_d_ ? load(old_d_ + d) : moving));
    const Vector<T> drift = rollout_d_ ? scale_ * (moving - load(rollout_d_ + d)) : shift;
    return {shift, drift, noise_d_ ? load(noise_d_ + d) - drift : -drift};
  }

 private:
  Rows moving_;
  std::optional<Rows> old_, rollout_, noise_;
  std::vector<T> scratch_;
  T scale_ = 0;
  const T *moving_d_ = nullptr, *old_d_ = nullptr, *rollout_d_ = nullptr, *noise_d_ = nullptr;
};

// The fields of the reference's GaussianRatio, stacked: [5, M].
Tensor gaussian_log_ratio(Tensor moving, std::optional<Tensor> old, std::optional<Tensor> rollout,
                          std::optional<Tensor> noise, Tensor scale) {
  constexpr int64_t MEANS = 5;
  const int64_t rows = moving.size(0), dim = moving.size(1);
  const Split split(rows, dim);
  const Tensor scales = contiguous(scale);
  Tensor result = new_empty(scale, {MEANS, rows});
  with_sum_type(scale.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* scale_of = scales.const_data_ptr<T>();
    const std::vector<double> totals = split.sum_tiles(MEANS, [&] {
      return [&, parts = Whitened<T>(moving, old, rollout, noise)](int64_t m, int64_t begin, int64_t count,
                                                                  double* sums) mutable {
        constexpr T HALF = 0.5;
        Vector<T> sum[MEANS] = {};
        parts.read(m, scale_of[m], begin, count);
        for (int64_t d = 0; d < count; d += LANES<T>) {
          const auto [shift, drift, rest] = parts[d];
          sum[0] += shift * (rest + HALF * shift);
          sum[1] += HALF * shift * shift;
          sum[2] += rest * rest;
          sum[3] += drift * (rest + HALF * drift);
          sum[4] += HALF * drift * drift;
        }
        for (int64_t i = 0; i < MEANS; ++i) sums[i] += sum_of_lanes<T>(sum[i]);
      };
    });
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < MEANS; ++i) {
        result.mutable_data_ptr<T>()[i * rows + m] = static_cast<T>(totals[m * MEANS + i] / dim);
      }
    }
  });
  return result;
}

Tensor gaussian_log_ratio_grad(Tensor moving, std::optional<Tensor> old, std::optional<Tensor> rollout,
                               std::optional<Tensor> noise, Tensor scale, Tensor by_log_ratio, Tensor by_kl) {
  constexpr int64_t WRITTEN = 8 * LANES<float>;  // at a time: the stores of a whole tile would hold up the next loads
  const int64_t rows = moving.size(0), dim = moving.size(1);
  const Split split(rows, dim);
  const Tensor scales = contiguous(scale), by_log_ratios = contiguous(by_log_ratio), by_kls = contiguous(by_kl);
  Tensor result = new_empty(moving, {rows, dim});
  with_sum_type(scale.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* scale_of = scales.const_data_ptr<T>();
    split.for_each_tile([&] {
      return [&, parts = Whitened<T>(moving, old, rollout, noise), grad = std::array<T, WRITTEN>()](
                 int64_t, int64_t m, int64_t begin, int64_t count) mutable {
        const T by_rest = scale_of[m] / dim * by_log_ratios.const_data_ptr<T>()[m];
        const T by_shift = scale_of[m] / dim * by_kls.const_data_ptr<T>()[m];
        parts.read(m, scale_of[m], begin, count);
        with_type(result.scalar_type(), [&](auto element) {
          auto* to = result.mutable_data_ptr<decltype(element)>() + m * dim + begin;
          for (int64_t first = 0; first < count; first += WRITTEN) {
            const int64_t size = std::min(WRITTEN, count - first);
            for (int64_t d = 0; d < size; d += LANES<T>) {
              const auto [shift, drift, rest] = parts[first + d];
              store(&grad[d], by_rest * rest + by_shift * shift);
            }
            for (int64_t d = 0; d < size; ++d) to[first + d] = convert<decltype(element)>(grad[d]);
          }
        });
      };
    });
  });
  return result;
}

}  // namespace
}  // namespace ngrpo

STABLE_TORCH_LIBRARY_IMPL(ngrpo_cpp, CPU, m) {
  m.impl("objective", TORCH_BOX(&ngrpo::objective));
  m.impl("weighted_differences", TORCH_BOX(&ngrpo::weighted_differences));
  m.impl("pairwise_sqdist", TORCH_BOX(&ngrpo::pairwise_sqdist));
  m.impl("weighted_sum_from", TORCH_BOX(&ngrpo::weighted_sum_from));
  m.impl("quasi_norm_advantages", TORCH_BOX(&ngrpo::quasi_norm_advantages));
  m.impl("gaussian_log_ratio", TORCH_BOX(&ngrpo::gaussian_log_ratio));
  m.impl("gaussian_log_ratio_grad", TORCH_BOX(&ngrpo::gaussian_log_ratio_grad));
}
