// One step of a Llama model on a CPU, all layers in one call: model.py's forward pass for any rows, with the
// cross-attention layers of vision/transformer.py if some of the tokens see images.
//
// Every output element is summed in a fixed order, whatever else is computed: along its inputs, or its
// positions, sequentially. So a sequence gets the same bits alone or in a batch, in one prefill or token by
// token, with any number of threads.
#include "attention.h"
#include "draw.h"
#include "image.h"
#include "quantize.h"
#include "threads.h"

#include <memory>
#include <mutex>

constexpr int QUERY_TOKENS = 32;  // tokens of one sequence that attend together

struct Layer {
  Matrix wq, wk, wv, wo, w1, w2, w3;
  const float *attention_norm, *ffn_norm;
  const float *q_norm, *gate_attn, *gate_ffwd;  // of cross-attention layers, whose keys and values are given
};
struct Model {
  int32_t dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, max_batch_size, max_seq_len;
  int32_t cache_kind;  // FP32 or BF16
  float norm_eps;
  const Layer* layers;
  Matrix tok_embeddings, output;
  const float* norm;
  // For images: the cross-attention layers, the layer that follows each, the embeddings of tokens from
  // vocab_size on, and how many positions a slot has.
  int32_t n_cross, image_positions;
  const Layer* cross;
  const int32_t* fusion;
  const float* added_embeddings;
};
struct Row { int32_t slot, start, length; };
struct Sight { int32_t first, count, slot, begin, end; };  // tokens of a step, and the positions they see

// ---- what tokens attend to

struct Span {  // some consecutive tokens of one sequence
  int first, count, slot;
  int begin, seen, growth;  // they see `seen` cache positions from `begin` on, each token `growth` more

  int sees(int token) const { return seen + token * growth; }
  int chunks() const { return (sees(count - 1) + CHUNK - 1) / CHUNK; }
};
struct Context {                 // what tokens attend to: the text before them, or images
  uint8_t* cache;                // (layers, 2, max_batch_size, n_kv_heads, positions, head_dim)
  int positions, tiled;          // tiled: before it, keys are in tiles
  std::vector<Span> spans;
  int chunks;                    // of the longest
  bool split;                    // work is split over positions too

  void clear() { spans.clear(), chunks = 0; }
  // Tokens that see `seen` positions, each `growth` more, in spans.
  void add(int first, int count, int slot, int begin, int seen, int growth) {
    for (int i = 0; i < count; i += QUERY_TOKENS) {
      spans.push_back({first + i, std::min(QUERY_TOKENS, count - i), slot, begin, seen + i * growth, growth});
      chunks = std::max(chunks, spans.back().chunks());
    }
  }
};

// ---- the step

struct Scratch {  // per thread
  Inputs inputs;
  std::vector<float> row, scores, partial, more;
  std::vector<Line> tiles;
  std::vector<int> visible;
#ifdef AMX
  std::unique_ptr<ChunkByAmx> by_amx;  // if it serves
#endif
  Chooser chooser;
};

struct Runtime {
  const Model m;
  Pool pool;
  std::mutex mutex;
  const int q_dim, share, widest, parts;  // share: query heads per key head; parts: the most that a matrix has
  int room = 0;                    // tokens that the buffers below hold
  std::vector<float> x, attended, hidden, partials, scores;  // residual stream, attention's and w1/w3's output, …, logits
  Inputs inputs, queries;                            // queries: n_kv_heads · tokens · share
  std::vector<Scratch> scratch;
  // For the current step:
  const int32_t* tokens;
  Context text, images;
  std::vector<int> slots, positions, last;  // of each token; the last token of each row
  std::vector<bool> sighted;          // whether it sees an image; otherwise cross-attention layers leave it as it is
  const float* rotations;             // (max_seq_len, head_dim / 2, 2): cosine and sine
  int n;

