// One step of a Llama model on a CPU, all layers in one call: model.py's forward pass for any rows.
//
// A matrix is stored in tiles of LANES output rows, units of 4 bytes of each row side by side: a vector
// holds the same few inputs of LANES rows, so every sum stays in its lane. A unit is 1 fp32, 2 bf16 or 4
// int8. int8, int5 and int4 come in groups of 32 inputs with an fp16 scale (and min) for each output row,
// w = scale · q + min; they multiply activations of int8, with a scale for each 32 as well.
//
// An output element is summed in one order, whatever else is computed beside it: along its inputs, one
// after the other. So a sequence gets the same bits alone, in company, in one prefill or token by token.
#include "machine.h"

#include <mutex>

constexpr int GROUP = 32;                      // inputs that share a scale
constexpr int ROWS = LANES == 16 ? 8 : 4;      // of activations, multiplied at once: as registers allow
constexpr int CHUNK = 256;                     // positions of the cache that are attended to as one
constexpr int QUERY_TOKENS = 8;                // of one sequence, that attend together

enum Kind : int32_t { FP32, BF16, INT8, INT5, INT4 };

struct Matrix {                  // (rows, cols)
  int32_t kind, rows, cols, tiled;  // not tiled: fp32 or bf16 as in a file, row after row
  const uint8_t* weight;
  const uint16_t *scale, *min;   // fp16, tiles of (cols / 32, LANES); min may be null: symmetric, -8 or -16 · scale
};
struct Layer {
  Matrix wq, wk, wv, wo, w1, w2, w3;
  const float *attention_norm, *ffn_norm;
};
struct Model {
  int32_t dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, max_batch_size, max_seq_len;
  int32_t cache_kind;  // FP32 or BF16
  float norm_eps;
  const Layer* layers;
  Matrix tok_embeddings, output;
  const float* norm;
};
struct Row { int32_t slot, start, length; };

// ---- the layout of matrices

constexpr int tiles_of(int rows) { return (rows + LANES - 1) / LANES; }
constexpr bool grouped(int kind) { return kind >= INT8; }
// Bytes of LANES rows and one group. int5: nibbles as int4, then a vector with the fifth bits.
constexpr int group_bytes(int kind) { return 4 * LANES * (kind == INT8 ? 8 : kind == INT5 ? 5 : 4); }
static size_t tile_bytes(int kind, int cols) {
  return grouped(kind) ? size_t(cols / GROUP) * group_bytes(kind) : size_t(cols) * LANES * (kind == FP32 ? 4 : 2);
}

// `rows` ≤ LANES rows of `units`, each `stride` bytes behind the last, as one tile; rows that are missing are 0.
static void tile_units(const uint8_t* from, size_t stride, int rows, int units, uint32_t* to) {
  int k = 0;
  for (; k + LANES <= units; k += LANES, to += LANES * LANES) {
    U v[LANES];
    for (int r = 0; r < LANES; r++) v[r] = r < rows ? load<U>(from + r * stride + 4 * k) : U{};
    transpose(v);
    for (int r = 0; r < LANES; r++) store(to + r * LANES, v[r]);
  }
  for (; k < units; k++, to += LANES)
    for (int r = 0; r < LANES; r++) to[r] = r < rows ? load<uint32_t>(from + r * stride + 4 * k) : 0;
}

// The 8 vectors of a group: inputs 4 j … 4 j + 3 in vector j. A byte's low nibble is an input of the
// group's first half, its high nibble one of the second.
template <int K> static inline void unpack(const uint8_t* group, Bytes w[8]) {
  if (K == INT8) {
    for (int j = 0; j < 8; j++) w[j] = load<Bytes>(group + j * sizeof(U));
    return;
  }
  for (int j = 0; j < 4; j++) {
    const U both = load<U>(group + j * sizeof(U));
    U low = both & 0x0f0f0f0f, high = (both >> 4) & 0x0f0f0f0f;
    if (K == INT5) {
      const U fifth = load<U>(group + 4 * sizeof(U));  // bit j: of vector j
      low |= (fifth << (4 - j)) & 0x10101010, high |= (fifth >> j) & 0x10101010;
    }
    w[j] = (Bytes)low, w[j + 4] = (Bytes)high;
  }
}
static void pack_group(int kind, const U w[8], uint8_t* to) {
  if (kind == INT8)
    for (int j = 0; j < 8; j++) store(to + j * sizeof(U), w[j] ^ FLIP);
  else {
    U fifth = {};
    for (int j = 0; j < 4; j++) store(to + j * sizeof(U), (w[j] & 0x0f0f0f0f) | (w[j + 4] & 0x0f0f0f0f) << 4);
    for (int j = 0; j < 8; j++) fifth |= ((w[j] >> 4) & 0x01010101) << j;
    if (kind == INT5) store(to + 4 * sizeof(U), fifth);
  }
}

