// video_sampling: the arithmetic of a video's sampling loop: noise, guidance, steps, and when to leap. Compiled
// without contraction, so that it rounds as eager float32 does (edgerun/models/rectified_flow.py).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "csrc/runtime/video_bundle.h"

namespace edgerun {

// Standard normal numbers, the same for a seed on every platform: SplitMix64 (Steele, Lea and Flood 2014) from `seed`
// on, its upper 53 bits as u in [0, 1); pairs (2 u - 1, 2 u' - 1) inside the unit circle, by the polar method
// (Marsaglia and Bray 1964), a pair's first number first; rounded to float32. Only IEEE operations: no libm.
void fill_noise(uint64_t seed, std::span<float> noise);

// Velocities of the prompt and of no caption → the prompt's, `scale` times as far from the other. In place of the first.
void guide(std::span<float> conditional, std::span<const float> unconditional, float scale);

// x += velocity * step
void euler_step(std::span<float> x, std::span<const float> velocity, float step);
// x += (velocity + turn * (velocity - before)) * step: a step of Adams-Bashforth's second order, `before` being the
// velocity of the step before and `turn` this step's length over twice that one's.
void adams_bashforth_step(std::span<float> x, std::span<const float> velocity, std::span<const float> before,
                          float turn, float step);

// Cosines and sines [positions, 2 * frequencies] of the rotary embedding; neighbours share an angle.
void rotary_angles(std::span<const float> positions, std::span<const float> frequencies, std::vector<float>* cosines,
                   std::vector<float>* sines);

// Frames [3, n, H, W] in [-1, 1] → uint8 [n, H, W, 3].
void to_pixels(std::span<const float> frames, uint8_t* target);

// When the last velocity is followed to the end (linear proportional leap, arXiv 2502.04363 section 3.1; the rules of
// edgerun/techniques/linear_proportional_leap.py). It serves one sample; its state can be kept and set.
class LeapRule {
 public:
  // evaluations: that the sample had before, also by a run with another rule.
  explicit LeapRule(const LeapOptions& options, int64_t evaluations = 0)
      : options_(options), left_(options.evaluations - evaluations) {}

  // Takes note of a velocity that was evaluated at `time`; true: leap.
  bool observe(double time, std::span<const float> velocity);
  // Whether the next velocity is certain to be the last; the cosine rule never knows.
  bool leaps_next() const { return options_.kind == LeapKind::kFixed && left_ <= 1; }

  struct State {
    int64_t stale = 0;
    double best = -1.0;
    std::vector<float> previous;  // the cosine rule's last velocity
  };
  State state() const { return {stale_, best_, previous_}; }
  void set_state(State state);

 private:
  LeapOptions options_;
  int64_t left_ = 0, stale_ = 0;
  double best_ = -1.0;
  std::vector<float> previous_;
};

}  // namespace edgerun
