// Products of a warpgroup in the emulator. Every thread keeps what it has issued and computes its own part of
// the result when it waits, from what is in shared memory then. Errors, all of which are undefined behaviour
// on the GPU:
//
// - warps of a warpgroup that issue different products;
// - shared memory that was not fenced and published by a barrier since the thread last waited for copies;
// - accumulators that were waited for, and so perhaps used, without a fence before the next product;
// - a descriptor with an odd address, or one that leaves the block's shared memory;
// - tiles that change between issue and wait;
// - a thread that ends before its products are waited for.
//
// Accumulators are NaN between issue and wait.
#ifdef DEPICT_EMULATE

#include <map>
#include <string>
#include <vector>

#include "device_sm90.h"

namespace depict::emulated {
namespace {

constexpr int kGroup = 128, kDepth = 16;

struct Tile {
  size_t start, leading, stride;

  explicit Tile(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {}

  // `row` counts along m or n, or along k where transposed; rows of 16 bytes are never split.
  const unsigned char* row(int outer, int inner, int within) const {
    return shared_memory() + start + outer * stride + inner * leading + within * 16;
  }
  void check(uint64_t descriptor, int outer) const {
    if (descriptor >> 62 || (descriptor >> 49 & 7))
      fail("a descriptor asks for a swizzle, which is not modelled");
    if (start + (outer - 1) * stride + leading + 128 > shared_bytes())
      fail("a descriptor reaches past the block's shared memory");
  }
};

struct Issued {
  uint64_t a, b;
  int columns, kind;
  bool operator==(const Issued& o) const {
    return a == o.a && b == o.b && columns == o.columns && kind == o.kind;
  }
};

struct Pending {
  Product product;
  uint32_t a[4][4];  // of the four lanes that share this thread's rows
  uint64_t hash;     // of the tiles at issue, in the warps' first lanes
};

struct Accumulators {
  std::vector<float> values;
  int products = 0;
};

struct Thread : Attachment {
  std::vector<Pending> pending;
  std::vector<size_t> groups;  // products in each committed group, oldest first
  std::map<float*, Accumulators> accumulators;
  bool fenced = false;
  size_t issued = 0;
  // In the warpgroup's first thread, for all of it.
  std::vector<Issued> log;
  size_t fewest = SIZE_MAX;  // products of a thread that has ended
  Thread* first = nullptr;