// What int5 and int4 without a min subtract from each value, times the scale.
constexpr float middle(int kind) { return kind == INT5 ? 16 : kind == INT4 ? 8 : 0; }

// One row as fp32: an embedding.
static void read_row(const Matrix& m, int row, float* out) {
  const int lane = row % LANES, per_unit = m.kind == FP32 ? 1 : m.kind == BF16 ? 2 : 4;
  const uint8_t* tile = m.weight + row / LANES * tile_bytes(m.kind, m.cols);
  for (int k = 0; k < m.cols; k++) {
    if (grouped(m.kind)) {
      const size_t at = (size_t(row / LANES) * (m.cols / GROUP) + k / GROUP) * LANES + lane;
      const uint8_t* group = tile + k / GROUP * group_bytes(m.kind);
      const int i = k % GROUP, byte = lane * 4 + i % 4, vector = m.kind == INT8 ? i / 4 : i / 4 % 4;
      int q = group[vector * sizeof(U) + byte];
      if (m.kind == INT8) q = int8_t(q ^ uint8_t(FLIP));
      else q = (i < 16 ? q & 15 : q >> 4) | (m.kind == INT5 ? (group[4 * sizeof(U) + byte] >> (i / 4) & 1) << 4 : 0);
      const float scale = from_half(m.scale[at]);
      out[k] = scale * q + (m.min ? from_half(m.min[at]) : -middle(m.kind) * scale);
    } else {
      const size_t unit = m.tiled ? size_t(k / per_unit) * LANES + lane : size_t(row) * (m.cols / per_unit) + k / per_unit;
      const uint8_t* at = (m.tiled ? tile : m.weight) + unit * 4;
      out[k] = m.kind == FP32 ? load<float>(at) : from_bf16(load<uint16_t>(at + k % 2 * 2));
    }
  }
}

// ---- products

// Rows of activations in the form that a kind of matrix multiplies: bf16, fp32, or int8 in groups.
struct Inputs {
  std::vector<uint32_t> values;
  std::vector<float> scale, scaled_sum;  // of each group
  std::vector<int32_t> offset;           // where its sum starts, if int8 weights have 128 added
  int stride = 0, groups = 0;

  void resize(int rows, int cols) {
    // A row takes one cache line more than it needs, or rows of 2^n would all fall into the same cache set.
    stride = cols + 16, groups = cols / GROUP;
    values.resize(size_t(rows) * stride);
    scale.resize(size_t(rows) * groups), scaled_sum.resize(scale.size()), offset.resize(scale.size());
  }
  const uint32_t* row(int i) const { return values.data() + size_t(i) * stride; }
  void put(int kind, int i, int col, F x) {
    uint32_t* to = values.data() + size_t(i) * stride;
    if (kind == BF16 && BF16_PRODUCTS) store((uint16_t*)to + col, to_bf16(x));
    else store(to + col, x);
  }
  void set(const Matrix& m, int i, const float* x) {
    if (!grouped(m.kind)) {
      for (int k = 0; k < m.cols; k += LANES) put(m.kind, i, k, load<F>(x + k));
      return;
    }
    int8_t* to = (int8_t*)(values.data() + size_t(i) * stride);
    for (int g = 0; g < m.cols / GROUP; g++, x += GROUP, to += GROUP) {
      I bits = {};  // the largest size, found among whole numbers: there NaN is larger than all others
      for (int k = 0; k < GROUP; k += LANES) {
        const I v = load<I>(x + k) & 0x7fffffff;
        bits = v > bits ? v : bits;
      }
      int32_t most_bits = 0;
      for (int k = 0; k < LANES; k++) most_bits = std::max(most_bits, bits[k]);
      const float most = load<float>(&most_bits), inverse = most > 1e-30f ? 127 / most : 0;
      I total = {};
      for (int k = 0; k < GROUP; k += LANES) {
        const F rounded = load<F>(x + k) * inverse + 12582912.f;  // 1.5 · 2^23: what is left is the integer
        const I q = (I)rounded - 0x4b400000;
        total += q;
        store(to + k, __builtin_convertvector(q, Quarters));
      }
      int whole = 0;
      for (int k = 0; k < LANES; k++) whole += total[k];
      const size_t at = size_t(i) * groups + g;
      scale[at] = most / 127, scaled_sum[at] = scale[at] * whole, offset[at] = FLIP ? -128 * whole : 0;
    }
  }
};

