// The CUDA kernels without PyTorch, for compute-sanitizer: every buffer is an allocation of its own
// and exactly as long as it must be, so that an access beyond its end is one beyond an allocation.
//
//   driver CASE      runs one case, 0 if it is right
//
// A result is right if it was written, is finite, and is what a loop in double precision gives.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "apt/bradley_terry_loss.h"
#include "apt/dpo_loss.h"
#include "apt/gae.h"
#include "apt/mlm_mask.h"
#include "apt/token_logprobs.h"

namespace {

using namespace apt::cuda;
using apt::DpoLossType;
using apt::Reduction;

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

void expect(bool right, const std::string& message) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", message.c_str());
  std::exit(1);
}

// Memory of the device. Bytes of 255 show what a kernel forgets to write: NaN, or -1.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    const std::vector<unsigned char> unwritten(count * sizeof(T), 255);
    allocate(unwritten.data());
  }
  explicit Buffer(const std::vector<T>& values) : count_(values.size()) { allocate(values.data()); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  T* get() const { return count_ ? static_cast<T*>(data_) : nullptr; }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    CHECK(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void allocate(const void* content) {
    if (count_ == 0) return;
    CHECK(cudaMalloc(&data_, count_ * sizeof(T)));
    CHECK(cudaMemcpy(data_, content, count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  size_t count_;
  void* data_ = nullptr;
};

// Numbers that repeat, in [-3, 3): multiples of 1/32, which every dtype holds exactly.
float number(size_t i) {
  const uint32_t mixed = static_cast<uint32_t>(i * 2654435761u + 12345u) >> 7;
  return static_cast<float>(mixed % 192) / 32 - 3;
}

std::vector<float> numbers(size_t count, size_t first = 0) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = number(first + i);
  return values;
}

uint16_t bits_of(float x, DType dtype) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (dtype == DType::kBFloat16) return static_cast<uint16_t>(bits >> 16);
  if (x == 0) return 0;
  const uint32_t exponent = ((bits >> 23) & 255) - 127 + 15;
  return static_cast<uint16_t>(((bits >> 16) & 0x8000) | (exponent << 10) | ((bits >> 13) & 1023));
}

// A tensor of the dtype, as the bytes that the launchers take.
Buffer<unsigned char> as(const std::vector<float>& values, DType dtype) {
  const size_t size = dtype == DType::kFloat32 ? 4 : 2;
  std::vector<unsigned char> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = bits_of(values[i], dtype);
    std::memcpy(&bytes[i * size], size == 4 ? static_cast<const void*>(&values[i]) : &half, size);
  }
  return Buffer<unsigned char>(bytes);
}

const DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

std::vector<unsigned char> flags(size_t count, int one_in, size_t first = 0) {
  std::vector<unsigned char> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = (i + first) % one_in != 0;
  return values;
}

const bool* bools(const Buffer<unsigned char>& buffer) {
  return reinterpret_cast<const bool*>(buffer.get());
}

void all_finite(const std::vector<float>& values, const std::string& name) {
  for (size_t i = 0; i < values.size(); ++i)
    expect(std::isfinite(values[i]), name + " at " + std::to_string(i));
}

void token_logprobs_of(DType dtype, int64_t rows, int64_t V, int64_t gap) {
  const int64_t stride = V + gap, K = 2;
  const std::vector<float> x = numbers((rows - 1) * stride + V);
  const auto logits = as(x, dtype);
  const Buffer<unsigned char> mask(flags(rows, 3));
  std::vector<int64_t> id(rows * K);
  for (int64_t i = 0; i < rows * K; ++i) id[i] = (i * 37) % V;
  const Buffer<int64_t> ids(id);
  const Buffer<float> logps(rows * K), entropy(rows);
  const Buffer<double> lse(rows);
  const LogitsRows input = {logits.get(), dtype, rows, 1, V, stride, V, bools(mask), nullptr, 1, 0};
  CHECK(token_logprobs_fwd(input, ids.get(), K, logps.get(), entropy.get(), lse.get(), nullptr));
  CHECK(cudaDeviceSynchronize());
  const std::vector<float> got = logps.host();
  all_finite(entropy.host(), "entropy");
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t v = 0; v < V; ++v) sum += std::exp(static_cast<double>(x[row * stride + v]));
    for (int64_t k = 0; k < K; ++k) {
      const double wanted = row % 3 == 0 ? 0 : x[row * stride + id[row * K + k]] - std::log(sum);
      expect(std::abs(got[row * K + k] - wanted) < 1e-4, "logps of row " + std::to_string(row));
    }
  }
  const Buffer<float> ones(std::vector<float>(rows * K, 1)), one(std::vector<float>(rows, 1));
  const size_t size = dtype == DType::kFloat32 ? 4 : 2;
  const Buffer<unsigned char> grad(rows * V * size);
  CHECK(token_logprobs_bwd(ones.get(), one.get(), input, ids.get(), K, lse.get(), entropy.get(),
                           grad.get(), nullptr));
  CHECK(cudaDeviceSynchronize());
  const std::vector<unsigned char> bytes = grad.host();
  for (int64_t i = 0; i < rows * V; ++i) {
    bool written = false;  // all bytes 255 are a NaN in every dtype
    for (size_t b = 0; b < size; ++b) written |= bytes[i * size + b] != 255;
    expect(written, "grad_logits at " + std::to_string(i));
  }
}

