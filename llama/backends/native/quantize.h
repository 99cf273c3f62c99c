// The search for a matrix's scales and values in 8, 5 or 4 bits: quantization.py's `fit`, for LANES groups at once.
#pragma once
#include "matrix.h"
#include "threads.h"

#include <array>

constexpr int file_bytes(int bits) { return bits == 8 ? 32 : bits == 5 ? 20 : 16; }  // of a group's values

typedef std::array<F, GROUP> Groups;  // LANES groups: input i of each in vector i

static inline F root(F v) {
  for (int i = 0; i < LANES; i++) v[i] = std::sqrt(v[i]);
  return v;
}
static inline F rounded(F v) { return v + 12582912.f - 12582912.f; }  // to even; 1.5 · 2^23 leaves only the integer part
static inline F at_least(F v, float least) { return v < least ? splat(least) : v; }

// To fp16 and back: to nearest even; too large values become infinite.
static inline uint16_t to_half(float f) {
  const uint32_t bits = load<uint32_t>(&f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) return uint16_t(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (magnitude < 0x38800000) {  // a multiple of 2^-24, the smallest subnormal number
    const float tiny = load<float>(&magnitude) + .5f;  // has this unit in the last place
    return uint16_t(sign | (load<uint32_t>(&tiny) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
static inline F through_half(F v) {
#if LANES == 16
  return (F)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < LANES; i++) v[i] = from_half(to_half(v[i]));
  return v;
#endif
}

// Of LANES groups: scales and minima, both rounded to fp16, and the values that are nearest for these.
struct Fit { F scale, low; Groups values; };

struct Search {
  const Groups& w;
  const float least, most;
  const bool shifted;  // whether there is a minimum
  Groups share, centred;  // each weight's part of the error, and that of its difference from the mean
  F mean;
  Groups values;

  Search(const Groups& w, int bits)
      : w(w), least(bits == 8 ? -127 : 0), most(bits == 8 ? 127 : (1 << bits) - 1), shifted(bits != 8) {}

  void nearest(F scale, F low) {
    const F inverse = 1.f / scale;
    for (int i = 0; i < GROUP; i++) {
      const F q = rounded((w[i] - low) * inverse);
      values[i] = q < least ? splat(least) : q > most ? splat(most) : q;
    }
  }
  struct Line { F explained, scale, low; };
  // The variance explained by the nearest values, and the scale and minimum of a linear regression on them.
  Line regress(F scale, F low) {
    nearest(scale, low);
    F mean_q = {}, covariance = {}, variance = {};
    if (shifted)
      for (int i = 0; i < GROUP; i++) mean_q = fma(share[i], values[i], mean_q);
    for (int i = 0; i < GROUP; i++) {
      const F q = values[i] - mean_q;
      covariance = fma(centred[i], q, covariance), variance = fma(share[i] * q, q, variance);
    }
    scale = through_half(at_least(variance > 1e-6f ? covariance / variance : scale, 1e-7f));
    return {scale * (2.f * covariance - scale * variance), scale, mean - scale * mean_q};
  }

  // counts: how much each squared error counts, or null.
  void weigh(const Groups* counts) {
    F squares = {}, total = {}, sum = {};
    for (const F& v : w) squares = fma(v, v, squares);
    for (int i = 0; i < GROUP; i++) {
      const F size = root(w[i] * w[i] + squares / float(GROUP));
      share[i] = (counts ? size * (*counts)[i] : size) + 1e-20f, total += share[i];
    }
    for (int i = 0; i < GROUP; i++) share[i] /= total, sum = fma(share[i], w[i], sum);
    mean = shifted ? sum : F{};
    for (int i = 0; i < GROUP; i++) centred[i] = share[i] * (w[i] - mean);
  }

  Fit fit(const Groups* counts) {
    F low = w[0], high = w[0];
    for (const F& v : w) low = v < low ? v : low, high = v > high ? v : high;
    if (!shifted) high = larger(-low, high), low = -high;
    const F middle = (low + high) / 2.f, reach = (high - low) / 2.f;
    Line best = {middle, at_least(reach / most, 1e-7f), middle};
    if (shifted || counts) {
      weigh(counts);
      int start = 0;
      for (float below : {1.f, .95f})
        for (float above : {1.f, .95f}) {
          const F scale = at_least(reach * (below + above) / (most - least), 1e-7f);
          better(best, regress(scale, shifted ? middle - reach * below : F{}), start++ == 0);
        }
      for (int i = 0; i < 2; i++) better(best, regress(best.scale, best.low), false);
    }
    best.scale = through_half(best.scale), best.low = through_half(best.low);
    nearest(best.scale, best.low);
    return {best.scale, best.low, values};
  }
  static void better(Line& best, Line found, bool always) {
    if (always) best = found;
    const I more = found.explained > best.explained;
    best = {more ? found.explained : best.explained, more ? found.scale : best.scale, more ? found.low : best.low};
  }
};

// The values of LANES groups, packed as in a file, `bytes` per group; `groups` of them are stored.
static inline void store_values(const Groups& q, int bits, int groups, uint8_t* to) {
  U units[GROUP / 4] = {};
  const int fifths = bits == 5, bytes = file_bytes(bits);
  for (int i = 0; i < GROUP; i++) {
    const U v = (U)__builtin_convertvector(q[i], I);
    if (bits == 8) units[i / 4] |= (v & 255) << (i % 4 * 8);
    else units[fifths + i % 16 / 4] |= (v & 15) << (i % 4 * 8 + i / 16 * 4);
    if (fifths) units[0] |= (v >> 4) << i;
  }
  for (int u = 0; u < bytes / 4; u++)
    for (int g = 0; g < groups; g++) memcpy(to + g * bytes + 4 * u, (uint32_t*)&units[u] + g, 4);
}

// One row of `cols` weights, fp32 or bf16, into its groups' values, scales and minima.
static void quantize_row(int bits, int kind, const uint8_t* from, int cols, const float* counts, uint8_t* values,
                         uint16_t* scales, uint16_t* mins) {
  const int bytes = file_bytes(bits);
  std::vector<float> row(cols);
  if (kind == FP32) memcpy(row.data(), from, cols * sizeof(float));
  else for (int k = 0; k < cols; k++) row[k] = from_bf16(load<uint16_t>(from + 2 * size_t(k)));
  for (int g = 0; g < cols / GROUP; g += LANES) {
    const int here = std::min(LANES, cols / GROUP - g);
    Groups w, count;
    const auto gather = [&](const float* all, Groups& to) {
      tile_units((const uint8_t*)(all + g * GROUP), GROUP * sizeof(float), here, GROUP, (uint32_t*)to.data());
    };
    gather(row.data(), w);
    if (counts) gather(counts, count);
    const Fit found = Search(w, bits).fit(counts ? &count : nullptr);
    store_values(found.values, bits, here, values + size_t(g) * bytes);
    for (int i = 0; i < here; i++) {
      scales[g + i] = to_half(found.scale[i]);
      if (mins) mins[g + i] = to_half(found.low[i]);
    }
  }
}

// A matrix (rows, cols), fp32 or bf16, in groups. counts: (cols), or null; mins: null for 8 bits.
extern "C" void llama_quantize(int32_t bits, int32_t kind, const uint8_t* from, int64_t stride, int32_t rows, int32_t cols,
                               const float* counts, uint8_t* values, uint16_t* scales, uint16_t* mins, int32_t threads) {
  const size_t groups = cols / GROUP, bytes = groups * file_bytes(bits);
  in_parallel(rows, threads, [&](int i) {
    quantize_row(bits, kind, from + i * stride, cols, counts, values + i * bytes, scales + i * groups,
                 mins ? mins + i * groups : nullptr);
  });
}