struct Tile { const uint8_t* weight; const uint16_t *scale, *min; };

// out[b][t] = products of tile t with row first + b of x.
template <int K, int T, int B>
__attribute__((noinline)) static void product(const Tile* tiles, int cols, const Inputs& x, int first, F (*out)[T]) {
  F acc[B][T] = {};
  const uint32_t* from = x.row(first);
  const size_t stride = x.stride;
  if constexpr (grouped(K)) {
    const float *scales = &x.scale[size_t(first) * x.groups], *sums = &x.scaled_sum[size_t(first) * x.groups];
    const int32_t* offsets = &x.offset[size_t(first) * x.groups];
    for (int g = 0; g < cols / GROUP; g++)
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) {
        Bytes w[8];
        unpack<K>(tiles[t].weight + size_t(g) * group_bytes(K), w);
        const F scale = from_half(load<Halves>(tiles[t].scale + g * LANES));
        const F min = tiles[t].min ? from_half(load<Halves>(tiles[t].min + g * LANES)) : scale * -middle(K);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
          const int at = b * x.groups + g;
          const F sum = dot32<K != INT8>(w, (const uint8_t*)(from + b * stride) + g * GROUP, K == INT8 ? offsets[at] : 0);
          acc[b][t] = fma(sum, scale * scales[at], acc[b][t]);
          if (K != INT8) acc[b][t] = fma(min, splat(sums[at]), acc[b][t]);
        }
      }
  } else {
    constexpr int STEP = K == BF16 && !BF16_PRODUCTS ? 2 : 1;  // numbers of x that meet a unit of w
    const int units = K == FP32 ? cols : cols / 2;
    for (int k = 0; k < units; k++)
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) {
        const U w = load<U>(tiles[t].weight + size_t(k) * sizeof(U));
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
          const uint32_t* in = from + b * stride + k * STEP;
          acc[b][t] = K == FP32 ? fma((F)w, splat(load<float>(in)), acc[b][t]) : dot2(acc[b][t], w, in);
        }
      }
  }
  for (int b = 0; b < B; b++)
    for (int t = 0; t < T; t++) out[b][t] = acc[b][t];
}

// use(row, products of T tiles) for n rows of x.
template <int T, int B = ROWS, class Use>
static void for_rows(int kind, const Tile (&tiles)[T], int cols, const Inputs& x, int first, int n, Use& use) {
  if constexpr (B > 0) {
    for (; n >= B; first += B, n -= B) {
      F out[B][T];
      if (kind == FP32) product<FP32, T, B>(tiles, cols, x, first, out);
      else if (kind == BF16) product<BF16, T, B>(tiles, cols, x, first, out);
      else if (kind == INT8) product<INT8, T, B>(tiles, cols, x, first, out);
      else if (kind == INT5) product<INT5, T, B>(tiles, cols, x, first, out);
      else product<INT4, T, B>(tiles, cols, x, first, out);
      for (int b = 0; b < B; b++) use(first + b, out[b]);
    }
    if (n) for_rows<T, B - 1>(kind, tiles, cols, x, first, n, use);
  }
}

