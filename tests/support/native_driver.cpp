// Runs the step of a model that a test wrote to a file, for processors that this machine can only emulate.
// Usage: driver MODEL OUT. Exits with 1 if decode and prefill give different bits.
#include "step.cpp"

#include <cstdio>

static std::vector<uint8_t> content;
static size_t at = 0;
template <class T> const T* next(size_t count) {
  const T* found = (const T*)&content[at];
  at += count * sizeof(T);
  return found;
}
static std::vector<std::vector<uint64_t>> kept;
static void* keep(size_t bytes) {
  kept.emplace_back(bytes / 8 + 1);
  return kept.back().data();
}
static Matrix matrix() {
  const int32_t *head = next<int32_t>(4), kind = head[0], rows = head[1], cols = head[2];
  const size_t padded = size_t(tiles_of(rows)) * LANES, groups = cols / GROUP;
  Matrix m{kind, rows, cols, 1, nullptr, nullptr, nullptr, 1};
  uint8_t* to = (uint8_t*)keep(tiles_of(rows) * tile_bytes(kind, cols));
  const size_t group = grouped(kind) ? group_bytes(kind) / LANES : 0;
  const size_t stride = grouped(kind) ? groups * group : cols * (kind == FP32 ? 4 : 2);
  llama_pack(kind, next<uint8_t>(rows * stride), stride, group, rows, cols, to, 2);
  m.weight = to;
  for (const uint16_t** scales : {&m.scale, &m.min}) {
    if (!grouped(kind) || (scales == &m.min && !head[3])) continue;
    uint16_t* tiled = (uint16_t*)keep(padded * groups * 2);
    llama_pack_scales(next<uint8_t>(rows * groups * 2), groups * 2, 2, rows, int(groups), tiled, 2);
    *scales = tiled;
  }
  return m;
}

int main(int, char** arguments) {
  FILE* file = fopen(arguments[1], "rb");
  fseek(file, 0, SEEK_END);
  content.resize(ftell(file));
  rewind(file);
  if (fread(content.data(), 1, content.size(), file) != content.size()) return 2;
  kept.reserve(10000);

  Model m{};
  memcpy(&m, next<int32_t>(11), 44);  // up to norm_eps
  std::vector<Layer> layers(m.n_layers);
  for (Layer& l : layers) {
    for (Matrix* w : {&l.wq, &l.wk, &l.wv, &l.wo, &l.w1, &l.w2, &l.w3}) *w = matrix();
    for (Matrix* w : {&l.wq, &l.wk, &l.wv}) w->parts = l.wq.kind == INT8 ? 2 : 1;
    l.attention_norm = next<float>(m.dim), l.ffn_norm = next<float>(m.dim);
  }
  m.layers = layers.data();
  m.tok_embeddings = matrix(), m.output = matrix(), m.norm = next<float>(m.dim);
  const float* rotations = next<float>(size_t(m.max_seq_len) * m.head_dim);
  const int n = *next<int32_t>(1);
  const int32_t* tokens = next<int32_t>(n);

  void* cache = keep(size_t(m.n_layers) * 2 * m.max_batch_size * m.n_kv_heads * m.max_seq_len * m.head_dim * 4);
  std::vector<float> hidden(n * m.dim), alone(m.dim), logits(size_t(n) * m.vocab_size);
  Runtime* runtime = llama_new(&m, 2);
  const Row whole{0, 0, n};
  llama_hidden(runtime, tokens, &whole, 1, rotations, cache, nullptr, 0, nullptr, hidden.data());
  for (int i = 0; i < n; i++) {
    const Row one{1, i, 1};
    llama_hidden(runtime, tokens + i, &one, 1, rotations, cache, nullptr, 0, nullptr, alone.data());
    if (memcmp(alone.data(), &hidden[i * m.dim], m.dim * 4)) return 1;
  }
  llama_logits(runtime, hidden.data(), n, logits.data());
  llama_free(runtime);
  file = fopen(arguments[2], "wb");
  fwrite(logits.data(), 4, logits.size(), file);
  fclose(file);
}
