// Private operators of the CUDA upsample kernels (see bindings_cuda.h). Outputs are among the arguments.
#include "bindings_cuda.h"
#include "cuda/upsample.h"

namespace depict::cuda {
namespace {

constexpr int64_t kTableInts = sizeof(AxisTile) / sizeof(int32_t);

Grid grid_of(int64_t batch, int64_t classes, int64_t h, int64_t w, int64_t height, int64_t width) {
  STD_TORCH_CHECK(classes > 0 && h > 0 && w > 0 && height > 0 && width > 0,
                  "logits and target must not be empty");
  const Grid grid{batch, classes, Cut({h, height}), Cut({w, width})};
  const char* reason = why_not(grid);
  STD_TORCH_CHECK(reason == nullptr, "depict_kernels: ", reason ? reason : "");
  return grid;
}

// Of packed logits (batch, h, w, classes).
Grid grid_of(const Tensor& packed, int64_t height, int64_t width) {
  STD_TORCH_CHECK(packed.dim() == 4, "packed must be (B, h, w, C)");
  return grid_of(packed.size(0), packed.size(3), packed.size(1), packed.size(2), height, width);
}

template <class T>
T* output(const Tensor& tensor, const char* name, ScalarType type, std::initializer_list<int64_t> shape) {
  check_contiguous(tensor, name, type, shape);
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
T* output(const std::optional<Tensor>& tensor, const char* name, ScalarType type,
          std::initializer_list<int64_t> shape) {
  return tensor ? output<T>(*tensor, name, type, shape) : nullptr;
}
const float* input(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check_contiguous(tensor, name, ScalarType::Float, shape);
  return static_cast<const float*>(tensor.const_data_ptr());
}
const float* input(const std::optional<Tensor>& tensor, const char* name,
                   std::initializer_list<int64_t> shape) {
  return tensor ? input(*tensor, name, shape) : nullptr;
}

AxisTile* table_of(const Tensor& table, const Grid& grid) {
  return output<AxisTile>(table, "table", ScalarType::Int, {grid.y.tiles + grid.x.tiles, kTableInts});
}

IntType int_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte: return IntType::u8;
    case ScalarType::Char: return IntType::i8;
    case ScalarType::Short: return IntType::i16;
    case ScalarType::Int: return IntType::i32;
    case ScalarType::Long: return IntType::i64;
    default: STD_TORCH_CHECK(false, name, " must be uint8, int8, int16, int32 or int64");
  }
}

Target target_of(const Tensor& target, const Grid& grid, int64_t ignore_index) {
  check(target, "target", target.scalar_type(), {grid.batch, grid.y.axis.out, grid.x.axis.out});
  return {target.const_data_ptr(),
          int_type(target, "target"),
          {target.stride(0), target.stride(1), target.stride(2)},
          ignore_index};
}

void pack(Tensor logits, std::optional<Tensor> weight, Tensor packed, std::optional<Tensor> smooth,
          std::optional<Tensor> magnitude, Tensor table, int64_t height, int64_t width, int64_t stream) {
  const Grid grid = grid_of(packed, height, width);
  const int64_t b = grid.batch, c = grid.classes, h = grid.y.axis.in, w = grid.x.axis.in;
  check(logits, "logits", logits.scalar_type(), {b, c, h, w});
  const Logits view{logits.const_data_ptr(),
                    type_of(logits, "logits"),
                    {logits.stride(0), logits.stride(1), logits.stride(2), logits.stride(3)}};
  const Device device(logits);
  check_launch(upsample_pack(
      {grid, view, input(weight, "weight", {c}),
       output<float>(packed, "packed", ScalarType::Float, {b, h, w, c}),
       output<float>(smooth, "smooth", ScalarType::Float, {b, h, w}),
       output<float>(magnitude, "magnitude", ScalarType::Float, {b, h, w}), table_of(table, grid)},
      reinterpret_cast<void*>(stream)));
}

void cross_entropy(Tensor packed, std::optional<Tensor> smooth, Tensor table, Tensor target,
                   std::optional<Tensor> weight, std::optional<Tensor> weight_sum,
                   std::optional<Tensor> upstream, std::optional<Tensor> pixel_loss,
                   std::optional<Tensor> partial, std::optional<Tensor> bad, std::optional<Tensor> samples,
                   int64_t first, int64_t count, int64_t ignore_index, double label_smoothing,
                   int64_t stream) {
  STD_TORCH_CHECK(target.dim() == 3, "target must be (B, H, W)");
  const Grid grid = grid_of(packed, target.size(1), target.size(2));
  const int64_t b = grid.batch, c = grid.classes, h = grid.y.axis.in, w = grid.x.axis.in;
  const int64_t tiles = grid.tiles(), height = grid.y.axis.out, width = grid.x.axis.out;
  STD_TORCH_CHECK(label_smoothing == 0 || (smooth && weight.has_value() == weight_sum.has_value()),
                  "label smoothing needs smooth, and weight_sum where there are weights");
  LossArguments a{};
  a.grid = grid;
  a.table = table_of(table, grid);
  a.packed = input(packed, "packed", {b, h, w, c});
  a.smooth = input(smooth, "smooth", {b, h, w});
  a.weight = input(weight, "weight", {c});
  a.weight_sum = input(weight_sum, "weight_sum", {});
  a.target = target_of(target, grid, ignore_index);
  if (upstream) {
    check(*upstream, "upstream", ScalarType::Float, {b, height, width});
    a.upstream = static_cast<const float*>(upstream->const_data_ptr());
    for (int i = 0; i < 3; ++i) a.upstream_stride[i] = upstream->stride(i);
  }
  a.label_smoothing = static_cast<float>(label_smoothing);
  a.pixel_loss = output<float>(pixel_loss, "pixel_loss", ScalarType::Float, {b, height, width});
  a.partial = output<double>(partial, "partial", ScalarType::Double, {tiles, 2});
  a.bad = output<int64_t>(bad, "bad", ScalarType::Long, {tiles});
  STD_TORCH_CHECK(first >= 0 && count >= 0 && count <= tiles - first, "there are no tiles ", first, " to ",
                  first + count);
  a.first = first, a.count = count;
  if (samples) {
    a.held = samples->size(0);
    STD_TORCH_CHECK(a.held >= count, "samples must have room for ", count, " tiles, has ", a.held);
    a.samples = output<float>(*samples, "samples", ScalarType::Float, {a.held, 4, c});
  }
  const Device device(packed);
  check_launch(upsample_cross_entropy(a, reinterpret_cast<void*>(stream)));
}

void finish(Tensor target, int64_t h, int64_t w, Tensor bad, std::optional<Tensor> partial,
            std::optional<Tensor> loss, std::optional<Tensor> scale, Tensor report, bool mean,
            int64_t ignore_index, int64_t stream) {
  STD_TORCH_CHECK(target.dim() == 3, "target must be (B, H, W)");
  STD_TORCH_CHECK(partial.has_value() == loss.has_value() && partial.has_value() == scale.has_value(),
                  "partial, loss and scale go together");
  const Grid grid = grid_of(target.size(0), 1, h, w, target.size(1), target.size(2));
  const Device device(target);
  check_launch(upsample_finish({grid, target_of(target, grid, ignore_index),
                                output<int64_t>(bad, "bad", ScalarType::Long, {grid.tiles()}),
                                output<double>(partial, "partial", ScalarType::Double, {grid.tiles(), 2}),
                                output<float>(loss, "loss", ScalarType::Float, {}),
                                output<float>(scale, "scale", ScalarType::Float, {}),
                                output<int64_t>(report, "report", ScalarType::Long, {5}), mean},
                               reinterpret_cast<void*>(stream)));
}

void gather(Tensor samples, std::optional<Tensor> scale, Tensor grad, int64_t height, int64_t width,
            int64_t first, int64_t rows, int64_t stream) {
  STD_TORCH_CHECK(grad.dim() == 4 && samples.dim() == 3, "grad must be (B, C, h, w), samples (tiles, 4, C)");
  const Grid grid = grid_of(grad.size(0), grad.size(1), grad.size(2), grad.size(3), height, width);
  const int64_t h = grid.y.axis.in, row_tiles = grid.y.parts * int64_t{grid.x.tiles};
  const int64_t held = samples.size(0) / row_tiles;
  STD_TORCH_CHECK(first >= 0 && rows >= 0 && rows <= grid.batch * h - first, "there are no rows ", first,
                  " to ", first + rows);
  STD_TORCH_CHECK(held >= 2 || rows == 0, "samples must hold two rows of cells");
  const Device device(grad);
  check_launch(upsample_gather(
      {grid, input(samples, "samples", {held * row_tiles, 4, grid.classes}), input(scale, "scale", {}),
       output<float>(grad, "grad", ScalarType::Float, {grid.batch, grid.classes, h, grid.x.axis.in}), first,
       rows, held},
      reinterpret_cast<void*>(stream)));
}

void labels(Tensor packed, Tensor magnitude, Tensor table, int64_t height, int64_t width,
            std::optional<Tensor> labels, std::optional<Tensor> target, std::optional<Tensor> bad,
            std::optional<Tensor> counts, int64_t ignore_index, int64_t stream) {
  const Grid grid = grid_of(packed, height, width);
  const int64_t b = grid.batch, c = grid.classes, h = grid.y.axis.in, w = grid.x.axis.in;
  STD_TORCH_CHECK(target.has_value() == counts.has_value() && target.has_value() == bad.has_value(),
                  "target, bad and counts go together");
  LabelArguments a{};
  a.grid = grid;
  a.table = table_of(table, grid);
  a.packed = input(packed, "packed", {b, h, w, c});
  a.magnitude = input(magnitude, "magnitude", {b, h, w});
  if (labels) {
    a.label_type = int_type(*labels, "labels");
    STD_TORCH_CHECK(a.label_type == IntType::i32 || a.label_type == IntType::i64 ||
                        (a.label_type == IntType::u8 && c <= 256),
                    "labels must be int32, int64 or, up to 256 classes, uint8");
    a.labels = output<void>(*labels, "labels", labels->scalar_type(), {b, height, width});
  }
  if (target) {
    a.target = target_of(*target, grid, ignore_index);
    a.bad = output<int64_t>(*bad, "bad", ScalarType::Long, {grid.tiles()});
    check(*counts, "counts", ScalarType::Long, {c, c});
    a.counts = static_cast<int64_t*>(counts->mutable_data_ptr());
    for (int i = 0; i < 2; ++i) a.counts_stride[i] = counts->stride(i);
  }
  const Device device(packed);
  check_launch(upsample_labels(a, reinterpret_cast<void*>(stream)));
}

}  // namespace
}  // namespace depict::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(DEPICT_CUDA_LIBRARY, m) {
  m.def(
      "upsample_pack(Tensor logits, Tensor? weight, Tensor(a!) packed, Tensor(b!)? smooth, Tensor(c!)? "
      "magnitude, Tensor(d!) table, int height, int width, int stream) -> ()");
  m.def(
      "upsample_cross_entropy(Tensor packed, Tensor? smooth, Tensor table, Tensor target, Tensor? weight, "
      "Tensor? weight_sum, Tensor? upstream, Tensor(a!)? pixel_loss, Tensor(b!)? partial, Tensor(c!)? bad, "
      "Tensor(d!)? samples, int first, int count, int ignore_index, float label_smoothing, int stream) -> "
      "()");
  m.def(
      "upsample_finish(Tensor target, int h, int w, Tensor bad, Tensor? partial, Tensor(a!)? loss, "
      "Tensor(b!)? scale, Tensor(c!) report, bool mean, int ignore_index, int stream) -> ()");
  m.def(
      "upsample_gather(Tensor samples, Tensor? scale, Tensor(a!) grad, int height, int width, int first, "
      "int rows, int stream) -> ()");
  m.def(
      "upsample_labels(Tensor packed, Tensor magnitude, Tensor table, int height, int width, "
      "Tensor(a!)? labels, Tensor? target, Tensor(b!)? bad, Tensor(c!)? counts, int ignore_index, int "
      "stream) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(DEPICT_CUDA_LIBRARY, DEPICT_CUDA_KEY, m) {
  m.impl("upsample_pack", TORCH_BOX(&depict::cuda::pack));
  m.impl("upsample_cross_entropy", TORCH_BOX(&depict::cuda::cross_entropy));
  m.impl("upsample_finish", TORCH_BOX(&depict::cuda::finish));
  m.impl("upsample_gather", TORCH_BOX(&depict::cuda::gather));
  m.impl("upsample_labels", TORCH_BOX(&depict::cuda::labels));
}