// ---- attention

static inline F from_cache(const uint16_t* at) { return from_bf16(load<Halves>(at)); }
static inline F from_cache(const float* at) { return load<F>(at); }

// For Q queries: their sums of values, weighted by scores (Q, CHUNK), over the positions each can see.
// C vectors of channels; values has hd channels a position.
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
template <int Q = ROWS / 2, class Element>
static void weigh_all(int n, const Element* values, int hd, const float* scores, const int* visible, float* to, int stride) {
  if constexpr (Q > 0) {
    for (; n >= Q; n -= Q, scores += Q * CHUNK, visible += Q, to += Q * stride) {
      int d = 0;
      for (; d + 4 * LANES <= hd; d += 4 * LANES) weigh<Q, 4>(values + d, hd, scores, visible, to + d, stride);
      for (; d < hd; d += LANES) weigh<Q, 1>(values + d, hd, scores, visible, to + d, stride);
    }
    if (n) weigh_all<Q - 1>(n, values, hd, scores, visible, to, stride);
  }
}

// A partial result of one query: head_dim sums of weighted values, the largest score, the sum of weights.
// `more` is of the positions behind those of `into`.
static void merge(float* into, const float* more, int hd) {
  const float most = std::max(into[hd], more[hd]), a = std::exp(into[hd] - most), b = std::exp(more[hd] - most);
  for (int d = 0; d < hd; d += LANES) store(into + d, fma(load<F>(more + d), splat(b), load<F>(into + d) * a));
  into[hd] = most, into[hd + 1] = into[hd + 1] * a + more[hd + 1] * b;
}

// Scores (n, CHUNK) to weights, and the last two numbers of each query's partial result.
static void softmax(int n, float* scores, const int* visible, float* partial, int stride, int hd) {
  for (int q = 0; q < n; q++, scores += CHUNK, partial += stride) {
    F most = splat(-INFINITY), total = {};
    for (int p = visible[q]; p % LANES; p++) scores[p] = -INFINITY;
    for (int p = 0; p < visible[q]; p += LANES) most = larger(load<F>(scores + p), most);
    const float top = largest(most);
    for (int p = 0; p < visible[q]; p += LANES) {
      const F e = exponential(load<F>(scores + p) - top);
      store(scores + p, e), total += e;
    }
    partial[hd] = top, partial[hd + 1] = sum(total);
  }
}

struct Span { int first, count, slot, position; };  // some consecutive tokens of one sequence

// ---- the step

struct Scratch {  // of one thread
  Inputs inputs;
  std::vector<float> row, scores, partial, more;
  std::vector<uint32_t> tiles;
  std::vector<int> visible;
};

struct Runtime {
  const Model m;
  Pool pool;
  std::mutex mutex;
  const int q_dim, share, widest;  // share: query heads to a key head
  int room = 0;                    // tokens that the buffers below hold
  std::vector<float> x, attended, hidden, partials;  // residual stream, attention's and w1/w3's output
  Inputs inputs, queries;                            // queries: n_kv_heads · tokens · share
  std::vector<Scratch> scratch;
  // Of the step that runs:
  const int32_t* tokens;
  std::vector<Span> spans;
  std::vector<int> slots, positions;  // of each token
  const float* rotations;             // (max_seq_len, head_dim / 2, 2): cosine and sine
  uint8_t* cache;                     // (n_layers, 2, max_batch_size, n_kv_heads, max_seq_len, head_dim)
  int n, chunks;                      // chunks: of the longest sequence
  bool split;                         // attention over positions too

  Runtime(const Model& model, int threads)
      : m(model), pool(threads), q_dim(m.n_heads * m.head_dim), share(m.n_heads / m.n_kv_heads),
        widest(std::max({m.dim, m.hidden_dim, q_dim})), scratch(threads) {
    const int at_once = QUERY_TOKENS * share;
    for (Scratch& s : scratch) {
      s.inputs.resize(ROWS, widest), s.row.resize(m.dim);
      s.tiles.resize(2 * LANES * size_t(widest));
      s.scores.resize(at_once * CHUNK), s.visible.resize(at_once);
      s.partial.resize(at_once * partial_size()), s.more.resize(at_once * partial_size());
    }
  }
  int partial_size() const { return m.head_dim + LANES; }

