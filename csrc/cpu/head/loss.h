// Losses of an output head whose gradient is formed in the forward pass: the logits of a chunk of
// rows stay until the gradients of its rows are known, or are computed again after all rows.
#pragma once
#include <vector>

#include "head/gradients.h"
#include "head/statistics.h"

namespace apt::APT_ISA {

// Of the logits of all rows an eighth is kept, within these limits. More rows a chunk would pass
// over the weight and its gradient less often; with an eighth that is already a small part of the
// products' time.
constexpr int64_t kLeastStored = int64_t{5} << 20, kMostStored = int64_t{64} << 20;

// Rows of a chunk: the largest that the limits above allow, all chunks of nearly one size.
template <class T, class P, class A = typename P::Scalar>
int64_t chunk_rows(const Tiles<T, P>& tiles, int64_t count) {
  const LinearHead& head = tiles.head;
  const int64_t logits = head.vocab * int64_t(sizeof(A));
  const int64_t row = logits + (tiles.workers + 1) * tiles.features * int64_t(sizeof(A));
  const int64_t eighth = std::min(logits * count / 8, kMostStored);
  const int64_t most = std::max<int64_t>(std::max(eighth, kLeastStored) / row, 1);
  const int64_t chunks = (count + most - 1) / most;
  return std::min((count + chunks - 1) / chunks, tiles.group_rows());
}

// from_chunks: a chunk's gradients follow its statistics; else those of all rows follow all
// statistics. Of the rows (ascending) that count, loss.finish_rows(statistics, start, size) sees
// each chunk; loss.finish() comes after all of them; loss.terms(i) are those of rows[i], with token
// and temperature before finish_rows and everything when the gradient is formed.
template <class T, class P, class Loss, class A = typename P::Scalar>
void run_linear_loss(const Tiles<T, P>& tiles, const std::vector<int64_t>& rows,
                     const RowFunctions<A>& forward, const RowFunctions<A>& backward,
                     bool from_chunks, Wanted statistic, Loss& loss) {
  const LinearHead& head = tiles.head;
  const int64_t count = int64_t(rows.size()), d = head.features;
  if (head.grad_hidden)
    for (int64_t row = 0, next = 0; row < head.rows; ++row) {
      if (next < count && rows[next] == row)
        ++next;
      else
        std::fill_n(static_cast<T*>(head.grad_hidden) + row * d, d, T{});
    }
  const bool wanted = head.grad_hidden || head.grad_weight || head.grad_bias;
  const bool stream = wanted && from_chunks;
  const int64_t chunk = stream ? chunk_rows(tiles, count) : std::min(tiles.group_rows(), count);
  Workspace<A> stored(stream ? chunk * tiles.count * tiles.stride : 0);
  typename P::Block hidden(chunk, d, {false, true, 0});
  HeadStatistics<T, P> statistics(tiles, forward, chunk, statistic);
  HeadGradients<T, P> gradients(tiles, backward, stream ? chunk : 0, true);
  const auto terms = [&](int64_t i) { return loss.terms(i); };
  for (int64_t start = 0; start < count; start += chunk) {
    const int64_t size = std::min(chunk, count - start);
    tiles.gather(rows.data() + start, size, hidden);
    const auto of_chunk = [&](int64_t i) { return loss.terms(start + i); };
    statistics.run(hidden, size, of_chunk, stored.data());
    loss.finish_rows(statistics, start, size);
    if (stream) gradients.run(rows.data() + start, size, of_chunk, stored.data(), start > 0);
  }
  loss.finish();
  if (wanted && !stream) {
    HeadGradients<T, P> all(tiles, backward, count, false);
    all.run(rows.data(), count, terms, nullptr, false);
  }
}

}  // namespace apt::APT_ISA