  Runtime(const Model& model, int threads)
      : m(model), pool(threads), q_dim(m.n_heads * m.head_dim), share(m.n_heads / m.n_kv_heads),
        widest(std::max({m.dim, m.hidden_dim, q_dim})), parts(most_parts()), scratch(threads) {
    const int at_once = QUERY_TOKENS * share;
    for (Scratch& s : scratch) {
      s.inputs.resize(ROWS * parts, widest), s.row.resize(m.dim);
      s.tiles.resize(2 * LANES * size_t(widest) / 16), s.scores.resize(at_once * CHUNK), s.visible.resize(at_once);
      s.partial.resize(at_once * partial_size()), s.more.resize(at_once * partial_size());
#ifdef AMX
      if (m.cache_kind == BF16 && ChunkByAmx::serves(m.head_dim)) s.by_amx = std::make_unique<ChunkByAmx>(m.head_dim);
#endif
    }
  }
  int most_parts() const {  // of matrices that may have more than one; wk and wv have as many as wq
    int most = m.output.parts;
    for (int i = 0; i < m.n_layers; i++) most = std::max(most, m.layers[i].wq.parts);
    for (int i = 0; i < m.n_cross; i++) most = std::max(most, m.cross[i].wq.parts);
    return most;
  }
  int partial_size() const { return m.head_dim + LANES; }

  void make_room(int rows) {
    if (rows <= room) return;
    room = rows;
    x.resize(size_t(rows) * m.dim), attended.resize(size_t(rows) * q_dim), hidden.resize(size_t(rows) * m.hidden_dim);
    if (rows > ROWS) inputs.resize(rows * parts, widest);
    queries.resize(rows * m.n_heads, m.head_dim);
  }

  // Calls work(inputs, from, to) for parts of `pieces`. A matrix's inputs are set from row(i, thread's buffer) for
  // n rows: few by each thread, many together.
  template <class GetRow, class Work> void divide(int t, const Matrix& matrix, int n, int pieces, GetRow row, Work work) {
    Scratch& s = scratch[t];
    Inputs& in = n <= ROWS ? s.inputs : inputs;
    auto set = [&](int from, int to) {
      for (; from < to; from++) in.set(matrix, from, row(from, s.row.data()));
    };
    bool ready = n > ROWS;
    if (ready) pool.phase(t, n, set);
    pool.phase(t, pieces, [&](int from, int to) {
      if (!ready) set(0, n), ready = true;
      work(in, from, to);
    });
  }
  const float* rms_norm(const float* from, const float* weight, float* to) const {
    const float scale = rms_scale(from, m.dim);
    for (int k = 0; k < m.dim; k += LANES) store(to + k, load<F>(from + k) * scale * load<F>(weight + k));
    return to;
  }
  float rms_scale(const float* from, int size) const {
    F squares = {};
    for (int k = 0; k < size; k += LANES) squares = fma(load<F>(from + k), load<F>(from + k), squares);
    return 1 / std::sqrt(sum(squares) / size + m.norm_eps);
  }
  Tile tile(const Matrix& w, int i, int t, int which) {  // which: of a thread's two buffers
    return tile_of(w, i, scratch[t].tiles[which * LANES * size_t(widest) / 16].units);
  }
  // Calls use(row of x, first column of the product, LANES products) for pairs of tiles, half of the matrix apart.
  template <class Use> void multiply(const Matrix& w, int from, int to, int t, const Inputs& x, int n, Use use) {
    for (int row = 0, rows = w.tiled ? PANEL : n; row < n; row += rows)
      for (int i = from; i < to; i++) {
        const int j = i + pairs_of(w.rows), last = tiles_of(w.rows) - 1;
        const Tile both[] = {tile(w, i, t, 0), tile(w, std::min(j, last), t, 1)}, one[] = {both[0]};
        auto each = [&](int b, const F* v) { use(b, i * LANES, v[0]), use(b, j * LANES, v[1]); };
        auto only = [&](int b, const F* v) { use(b, i * LANES, v[0]); };
        if (j <= last) for_rows<2>(w, both, x, row, std::min(rows, n - row), each);
        else for_rows<1>(w, one, x, row, std::min(rows, n - row), only);
      }
  }
  template <class GetRow, class Use> void multiply(const Matrix& w, int t, int n, GetRow row, Use use) {
    divide(t, w, n, pairs_of(w.rows), row, [&](const Inputs& x, int from, int to) { multiply(w, from, to, t, x, n, use); });
  }

