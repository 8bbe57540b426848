// Counts the memory requests of warps: what a GPU's load and store units would be asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <tuple>

namespace cuda_emulation {

// The n-th accesses that the lanes of a warp make at one line of the source are one request.
class Traffic {
 public:
  bool counting = false;

  void start() {
    *this = Traffic();
    counting = true;
  }

  void stop(int64_t* counts) {
    counting = false;
    for (int store = 0; store < 2; ++store) {
      counts[3 * store] = totals_[store].requests;
      counts[3 * store + 1] = totals_[store].bytes;
      counts[3 * store + 2] = totals_[store].sectors;
    }
  }

  void add(int thread, int line, uintptr_t address, size_t bytes, bool store) {
    const int nth = occurrences_[{thread, line, store}]++;
    Request& request = requests_[{thread / 32, line, store, nth}];
    request.bytes += bytes;
    for (uintptr_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector) {
      request.sectors.insert(sector);
    }
  }

  void end_block() {
    for (const auto& [key, request] : requests_) {
      Total& total = totals_[std::get<2>(key)];
      total.requests += 1;
      total.bytes += request.bytes;
      total.sectors += static_cast<int64_t>(request.sectors.size());
    }
    requests_.clear();
    occurrences_.clear();
  }

 private:
  struct Request {
    int64_t bytes = 0;
    std::set<uintptr_t> sectors;
  };
  struct Total {
    int64_t requests = 0, bytes = 0, sectors = 0;
  };
  std::map<std::tuple<int, int, bool>, int> occurrences_;
  std::map<std::tuple<int, int, bool, int>, Request> requests_;
  Total totals_[2];
};

}  // namespace cuda_emulation