  void make_room(int rows) {
    if (rows <= room) return;
    room = rows;
    x.resize(size_t(rows) * m.dim), attended.resize(size_t(rows) * q_dim), hidden.resize(size_t(rows) * m.hidden_dim);
    if (rows > ROWS) inputs.resize(rows, widest);
    queries.resize(rows * m.n_heads, m.head_dim);
  }

  // What a matrix reads, made of row(i, thread's buffer) for n rows: few by every thread for itself, many together.
  template <class GetRow> const Inputs& read(const Matrix& matrix, int t, int n, GetRow row) {
    float* buffer = scratch[t].row.data();
    if (n <= ROWS) {
      for (int i = 0; i < n; i++) scratch[t].inputs.set(matrix, i, row(i, buffer));
      return scratch[t].inputs;
    }
    for (int from, to; pool.take(n, from, to);)
      for (int i = from; i < to; i++) inputs.set(matrix, i, row(i, buffer));
    pool.barrier();
    return inputs;
  }
  const float* rms_norm(const float* from, const float* weight, float* to) const {
    F squares = {};
    for (int k = 0; k < m.dim; k += LANES) squares = fma(load<F>(from + k), load<F>(from + k), squares);
    const float scale = 1 / std::sqrt(sum(squares) / m.dim + m.norm_eps);
    for (int k = 0; k < m.dim; k += LANES) store(to + k, load<F>(from + k) * scale * load<F>(weight + k));
    return to;
  }
  // `which`: 0 or 1, the buffer in which rows of a file are laid out as a tile.
  Tile tile(const Matrix& w, int i, int t, int which) {
    const size_t scales = size_t(i) * (w.cols / GROUP) * LANES, bytes = size_t(w.cols) * (w.kind == FP32 ? 4 : 2);
    if (w.tiled) return {w.weight + i * tile_bytes(w.kind, w.cols), w.scale + scales, w.min ? w.min + scales : nullptr};
    uint32_t* to = scratch[t].tiles.data() + which * LANES * size_t(widest);
    tile_units(w.weight + i * LANES * bytes, bytes, std::min(LANES, w.rows - i * LANES), int(bytes / 4), to);
    return {(const uint8_t*)to, nullptr, nullptr};
  }
  // use(row of x, first column of the product, LANES products) for tiles from … to - 1.
  template <class Use> void multiply(const Matrix& w, int from, int to, int t, const Inputs& x, int n, Use use) {
    for (; from < to; from += 2) {
      if (from + 1 < to) {
        const Tile both[] = {tile(w, from, t, 0), tile(w, from + 1, t, 1)};
        auto each = [&](int i, const F* v) { use(i, from * LANES, v[0]), use(i, from * LANES + LANES, v[1]); };
        for_rows<2>(w.kind, both, w.cols, x, 0, n, each);
      } else {
        const Tile one[] = {tile(w, from, t, 0)};
        auto each = [&](int i, const F* v) { use(i, from * LANES, v[0]); };
        for_rows<1>(w.kind, one, w.cols, x, 0, n, each);
      }
    }
  }
  template <class Use> void multiply(const Matrix& w, int t, const Inputs& x, int n, Use use) {
    for (int from, to; pool.take(tiles_of(w.rows), from, to);) multiply(w, from, to, t, x, n, use);
    pool.barrier();
  }

  int width() const { return m.cache_kind == FP32 ? 4 : 2; }
  // Keys (side 0) or values (1) of a layer, slot and head.
  uint8_t* cached(int layer, int side, int slot, int head) const {
    const size_t at = ((size_t(layer) * 2 + side) * m.max_batch_size + slot) * m.n_kv_heads + head;
    return cache + at * m.max_seq_len * m.head_dim * width();
  }

