// The choice of the instruction set, at the first call.
#include <atomic>
#include <cstring>
#include <string>

#include "schedule.h"

namespace depict::cpu {
namespace {

const InstructionSet* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512,
    &kAvx2,
#endif
    &kBaseline,
};

const InstructionSet* best_instruction_set() {
  for (const InstructionSet* set : kAll)
    if (set->supported()) return set;
  return &kBaseline;
}

std::atomic<const InstructionSet*> in_use{nullptr};

}  // namespace

const InstructionSet& instruction_set() {
  const InstructionSet* set = in_use.load(std::memory_order_acquire);
  if (!set) {
    set = best_instruction_set();
    in_use.store(set, std::memory_order_release);
  }
  return *set;
}

const char* instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const InstructionSet* set : kAll)
      if (set->supported()) all += (all.empty() ? "" : " ") + std::string(set->name);
    return all;
  }();
  return names.c_str();
}

bool use_instruction_set(const char* name) {
  for (const InstructionSet* set : kAll)
    if (set->supported() && std::strcmp(set->name, name) == 0) {
      in_use.store(set, std::memory_order_release);
      return true;
    }
  return false;
}

const char* instruction_set_in_use() { return instruction_set().name; }

}  // namespace depict::cpu
