// Attention of queries to cached keys and values, a chunk of positions at a time.
//
// Values are cached by position. So are the keys of images, and the last few of a cache that is not a multiple of
// LANES long; all others are in tiles of LANES positions, as they are multiplied.
#pragma once
#include "product.h"

#include <type_traits>

constexpr int CHUNK = 256;  // cache positions that are processed together

// A partial result of one query: head_dim sums of weighted values, the largest score, the sum of weights.
// `more` covers the positions after those of `into`.
static void merge(float* into, const float* more, int hd) {
  const float most = std::max(into[hd], more[hd]), a = std::exp(into[hd] - most), b = std::exp(more[hd] - most);
  for (int d = 0; d < hd; d += LANES) store(into + d, fma(load<F>(more + d), splat(b), load<F>(into + d) * a));
  into[hd] = most, into[hd + 1] = into[hd + 1] * a + more[hd + 1] * b;
}

// Scores (n, CHUNK) to weights; also fills the last two numbers of each query's partial result.
static void softmax(int n, float* scores, const int* visible, float* partial, int stride, int hd) {
  for (int q = 0; q < n; q++) {
    F most = splat(-INFINITY);
    float* row = scores + q * CHUNK;
    for (int p = visible[q]; p % LANES; p++) row[p] = -INFINITY;
    for (int p = 0; p < visible[q]; p += LANES) most = larger(load<F>(row + p), most);
    partial[q * stride + hd] = largest(most);
  }
  for (int q = 0; q < n; q++, scores += CHUNK, partial += stride) {
    F total = {};
    for (int p = 0; p < visible[q]; p += LANES) {
      const F e = exponential(load<F>(scores + p) - partial[hd]);
      store(scores + p, e), total += e;
    }
    partial[hd + 1] = sum(total);
  }
}

// ---- the cache

// Stores LANES channels of a position's key or value, from `channel` on. tiled: how many positions are in tiles.
static void store_cached(int kind, F v, uint8_t* to, int hd, int position, int channel, int tiled) {
  const int width = kind == FP32 ? 4 : 2, lane = position < tiled ? position % LANES : 0, next = position < tiled ? LANES : 1;
  uint32_t units[LANES], *at = (uint32_t*)(to + size_t(position - lane) * hd * width) + channel * width / 4 * next + lane;
  kind == FP32 ? store(units, v) : store(units, to_bf16(v));
  for (int i = 0; i < LANES * width / 4; i++) at[i * next] = units[i];
}
// The tile with the keys of positions p … p + LANES - 1, of `count`. If they are not in tiles, it is made in the buffer.
static const uint8_t* key_tile(int kind, const uint8_t* keys, int hd, int p, int count, int tiled, uint32_t* buffer) {
  const int bytes = hd * (kind == FP32 ? 4 : 2);
  const uint8_t* from = keys + size_t(p) * bytes;
  if (p < tiled) return from;
  // Reading a part of each key in turn, as below, would take twice as long.
  for (int i = 0; i < LANES * bytes; i += 64) __builtin_prefetch(from + i);
  tile_units(from, bytes, std::min(count - p, LANES), bytes / 4, buffer);
  return (const uint8_t*)buffer;
}

#if LANES == 16 && defined(__AVX512BF16__)
#define PAIRS
// ---- values in pairs of positions

// Weights (n, stride) in bf16, 0 for positions that a query does not see. They may overwrite the scores.
static void round_weights(int n, const float* scores, const int* visible, int count, uint16_t* weights, int stride) {
  for (int q = 0; q < n; q++)
    for (int p = 0; p < count; p += 2 * LANES) {
      const __mmask32 seen = visible[q] - p >= 32 ? ~0u : visible[q] <= p ? 0 : (1u << (visible[q] - p)) - 1;
      const float* from = scores + q * CHUNK + p;
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + LANES), _mm512_loadu_ps(from));
      _mm512_storeu_si512(weights + q * stride + p, _mm512_maskz_mov_epi16(seen, both));
    }
}
// 32 channels of two positions in pairs: the even channels and the odd ones.
static inline void pair_up(__m512i a, __m512i b, __m512i& even, __m512i& odd) {
  even = _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
  odd = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
}
// Sums of 32 channels in order, from those of the even channels and the odd ones.
static inline void store_channels(float* to, F even, F odd) {
  store(to, ZIP_LOW(even, odd)), store(to + LANES, ZIP_HIGH(even, odd));
}
#endif

