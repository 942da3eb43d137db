#include "csrc/runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace edgerun {

namespace {

constexpr uint64_t kMultiplier = 6364136223846793005u;
constexpr uint64_t kIncrement = 1442695040888963407u;

uint32_t next_pcg32(uint64_t* state) {
  const uint64_t old = *state;
  *state = old * kMultiplier + kIncrement;
  const auto shifted = static_cast<uint32_t>(((old >> 18) ^ old) >> 27);
  const auto rotation = static_cast<uint32_t>(old >> 59);
  return (shifted >> rotation) | (shifted << ((32 - rotation) & 31));
}

// exp(x) for x <= 0 in IEEE double operations alone: a libm's last bit differs between platforms, this does not.
// x = n ln 2 + r, |r| <= ln 2 / 2; Taylor to r^12 (error below 2^-51).
double portable_exp(double x) {
  if (x < -700.0) return 0.0;
  constexpr double kInverseFactorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,      1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
  constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  const double n = std::floor(x * 1.44269504088896338700 + 0.5);
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double sum = kInverseFactorial[12];
  for (int power = 11; power >= 0; --power) sum = sum * r + kInverseFactorial[power];
  return std::ldexp(sum, static_cast<int>(n));
}

}  // namespace

Status check(const SamplerOptions& options) {
  const auto invalid = [](const std::string& message) { return Status(StatusCode::kInvalidArgument, message); };
  if (!std::isfinite(options.temperature) || options.temperature < 0.0f) {
    return invalid("temperature is " + std::to_string(options.temperature) +
                   "; it must be 0 (greedy) or above and finite");
  }
  if (options.top_k < 0) {
    return invalid("top_k is " + std::to_string(options.top_k) + "; it must be 0 (all tokens) or above");
  }
  if (!(options.top_p > 0.0f && options.top_p <= 1.0f)) {
    return invalid("top_p is " + std::to_string(options.top_p) + "; it must be above 0 and at most 1 (all tokens)");
  }
  return Status();
}

Sampler::Sampler(const SamplerOptions& options) : options_(options) {
  next_pcg32(&state_);
  state_ += options.seed;
  next_pcg32(&state_);
}

double Sampler::uniform() {
  const uint64_t high = next_pcg32(&state_) >> 5, low = next_pcg32(&state_) >> 6;
  return static_cast<double>(high << 26 | low) * 0x1p-53;
}

Status Sampler::sample(std::span<const float> logits, int64_t* token) {
  const auto count = static_cast<int64_t>(logits.size());
  int64_t best = -1;
  for (int64_t id = 0; id < count; ++id) {
    if (std::isnan(logits[id]) || logits[id] == std::numeric_limits<float>::infinity()) {
      return Status(StatusCode::kInternal, "the logit of token " + std::to_string(id) + " is " +
                                               (std::isnan(logits[id]) ? "NaN" : "infinite") +
                                               ": the program overflowed; validate the bundle, or export it as fp32");
    }
    if (logits[id] != -std::numeric_limits<float>::infinity() && (best < 0 || logits[id] > logits[best])) best = id;
  }
  if (best < 0) return Status(StatusCode::kInternal, "no logit is above -infinity: validate the bundle");
  *token = best;
  if (options_.temperature == 0.0f || options_.top_k == 1) return Status();

  weights_.resize(count);
  const double highest = logits[best], temperature = options_.temperature;
  for (int64_t id = 0; id < count; ++id) weights_[id] = portable_exp((logits[id] - highest) / temperature);
  order_.resize(count);
  std::iota(order_.begin(), order_.end(), int64_t{0});
  int64_t kept = count;
  double total = 0.0;
  const auto better = [&](int64_t a, int64_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  if (options_.top_k > 0 && options_.top_k < count) {
    kept = options_.top_k;
    std::partial_sort(order_.begin(), order_.begin() + kept, order_.end(), better);
  }
  for (int64_t rank = 0; rank < kept; ++rank) total += weights_[order_[rank]];
  if (options_.top_p < 1.0f) {
    // The nucleus is small: sort a little, and four times as much for as long as it is not in there.
    const double wanted = static_cast<double>(options_.top_p) * total;
    int64_t sorted = kept < count ? kept : 0, rank = 0;
    double reached = 0.0;
    for (; rank < kept && reached < wanted; ++rank) {
      if (rank == sorted) {
        sorted = std::min(kept, std::max<int64_t>(64, 4 * sorted));
        std::partial_sort(order_.begin() + rank, order_.begin() + sorted, order_.end(), better);
      }
      reached += weights_[order_[rank]];
    }
    kept = rank;
    total = reached;
  }
  const double target = uniform() * total;
  double reached = 0.0;
  for (int64_t rank = 0; rank < kept; ++rank) {
    *token = order_[rank];
    reached += weights_[*token];
    if (reached > target) break;
  }
  return Status();
}

}  // namespace edgerun