  int width() const { return m.cache_kind == FP32 ? 4 : 2; }
  // Keys (side 0) or values (1) of a layer, slot and head.
  uint8_t* cached(const Context& context, int layer, int side, int slot, int head) const {
    const size_t at = ((size_t(layer) * 2 + side) * m.max_batch_size + slot) * m.n_kv_heads + head;
    return context.cache + at * context.positions * m.head_dim * width();
  }

  void attention(int t, int layer) {
    const Layer& l = m.layers[layer];
    const float scale = 1 / std::sqrt(float(m.head_dim));
    const int hd = m.head_dim, q = pairs_of(q_dim), kv = pairs_of(m.n_kv_heads * hd);
    auto normed = [&](int i, float* to) { return rms_norm(&x[size_t(i) * m.dim], l.attention_norm, to); };
    divide(t, l.wq, n, q + 2 * kv, normed, [&](const Inputs& in, int from, int to) {
      multiply(l.wq, from, std::min(to, q), t, in, n, [&](int i, int col, F v) {
        queries.put(m.cache_kind, query(i, col / hd), col % hd, rotate(v, positions[i], col % hd) * scale);
      });
      for (int side = 0; side < 2; side++) {
        const int first = q + side * kv;
        multiply(side ? l.wv : l.wk, std::max(from - first, 0), std::min(to - first, kv), t, in, n, [&](int i, int col, F v) {
          if (!side) v = rotate(v, positions[i], col % hd);
          uint8_t* head = cached(text, layer, side, slots[i], col / hd);
          store_cached(m.cache_kind, v, head, hd, positions[i], col % hd, side ? 0 : text.tiled);
        });
      }
    });
    attend(t, l, text, layer);
  }
  // The same to images, without positions.
  void cross_attention(int t, int layer) {
    const Layer& l = m.cross[layer];
    const int hd = m.head_dim;
    auto normed = [&](int i, float* to) { return rms_norm(&x[size_t(i) * m.dim], l.attention_norm, to); };
    multiply(l.wq, t, n, normed, [&](int i, int col, F v) { store(&attended[size_t(i) * q_dim + col], v); });
    pool.phase(t, n * m.n_heads, [&](int from, int to) {
      for (; from < to; from++) {
        const int i = from / m.n_heads, head = from % m.n_heads;
        const float *q = &attended[size_t(from) * hd], scale = rms_scale(q, hd) / std::sqrt(float(hd));
        for (int d = 0; d < hd; d += LANES)
          queries.put(m.cache_kind, query(i, head), d, load<F>(q + d) * scale * load<F>(l.q_norm + d));
      }
    });
    attend(t, l, images, layer);
  }
  // Where a token's query is: those that share a key head follow one another.
  int query(int i, int head) const { return (head / share * n + i) * share + head % share; }
  void attend(int t, const Layer& l, const Context& context, int layer) {
    m.cache_kind == FP32 ? attend<float>(t, context, layer) : attend<uint16_t>(t, context, layer);
    auto row = [&](int i, float*) { return &attended[size_t(i) * q_dim]; };
    multiply(l.wo, t, n, row, [&](int i, int col, F v) { add(l.gate_attn, i, col, v); });
  }
  // Rotates adjacent channels of a head, from `channel` on, by their position's angles. One function for all
  // callers: GCC fuses alternating sums and differences of products even if told not to.
  __attribute__((noinline)) F rotate(F v, int position, int channel) const {
    const float* r = rotations + size_t(position) * m.head_dim + channel;
    F out;
    for (int i = 0; i < LANES; i += 2) {
      out[i] = v[i] * r[i] - v[i + 1] * r[i + 1];
      out[i + 1] = v[i] * r[i + 1] + v[i + 1] * r[i];
    }
    return out;
  }
  void add(const float* gate, int i, int col, F v) {  // gate: null for none
    if (gate && !sighted[i]) return;
    float* to = &x[size_t(i) * m.dim + col];
    store(to, load<F>(to) + (gate ? v * std::tanh(*gate) : v));
  }