  void attention(int t, int layer) {
    const Layer& l = m.layers[layer];
    const float scale = 1 / std::sqrt(float(m.head_dim));
    const Inputs& in = read(l.wq, t, n, [&](int i, float* to) { return rms_norm(&x[size_t(i) * m.dim], l.attention_norm, to); });
    const int hd = m.head_dim, q = tiles_of(q_dim), kv = tiles_of(m.n_kv_heads * hd);
    for (int from, to; pool.take(q + 2 * kv, from, to);) {
      multiply(l.wq, from, std::min(to, q), t, in, n, [&](int i, int col, F v) {
        const int head = col / hd, row = (head / share * n + i) * share + head % share;
        queries.put(m.cache_kind, row, col % hd, rotate(v, positions[i], col % hd) * scale);
      });
      for (int side = 0; side < 2; side++) {
        const int first = q + side * kv;
        multiply(side ? l.wv : l.wk, std::max(from - first, 0), std::min(to - first, kv), t, in, n, [&](int i, int col, F v) {
          if (!side) v = rotate(v, positions[i], col % hd);
          uint8_t* at = cached(layer, side, slots[i], col / hd) + (size_t(positions[i]) * hd + col % hd) * width();
          m.cache_kind == FP32 ? store(at, v) : store(at, to_bf16(v));
        });
      }
    }
    pool.barrier();
    m.cache_kind == FP32 ? attend<float>(t, layer) : attend<uint16_t>(t, layer);
    const Inputs& out = read(l.wo, t, n, [&](int i, float*) { return &attended[size_t(i) * q_dim]; });
    multiply(l.wo, t, out, n, [&](int i, int col, F v) { add(i, col, v); });
  }
  // Adjacent channels of a head, from `channel` on, turned by their position's angles.
  F rotate(F v, int position, int channel) const {
    const float* r = rotations + size_t(position) * m.head_dim + channel;
    F out;
    for (int i = 0; i < LANES; i += 2) {
      out[i] = v[i] * r[i] - v[i + 1] * r[i + 1];
      out[i + 1] = v[i] * r[i + 1] + v[i + 1] * r[i];
    }
    return out;
  }
  void add(int i, int col, F v) {
    float* to = &x[size_t(i) * m.dim + col];
    store(to, load<F>(to) + v);
  }