void token_logprobs() {
  for (const DType dtype : kDTypes)
    for (const int64_t V : {1, 1000, 1023, 4099})
      for (const int64_t gap : {0, 3}) token_logprobs_of(dtype, 5, V, gap);
}

void dpo_loss() {
  for (const DType dtype : kDTypes)
    for (int type = 0; type <= static_cast<int>(DpoLossType::orpo); ++type)
      for (const int64_t B : {1, 5000}) {
        // log-probabilities of average tokens, below 0, as kOrpo takes them
        std::vector<float> x = numbers(4 * B);
        for (float& value : x) value = -4 + value;
        const auto part = [&](int i) {
          return as(std::vector<float>(x.begin() + i * B, x.begin() + (i + 1) * B), dtype);
        };
        const auto chosen = part(0), rejected = part(1), ref_chosen = part(2), ref_other = part(3);
        const bool alone = type >= static_cast<int>(DpoLossType::simpo);
        for (const Reduction reduction : {Reduction::none, Reduction::mean, Reduction::sum}) {
          const DpoOptions options = {static_cast<DpoLossType>(type), reduction, 0.1, 0.1, 0.5};
          const Buffer<float> loss(reduction == Reduction::none ? B : 1), rewards(B), others(B);
          const Buffer<float> grads(2 * B), workspace(pair_loss_workspace(B, reduction));
          CHECK(dpo_loss_fwd(chosen.get(), rejected.get(), alone ? nullptr : ref_chosen.get(),
                             alone ? nullptr : ref_other.get(), dtype, B, options, loss.get(),
                             rewards.get(), others.get(), grads.get(), workspace.get(), nullptr));
          CHECK(cudaDeviceSynchronize());
          const std::string name = "loss type " + std::to_string(type);
          all_finite(loss.host(), name);
          all_finite(grads.host(), name + ", gradients");
          const std::vector<float> got = rewards.host();
          for (int64_t i = 0; i < B; ++i) {
            const double wanted = 0.1 * (x[i] - (alone ? 0 : x[2 * B + i]));
            expect(std::abs(got[i] - wanted) < 1e-4, name + ", reward " + std::to_string(i));
          }
        }
      }
}

void bradley_terry_loss() {
  for (const DType dtype : kDTypes)
    for (const int64_t B : {1, 2049, 5000})
      for (const bool given : {false, true}) {
        const std::vector<float> x = numbers(2 * B);
        const auto chosen = as(std::vector<float>(x.begin(), x.begin() + B), dtype);
        const auto rejected = as(std::vector<float>(x.begin() + B, x.end()), dtype);
        const Buffer<float> margins(std::vector<float>(given ? B : 0, 0.25f));
        const Buffer<float> loss(1), grads(2 * B);
        const Buffer<float> workspace(pair_loss_workspace(B, Reduction::mean));
        CHECK(bradley_terry_loss_fwd(chosen.get(), rejected.get(), dtype, margins.get(), B, 0.25,
                                     0.0, Reduction::mean, loss.get(), grads.get(), workspace.get(),
                                     nullptr));
        CHECK(cudaDeviceSynchronize());
        double wanted = 0;
        for (int64_t i = 0; i < B; ++i) wanted += std::log1p(std::exp(x[B + i] + 0.25 - x[i])) / B;
        expect(std::abs(loss.host()[0] - wanted) < 1e-4 * (1 + wanted), "loss");
        all_finite(grads.host(), "gradients");
      }
}

