// The kernels of one instruction set, after DEPICT_ISA, DEPICT_LANES and DEPICT_PIXELS were defined.
#pragma once

#include "simd.h"
// (order matters: each builds on the ones before)
#include "packing.h"

#include "cell.h"

#include "careful.h"

#include "series.h"

#include "cross_entropy.h"

#include "label_map.h"

#include "product.h"

#include "attention_kernels.h"

#include "mask_head_kernels.h"

namespace depict::cpu::DEPICT_ISA {

template <class T>
constexpr Kernels<T> table() {
  return {mask_head_pack_classes<T>,
          mask_head_scratch<T>,
          mask_head_forward<T>,
          mask_head_backward<T>,
          mask_head_sum_classes<T>,
          mask_head_finish_classes<T>,
          attention_pack_keys<T>,
          attention_pack_queries<T>,
          attention_prepare_pairs<T>,
          attention_forward_pair<T>,
          attention_backward_pair<T>,
          attention_forward_rows<T>,
          attention_backward_rows<T>,
          attention_finish<T>,
          attention_unpack<T>,
          cross_entropy_scratch<T>,
          cross_entropy_band<T>,
          gather_border<T>,
          scale<T>,
          label_loader,
          label_scratch<T>,
          label_cell_row<T>};
}

}  // namespace depict::cpu::DEPICT_ISA