// ---- by vectors

// Scores (n, CHUNK) of n queries, from `first` on, for `count` positions. buffer: for a tile.
static void score(int kind, const Inputs& queries, int first, int n, const uint8_t* keys, int hd, int count, int tiled,
                  uint32_t* buffer, float* scores) {
  for (int p = 0; p < count; p += LANES) {  // one tile at a time: reading two in turn would take much longer
    const Tile one[] = {{key_tile(kind, keys, hd, p, count, tiled, buffer), nullptr, nullptr}};
    auto use = [&](int i, const F* v) { store(scores + (i - first) * CHUNK + p, v[0]); };
    for_rows<1>(kind, one, hd, queries, first, n, use);
  }
}

static inline F from_cache(const uint16_t* at) { return from_bf16(load<Halves>(at)); }
static inline F from_cache(const float* at) { return load<F>(at); }

// For Q queries: their sums of values, weighted by scores (Q, CHUNK), over the positions each can see.
// C vectors of channels; values has hd channels per position.
template <int Q, int C, class Element>
static inline void weigh(const Element* values, int hd, const float* scores, const int* visible, float* to, int stride) {
  F acc[Q][C] = {};
  int together = visible[0];
  for (int q = 1; q < Q; q++) together = std::min(together, visible[q]);
  for (int p = 0; p < together; p++)
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      const F v = from_cache(values + size_t(p) * hd + c * LANES);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) acc[q][c] = fma(splat(scores[q * CHUNK + p]), v, acc[q][c]);
    }
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++) {
    for (int p = together; p < visible[q]; p++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++)
        acc[q][c] = fma(splat(scores[q * CHUNK + p]), from_cache(values + size_t(p) * hd + c * LANES), acc[q][c]);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) store(to + q * stride + c * LANES, acc[q][c]);
  }
}
#ifdef PAIRS
// The same over `count` positions in pairs, with bf16 weights in place of the scores.
template <int Q, int C>
static inline void weigh(const uint16_t* values, int hd, const float* weights, int count, float* to, int stride) {
  F acc[Q][C] = {};
  for (int p = 0; p < count; p += 2, values += 2 * hd)
#pragma GCC unroll 2
    for (int c = 0; c < C; c += 2) {
      const uint16_t* at = values + c * LANES;
      __m512i even, odd;
      pair_up(_mm512_loadu_si512(at), p + 1 < count ? _mm512_loadu_si512(at + hd) : __m512i{}, even, odd);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) {
        const uint32_t* both = (const uint32_t*)(weights + q * CHUNK) + p / 2;
        acc[q][c] = dot2(acc[q][c], (U)even, both), acc[q][c + 1] = dot2(acc[q][c + 1], (U)odd, both);
      }
    }
#pragma GCC unroll 4
  for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
    for (int c = 0; c < C; c += 2) store_channels(to + q * stride + c * LANES, acc[q][c], acc[q][c + 1]);
}
#endif
// seen: `visible` or `count`. REST: vectors of channels at once if there are not four.
template <int REST, int Q = ROWS / 2, class Element, class Seen>
static void weigh_all(int n, const Element* values, int hd, const float* scores, Seen seen, float* to, int stride) {
  if constexpr (Q > 0) {
    for (; n >= Q; n -= Q, scores += Q * CHUNK, to += Q * stride) {
      int d = 0;
      for (; d + 4 * LANES <= hd; d += 4 * LANES) weigh<Q, 4>(values + d, hd, scores, seen, to + d, stride);
      for (; d < hd; d += REST * LANES) weigh<Q, REST>(values + d, hd, scores, seen, to + d, stride);
      if constexpr (std::is_pointer_v<Seen>) seen += Q;
    }
    if (n) weigh_all<REST, Q - 1>(n, values, hd, scores, seen, to, stride);
  }
}
// Sums (n, stride) of `count` positions' values, times their weights, which are overwritten.
template <class Element>
static void weigh(int n, const Element* values, int hd, float* weights, const int* visible, int count, float* to, int stride) {
#ifdef PAIRS
  if constexpr (sizeof(Element) == 2)
    if (hd % (2 * LANES) == 0) {
      round_weights(n, weights, visible, count, (uint16_t*)weights, 2 * CHUNK);
      return weigh_all<2>(n, values, hd, weights, count, to, stride);
    }
#endif
  weigh_all<1>(n, values, hd, weights, visible, to, stride);
}