  const char* unfinished() const override {
    if (!pending.empty()) return "a thread ended with products that it had not waited for";
    first->fewest = issued < first->fewest ? issued : first->fewest;
    return issued < first->log.size() ? kDiffer : nullptr;
  }
  static constexpr const char* kDiffer = "warps of one warpgroup issue different products";
};

Thread& state(int thread) {
  std::unique_ptr<Attachment>& slot = attachment(thread);
  if (!slot) slot = std::make_unique<Thread>();
  return static_cast<Thread&>(*slot);
}
Thread& here() {
  Thread& thread = state(thread_index());
  thread.first = &state(thread_index() / kGroup * kGroup);
  thread.first->first = thread.first;
  return thread;
}

uint64_t add_to_hash(uint64_t hash, const Tile& tile, int outer) {
  for (int i = 0; i < outer; ++i)
    for (int j = 0; j < 2; ++j)
      for (int k = 0; k < 128; k += 8) {
        uint64_t word;
        std::memcpy(&word, tile.row(i, j, 0) + k, 8);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
      }
  return hash;
}

uint64_t hash_tiles(const Product& product) {
  uint64_t hash = add_to_hash(0, Tile(product.b), product.columns / 8);
  return product.a_is_shared ? add_to_hash(hash, Tile(product.a), kGroup / 16) : hash;
}

float to_float(const Product& product, const unsigned char* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return product.bfloat16 ? cuda::bfloat16_to_float(bits) : cuda::float16_to_float(bits);
}

void compute(const Pending& pending, std::vector<float>& d) {
  const Product& product = pending.product;
  const int lane = thread_index() % kWarp, warp = thread_index() % kGroup / kWarp;
  float a[2][kDepth];
  const Tile tile_a(product.a), tile_b(product.b);
  for (int upper = 0; upper < 2; ++upper)
    for (int k = 0; k < kDepth; ++k) {
      if (product.a_is_shared)
        a[upper][k] = to_float(product, tile_a.row(2 * warp + upper, k / 8, lane / 4) + k % 8 * 2);
      else
        a[upper][k] = to_float(
            product,
            reinterpret_cast<const unsigned char*>(&pending.a[k % 8 / 2][upper + k / 8 * 2]) + k % 2 * 2);
    }
  for (int n = 0; n < product.columns / 8; ++n)
    for (int odd = 0; odd < 2; ++odd) {
      const int column = lane % 4 * 2 + odd;
      double sums[2] = {0, 0};
      for (int k = 0; k < kDepth; ++k) {
        const unsigned char* at = product.transposed ? tile_b.row(n, k / 8, k % 8) + column * 2
                                                     : tile_b.row(n, k / 8, column) + k % 8 * 2;
        const double b = to_float(product, at);
        sums[0] += a[0][k] * b;
        sums[1] += a[1][k] * b;
      }
      for (int upper = 0; upper < 2; ++upper) {
        float& at = d[n * 4 + upper * 2 + odd];
        at = static_cast<float>(product.add ? at + sums[upper] : sums[upper]);
      }
    }
}

}  // namespace

uint32_t shared_address(const void* tile) {
  const auto offset = static_cast<const unsigned char*>(tile) - shared_memory();
  if (offset < 0 || static_cast<size_t>(offset) >= shared_bytes())
    fail("a tile for tensor cores is not in shared memory");
  if (offset % 16) fail("a tile for tensor cores is not aligned to 16 bytes");
  return static_cast<uint32_t>(offset);
}

void fence_products() { here().fenced = true; }

void issue_product(const Product& product) {
  if (thread_count() % kGroup) fail("products need whole warpgroups of 128 threads");
  const Slot* slots = exchange(product.a_registers, sizeof(product.a_registers), "a product");
  Thread& thread = here();
  if (!fenced_and_published())
    fail("a product reads shared memory without fence_tensor_core_reads and a barrier after it was written");
  Tile(product.b).check(product.b, product.columns / 8);
  if (product.a_is_shared) Tile(product.a).check(product.a, kGroup / 16);

  const Issued issued{
      product.a, product.b, product.columns,
      product.bfloat16 | product.transposed << 1 | product.add << 2 | product.a_is_shared << 3};
  Thread& first = *thread.first;
  if (thread.issued == first.log.size()) first.log.push_back(issued);
  if (thread.issued >= first.fewest || !(first.log[thread.issued] == issued)) fail(Thread::kDiffer);
  ++thread.issued;

  Accumulators& accumulators = thread.accumulators[product.d];
  const size_t count = product.columns / 2;
  if (accumulators.products == 0) {
    if (!thread.fenced) fail("a product follows a wait without fence_products");
    accumulators.values.assign(product.d, product.d + count);
    for (size_t i = 0; i < count; ++i) product.d[i] = __builtin_nanf("");
  } else if (accumulators.values.size() != count) {
    fail("products of different shapes share accumulators without a wait");
  }
  ++accumulators.products;
  Pending pending{product, {}, 0};
  const int lane = thread_index() % kWarp;
  for (int i = 0; i < 4; ++i) std::memcpy(pending.a[i], slots[lane / 4 * 4 + i].bytes, sizeof(pending.a[i]));
  if (lane == 0) pending.hash = hash_tiles(product);
  thread.pending.push_back(pending);
}

void commit_products() {
  Thread& thread = here();
  size_t closed = 0;
  for (size_t count : thread.groups) closed += count;
  thread.groups.push_back(thread.pending.size() - closed);
}

void wait_for_products(int groups_left) {
  Thread& thread = here();
  exchange(nullptr, 0, "wait_for_products");
  while (static_cast<int>(thread.groups.size()) > groups_left) {
    const size_t count = thread.groups.front();
    for (size_t i = 0; i < count; ++i) {
      const Pending& pending = thread.pending[i];
      if (thread_index() % kWarp == 0 && hash_tiles(pending.product) != pending.hash)
        fail("shared memory that a product reads was written before the product was waited for");
      Accumulators& accumulators = thread.accumulators[pending.product.d];
      compute(pending, accumulators.values);
      if (--accumulators.products == 0)
        std::memcpy(pending.product.d, accumulators.values.data(),
                    accumulators.values.size() * sizeof(float));
    }
    thread.pending.erase(thread.pending.begin(), thread.pending.begin() + static_cast<std::ptrdiff_t>(count));
    thread.groups.erase(thread.groups.begin());
  }
  thread.fenced = false;
}

}  // namespace depict::emulated

#endif