  // A span's queries of one key head over one chunk of positions: their partial results, scores by the way.
  template <class Element> void attend_chunk(int t, int layer, const Span& span, int head, int chunk, float* partial) {
    Scratch& s = scratch[t];
    const int hd = m.head_dim, from = chunk * CHUNK, to = std::min(from + CHUNK, span.position + span.count);
    const int first = (head * n + span.first) * share, count = span.count * share, bytes = hd * sizeof(Element);
    const uint8_t* keys = cached(layer, 0, span.slot, head);
    for (int i = 0; i < count; i++) s.visible[i] = std::min(std::max(span.position + i / share + 1 - from, 0), CHUNK);
    for (int p = from; p < to; p += 2 * LANES) {
      Tile both[2];
      for (int i = 0; i < 2; i++) {  // keys are stored by position, and multiplied as tiles
        const int at = p + i * LANES, rows = std::min(std::max(to - at, 0), LANES);
        uint32_t* tile = s.tiles.data() + i * LANES * hd;
        tile_units(keys + size_t(at) * bytes, bytes, rows, bytes / 4, tile);
        both[i] = {(const uint8_t*)tile, nullptr, nullptr};
      }
      auto use = [&](int i, const F* v) {
        float* score = &s.scores[(i - first) * CHUNK + p - from];
        store(score, v[0]), store(score + LANES, v[1]);
      };
      for_rows<2>(m.cache_kind, both, hd, queries, first, count, use);
    }
    softmax(count, s.scores.data(), s.visible.data(), partial, partial_size(), hd);
    const Element* values = (const Element*)cached(layer, 1, span.slot, head) + size_t(from) * hd;
    weigh_all(count, values, hd, s.scores.data(), s.visible.data(), partial, partial_size());
  }
  int chunks_of(const Span& span) const { return (span.position + span.count + CHUNK - 1) / CHUNK; }
  // Adds the partial results of a chunk that is not the first.
  void merge_chunk(const Span& span, int chunk, float* into, const float* more) const {
    for (int i = 0; i < span.count * share; i++)  // queries that see none of it stay as they are
      if (span.position + i / share >= chunk * CHUNK) merge(into + i * partial_size(), more + i * partial_size(), m.head_dim);
  }
  void finish(const Span& span, int head, const float* partial) {
    for (int i = 0; i < span.count * share; i++, partial += partial_size()) {
      float* to = &attended[size_t(span.first + i / share) * q_dim + (head * share + i % share) * m.head_dim];
      for (int d = 0; d < m.head_dim; d += LANES) store(to + d, load<F>(partial + d) / splat(partial[m.head_dim + 1]));
    }
  }
  template <class Element> void attend(int t, int layer) {
    const int units = int(spans.size()) * m.n_kv_heads, size = QUERY_TOKENS * share * partial_size();
    if (!split) {
      float *partial = scratch[t].partial.data(), *more = scratch[t].more.data();
      for (int from, to; pool.take(units, from, to);)
        for (int u = from; u < to; u++) {
          const Span& span = spans[u / m.n_kv_heads];
          const int head = u % m.n_kv_heads;
          attend_chunk<Element>(t, layer, span, head, 0, partial);
          for (int c = 1; c < chunks_of(span); c++) {
            attend_chunk<Element>(t, layer, span, head, c, more);
            merge_chunk(span, c, partial, more);
          }
          finish(span, head, partial);
        }
      return pool.barrier();
    }
    for (int from, to; pool.take(units * chunks, from, to);)
      for (int w = from; w < to; w++) {
        const Span& span = spans[w / chunks / m.n_kv_heads];
        if (w % chunks < chunks_of(span))
          attend_chunk<Element>(t, layer, span, w / chunks % m.n_kv_heads, w % chunks, &partials[size_t(w) * size]);
      }
    pool.barrier();
    for (int from, to; pool.take(units, from, to);)
      for (int u = from; u < to; u++) {
        const Span& span = spans[u / m.n_kv_heads];
        float* partial = &partials[size_t(u) * chunks * size];
        for (int c = 1; c < chunks_of(span); c++) merge_chunk(span, c, partial, partial + size_t(c) * size);
        finish(span, u % m.n_kv_heads, partial);
      }
    pool.barrier();
  }

  void feed_forward(int t, const Layer& l) {
    const Inputs& in = read(l.w1, t, n, [&](int i, float* to) { return rms_norm(&x[size_t(i) * m.dim], l.ffn_norm, to); });
    for (int from, to; pool.take(tiles_of(m.hidden_dim), from, to);)
      for (; from < to; from++) {
        const Tile both[] = {tile(l.w1, from, t, 0), tile(l.w3, from, t, 1)};
        auto silu = [&](int i, const F* v) {
          store(&hidden[size_t(i) * m.hidden_dim + from * LANES], v[0] / (exponential(-v[0]) + 1.f) * v[1]);
        };
        for_rows<2>(l.w1.kind, both, m.dim, in, 0, n, silu);
      }
    pool.barrier();
    const Inputs& out = read(l.w2, t, n, [&](int i, float*) { return &hidden[size_t(i) * m.hidden_dim]; });
    multiply(l.w2, t, out, n, [&](int i, int col, F v) { add(i, col, v); });
  }

  void step(int t, float* out) {
    for (int from, to; pool.take(n, from, to);)
      for (; from < to; from++) read_row(m.tok_embeddings, tokens[from], &x[size_t(from) * m.dim]);
    pool.barrier();
    for (int layer = 0; layer < m.n_layers; layer++) {
      attention(t, layer);
      feed_forward(t, m.layers[layer]);
    }
    for (int from, to; pool.take(n, from, to);)
      for (; from < to; from++) rms_norm(&x[size_t(from) * m.dim], m.norm, out + size_t(from) * m.dim);
  }
  void logits(int t, const float* from, int rows, float* out) {
    const Inputs& in = read(m.output, t, rows, [&](int i, float*) { return from + size_t(i) * m.dim; });
    multiply(m.output, t, in, rows, [&](int i, int col, F v) {
      memcpy(out + size_t(i) * m.vocab_size + col, &v, std::min(LANES, m.vocab_size - col) * sizeof(float));
    });
  }
};

