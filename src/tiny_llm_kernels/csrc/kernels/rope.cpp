// Rotary positions: rotates each pair (x[i], x[i + D/2]) by the angle position * inv_freq[i].
//
//     | a_0 a_1 ... a_{D/2-1} | b_0 b_1 ... b_{D/2-1} |
//     a_i' = a_i cos - b_i sin        b_i' = b_i cos + a_i sin
//
// The angle can reach 131,072 radians, but its sine needs seven digits of the remainder after whole turns. So
// the angle and the remainder are doubles, and only the remainder is converted to float.
#include "kernels.h"
#include "vec.h"

namespace tiny_llm::TINY_LLM_ISA {

/// cos and sin of eight angles:  angle = n * pi/2 + r,  |r| <= pi/4, then polynomials in r; the quadrant
/// n mod 4 selects which polynomial is which function, and the signs.
INLINE void cos_sin(f64x8 angle, f32x8& cosine, f32x8& sine) {
  const double magic = 0x1.8p52, half_pi_high = 0x1.921fb544p0, half_pi_low = 0x1.0b4611a626331p-34;
  f64x8 n = (angle * 0x1.45f306dc9c883p-1 + magic) - magic;
  f64x8 r = (angle - n * half_pi_high) - n * half_pi_low;  // n has 18 bits, half_pi_high 33: exact
  f32x8 x = __builtin_convertvector(r, f32x8), x2 = x * x;
  i32x8 quadrant = __builtin_convertvector(n, i32x8);

  f32x8 s = fma(splat(-1.9515295891e-4f), x2, splat(8.3321608736e-3f));
  s = fma(s, x2, splat(-1.6666654611e-1f));
  s = fma(s * x2, x, x);
  f32x8 c = fma(splat(2.443315711809948e-5f), x2, splat(-1.388731625493765e-3f));
  c = fma(c, x2, splat(4.166664568298827e-2f));
  c = fma(c * x2, x2, fma(splat(-0.5f), x2, splat(1.0f)));

  i32x8 swapped = -(quadrant & 1);  // all ones where cos and sin are exchanged
  u32x8 sign_of_cos = bits_as<u32x8>((quadrant + 1) & 2) << 30;
  u32x8 sign_of_sin = bits_as<u32x8>(quadrant & 2) << 30;
  cosine = bits_as<f32x8>(bits_as<u32x8>(swapped != 0 ? s : c) ^ sign_of_cos);
  sine = bits_as<f32x8>(bits_as<u32x8>(swapped != 0 ? c : s) ^ sign_of_sin);
}

/// Rotates eight pairs of every head: i .. i+7 and D/2+i .. D/2+i+7 (`count` < 8 pairs at the end of a row).
INLINE void rotate(const RopeJob& job, const float* x, float* out, int64_t position, int64_t i,
                   int64_t count) {
  const int64_t half = job.D / 2;
  f64x8 frequency = __builtin_convertvector(load_first(job.inv_freq + i, count), f64x8);
  f32x8 c, s;
  cos_sin(frequency * static_cast<double>(position), c, s);
  for (int64_t head = 0; head < job.H; ++head) {
    const float* from = x + head * job.x_head + i;
    float* to = out + head * job.D + i;
    f32x8 a = load_first(from, count), b = load_first(from + half, count);
    store_first(to, a * c - b * s, count);
    store_first(to + half, b * c + a * s, count);
  }
}

void rope(const RopeJob& job, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t batch = item / job.L, token = item % job.L, half = job.D / 2;
    const float* x = job.x + batch * job.x_batch + token * job.x_token;
    float* out = job.out + item * job.H * job.D;
    const int64_t position = job.positions[token];
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) rotate(job, x, out, position, i, LANES);
    if (i < half) rotate(job, x, out, position, i, half - i);
  }
}

}  // namespace tiny_llm::TINY_LLM_ISA
