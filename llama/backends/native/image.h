// Attention among the tokens of an image, in bf16 on AMX: vision/encoder.py's, for thousands of tokens.
//
// Some queries see the same keys a chunk at a time (Dao et al. 2022): scores, weights relative to the largest
// so far, and the sums of weighted values, which are scaled down when a larger score is found.
#pragma once
#include "product.h"

#ifdef AMX
class ImageAttention {
  static constexpr int QUERIES = 128;  // that share the reading of keys and values from memory
  static constexpr int KEYS = 256, STRIDE = KEYS + 16;  // a chunk; rows of 2^n would share cache sets
  static constexpr float NEVER = -1e5f;                 // the score of what a query does not see

  const uint16_t* qkv;  // (n, 3, heads, head_dim)
  uint16_t* out;        // (n, heads, head_dim)
  const int n, heads, hd, valid, wide, padded;  // wide: head_dim in whole registers; padded: n in pairs of tiles
  std::vector<Line> keys, values;               // tiles of each head
  std::vector<float> seen, blind;               // added to the scores of each key, in powers of 2

  const uint16_t* at(int token, int which, int head) const { return qkv + ((size_t(token) * 3 + which) * heads + head) * hd; }
  uint32_t* key_tile(int head, int i) { return keys[(size_t(head) * padded / 16 + i) * wide / 2].units; }
  uint32_t* value_tile(int head, int i) { return values[(size_t(head) * padded / 32 + i) * hd].units; }

  static F power_of_two(F x) {  // error 3e-6
    const F whole = (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT), part = x - whole;
    F p = splat(.00956051f);
    for (float c : {.05591704f, .24024981f, .69312197f, .99999919f}) p = fma(p, part, splat(c));
    return (F)_mm512_scalef_ps((__m512)p, (__m512)whole);
  }

  struct Work {  // of one thread
    alignas(64) uint16_t weights[32 * STRIDE];
    alignas(64) float scores[32 * STRIDE];
    float most[QUERIES], total[QUERIES];  // of each query: its largest score so far, and its sum of weights
    std::vector<Line> query_lines, sum_lines;
    uint16_t* queries;                    // (QUERIES, wide)
    float* sums;                          // (QUERIES, head_dim)
  };

