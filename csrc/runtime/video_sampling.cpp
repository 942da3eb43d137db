#include "csrc/runtime/video_sampling.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace edgerun {

namespace {

uint64_t next_random(uint64_t* state) {
  *state += 0x9e3779b97f4a7c15u;
  uint64_t mixed = *state;
  mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
  return mixed ^ (mixed >> 31);
}

double next_uniform(uint64_t* state) { return static_cast<double>(next_random(state) >> 11) * 0x1p-53; }

// ln(x) for x in (0, 1] in IEEE double operations alone. x = m 2^e with m in [sqrt(1/2), sqrt(2)), f = (m - 1) / (m + 1):
// ln m = 2 (f + f^3 / 3 + f^5 / 5 + …), |f| < 0.172, to f^21 (error below 1e-17).
double portable_log(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) {
    m *= 2.0;
    --exponent;
  }
  const double f = (m - 1.0) / (m + 1.0), square = f * f;
  double sum = 0.0;
  for (int power = 21; power >= 1; power -= 2) sum = sum * square + 1.0 / power;
  return exponent * 0.69314718055994530942 + 2.0 * f * sum;
}

}  // namespace

void fill_noise(uint64_t seed, std::span<float> noise) {
  uint64_t state = seed;
  for (size_t i = 0; i < noise.size(); i += 2) {
    double a = 0.0, b = 0.0, square = 0.0;
    do {
      a = 2.0 * next_uniform(&state) - 1.0;
      b = 2.0 * next_uniform(&state) - 1.0;
      square = a * a + b * b;
    } while (square >= 1.0 || square == 0.0);
    const double scale = std::sqrt(-2.0 * portable_log(square) / square);
    noise[i] = static_cast<float>(a * scale);
    if (i + 1 < noise.size()) noise[i + 1] = static_cast<float>(b * scale);
  }
}

void guide(std::span<float> conditional, std::span<const float> unconditional, float scale) {
  for (size_t i = 0; i < conditional.size(); ++i) {
    conditional[i] = unconditional[i] + scale * (conditional[i] - unconditional[i]);
  }
}

void euler_step(std::span<float> x, std::span<const float> velocity, float step) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += velocity[i] * step;
}

void adams_bashforth_step(std::span<float> x, std::span<const float> velocity, std::span<const float> before,
                          float turn, float step) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += (velocity[i] + turn * (velocity[i] - before[i])) * step;
}

void rotary_angles(std::span<const float> positions, std::span<const float> frequencies, std::vector<float>* cosines,
                   std::vector<float>* sines) {
  cosines->clear();
  sines->clear();
  for (const float position : positions) {
    for (const float frequency : frequencies) {
      const float angle = position * frequency;
      cosines->insert(cosines->end(), 2, std::cos(angle));
      sines->insert(sines->end(), 2, std::sin(angle));
    }
  }
}

void to_pixels(std::span<const float> frames, uint8_t* target) {
  const size_t pixels = frames.size() / 3;
  for (size_t channel = 0; channel < 3; ++channel) {
    const float* const source = frames.data() + channel * pixels;
    for (size_t i = 0; i < pixels; ++i) {
      const float level = (source[i] + 1.0f) * 127.5f + 0.5f;
      // Not a number becomes 0: the comparison fails.
      target[3 * i + channel] = static_cast<uint8_t>(level > 0.0f ? std::min(level, 255.0f) : 0.0f);
    }
  }
}

bool LeapRule::observe(double time, std::span<const float> velocity) {
  if (options_.kind == LeapKind::kNone) return false;
  if (options_.kind == LeapKind::kFixed) return --left_ <= 0;
  if (previous_.empty()) {
    previous_.assign(velocity.begin(), velocity.end());
    return false;
  }
  double product = 0.0, before = 0.0, now = 0.0;
  for (size_t i = 0; i < velocity.size(); ++i) {
    const double a = previous_[i], b = velocity[i];
    product += a * b;
    before += a * a;
    now += b * b;
  }
  previous_.assign(velocity.begin(), velocity.end());
  constexpr double kLeast = 1e-8;  // of a length, as torch's cosine_similarity has it
  const double cosine = product / (std::max(std::sqrt(before), kLeast) * std::max(std::sqrt(now), kLeast));
  if (cosine > best_ + options_.tolerance) {
    best_ = cosine;
    stale_ = 0;
  } else {
    ++stale_;
  }
  return time <= options_.latest_time && stale_ >= options_.patience;
}

void LeapRule::set_state(State state) {
  stale_ = state.stale;
  best_ = state.best;
  previous_ = std::move(state.previous);
}

}  // namespace edgerun