  // A span's queries for one key head over some chunks of positions: partial results of each, `next` numbers apart.
  template <class Element> void attend_chunks(int t, const Context& context, int layer, const Span& span, int head,
                                              int chunk, int chunks, float* partial, size_t next) {
    Scratch& s = scratch[t];
    const int hd = m.head_dim, first = (head * n + span.first) * share, count = span.count * share, end = chunk + chunks;
    const uint8_t* keys = cached(context, layer, 0, span.slot, head) + size_t(span.begin) * hd * sizeof(Element);
    const Element* values = (const Element*)cached(context, layer, 1, span.slot, head) + size_t(span.begin) * hd;
    auto length = [&](int c) { return std::min(CHUNK, span.sees(span.count - 1) - c * CHUNK); };
    auto each = [&](auto attend) {
      for (int c = chunk; c < end; c++, partial += next) {
        for (int i = 0; i < count; i++) s.visible[i] = std::min(std::max(span.sees(i / share) - c * CHUNK, 0), CHUNK);
        attend(c, size_t(c) * CHUNK * hd);
      }
    };
#ifdef AMX
    if (s.by_amx)
      return each([&](int c, size_t at) {
        s.by_amx->attend(count, queries.row(first), queries.stride, keys + at * sizeof(Element), (const uint16_t*)values + at,
                         length(c), context.tiled - c * CHUNK, s.visible.data(), partial, partial_size());
      });
#endif
    auto scores = [&](int c) { return &s.scores[size_t(c - chunk) * count * CHUNK]; };
    for (int c = chunk; c < end; c++)  // all keys first: memory is read fastest in long runs
      score(m.cache_kind, queries, first, count, keys + size_t(c) * CHUNK * hd * sizeof(Element), hd, length(c),
            context.tiled - c * CHUNK, s.tiles[0].units, scores(c));
    each([&](int c, size_t at) {
      softmax(count, scores(c), s.visible.data(), partial, partial_size(), hd);
      weigh(count, values + at, hd, scores(c), s.visible.data(), length(c), partial, partial_size());
    });
  }
  // Adds the partial results of a chunk other than the first.
  void merge_chunk(const Span& span, int chunk, float* into, const float* more) const {
    for (int i = 0; i < span.count * share; i++)  // queries that see none of it stay unchanged
      if (span.sees(i / share) > chunk * CHUNK) merge(into + i * partial_size(), more + i * partial_size(), m.head_dim);
  }
  void finish(const Span& span, int head, const float* partial) {
    for (int i = 0; i < span.count * share; i++, partial += partial_size()) {
      float* to = &attended[size_t(span.first + i / share) * q_dim + (head * share + i % share) * m.head_dim];
      for (int d = 0; d < m.head_dim; d += LANES) store(to + d, load<F>(partial + d) / splat(partial[m.head_dim + 1]));
    }
  }
  template <class Element> void attend(int t, const Context& context, int layer) {
    const std::vector<Span>& spans = context.spans;
    const int chunks = context.chunks, units = int(spans.size()) * m.n_kv_heads, size = QUERY_TOKENS * share * partial_size();
    if (!context.split) {
      return pool.phase(t, units, [&](int from, int to) {
        for (int u = from; u < to; u++) {
          const Span& span = spans[u / m.n_kv_heads];
          const int head = u % m.n_kv_heads, rows = span.count * share * partial_size();
          float *partial = scratch[t].partial.data(), *more = partial;
          for (int c = 0, some; c < span.chunks(); c += some, more = scratch[t].more.data()) {
            some = std::min(QUERY_TOKENS / span.count, span.chunks() - c);  // there is room for their scores
            attend_chunks<Element>(t, context, layer, span, head, c, some, more, rows);
            for (int i = !c; i < some; i++) merge_chunk(span, c + i, partial, more + size_t(i) * rows);
          }
          finish(span, head, partial);
        }
      });
    }
    pool.phase(t, units * chunks, [&](int from, int to) {
      for (int w = from, some; w < to; w += some) {
        const Span& span = spans[w / chunks / m.n_kv_heads];
        const int head = w / chunks % m.n_kv_heads, c = w % chunks;
        some = std::min({QUERY_TOKENS / span.count, to - w, chunks - c});
        const int there = std::min(some, span.chunks() - c);
        attend_chunks<Element>(t, context, layer, span, head, c, there, &partials[size_t(w) * size], size);
      }
    });
    pool.phase(t, units, [&](int from, int to) {
      for (int u = from; u < to; u++) {
        const Span& span = spans[u / m.n_kv_heads];
        float* partial = &partials[size_t(u) * chunks * size];
        for (int c = 1; c < span.chunks(); c++) merge_chunk(span, c, partial, partial + size_t(c) * size);
        finish(span, u % m.n_kv_heads, partial);
      }
    });
  }

