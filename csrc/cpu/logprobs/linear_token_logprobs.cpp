// Log-probabilities of tokens from hidden states: tiles of logits that never leave the cache.
// Flops (M rows that count): forward 2 M D V, 4 M D V with the hidden's gradient (frozen head);
// backward 2 M D V again for the logits and 2 M D V for each of the two gradients.
// Bytes: the weight once a group of rows (8 MiB of hidden states), its gradient written once.
// Parallel over the vocabulary. Accuracy: as token_logprobs; the gradients are sums in float.
#include "logprobs/linear_token_logprobs.h"

#include <vector>

#include "head/gradients.h"
#include "head/statistics.h"

namespace apt::APT_ISA {
namespace {

std::vector<int64_t> counting_rows(const LinearTokenLogprobs& a) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < a.head.rows; ++row)
    if (!a.mask || a.mask[row]) rows.push_back(row);
  return rows;
}

template <class A>
RowTerms row_terms(const LinearTokenLogprobs& a, int64_t row) {
  RowTerms t{};
  t.token = a.token_ids[row];
  t.temperature = a.temperatures ? static_cast<const A*>(a.temperatures)[row] : a.temperature;
  return t;
}

bool transforms(const LinearTokenLogprobs& a) {
  return a.temperatures || a.temperature != 1 || a.head.softcap > 0;
}

template <class T, class A>
void zero_masked(const LinearTokenLogprobs& a) {
  for (int64_t row = 0; a.mask && row < a.head.rows; ++row) {
    if (a.mask[row]) continue;
    static_cast<A*>(a.logps)[row] = A(0);
    a.lse[row] = 0;
    if (a.return_entropy) static_cast<A*>(a.entropy)[row] = A(0);
    if (a.head.grad_hidden)
      std::fill_n(static_cast<T*>(a.head.grad_hidden) + row * a.head.features, a.head.features,
                  T{});
  }
}

template <class T, class P, class A = typename P::Scalar>
void forward(const LinearTokenLogprobs& a, const std::vector<int64_t>& rows) {
  zero_masked<T, A>(a);
  const int64_t count = int64_t(rows.size());
  if (count == 0) return;
  const Tiles<T, P> tiles(a.head);
  const auto functions = row_functions<A>(a.return_entropy, transforms(a));
  const int64_t group = std::min(tiles.group_rows(), count), d = a.head.features;
  T* gradient = static_cast<T*>(a.head.grad_hidden);
  HeadStatistics<T, P> statistics(tiles, functions, group, {gradient != nullptr, false, false});
  typename P::Block hidden(group, d, {false, true, 0});
  for (int64_t start = 0; start < count; start += group) {
    const int64_t size = std::min(group, count - start);
    tiles.gather(rows.data() + start, size, hidden);
    const auto terms = [&](int64_t i) { return row_terms<A>(a, rows[start + i]); };
    statistics.run(hidden, size, terms, nullptr);
    parallel_for(size, 16, [&](int64_t first, int64_t last) {
      std::vector<A> scratch(gradient ? d : 0);
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = rows[start + i];
        const RowTerms t = terms(i);
        const RowStats stats = statistics.stats(i);
        const double z = functions.logit(statistics.token_logit(i), t.temperature, a.head.softcap);
        a.lse[row] = stats.lse();
        static_cast<A*>(a.logps)[row] = A(stats.log_probability(z));
        if (a.return_entropy) static_cast<A*>(a.entropy)[row] = A(stats.entropy());
        if (gradient) statistics.write_gradient(i, t, scratch.data(), gradient + row * d);
      }
    });
  }
}

template <class T, class P, class A = typename P::Scalar>
void backward(const LinearTokenLogprobs& a, const std::vector<int64_t>& rows) {
  const int64_t count = int64_t(rows.size()), d = a.head.features;
  if (count == 0) return zero_head_gradients(a.head);
  if (a.head.grad_hidden)
    for (int64_t row = 0; a.mask && row < a.head.rows; ++row)
      if (!a.mask[row]) std::fill_n(static_cast<T*>(a.head.grad_hidden) + row * d, d, T{});
  const Tiles<T, P> tiles(a.head);
  const bool entropy = a.grad_entropy != nullptr;
  HeadGradients<T, P> gradients(tiles, row_functions<A>(entropy, transforms(a)), count, false);
  const auto terms = [&](int64_t i) {
    const int64_t row = rows[i];
    RowTerms t = row_terms<A>(a, row);
    t.lse = a.lse[row];
    t.grad = t.pick = static_cast<const A*>(a.grad_logps)[row];
    if (entropy) {
      t.grad_entropy = static_cast<const A*>(a.grad_entropy)[row];
      t.entropy = static_cast<const A*>(a.entropy)[row];
    }
    return t;
  };
  gradients.run(rows.data(), count, terms, nullptr, false);
}

}  // namespace

int64_t linear_token_logprobs_fwd(const LinearTokenLogprobs& a) {
  const std::vector<int64_t> rows = counting_rows(a);
  for (const int64_t row : rows)
    if (a.token_ids[row] < 0 || a.token_ids[row] >= a.head.vocab) return row;
  with_head_products(a.head.dtype, [&](auto stored, auto products) {
    forward<decltype(stored), decltype(products)>(a, rows);
  });
  return -1;
}

void linear_token_logprobs_bwd(const LinearTokenLogprobs& a) {
  const std::vector<int64_t> rows = counting_rows(a);
  with_head_products(a.head.dtype, [&](auto stored, auto products) {
    backward<decltype(stored), decltype(products)>(a, rows);
  });
}

}  // namespace apt::APT_ISA
