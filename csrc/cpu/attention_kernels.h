// Attention of blocks of kTokens tokens. Everything is in panels (product.h): the lanes of every vector are
// tokens, so that maxima and sums of the softmax need no step across lanes and any dim is computed as it is.
#pragma once

namespace depict::cpu::DEPICT_ISA {

// exp of a score less its row's largest or log-sum-exp: at most 0 but for rounding, which is small up to the
// scores that have gradients at all. What is far below the largest is 0: it adds nothing, and its
// products with other numbers could be subnormal, which processors compute slowly.
template <class T>
DEPICT_INLINE Vec<T> weight_of(Vec<T> x) {
  return x < kLeastExponent<T> ? Vec<T>{} : vexp(x);
}

// --- preparation -----------------------------------------------------------------------------------------

// Block of keys; of the tokens themselves where they are their own keys.
template <class T>
void attention_pack_keys(const AttentionTask<T>& task, int64_t head, int64_t block) {
  const int64_t at = (head * task.w_blocks + block) * kTokens, dim = task.w.dim;
  pack_tokens<T>(task.w, task.first_head + head, block, task.w_panel + at * dim);
  if (task.sum_w) __builtin_memset(task.sum_w + at * dim, 0, sizeof(T) * kTokens * dim);
  if (!task.half) return;
  // Summed as the scores are, so that a token's score with itself is twice this to the last bit.
  const T* panel = task.w_panel + at * dim;
  for (int v = 0; v < kTokens; v += Simd<T>::lanes) {
    Vec<T> square = {};
    for (int64_t d = 0; d < dim; ++d) {
      const Vec<T> w = load<T>(panel + d * kTokens + v);
      square = multiply_add(w, w, square);
    }
    store<T>(task.half + at + v, square * task.scale * T(0.5));
  }
}

template <class T>
void attention_pack_queries(const AttentionTask<T>& task, int64_t head, int64_t block) {
  const int64_t at = (head * task.q_blocks + block) * kTokens, dim = task.w.dim,
                of_all = task.first_head + head;
  if (task.q_panel != task.w_panel) pack_tokens<T>(task.q, of_all, block, task.q_panel + at * dim);
  if (task.sum_q != task.sum_w) __builtin_memset(task.sum_q + at * dim, 0, sizeof(T) * kTokens * dim);
  if (task.total) __builtin_memset(task.total + at, 0, sizeof(T) * kTokens);
  if (!task.grad_panel) return;
  T *grad = task.grad_panel + at * dim, *delta = task.delta + at;
  pack_tokens<T>(task.grad, of_all, block, grad);
  __builtin_memset(delta, 0, sizeof(T) * kTokens);
  // Summed as the dot products that it is subtracted from: where one weight is 1 the difference is 0.
  visit_tokens<T>(task.out, of_all, block, [&](int d, int t, Vec<T> v) {
    store<T>(delta + t, multiply_add(load<T>(grad + d * kTokens + t), v, load<T>(delta + t)));
  });
  const int tokens = tokens_in(task.q.tokens, block);
  const T* lse = task.given_lse + of_all * task.q.tokens + block * kTokens;
  for (int t = 0; t < kTokens; ++t) task.lse[at + t] = lse[t < tokens ? t : 0];
}

// --- forward, tokens that are their own keys -------------------------------------------------------------

// With h = scale |w|^2 / 2, exp(s_ij - h_i - h_j) is exp(-scale |w_i - w_j|^2 / 2): in (0, 1] and the same
// for rows i and j. Row i takes token j with that times g_j = exp(h_j - max h). Its largest weight is at
// least g_i: where the h of a head lie too far apart for that, or are too large to be subtracted, its rows
// are computed one by one.
template <class T>
void attention_prepare_pairs(const AttentionTask<T>& task, int64_t head) {
  constexpr int L = Simd<T>::lanes;
  const int64_t first = head * task.w_blocks * kTokens, tokens = task.w.tokens;
  const T* half = task.half + first;
  T least = half[0], most = half[0];
  for (int64_t i = 1; i < tokens; ++i) {
    least = half[i] < least ? half[i] : least;
    most = half[i] > most ? half[i] : most;
  }
  task.by_row[head] = !(most - least <= kSpread && most <= kLargestHalf);
  task.top[head] = task.by_row[head] ? 0 : most;
  if (task.by_row[head]) return;
  for (int64_t i = 0; i < tokens; i += L) {
    const Vec<T> h = load<T>(half + i);
    store<T>(task.g + first + i, weight_of<T>(h - most));
    store<T>(task.shift + first + i, h);
  }
  for (int64_t i = tokens; i < task.w_blocks * kTokens; ++i) task.g[first + i] = 0;  // nobody takes them
}

template <class T>
void attention_forward_pair(const AttentionTask<T>& task, int64_t head, int64_t i, int64_t j, T* scratch) {
  constexpr int L = Simd<T>::lanes;
  const int dim = static_cast<int>(task.w.dim);
  const int64_t first = head * task.w_blocks * kTokens;
  const int64_t at_i = first + i * kTokens, at_j = first + j * kTokens;
  const T *wi = task.w_panel + at_i * dim, *wj = task.w_panel + at_j * dim;
  const int ni = tokens_in(task.w.tokens, i), nj = tokens_in(task.w.tokens, j);
  const int li = lanes_in<T>(task.w.tokens, i), lj = lanes_in<T>(task.w.tokens, j);
  T *tile = scratch, *turned = scratch + kTile;

  dot_tokens(wi, li, wj, lj, dim, task.scale, tile);
  for (int v = 0; v < lj; v += L) {
    const Vec<T> h = load<T>(task.half + at_j + v), g = load<T>(task.g + at_j + v);
    Vec<T> sum = {};
    for (int r0 = 0; r0 < li; r0 += L) {
      Vec<T> e[L];
      DEPICT_UNROLL
      for (int r = 0; r < L; ++r) {
        T* s = tile + (r0 + r) * kTokens + v;
        e[r] = weight_of<T>((load<T>(s) - h) - task.half[at_i + r0 + r]);
        const Vec<T> weight = e[r] * task.g[at_i + r0 + r];
        store<T>(s, weight);
        sum += weight;
        e[r] *= g;
      }
      if (i == j) continue;
      transpose<T>(e);
      Vec<T> across = {};
      DEPICT_UNROLL
      for (int r = 0; r < L; ++r) {
        store<T>(turned + (v + r) * kTokens + r0, e[r]);
        across += e[r];
      }
      T* total = task.total + at_i + r0;
      store<T>(total, load<T>(total) + across);
    }
    T* total = task.total + at_j + v;
    store<T>(total, load<T>(total) + sum);
  }
  add_weighted(wi, ni, tile, lj, dim, task.sum_q + at_j * dim);
  if (i != j) add_weighted(wj, nj, turned, li, dim, task.sum_q + at_i * dim);
}

// --- forward, in general ---------------------------------------------------------------------------------

// A block of queries, with the running maximum of the online softmax.
template <class T>
void attention_forward_rows(const AttentionTask<T>& task, int64_t head, int64_t block, T* tile) {
  constexpr int L = Simd<T>::lanes;
  const int dim = static_cast<int>(task.w.dim);
  const int64_t at = (head * task.q_blocks + block) * kTokens;
  const int lanes = lanes_in<T>(task.q.tokens, block);
  T *sum = task.sum_q + at * dim, *total = task.total + at, *shift = task.shift + at;
  for (int64_t key = 0; key < task.w_blocks; ++key) {
    const T* w = task.w_panel + (head * task.w_blocks + key) * kTokens * dim;
    const int keys = tokens_in(task.w.tokens, key);
    dot_tokens(w, keys, task.q_panel + at * dim, lanes, dim, task.scale, tile);
    for (int v = 0; v < lanes; v += L) {
      T* s = tile + v;
      Vec<T> most = splat<T>(-__builtin_inf());
      for (int r = 0; r < keys; ++r) most = at_least(load<T>(s + r * kTokens), most);
      if (key > 0) {
        const Vec<T> before = load<T>(shift + v);
        most = at_least(before, most);
        const Vec<T> kept = weight_of<T>(before - most);
        store<T>(total + v, load<T>(total + v) * kept);
        for (int d = 0; d < dim; ++d) store<T>(sum + d * kTokens + v, load<T>(sum + d * kTokens + v) * kept);
      }
      store<T>(shift + v, most);
      Vec<T> added = {};
      for (int r = 0; r < keys; ++r) {
        const Vec<T> weight = weight_of<T>(load<T>(s + r * kTokens) - most);
        store<T>(s + r * kTokens, weight);
        added += weight;
      }
      store<T>(total + v, load<T>(total + v) + added);
    }
    add_weighted(w, keys, tile, lanes, dim, sum);
  }
}

template <class T>
void attention_finish(const AttentionTask<T>& task, int64_t head, int64_t block, const TokensView<T>& out,
                      T* lse) {
  const int64_t at = (head * task.q_blocks + block) * kTokens;
  const int tokens = tokens_in(task.q.tokens, block);
  alignas(64) T factor[kTokens];
  for (int t = 0; t < kTokens; ++t) factor[t] = T(1) / task.total[at + t];
  const T* sum = task.sum_q + at * task.w.dim;
  unpack_tokens<T>(out, task.first_head + head, block,
                   [&](int d, int t) { return load<T>(sum + d * kTokens + t) * load<T>(factor + t); });
  T* to = lse + (task.first_head + head) * task.q.tokens + block * kTokens;
  const double top = task.top ? static_cast<double>(task.top[head]) : 0;
  for (int t = 0; t < tokens; ++t)
    to[t] = static_cast<T>(static_cast<double>(task.shift[at + t]) + top +
                           __builtin_log(static_cast<double>(task.total[at + t])));
}

// --- backward --------------------------------------------------------------------------------------------

// Tokens that are their own keys: with P the weights, G the output's gradient and
// dS_ij = scale P_ij (G_i . w_j - delta_i), the gradient is dw_j = sum_i (dS_ij + dS_ji) w_i + P_ij G_i. The
// scores of two blocks and the sum of both dS serve both: 7 products in place of 10.
template <class T>
void attention_backward_pair(const AttentionTask<T>& task, int64_t head, int64_t i, int64_t j, T* scratch) {
  constexpr int L = Simd<T>::lanes;
  const int dim = static_cast<int>(task.w.dim);
  const int64_t first = head * task.w_blocks * kTokens;
  const int64_t at_i = first + i * kTokens, at_j = first + j * kTokens;
  const T *wi = task.w_panel + at_i * dim, *wj = task.w_panel + at_j * dim;
  const T *gi = task.grad_panel + at_i * dim, *gj = task.grad_panel + at_j * dim;
  const int ni = tokens_in(task.w.tokens, i), nj = tokens_in(task.w.tokens, j);
  const int li = lanes_in<T>(task.w.tokens, i), lj = lanes_in<T>(task.w.tokens, j);
  T *both = scratch, *p_ij = both + kTile, *p_ji = p_ij + kTile, *turned = p_ji + kTile;

  dot_tokens(wi, ni, wj, lj, dim, task.scale, both);
  dot_tokens(gi, ni, wj, lj, dim, T(1), p_ij);
  dot_tokens(wi, ni, gj, lj, dim, T(1), p_ji);
  for (int v = 0; v < lj; v += L) {
    const Vec<T> lse = load<T>(task.lse + at_j + v), delta = load<T>(task.delta + at_j + v);
    for (int r = 0; r < ni; ++r) {
      const int at = r * kTokens + v;
      const Vec<T> s = load<T>(both + at);
      const Vec<T> p = weight_of<T>(s - task.lse[at_i + r]), q = weight_of<T>(s - lse);
      store<T>(both + at, task.scale * (p * (load<T>(p_ij + at) - task.delta[at_i + r]) +
                                        q * (load<T>(p_ji + at) - delta)));
      store<T>(p_ij + at, p);
      store<T>(p_ji + at, q);
    }
  }
  T *to_i = task.sum_w + at_i * dim, *to_j = task.sum_w + at_j * dim;
  add_weighted(wi, ni, both, lj, dim, to_j);
  add_weighted(gi, ni, p_ij, lj, dim, to_j);
  if (i == j) return;
  transpose_tile(both, li, lj, turned);
  add_weighted(wj, nj, turned, li, dim, to_i);
  transpose_tile(p_ji, li, lj, turned);
  add_weighted(gj, nj, turned, li, dim, to_i);
}

// A block of queries and one of keys.
template <class T>
void attention_backward_rows(const AttentionTask<T>& task, int64_t head, int64_t query, int64_t key,
                             T* scratch) {
  constexpr int L = Simd<T>::lanes;
  const int dim = static_cast<int>(task.w.dim);
  const int64_t at_q = (head * task.q_blocks + query) * kTokens;
  const int64_t at_w = (head * task.w_blocks + key) * kTokens;
  const T *w = task.w_panel + at_w * dim, *q = task.q_panel + at_q * dim, *g = task.grad_panel + at_q * dim;
  const int queries = tokens_in(task.q.tokens, query), keys = tokens_in(task.w.tokens, key);
  const int query_lanes = lanes_in<T>(task.q.tokens, query), key_lanes = lanes_in<T>(task.w.tokens, key);
  T *ds = scratch, *p = ds + kTile, *turned = p + kTile;

  dot_tokens(w, keys, q, query_lanes, dim, task.scale, p);
  dot_tokens(w, keys, g, query_lanes, dim, T(1), ds);
  for (int v = 0; v < query_lanes; v += L) {
    const Vec<T> lse = load<T>(task.lse + at_q + v), delta = load<T>(task.delta + at_q + v);
    for (int r = 0; r < keys; ++r) {
      const int at = r * kTokens + v;
      const Vec<T> weight = weight_of<T>(load<T>(p + at) - lse);
      store<T>(ds + at, task.scale * (weight * (load<T>(ds + at) - delta)));
      store<T>(p + at, weight);
    }
  }
  T* to = task.sum_w + at_w * dim;
  add_weighted(w, keys, ds, query_lanes, dim, task.sum_q + at_q * dim);
  transpose_tile(ds, key_lanes, query_lanes, turned);
  add_weighted(q, queries, turned, key_lanes, dim, to);
  transpose_tile(p, key_lanes, query_lanes, turned);
  add_weighted(g, queries, turned, key_lanes, dim, to);
}

template <class T>
void attention_unpack(const T* sum, const TokensView<T>& to, int64_t head, int64_t block) {
  unpack_tokens<T>(to, head, block, [&](int d, int t) { return load<T>(sum + d * kTokens + t); });
}

}  // namespace depict::cpu::DEPICT_ISA