  void feed_forward(int t, const Layer& l) {
    auto normed = [&](int i, float* to) { return rms_norm(&x[size_t(i) * m.dim], l.ffn_norm, to); };
    divide(t, l.w1, n, tiles_of(m.hidden_dim), normed, [&](const Inputs& in, int from, int to) {
      for (int row = 0, rows = l.w1.tiled ? PANEL : n; row < n; row += rows)
        for (int i = from; i < to; i++) {
          const Tile both[] = {tile(l.w1, i, t, 0), tile(l.w3, i, t, 1)};
          auto silu = [&](int b, const F* v) {
            store(&hidden[size_t(b) * m.hidden_dim + i * LANES], v[0] / (exponential(-v[0]) + 1.f) * v[1]);
          };
          for_rows<2>(l.w1, both, in, row, std::min(rows, n - row), silu);
        }
    });
    auto row = [&](int i, float*) { return &hidden[size_t(i) * m.hidden_dim]; };
    multiply(l.w2, t, n, row, [&](int i, int col, F v) { add(l.gate_ffwd, i, col, v); });
  }

  void embed(int token, float* to) const {
    if (token < m.vocab_size) return read_row(m.tok_embeddings, token, to);
    memcpy(to, m.added_embeddings + size_t(token - m.vocab_size) * m.dim, m.dim * sizeof(float));
  }
  // Prepares attention to a context whose spans are known.
  void plan(Context& context, void* cache, int positions, int tiled) {
    const size_t units = context.spans.size() * m.n_kv_heads;
    context.cache = (uint8_t*)cache, context.positions = positions, context.tiled = tiled;
    context.split = context.chunks > 1 && units < size_t(4 * pool.threads);
    const size_t size = context.split ? units * context.chunks * QUERY_TOKENS * share * partial_size() : 0;
    if (size > partials.size()) partials.resize(size);
  }
  void layers(int t) {
    pool.phase(t, n, [&](int from, int to) {
      for (; from < to; from++) embed(tokens[from], &x[size_t(from) * m.dim]);
    });
    for (int layer = 0, cross = 0; layer < m.n_layers; layer++) {
      if (!images.spans.empty() && cross < m.n_cross && m.fusion[cross] == layer) {
        cross_attention(t, cross);
        feed_forward(t, m.cross[cross++]);
      }
      attention(t, layer);
      feed_forward(t, m.layers[layer]);
    }
  }
  const float* normed(int i, float* to) const { return rms_norm(&x[size_t(i) * m.dim], m.norm, to); }
  template <class GetRow> void logits(int t, int rows, GetRow row, float* out) {
    multiply(m.output, t, rows, row, [&](int i, int col, F v) {
      memcpy(out + size_t(i) * m.vocab_size + col, &v, std::min(LANES, m.vocab_size - col) * sizeof(float));
    });
  }
  void choose(int t, const float* logits, int rows, const Draw* draws, int64_t* chosen) {
    pool.phase(t, rows, [&](int from, int to) {
      for (; from < to; from++)
        chosen[from] = scratch[t].chooser.choose(logits + size_t(from) * m.vocab_size, m.vocab_size, draws[from]);
    });
  }
  // Prepares a step for the concatenated rows' tokens, which see no images yet.
  void begin(const int32_t* ids, const Row* rows, int n_rows, const float* angles, void* cache) {
    tokens = ids, rotations = angles, n = 0;
    text.clear(), images.clear(), slots.clear(), positions.clear(), last.clear();
    for (const Row* row = rows; row < rows + n_rows; row++) {
      text.add(n, row->length, row->slot, 0, row->start + 1, 1);
      for (int p = 0; p < row->length; p++) slots.push_back(row->slot), positions.push_back(row->start + p);
      last.push_back((n += row->length) - 1);
    }
    sighted.assign(n, false);
    plan(text, cache, m.max_seq_len, m.max_seq_len / LANES * LANES);
    make_room(n);
  }
};