  // Scores (32, count) of 32 queries for `count` keys, by pairs of tiles.
  void score(const uint16_t* queries, const uint32_t* tiles, int count, float* scores) const {
    fence();
    for (int k = 0; k < count; k += 32, tiles += 16 * wide) {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      for (int d = 0; d < wide; d += 32) {
        _tile_loadd(4, queries + d, wide * 2);
        _tile_loadd(5, queries + d + 16 * wide, wide * 2);
        _tile_loadd(6, tiles + 8 * d, 64);
        _tile_loadd(7, tiles + 8 * (d + wide), 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, scores + k, STRIDE * 4); _tile_stored(1, scores + k + 16, STRIDE * 4);
      _tile_stored(2, scores + k + 16 * STRIDE, STRIDE * 4); _tile_stored(3, scores + k + 16 * STRIDE + 16, STRIDE * 4);
    }
    fence();
  }
  // One query's scores to weights; `sums` are scaled down to them. bias: null if it is 0.
  void weigh(float* scores, int count, const float* bias, uint16_t* weights, float& most, float& total, float* sums) const {
    const F scale = splat(1.44269504f / std::sqrt(float(hd)));
    F top[2] = {splat(NEVER), splat(NEVER)}, sum_of[2] = {};
    for (int k = 0; k < count; k += 2 * LANES)
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        F s = load<F>(scores + k + i * LANES);
        if (bias) store(scores + k + i * LANES, s = fma(s, scale, load<F>(bias + k + i * LANES)));
        top[i] = (F)_mm512_max_ps((__m512)s, (__m512)top[i]);
      }
    const float found = _mm512_reduce_max_ps((__m512)larger(top[0], top[1])), now = std::max(bias ? found : found * scale[0], most);
    const F by = bias ? splat(1.f) : scale;
    for (int k = 0; k < count; k += 2 * LANES) {
      F e[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        e[i] = power_of_two(fma(load<F>(scores + k + i * LANES), by, splat(-now)));
        sum_of[i] += e[i];
      }
      store(weights + k, (Bytes)_mm512_cvtne2ps_pbh((__m512)e[1], (__m512)e[0]));
    }
    if (now > most) {
      const float down = std::exp2(most - now);
      for (int d = 0; d < hd; d += LANES) store(sums + d, load<F>(sums + d) * down);
      most = now, total *= down;
    }
    total += _mm512_reduce_add_ps((__m512)(sum_of[0] + sum_of[1]));
  }
  // Adds to the sums (32, head_dim) of 32 queries the values of `count` keys, times their weights.
  void add(const uint16_t* weights, const uint32_t* tiles, int count, float* sums) const {
    fence();
    for (int d = 0; d < hd; d += 32) {
      const bool two = d + 16 < hd;
      float *upper = sums + d, *lower = upper + 16 * hd;
      _tile_loadd(0, upper, hd * 4); _tile_loadd(2, lower, hd * 4);
      if (two) { _tile_loadd(1, upper + 16, hd * 4); _tile_loadd(3, lower + 16, hd * 4); }
      for (int k = 0; k < count; k += 32) {
        const uint32_t* tile = tiles + size_t(k / 32) * 16 * hd + 16 * d;
        _tile_loadd(4, weights + k, STRIDE * 2);
        _tile_loadd(5, weights + k + 16 * STRIDE, STRIDE * 2);
        _tile_loadd(6, tile, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
        if (two) {
          _tile_loadd(7, tile + 256, 64);
          _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, upper, hd * 4); _tile_stored(2, lower, hd * 4);
      if (two) { _tile_stored(1, upper + 16, hd * 4); _tile_stored(3, lower + 16, hd * 4); }
    }
    fence();
  }

 public:
  // bias: (n), added to the scores of each key, or null. Tokens from `valid` on see only those before.
  ImageAttention(const uint16_t* qkv, uint16_t* out, int n, int heads, int head_dim, int valid, const float* bias)
      : qkv(qkv), out(out), n(n), heads(heads), hd(head_dim), valid(valid), wide((hd + 31) / 32 * 32),
        padded((n + 31) / 32 * 32), keys(size_t(heads) * padded * wide / 32), values(size_t(heads) * padded * hd / 32),
        seen(padded, NEVER), blind(padded, NEVER) {
    for (int i = 0; i < n; i++) seen[i] = bias ? bias[i] * 1.44269504f : 0;
    std::fill_n(blind.begin(), valid, 0.f);
  }
  int blocks() const { return heads * (padded / 32); }
  // Arranges 32 tokens' keys and values of a head.
  void pack(int block) {
    const int head = block / (padded / 32), i = block % (padded / 32), count = std::min(32, n - 32 * i);
    for (int half = 0; half < 2; half++)
      if (count > 16 * half)
        tile_units((const uint8_t*)at(32 * i + 16 * half, 1, head), size_t(6) * heads * hd, std::min(16, count - 16 * half),
                   hd / 2, key_tile(head, 2 * i + half));
    for (int pair = 0; pair < count; pair += 2)
      for (int d = 0; d < hd; d += 16) {
        const U low = __builtin_convertvector(load<Halves>(at(32 * i + pair, 2, head) + d), U);
        U high = {};
        if (pair + 1 < count) high = __builtin_convertvector(load<Halves>(at(32 * i + pair + 1, 2, head) + d), U);
        store(value_tile(head, i) + 16 * d + pair / 2 * 16, low | high << 16);
      }
  }
  int units() const { return heads * ((valid + QUERIES - 1) / QUERIES + (n - valid + QUERIES - 1) / QUERIES); }
  // Computes some queries of a head, all of which see the same keys.
  void attend(int unit) {
    const int per_head = units() / heads, head = unit / per_head, of_valid = (valid + QUERIES - 1) / QUERIES;
    const int i = unit % per_head, first = i < of_valid ? i * QUERIES : valid + (i - of_valid) * QUERIES;
    const int end = i < of_valid ? valid : n, count = std::min(QUERIES, end - first);
    const int n_keys = (((first < valid ? n : valid) + 31) & ~31);
    const float* bias = first < valid ? seen.data() : blind.data();

    use_amx(16, 16);
    static thread_local Work w;
    w.query_lines.assign(size_t(QUERIES) * wide / 32, {}), w.sum_lines.assign(size_t(QUERIES) * hd / 16, {});
    w.queries = (uint16_t*)w.query_lines.data(), w.sums = (float*)w.sum_lines.data();
    for (int q = 0; q < count; q++) memcpy(&w.queries[size_t(q) * wide], at(first + q, 0, head), hd * 2);
    std::fill_n(w.most, QUERIES, 2 * NEVER), std::fill_n(w.total, QUERIES, 0.f);
    for (int k = 0; k < n_keys; k += KEYS) {
      const int chunk = std::min(KEYS, n_keys - k);
      const bool biased = std::any_of(bias + k, bias + k + chunk, [](float b) { return b != 0; });
      for (int q = 0; q < count; q += 32) {
        score(&w.queries[size_t(q) * wide], key_tile(head, k / 16), chunk, w.scores);
        for (int r = 0; r < 32; r++)
          weigh(w.scores + r * STRIDE, chunk, biased ? bias + k : nullptr, w.weights + r * STRIDE, w.most[q + r],
                w.total[q + r], &w.sums[size_t(q + r) * hd]);
        add(w.weights, value_tile(head, k / 32), chunk, &w.sums[size_t(q) * hd]);
      }
    }
    _tile_release();
    for (int q = 0; q < count; q++)
      for (int d = 0; d < hd; d += LANES)
        store(out + (size_t(first + q) * heads + head) * hd + d, to_bf16(load<F>(&w.sums[size_t(q) * hd + d]) / w.total[q]));
  }
};
#endif
