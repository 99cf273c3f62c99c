// The next token of a row of logits: the one that sampling.py chooses, without sorting the vocabulary.
#pragma once
#include "matrix.h"

constexpr int BROKEN = -1, FORBIDDEN = -2;  // in place of a token
constexpr int NUCLEUS = 1024;               // a nucleus is sought among about as many most likely tokens first

struct Draw {
  int64_t key;  // of the noise
  float temperature, top_p, min_p;  // temperature 0: the most likely token
  int32_t top_k;
};

// noise.py's: a hash of key and token, as a number between 0 and 1.
static inline double uniform(uint64_t key, int token) {
  uint64_t x = key + uint64_t(token + 1) * 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return (double((x ^ x >> 31) >> 12) + .5) * 0x1p-52;
}

class Chooser {
 public:
  int32_t choose(const float* logits, int n, const Draw& draw) {
    this->logits = logits, this->n = n, this->draw = draw;
    if (!find_best()) return BROKEN;
    if (best == -INFINITY) return FORBIDDEN;
    if (draw.temperature == 0) {
      const int block = int(std::find(tops.begin(), tops.end(), best) - tops.begin());
      for (int i = block / LANES * LANES * BLOCK + block % LANES;; i += LANES)
        if (logits[i] == best) return i;
    }
    weigh();
    score = -INFINITY, bound = INFINITY;
    if (draw.top_k >= n && draw.top_p >= 1) consider_all();
    else for (const Candidate& c : kept()) consider(c.token);
    return token;
  }

 private:
  static constexpr int BLOCK = 16;  // logits of each lane
  struct Candidate {
    float logit;
    int32_t token;
    bool operator<(const Candidate& other) const { return logit > other.logit || (logit == other.logit && token < other.token); }
  };
  const float* logits;
  int n;
  Draw draw;
  float best;
  std::vector<float> tops, weights, order;  // tops: the largest logit of each block
  std::vector<Candidate> candidates;
  double total, score, bound;  // bound: a token can win against `score` only if 1 - uniform < weight · bound
  int32_t token;

  F at(int i) const {
    if (i + LANES <= n) return load<F>(logits + i);
    F v = splat(-INFINITY);
    memcpy(&v, logits + i, (n - i) * sizeof(float));
    return v;
  }
  // Fills `tops` and `best`. False if a logit is NaN or infinite.
  bool find_best() {
    tops.clear();
    I finite = splat(-1);
    for (int i = 0; i < n; i += BLOCK * LANES) {
      F most = splat(-INFINITY);
      for (int j = i; j < std::min(n, i + BLOCK * LANES); j += LANES) {
        const F v = at(j);
        finite &= v < INFINITY;
        most = larger(v, most);
      }
      for (int lane = 0; lane < LANES; lane++) tops.push_back(most[lane]);
    }
    best = *std::max_element(tops.begin(), tops.end());
    for (int i = 0; i < LANES; i++)
      if (!finite[i]) return false;
    return true;
  }
  // Fills `weights`, probabilities relative to the largest, and their `total`.
  void weigh() {
    weights.resize(n + LANES);
    total = 0;
    for (int i = 0; i < n; i += 64 * LANES) {
      F part = {};
      for (int j = i; j < std::min(n, i + 64 * LANES); j += LANES) {
        const F weight = exponential((at(j) - best) / draw.temperature);
        store(&weights[j], weight), part += weight;
      }
      total += sum(part);
    }
  }
  // The tokens that top_k, top_p and min_p leave, the most likely first.
  const std::vector<Candidate>& kept() {
    const bool limited = draw.top_k < n;
    // Tokens that weigh less are less than 1 - top_p together.
    const float least = limited ? 0 : std::max(draw.min_p, float((1 - draw.top_p) * total / n));
    for (size_t most = limited ? draw.top_k : NUCLEUS;; most *= 8) {
      collect(most, least);
      if (limited) candidates.resize(std::min(candidates.size(), most));
      if (cut(limited) || limited || most >= tops.size()) return candidates;
    }
  }
  // Sorts at least the `most` likeliest tokens among those that weigh at least `least`.
  void collect(size_t most, float least) {
    float floor = -INFINITY;  // so many blocks have a logit that is not below
    if (most < tops.size()) {
      order = tops;
      std::nth_element(order.begin(), order.begin() + most - 1, order.end(), std::greater<>());
      floor = order[most - 1];
    }
    candidates.clear();
    for (int i = 0; i < n; i += LANES) {
      const F v = at(i);
      const I some = (v >= floor) & (load<F>(&weights[i]) >= least);
      if (!any(some)) continue;
      for (int j = 0; j < std::min(LANES, n - i); j++)
        if (some[j]) candidates.push_back({v[j], i + j});
    }
    std::sort(candidates.begin(), candidates.end());
  }
  // Drops what is beyond top_p and min_p. False if nothing is.
  bool cut(bool limited) {
    double whole = total, before = 0;
    if (limited) {
      whole = 0;
      for (const Candidate& c : candidates) whole += weights[c.token];
    }
    for (size_t i = 0; i < candidates.size(); before += weights[candidates[i++].token])
      if (before > draw.top_p * whole || weights[candidates[i].token] < draw.min_p) {
        candidates.resize(i);
        return true;
      }
    return false;
  }
  // Lets a token compete: the largest logit / temperature + noise wins. -log(uniform) is at least 1 - uniform, so
  // most tokens need no logarithms.
  void consider(int i) {
    const double u = uniform(draw.key, i);
    if (1 - u >= weights[i] * bound) return;
    const double sum = double(logits[i] - best) / draw.temperature - std::log(-std::log(u));
    if (sum > score) score = sum, token = i, bound = std::exp(-sum) * 1.0001;
  }
  void consider_all() {
    consider(int(std::find(logits, logits + n, best) - logits));
    for (int i = 0; i < n; i += 64) {
      const int end = std::min(n, i + 64);
      int some = 0;
      for (int j = i; j < end; j++) some += 1 - uniform(draw.key, j) < weights[j] * bound;
      if (!some) continue;
      for (int j = i; j < end; j++)
        if (weights[j] >= draw.min_p) consider(j);
    }
  }
};