// Every thread a part of `count` pieces of work.
template <class Work> static void in_parallel(int count, int threads, Work work) {
  Pool pool(threads);
  pool.run([&](int) {
    for (int from, to; pool.take(count, from, to);)
      for (; from < to; from++) work(from);
  });
}

extern "C" {
int32_t llama_lanes() { return LANES; }
int64_t llama_tile_bytes(int32_t kind, int32_t cols) { return tile_bytes(kind, cols); }

// Tiles of fp32 or bf16 rows, or of quantized values: uint8, or int8 for INT8, one a byte. `to` holds whole tiles.
void llama_pack(int32_t kind, const uint8_t* from, int32_t rows, int32_t cols, uint8_t* to, int32_t threads) {
  const size_t bytes = size_t(cols) * (kind == FP32 ? 4 : kind == BF16 ? 2 : 1);
  in_parallel(tiles_of(rows), threads, [&](int i) {
    const uint8_t* source = from + i * LANES * bytes;
    uint8_t* tile = to + i * tile_bytes(kind, cols);
    const int here = std::min(LANES, rows - i * LANES);
    if (!grouped(kind)) return tile_units(source, bytes, here, int(bytes / 4), (uint32_t*)tile);
    for (int g = 0; g < cols / GROUP; g++) {
      U w[8];
      tile_units(source + g * GROUP, bytes, here, 8, (uint32_t*)w);
      pack_group(kind, w, tile + size_t(g) * group_bytes(kind));
    }
  });
}
// fp16 (rows, groups) to tiles of (groups, LANES).
void llama_pack_scales(const uint16_t* from, int32_t rows, int32_t groups, uint16_t* to, int32_t threads) {
  in_parallel(tiles_of(rows), threads, [&](int i) {
    for (int g = 0; g < groups; g++)
      for (int r = 0; r < LANES; r++)
        to[(size_t(i) * groups + g) * LANES + r] = i * LANES + r < rows ? from[size_t(i * LANES + r) * groups + g] : 0;
  });
}

Runtime* llama_new(const Model* model, int32_t threads) { return new Runtime(*model, threads); }
void llama_free(Runtime* runtime) { delete runtime; }

// Normed output (n, dim) for the tokens of rows, one row behind the other; keys and values go to the cache.
void llama_hidden(Runtime* runtime, const int32_t* tokens, const Row* rows, int32_t n_rows, const float* rotations,
                  void* cache, float* out) {
  Runtime& r = *runtime;
  std::lock_guard<std::mutex> lock(r.mutex);
  r.tokens = tokens, r.rotations = rotations, r.cache = (uint8_t*)cache, r.n = 0, r.chunks = 0;
  r.spans.clear(), r.slots.clear(), r.positions.clear();
  for (int i = 0; i < n_rows; i++) {
    for (int p = 0; p < rows[i].length; p += QUERY_TOKENS) {
      r.spans.push_back({r.n + p, std::min(QUERY_TOKENS, rows[i].length - p), rows[i].slot, rows[i].start + p});
      r.chunks = std::max(r.chunks, r.chunks_of(r.spans.back()));
    }
    for (int p = 0; p < rows[i].length; p++) r.slots.push_back(rows[i].slot), r.positions.push_back(rows[i].start + p);
    r.n += rows[i].length;
  }
  const size_t units = r.spans.size() * r.m.n_kv_heads;
  r.split = r.chunks > 1 && units < size_t(4 * r.pool.threads);
  if (r.split) r.partials.resize(units * r.chunks * QUERY_TOKENS * r.share * r.partial_size());
  r.make_room(r.n);
  r.pool.run([&](int t) { r.step(t, out); });
}

// fp32 (n, vocab_size) of normed output (n, dim).
void llama_logits(Runtime* runtime, const float* hidden, int32_t n, float* out) {
  std::lock_guard<std::mutex> lock(runtime->mutex);
  runtime->make_room(n);
  runtime->pool.run([&](int t) { runtime->logits(t, hidden, n, out); });
}
}
