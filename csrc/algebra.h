// The algebra of ngrpo_kernels/reference.py on one row, once its sums over D are known: the same steps and names.
//
// All in double, which costs next to nothing here. `eps` is the rounding of the dtype that the caller sees; it decides
// which rewards count as flat. Comparisons are written so that NaN gets through.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace ngrpo {

using Numbers = std::vector<double>;

constexpr double LOG_RATIO_LIMIT = 20;
constexpr double NaN = std::numeric_limits<double>::quiet_NaN();

inline double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// Rewards of a group minus their mean, divided by their standard deviation (Eq. 3); zeros where they are flat.
inline Numbers standardised(const Numbers& rewards, const std::vector<int64_t>& valid, double min_std, double eps) {
  const double count = static_cast<double>(valid.size());
  Numbers result(rewards.size(), 0.0);
  for (const int64_t g : valid) result[g] = rewards[g];
  for (int pass = 0; pass < 2; ++pass) {  // the second removes the rounding of the first mean
    double sum = 0;
    for (const int64_t g : valid) sum += result[g];
    for (const int64_t g : valid) result[g] -= sum / count;
  }
  double largest = 0, peak = 0, squares = 0;
  for (const int64_t g : valid) {
    largest = std::max(largest, std::abs(result[g]));
    peak = std::max(peak, std::abs(rewards[g]));
  }
  for (const int64_t g : valid) {
    result[g] /= largest > 0 ? largest : 1;  // squares of tiny and huge rewards stay in range
    squares += result[g] * result[g];
  }
  const double unit_std = std::sqrt(squares / std::max(1.0, count - 1)), std = largest * unit_std;
  const bool flat = std <= 8 * eps * peak || std < min_std || count < 2;
  for (const int64_t g : valid) result[g] = flat ? 0 * result[g] : result[g] / unit_std;  // 0 * NaN stays NaN
  return result;
}

// combined / |combined|_p (Eq. 11); zeros where terms of size `magnitude` cancel, so that `combined` is only rounding.
inline void divide_by_quasi_norm(Numbers& combined, const Numbers& magnitude, const std::vector<int64_t>& valid,
                                 double p, double eps) {
  double peak = 0, largest = 0, total = 0;
  for (const int64_t g : valid) {
    peak = std::max(peak, std::abs(combined[g]));
    largest = std::max(largest, magnitude[g]);
  }
  const bool cancelled = peak <= 8 * eps * largest;
  for (const int64_t g : valid) total += std::pow(std::abs(combined[g]) / peak, p);
  const double quasi_norm = peak * std::pow(total, 1 / p);
  for (const int64_t g : valid) combined[g] = cancelled ? 0 * combined[g] : combined[g] / quasi_norm;
}

// The sums over D of a row: [B, G], [B, G] and [G, G]. Of the last, only the upper triangle is filled.
struct Sums {
  const double* toward;  // <y_i, a - x_j>
  const double* along;   // <y_i, delta>
  const double* sqdist;  // |x_i - x_k|^2, i <= k
  int64_t group;

  double pair(int64_t i, int64_t k) const { return sqdist[std::min(i, k) * group + std::max(i, k)]; }
};

// Mean squared distance over the pairs of valid candidates.
inline double mean_sqdist(const Sums& sums, const std::vector<int64_t>& valid) {
  double total = 0;
  for (size_t i = 0; i < valid.size(); ++i) {
    for (size_t k = i + 1; k < valid.size(); ++k) total += sums.pair(valid[i], valid[k]);
  }
  return total / std::max(1.0, valid.size() * (valid.size() - 1.0) / 2);
}

struct Anchor {
  double loss, clip_fraction, clamp_fraction, kl, entropy, grad_norm;
  Numbers weights, log_ratio, policy;  // [G]; zeros where masked
};

struct Settings {
  double ratio_low, ratio_high, kl_coef;
};