#ifdef AMX
// ---- in bf16, by AMX, for heads of whole tiles

// Attention of one key head's queries to a chunk of positions, 16 queries and 16 positions at a time. Values are
// arranged in pairs of positions.
class ChunkByAmx {
  static constexpr int QUERIES = 16, STRIDE = CHUNK + 32;  // rows of 2^n bytes would share cache sets
  const int hd;
  std::vector<Line> keys, values;  // tiles of those that are stored by position
  alignas(64) float scores[QUERIES * CHUNK], sums[2 * 256];
  alignas(64) uint16_t weights[QUERIES * STRIDE];

  // Products of queries, rows of `stride`, and a tile of keys: (queries, CHUNK).
  void multiply(const uint32_t* queries, int stride, const uint8_t* tile, float* to) {
    _tile_zero(0);
    for (int d = 0; d < hd; d += 32) {
      _tile_loadd(4, queries + d / 2, size_t(stride) * 4);
      _tile_loadd(6, tile + d / 32 * 1024, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, to, CHUNK * 4);
  }
  // Values of positions p to p + 15, of which those before `count` exist, in tiles of 32 positions by 16 channels:
  // of 32 channels, the even and the odd ones.
  void arrange(const uint16_t* from, int p, int count) {
    Line* to = &values[p / 32 * hd + p % 32 / 2];
    from += size_t(p) * hd;
    for (const int end = p + 16; p < end; p += 2, from += 2 * hd, to++)
      for (int d = 0; d < hd; d += 32) {
        __m512i even, odd;
        pair_up(p < count ? _mm512_loadu_si512(from + d) : __m512i{},
                p + 1 < count ? _mm512_loadu_si512(from + hd + d) : __m512i{}, even, odd);
        _mm512_store_si512(to[d].units, even), _mm512_store_si512(to[d + 16].units, odd);
      }
  }
  // Sums (n, stride) of `count` positions' values, times their weights.
  void weigh(int n, int count, float* to, int stride) {
    for (int d = 0; d < hd; d += 32) {
      _tile_zero(0);
      _tile_zero(1);
      for (int p = 0; p < count; p += 32) {
        const Line* tile = &values[p / 32 * hd + d];
        _tile_loadd(4, weights + p, STRIDE * 2);
        _tile_loadd(6, tile, 64);
        _tile_loadd(7, tile + 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
      for (int q = 0; q < n; q++) store_channels(to + q * stride + d, load<F>(sums + 16 * q), load<F>(sums + 256 + 16 * q));
    }
  }

 public:
  explicit ChunkByAmx(int head_dim) : hd(head_dim), keys(CHUNK / 32 * hd), values(CHUNK / 32 * hd), weights() {}
  static bool serves(int head_dim) { return head_dim % 32 == 0 && has_amx(); }

  // Partial results of n queries, rows of `stride`; they see the first `visible` of `count` positions.
  void attend(int n, const uint32_t* queries, int query_stride, const uint8_t* keys_at, const uint16_t* values_at, int count,
              int tiled, const int* visible, float* partial, int stride) {
    const uint8_t* tiles[CHUNK / 16];
    for (int q = 0; q < n; q += QUERIES, queries += size_t(QUERIES) * query_stride) {
      const int here = std::min(QUERIES, n - q);
      use_amx(here, 0);
      for (int p = 0; p < (count + 31) / 32 * 32; p += 16) {
        if (p < count) {
          if (!q) tiles[p / 16] = key_tile(BF16, keys_at, hd, p, count, tiled, keys[p * hd / 32].units);
          fence();
          multiply(queries, query_stride, tiles[p / 16], scores + p);
        }
        if (!q) arrange(values_at, p, count);  // in between: memory is read fastest from several places in turn
      }
      fence();
      softmax(here, scores, visible + q, partial + size_t(q) * stride, stride, hd);
      round_weights(here, scores, visible + q, count, weights, STRIDE);
      fence();
      weigh(here, count, partial + size_t(q) * stride, stride);
    }
    _tile_release();
  }
};
#endif
