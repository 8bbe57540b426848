// BERT's 80/10/10 masking (Devlin 2018) from counter-based random numbers (Salmon 2011).
// Passes: one over a row; one more over a row that at_least_one finds without a chosen slot.
// Bytes of int64 ids: 8 read and 17 written a slot, and the masks. Parallel over rows.
// Floor: 10 Philox rounds a slot with 18 multiplications that differ from slot to slot, 2.3 cycles
// at a 512-bit multiplication a cycle: more than 25 bytes a slot cost while they stay in cache.
#include "masking/mlm_mask.h"

#include <algorithm>
#include <utility>

#include "common/parallel.h"
#include "masking/philox.h"

namespace apt::APT_ISA {
namespace {

constexpr int64_t kSlotsATask = 8192;  // about 25 us of work, several times the start of a thread
constexpr int64_t kFewRuns = 16;       // more runs of special ids are searched by bisection
constexpr int64_t kIgnored = -100, kNone = -1, kAlways = int64_t{1} << 32;
constexpr int64_t kNoKey = std::numeric_limits<int64_t>::max();
constexpr int kKeyShift = 31;  // positions are below 2^31

VecI64 splat(int64_t x) { return x + VecI64{}; }

template <class T>
VecI64 load_lanes(const T* p, int64_t count) {
  if (count < kLanes64) {
    VecI64 v{};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
  }
  typedef T Raw __attribute__((vector_size(kLanes64 * sizeof(T))));
  Raw raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector(raw, VecI64);
}

template <class T>
void store_lanes(T* p, int64_t count, VecI64 v) {
  if (count < kLanes64) {
    for (int64_t i = 0; i < count; ++i) p[i] = T(v[i]);
    return;
  }
  typedef T Raw __attribute__((vector_size(kLanes64 * sizeof(T))));
  const Raw raw = __builtin_convertvector(v, Raw);
  std::memcpy(p, &raw, sizeof raw);
}

VecI64 load_mask(const IntegerMask& mask, int64_t offset, int64_t count) {
  if (mask.bytes == 1) return load_lanes(static_cast<const int8_t*>(mask.data) + offset, count);
  if (mask.bytes == 4) return load_lanes(static_cast<const int32_t*>(mask.data) + offset, count);
  return load_lanes(static_cast<const int64_t*>(mask.data) + offset, count);
}

bool is_special(const MlmMask& a, int64_t id) {
  const SpecialRun* end = a.special_runs + a.special_run_count;
  const SpecialRun* above = std::upper_bound(
      a.special_runs, end, id, [](int64_t x, const SpecialRun& run) { return x < run.first; });
  return above != a.special_runs && id < above[-1].first + above[-1].count;
}

// Many runs: out of the way, so that the common case keeps its registers.
[[gnu::noinline]] VecI64 is_ordinary_by_lane(const MlmMask& a, VecI64 id) {
  for (int lane = 0; lane < kLanes64; ++lane) id[lane] = -int64_t(!is_special(a, id[lane]));
  return id;
}
[[gnu::always_inline]] inline VecI64 is_ordinary(const MlmMask& a, VecI64 id) {
  if (a.special_run_count > kFewRuns) return is_ordinary_by_lane(a, id);
  VecI64 ordinary = splat(-1);
  for (int64_t r = 0; r < a.special_run_count; ++r) {
    const SpecialRun run = a.special_runs[r];
    ordinary &= (id < run.first) | (id >= run.first + run.count);
  }
  return ordinary;
}

[[gnu::noinline]] VecI64 skip_runs_by_lane(const MlmMask& a, VecI64 id, VecI64 needed) {
  for (int lane = 0; lane < kLanes64; ++lane) {
    const SpecialRun *run = a.special_runs, *end = run + a.special_run_count;
    for (; needed[lane] && run < end && id[lane] >= run->first; ++run) id[lane] += run->count;
  }
  return id;
}
// Number (w * n) >> 32 of the n ids that are not special; anything in lanes not needed.
[[gnu::always_inline]] inline VecI64 random_word(const MlmMask& a, VecI64 w, VecI64 needed) {
  VecI64 id = VecI64(multiply_low(VecU64(w), splat64(uint64_t(a.word_count))) >> 32);
  if (a.special_run_count > kFewRuns) return skip_runs_by_lane(a, id, needed);
  for (int64_t r = 0; r < a.special_run_count; ++r)
    id += (id >= a.special_runs[r].first) & a.special_runs[r].count;
  return id;
}

// The lanes moved up by kStep; those that become free come from the end of `below`.
template <int kStep, int... kLane>
VecI64 move_up(VecI64 below, VecI64 v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(below, v, (kLanes64 - kStep + kLane)...);
}
template <int kStep>
VecI64 move_up(VecI64 below, VecI64 v) {
  return move_up<kStep>(below, v, std::make_integer_sequence<int, kLanes64>());
}

// Of every lane the first slot of its word and that slot's draw.
struct Words {
  VecI64 id, start, draw;
};

template <int kStep>
void spread(Words& now, const Words& before) {
  if constexpr (kStep <= kLanes64) {
    const VecI64 start = move_up<kStep>(before.start, now.start);
    const VecI64 draw = move_up<kStep>(before.draw, now.draw);
    const VecI64 later = start > now.start;
    now.start = later ? start : now.start;
    now.draw = later ? draw : now.draw;
    spread<2 * kStep>(now, before);
  }
}

// `before` is the word that the last lane of the vector before belongs to, in every lane.
Words spread_words(VecI64 id, VecI64 slots, VecI64 draw, Words& before) {
  const VecI64 first = (id != move_up<1>(before.id, id)) | (slots == 0);
  Words words{id, first ? slots : splat(kNone), draw};
  spread<1>(words, before);
  constexpr int kLast = kLanes64 - 1;
  before = {splat(id[kLast]), splat(words.start[kLast]), splat(words.draw[kLast])};
  return words;
}

struct Found {
  bool any;
  int64_t smallest;  // key of the smallest draw of an eligible slot
};

// Writes a row. Chosen are eligible slots whose draw is below `below`, of the word that begins at
// `only_start` unless that is kNone.
template <class T>
Found mask_row(MlmMask a, int64_t row, int64_t below, int64_t only_start) {
  const PhiloxRow counters{a.step, uint64_t(a.sample_ids ? a.sample_ids[row] : row), a.key};
  VecI64 slots{}, any{}, smallest = splat(kNoKey);
  for (int lane = 0; lane < kLanes64; ++lane) slots[lane] = lane;
  const VecI64 lanes = slots;
  Words before{splat(kNone), splat(kNone), splat(0)};
  for (int64_t t = 0; t < a.length; t += kLanes64, slots += kLanes64) {
    const int64_t at = row * a.length + t, count = std::min<int64_t>(kLanes64, a.length - t);
    const PhiloxWords random = philox(counters, VecU64(slots));
    const VecI64 id = load_lanes(static_cast<const T*>(a.input_ids) + at, count);
    VecI64 eligible = (lanes < count) & is_ordinary(a, id);
    if (a.attention_mask.data) eligible &= load_mask(a.attention_mask, at, count) != 0;
    if (a.special_tokens_mask.data) eligible &= load_mask(a.special_tokens_mask, at, count) == 0;
    VecI64 draw = random.w0, start = slots;
    if (a.word_ids) {
      const Words words = spread_words(load_lanes(a.word_ids + at, count), slots, draw, before);
      eligible &= words.id >= 0;
      draw = words.draw;
      start = words.start;
    }
    VecI64 chosen = eligible & (draw < below);
    if (a.at_least_one) {
      const VecI64 key = eligible ? draw << kKeyShift | start : splat(kNoKey);
      smallest = key < smallest ? key : smallest;
      if (only_start != kNone) chosen &= start == only_start;
    }
    any |= chosen;
    const VecI64 masked = random.w1 < a.mask_below, drawn = ~masked & (random.w1 < a.random_below);
    const VecI64 word = random_word(a, random.w2, chosen & drawn);
    const VecI64 replaced = masked ? splat(a.mask_token_id) : drawn ? word : id;
    store_lanes(static_cast<T*>(a.masked_ids) + at, count, chosen ? replaced : id);
    store_lanes(static_cast<T*>(a.labels) + at, count, chosen ? id : splat(kIgnored));
    store_lanes(reinterpret_cast<int8_t*>(a.mask_positions) + at, count, chosen & 1);
  }
  Found found{false, kNoKey};
  for (int lane = 0; lane < kLanes64; ++lane) {
    found.any |= any[lane] != 0;
    found.smallest = std::min(found.smallest, int64_t(smallest[lane]));
  }
  return found;
}

template <class T>
void mask_rows(const MlmMask& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Found found = mask_row<T>(a, row, a.chosen_below, kNone);
    if (a.at_least_one && !found.any && found.smallest != kNoKey)
      mask_row<T>(a, row, kAlways, found.smallest & ((int64_t{1} << kKeyShift) - 1));
  }
}

}  // namespace

void mlm_mask_fwd(const MlmMask& a) {
  const int64_t grain = std::max<int64_t>(1, kSlotsATask / std::max<int64_t>(1, a.length));
  parallel_for(a.rows, grain, [&](int64_t begin, int64_t end) {
    a.id_bytes == 4 ? mask_rows<int32_t>(a, begin, end) : mask_rows<int64_t>(a, begin, end);
  });
}

}  // namespace apt::APT_ISA