void gae_of(DType dtype, int64_t rows, int64_t length, bool time_major, bool whiten) {
  const size_t count = rows * length;
  const std::vector<float> r = numbers(count), v = numbers(count, 999);
  const auto rewards = as(r, dtype), values = as(v, dtype);
  const Buffer<unsigned char> mask(flags(count, 7)), ends(flags(count, 2));
  const Buffer<float> bootstrap(numbers(rows, 77)), advantages(count), returns(count);
  const Buffer<double> workspace(whiten ? kGaeWorkspace : 0);
  const int64_t row_stride = time_major ? 1 : length, step_stride = time_major ? rows : 1;
  const auto of = [&](const void* data) { return GaeInput{data, row_stride, step_stride}; };
  Gae a = {};
  a.dtype = dtype;
  a.rows = rows;
  a.length = length;
  a.rewards = of(rewards.get());
  a.values = of(values.get());
  a.mask = of(mask.get());
  a.terminated = of(ends.get());
  a.bootstrap = {bootstrap.get(), 1, 1};
  a.gamma = 0.99f;
  a.decay = 0.95f;
  a.out_row_stride = row_stride;
  a.out_step_stride = step_stride;
  a.advantages = advantages.get();
  a.returns = returns.get();
  a.flat_mask = whiten ? bools(mask) : nullptr;
  a.workspace = workspace.get();
  CHECK(gae_fwd(a, nullptr));
  CHECK(cudaDeviceSynchronize());
  all_finite(advantages.host(), "advantages");
  all_finite(returns.host(), "returns");
}

void gae() {
  for (const DType dtype : kDTypes)
    for (const bool time_major : {false, true})
      for (const bool whiten : {false, true}) {
        gae_of(dtype, 19, 37, time_major, whiten);
        gae_of(dtype, 1, 1, time_major, whiten);
        gae_of(dtype, 3, 5000, time_major, whiten);
      }
}

template <typename Id>
void mlm_mask_of(int64_t rows, int64_t length) {
  const size_t count = rows * length;
  std::vector<Id> ids(count);
  for (size_t i = 0; i < count; ++i) ids[i] = static_cast<Id>((i * 7919) % 1000);
  const Buffer<Id> input(ids), masked(count), labels(count);
  const Buffer<unsigned char> attention(flags(count, 11)), positions(count);
  MlmMask a = {};
  a.rows = rows;
  a.length = length;
  a.id_bytes = sizeof(Id);
  a.input_ids = input.get();
  a.attention_mask = {attention.get(), 1};
  a.special_runs.count = 1;
  a.special_runs.first[0] = 100;
  a.special_runs.size[0] = 4;
  a.mask_token_id = 103;
  a.word_count = 996;
  a.chosen_below = int64_t{1} << 31;
  a.mask_below = int64_t{3} << 30;
  a.random_below = int64_t{7} << 29;
  a.seed_low = 5;
  a.step = 1;
  a.at_least_one = true;
  a.masked_ids = masked.get();
  a.labels = labels.get();
  a.mask_positions = reinterpret_cast<bool*>(positions.get());
  CHECK(mlm_mask_fwd(a, nullptr));
  CHECK(cudaDeviceSynchronize());
  const std::vector<Id> now = masked.host(), label = labels.host();
  const std::vector<unsigned char> at = positions.host();
  for (size_t i = 0; i < count; ++i) {
    const std::string where = " at " + std::to_string(i);
    expect(at[i] <= 1, "position" + where);
    expect(label[i] == (at[i] ? ids[i] : -100), "label" + where);
    expect(at[i] || now[i] == ids[i], "id" + where);
    expect(!at[i] || (ids[i] < 100 || ids[i] > 103), "special id chosen" + where);
  }
}

void mlm_mask() {
  for (const int64_t length : {1, 128, 1023, 2051}) {
    mlm_mask_of<int64_t>(5, length);
    mlm_mask_of<int32_t>(5, length);
  }
}

struct Case {
  const char* name;
  void (*run)();
};
const Case kCases[] = {{"token_logprobs", token_logprobs},
                       {"dpo_loss", dpo_loss},
                       {"bradley_terry_loss", bradley_terry_loss},
                       {"gae", gae},
                       {"mlm_mask", mlm_mask}};

}  // namespace

int main(int count, char** arguments) {
  for (const Case& one : kCases)
    if (count == 2 && std::strcmp(arguments[1], one.name) == 0) {
      one.run();
      std::printf("%s: right\n", one.name);
      return 0;
    }
  std::fprintf(stderr, "usage: driver CASE, one of:\n");
  for (const Case& one : kCases) std::fprintf(stderr, "%s\n", one.name);
  return 2;
}