// Results for anchor `b` of a row, whose own candidate is `own`. `gain` are the advantages. The gradient's weights are
// multiplied by `factor`: d x_theta / d moving times -2 / tau, divided by the number of anchors of all prompts.
inline Anchor finish(const Sums& sums, int64_t b, int64_t own, bool anchor_is_valid,
                     const std::vector<int64_t>& valid, double tau, double factor, const Numbers& gain,
                     const Settings& settings) {
  const int64_t group = sums.group;
  Numbers log_old(group, 0.0), shift(group, 0.0), change(group, 0.0);
  double top = -INFINITY, total = 0;
  for (const int64_t i : valid) {
    log_old[i] = anchor_is_valid ? (2 * sums.toward[b * group + i] - sums.pair(i, own)) / tau : NaN;
    shift[i] = 2 * sums.along[b * group + i] / tau;
    top = std::max(top, log_old[i]);
  }
  for (const int64_t i : valid) total += std::exp(log_old[i] - top);
  for (const int64_t i : valid) log_old[i] -= top + std::log(total);

  // exactly 0 at delta = 0, and accurate relative to itself for small shifts, where logsumexp loses digits
  bool near = true;
  double shifted_top = -INFINITY, small = 0, large = 0;
  for (const int64_t i : valid) {
    near = near && std::abs(shift[i]) <= 1;
    shifted_top = std::max(shifted_top, log_old[i] + shift[i]);
    small += std::exp(log_old[i]) * std::expm1(shift[i]);
  }
  for (const int64_t i : valid) large += std::exp(log_old[i] + shift[i] - shifted_top);
  const double log_normalizer = near ? std::log1p(small) : shifted_top + std::log(large);

  Anchor result{0, 0, 0, 0, 0, 0, Numbers(group, 0.0), Numbers(group, 0.0), Numbers(group, 0.0)};
  double surrogate = 0, total_grad = 0;
  for (const int64_t i : valid) {
    const double log_ratio = result.log_ratio[i] = shift[i] - log_normalizer;
    const double pi_old = std::exp(log_old[i]), log_new = log_old[i] + log_ratio;
    change[i] = std::abs(log_ratio) <= 1 ? pi_old * std::expm1(log_ratio) : std::exp(log_new) - pi_old;
    result.policy[i] = pi_old + change[i];
    result.kl -= pi_old * log_ratio;
    result.entropy -= result.policy[i] * log_new;

    const double ratio = std::exp(clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT));
    const double at_ratio = gain[i] * ratio, at_bound = gain[i] * clamp(ratio, settings.ratio_low, settings.ratio_high);
    surrogate += at_ratio < at_bound ? at_ratio : at_bound;
    const bool clamped = std::abs(log_ratio) > LOG_RATIO_LIMIT;
    const bool clipped = gain[i] > 0 ? ratio > settings.ratio_high : ratio < settings.ratio_low;
    result.weights[i] = gain[i] * (clamped || clipped ? 0 : ratio);  // a NaN advantage stays NaN
    total_grad += result.weights[i];
    const bool outside = ratio < settings.ratio_low || ratio > settings.ratio_high;
    result.clip_fraction += (std::isnan(log_ratio) ? NaN : outside) / valid.size();
    result.clamp_fraction += (std::isnan(log_ratio) ? NaN : clamped) / valid.size();
  }
  result.loss = settings.kl_coef * result.kl - surrogate;
  for (const int64_t i : valid) {
    result.weights[i] =
        factor * (result.weights[i] - total_grad * result.policy[i] - settings.kl_coef * change[i]);
  }

  // |sum_i w_i y_i|^2 = sum_ik w_i w_k <y_i, y_k>, and 2 <y_i, y_k> = |y_i|^2 + |y_k|^2 - |x_i - x_k|^2
  double square = 0;
  for (const int64_t i : valid) {
    double row = 0;
    for (const int64_t k : valid) {
      row += result.weights[k] * (sums.pair(i, own) + sums.pair(k, own) - sums.pair(i, k));
    }
    square += result.weights[i] * row / 2;
  }
  result.grad_norm = std::sqrt(square < 0 ? 0 : square);
  if (valid.empty()) result.loss = result.clip_fraction = result.clamp_fraction = NaN;  // then no anchor is valid
  return result;
}

}  // namespace ngrpo