extern "C" {
int32_t llama_lanes() { return LANES; }
int64_t llama_tile_bytes(int32_t kind, int32_t cols) { return tile_bytes(kind, cols); }

// Converts a matrix (rows, cols) to tiles. `stride`: bytes from row to row; `group_stride`: from group to group.
void llama_pack(int32_t kind, const uint8_t* from, int64_t stride, int64_t group_stride, int32_t rows, int32_t cols,
                uint8_t* to, int32_t threads) {
  in_parallel(tiles_of(rows), threads, [&](int i) {
    const uint8_t* source = from + i * LANES * stride;
    uint8_t* tile = to + i * tile_bytes(kind, cols);
    const int here = std::min(LANES, rows - i * LANES);
    if (!grouped(kind)) return tile_units(source, stride, here, int(tile_bytes(kind, cols) / sizeof(U)), (uint32_t*)tile);
    for (int g = 0; g < cols / GROUP; g++)
      pack_group(kind, source + g * group_stride, stride, here, tile + size_t(g) * group_bytes(kind));
  });
}
// Converts fp16 (rows, groups) to tiles of (groups, LANES).
void llama_pack_scales(const uint8_t* from, int64_t stride, int64_t group_stride, int32_t rows, int32_t groups,
                       uint16_t* to, int32_t threads) {
  in_parallel(tiles_of(rows), threads, [&](int i) {
    for (int g = 0; g < groups; g++)
      for (int r = i * LANES; r < i * LANES + LANES; r++)
        to[(size_t(i) * groups + g) * LANES + r % LANES] =
            r < rows ? load<uint16_t>(from + r * stride + g * group_stride) : 0;
  });
}

// fp32 x (n, cols) times one matrix, (n, rows), for running single layers.
void llama_multiply(const Matrix* matrix, const float* x, int32_t n, float* out, int32_t threads) {
  const Matrix& m = *matrix;
  Inputs in;
  in.resize(n * m.parts, m.cols);
  for (int i = 0; i < n; i++) in.set(m, i, x + size_t(i) * m.cols);
  in_parallel(tiles_of(m.rows), threads, [&](int t) {
    std::vector<uint32_t> buffer(m.tiled ? 0 : size_t(m.cols) * LANES);
    const Tile one[] = {tile_of(m, t, buffer.data())};
    auto use = [&](int i, const F* v) {
      memcpy(out + size_t(i) * m.rows + t * LANES, v, std::min(LANES, m.rows - t * LANES) * sizeof(float));
    };
    for_rows<1>(m, one, in, 0, n, use);
  });
}
// Rows of a matrix as fp32 (n, cols).
void llama_rows(const Matrix* matrix, const int32_t* rows, int32_t n, float* out) {
  for (int i = 0; i < n; i++) read_row(*matrix, rows[i], out + size_t(i) * matrix->cols);
}
// All of a quantized matrix as fp32 (rows, cols).
void llama_widen(const Matrix* matrix, float* out, int32_t threads) {
  const auto widen = matrix->kind == INT8 ? widen_tile<INT8> : matrix->kind == INT5 ? widen_tile<INT5> : widen_tile<INT4>;
  in_parallel(tiles_of(matrix->rows), threads, [&](int i) { widen(*matrix, i, out + size_t(i) * LANES * matrix->cols); });
}

// Whether there is `llama_attend_image`.
int32_t llama_sees() {
#ifdef AMX
  return has_amx();
#else
  return 0;
#endif
}
// See `ImageAttention`.
void llama_attend_image(const uint16_t* qkv, int32_t n, int32_t heads, int32_t head_dim, int32_t valid,
                        const float* bias, uint16_t* out, int32_t threads) {
#ifdef AMX
  ImageAttention attention(qkv, out, n, heads, head_dim, valid, bias);
  in_parallel(attention.blocks(), threads, [&](int block) { attention.pack(block); });
  in_parallel(attention.units(), threads, [&](int unit) { attention.attend(unit); });
#endif
}

Runtime* llama_new(const Model* model, int32_t threads) { return new Runtime(*model, threads); }
void llama_free(Runtime* runtime) { delete runtime; }

// Normed output (n, dim) for the concatenated rows' tokens; keys and values are written to the cache.
void llama_hidden(Runtime* runtime, const int32_t* tokens, const Row* rows, int32_t n_rows, const float* rotations,
                  void* cache, const Sight* sights, int32_t n_sights, void* images, float* out) {
  Runtime& r = *runtime;
  std::lock_guard<std::mutex> lock(r.mutex);
  r.begin(tokens, rows, n_rows, rotations, cache);
  for (const Sight* s = sights; s < sights + n_sights; s++) {
    r.images.add(s->first, s->count, s->slot, s->begin, s->end - s->begin, 0);
    std::fill_n(r.sighted.begin() + s->first, s->count, true);
  }
  r.plan(r.images, images, r.m.image_positions, 0);
  r.pool.run([&](int t) {
    r.layers(t);
    r.pool.phase(t, r.n, [&](int i, int to) { for (; i < to; i++) r.normed(i, out + size_t(i) * r.m.dim); });
  });
}

// fp32 logits (n, vocab_size) from normed output (n, dim).
void llama_logits(Runtime* runtime, const float* hidden, int32_t n, float* out) {
  std::lock_guard<std::mutex> lock(runtime->mutex);
  runtime->make_room(n);
  runtime->pool.run([&](int t) {
    runtime->logits(t, n, [&](int i, float*) { return hidden + size_t(i) * runtime->m.dim; }, out);
  });
}

// The next token of each row of fp32 logits (n, vocab_size).
void llama_choose(Runtime* runtime, const float* logits, int32_t n, const Draw* draws, int64_t* chosen) {
  std::lock_guard<std::mutex> lock(runtime->mutex);
  runtime->pool.run([&](int t) { runtime->choose(t, logits, n, draws, chosen); });
}

// The token after each row that sees no images: hidden, logits and choose in one call.
void llama_next(Runtime* runtime, const int32_t* tokens, const Row* rows, int32_t n_rows, const float* rotations,
                void* cache, const Draw* draws, int64_t* chosen) {
  Runtime& r = *runtime;
  std::lock_guard<std::mutex> lock(r.mutex);
  r.begin(tokens, rows, n_rows, rotations, cache);
  r.scores.resize(std::max(r.scores.size(), size_t(n_rows) * r.m.vocab_size));
  r.pool.run([&](int t) {
    r.layers(t);
    r.logits(t, n_rows, [&](int i, float* to) { return r.normed(r.last[i], to); }, r.scores.data());
    r.choose(t, r.scores.data(), n_rows, draws, chosen);
  });
}
}
