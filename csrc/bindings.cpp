// The one file that sees Python: addresses, sizes and a stream become the kernels' plain structs, without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "dove/allocator.h"
#include "dove/cuda_error.h"
#include "dove/eos_scan.h"
#include "dove/group_norm_silu.h"
#include "dove/isa.h"
#include "dove/layer_norm_pair.h"
#include "dove/pack.h"
#include "dove/prefix_attention.h"
#include "dove/resize_square.h"
#include "dove/vq_lookup.h"

namespace py = pybind11;

namespace {

py::list split(const std::string& text) { return py::list(py::str(text).attr("split")(",")); }

py::dict build_info() {
  py::dict info;
  info["compiler"] = DOVE_COMPILER;
  info["build_type"] = DOVE_BUILD_TYPE;
  info["cpu_isas"] = split(DOVE_CPU_ISAS);
  info["cpu_isa"] = dove::isa_name(dove::best_isa());
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef DOVE_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = split(DOVE_CUDA_ARCHS);
  info["nvcc"] = DOVE_NVCC;
#else
  info["cuda"] = false;
  info["cuda_archs"] = py::list();
  info["nvcc"] = "";
#endif
  info["cuda_reason"] = DOVE_CUDA_REASON;
  return info;
}

// Python's BackendError, raised for CudaError. Looked up when it is needed: the package is imported by then.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const dove::CudaError& error) {
    py::set_error(py::module_::import("dove_fast.errors").attr("BackendError"), error.what());
  }
}

// pack and unpack: source, target and cu_seqlens are addresses of tensors that the caller holds.
auto cpu_pack(dove::CpuKernel<dove::PackParams> kernel) {
  return
      [kernel](uintptr_t source, uintptr_t target, uintptr_t cu_seqlens, int64_t batch, int64_t length, int64_t total,
               int64_t entry_bytes, int64_t row_stride, int64_t entry_stride, int num_threads, const std::string& isa) {
        const dove::PackParams params{reinterpret_cast<const void*>(source),
                                      reinterpret_cast<void*>(target),
                                      reinterpret_cast<const int32_t*>(cu_seqlens),
                                      batch,
                                      length,
                                      total,
                                      entry_bytes,
                                      row_stride,
                                      entry_stride,
                                      num_threads};
        const dove::Isa chosen = dove::isa_by_name(isa);
        const py::gil_scoped_release release;
        kernel(params, chosen);
      };
}

#ifdef DOVE_CUDA
auto cuda_pack(void (*launch)(const dove::PackParams&, int, void*)) {
  return
      [launch](uintptr_t source, uintptr_t target, uintptr_t cu_seqlens, int64_t batch, int64_t length, int64_t total,
               int64_t entry_bytes, int64_t row_stride, int64_t entry_stride, int device, uintptr_t stream) {
        const dove::PackParams params{reinterpret_cast<const void*>(source),
                                      reinterpret_cast<void*>(target),
                                      reinterpret_cast<const int32_t*>(cu_seqlens),
                                      batch,
                                      length,
                                      total,
                                      entry_bytes,
                                      row_stride,
                                      entry_stride,
                                      0};
        const py::gil_scoped_release release;
        launch(params, device, reinterpret_cast<void*>(stream));
      };
}
#endif

void resize_square_cpu(uintptr_t source, uintptr_t target, int64_t width, int64_t height, int64_t left, int64_t top,
                       int64_t side, int64_t size, const std::string& isa) {
  const dove::ResizeSquareParams params{reinterpret_cast<const uint8_t*>(source),
                                        reinterpret_cast<uint8_t*>(target),
                                        width,
                                        height,
                                        left,
                                        top,
                                        side,
                                        size};
  const dove::Isa chosen = dove::isa_by_name(isa);
  const py::gil_scoped_release release;
  DOVE_CPU_KERNEL(resize_square)(params, chosen);
}

int64_t vq_lookup_cpu(uintptr_t rows, int64_t row_stride, uintptr_t words, uintptr_t squares, uintptr_t codes,
                      uintptr_t quantized, int64_t num_rows, int64_t num_words, int64_t width, int dtype,
                      int num_threads, const std::string& isa) {
  int64_t undecided = 0;
  const dove::VqLookupParams params{reinterpret_cast<const void*>(rows),
                                    row_stride,
                                    reinterpret_cast<const float*>(words),
                                    reinterpret_cast<const float*>(squares),
                                    reinterpret_cast<int64_t*>(codes),
                                    reinterpret_cast<void*>(quantized),
                                    &undecided,
                                    num_rows,
                                    num_words,
                                    width,
                                    static_cast<dove::Dtype>(dtype),
                                    num_threads,
                                    false,
                                    0,
                                    nullptr};
  const dove::Isa chosen = dove::isa_by_name(isa);
  const py::gil_scoped_release release;
  DOVE_CPU_KERNEL(vq_lookup)(params, chosen);
  return undecided;
}

#ifdef DOVE_CUDA
void vq_lookup_cuda(uintptr_t rows, int64_t row_stride, uintptr_t words, uintptr_t squares, uintptr_t codes,
                    uintptr_t quantized, int64_t num_rows, int64_t num_words, int64_t width, int dtype,
                    bool words_rounded, int64_t num_ranges, uintptr_t scratch, int device, uintptr_t stream) {
  const dove::VqLookupParams params{reinterpret_cast<const void*>(rows),
                                    row_stride,
                                    reinterpret_cast<const float*>(words),
                                    reinterpret_cast<const float*>(squares),
                                    reinterpret_cast<int64_t*>(codes),
                                    reinterpret_cast<void*>(quantized),
                                    nullptr,
                                    num_rows,
                                    num_words,
                                    width,
                                    static_cast<dove::Dtype>(dtype),
                                    0,
                                    words_rounded,
                                    num_ranges,
                                    reinterpret_cast<void*>(scratch)};
  const py::gil_scoped_release release;
  dove::cuda::vq_lookup(params, device, reinterpret_cast<void*>(stream));
}
#endif

// Addresses are 0 for what is not given: terms (x, two addends), outputs (total, y1, y2), statistics (mean, rstd),
// parameters (weight1, bias1, weight2, bias2).
void layer_norm_pair_cpu(std::array<uintptr_t, 3> terms, std::array<int64_t, 3> row_strides,
                         std::array<uintptr_t, 3> outputs, std::array<uintptr_t, 2> statistics,
                         std::array<uintptr_t, 4> parameters, int64_t rows, int64_t width, float eps, int dtype,
                         int num_threads, const std::string& isa) {
  const auto parameter = [&](int index) { return reinterpret_cast<const float*>(parameters[index]); };
  const dove::LayerNormPairParams params{
      {reinterpret_cast<const void*>(terms[0]), reinterpret_cast<const void*>(terms[1]),
       reinterpret_cast<const void*>(terms[2])},
      {row_strides[0], row_strides[1], row_strides[2]},
      reinterpret_cast<void*>(outputs[0]),
      reinterpret_cast<void*>(outputs[1]),
      reinterpret_cast<void*>(outputs[2]),
      reinterpret_cast<float*>(statistics[0]),
      reinterpret_cast<float*>(statistics[1]),
      parameter(0),
      parameter(1),
      parameter(2),
      parameter(3),
      rows,
      width,
      eps,
      static_cast<dove::Dtype>(dtype),
      num_threads};
  const dove::Isa chosen = dove::isa_by_name(isa);
  const py::gil_scoped_release release;
  DOVE_CPU_KERNEL(layer_norm_pair)(params, chosen);
}

// The tensors' addresses come as tuples, 0 for one that is not given: (q, k, v, out), their strides (entry, head) for
// q, k and v, (cu_seqlens, cos, sin), (k_cache, v_cache, slots, starts, key_lengths).
void prefix_attention_cpu(std::array<uintptr_t, 4> data, std::array<std::array<int64_t, 2>, 3> strides,
                          std::array<uintptr_t, 3> tables, std::array<uintptr_t, 5> cache, int64_t max_positions,
                          int64_t rows, int64_t heads, int64_t head_dim, int64_t rotary_dim, float scale, bool causal,
                          int dtype, int num_threads, const std::string& isa) {
  const dove::PrefixAttentionParams params{reinterpret_cast<const void*>(data[0]),
                                           reinterpret_cast<const void*>(data[1]),
                                           reinterpret_cast<const void*>(data[2]),
                                           {strides[0][0], strides[0][1]},
                                           {strides[1][0], strides[1][1]},
                                           {strides[2][0], strides[2][1]},
                                           reinterpret_cast<void*>(data[3]),
                                           reinterpret_cast<const int32_t*>(tables[0]),
                                           reinterpret_cast<const float*>(tables[1]),
                                           reinterpret_cast<const float*>(tables[2]),
                                           reinterpret_cast<void*>(cache[0]),
                                           reinterpret_cast<void*>(cache[1]),
                                           reinterpret_cast<const int32_t*>(cache[2]),
                                           reinterpret_cast<const int32_t*>(cache[3]),
                                           reinterpret_cast<const int32_t*>(cache[4]),
                                           max_positions,
                                           rows,
                                           heads,
                                           head_dim,
                                           rotary_dim,
                                           scale,
                                           causal,
                                           static_cast<dove::Dtype>(dtype),
                                           num_threads};
  const dove::Isa chosen = dove::isa_by_name(isa);
  const py::gil_scoped_release release;
  DOVE_CPU_KERNEL(prefix_attention)(params, chosen);
}

void group_norm_silu_cpu(uintptr_t x, uintptr_t out, uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t rstd,
                         int64_t batch, int64_t channels, int64_t spatial, int64_t groups, double eps,
                         bool channels_last, bool silu, int dtype, int num_threads, const std::string& isa) {
  const dove::GroupNormSiluParams params{reinterpret_cast<const void*>(x),
                                         reinterpret_cast<void*>(out),
                                         reinterpret_cast<const float*>(weight),
                                         reinterpret_cast<const float*>(bias),
                                         reinterpret_cast<float*>(mean),
                                         reinterpret_cast<float*>(rstd),
                                         batch,
                                         channels,
                                         spatial,
                                         groups,
                                         eps,
                                         channels_last,
                                         silu,
                                         static_cast<dove::Dtype>(dtype),
                                         num_threads};
  const dove::Isa chosen = dove::isa_by_name(isa);
  const py::gil_scoped_release release;
  DOVE_CPU_KERNEL(group_norm_silu)(params, chosen);
}

// The tensors' addresses come as tuples: (grad, x, grad_x), (weight, bias), (mean, rstd), (grad_weight, grad_bias).
void group_norm_silu_backward_cpu(std::array<uintptr_t, 3> data, std::array<uintptr_t, 2> parameters,
                                  std::array<uintptr_t, 2> statistics, std::array<uintptr_t, 2> grads, int64_t batch,
                                  int64_t channels, int64_t spatial, int64_t groups, bool channels_last, bool silu,
                                  int dtype, int num_threads, const std::string& isa) {
  const dove::GroupNormSiluBackwardParams params{reinterpret_cast<const void*>(data[0]),
                                                 reinterpret_cast<const void*>(data[1]),
                                                 reinterpret_cast<void*>(data[2]),
                                                 reinterpret_cast<const float*>(parameters[0]),
                                                 reinterpret_cast<const float*>(parameters[1]),
                                                 reinterpret_cast<const float*>(statistics[0]),
                                                 reinterpret_cast<const float*>(statistics[1]),
                                                 reinterpret_cast<float*>(grads[0]),
                                                 reinterpret_cast<float*>(grads[1]),
                                                 batch,
                                                 channels,
                                                 spatial,
                                                 groups,
                                                 channels_last,
                                                 silu,
                                                 static_cast<dove::Dtype>(dtype),
                                                 num_threads};
  const dove::Isa chosen = dove::isa_by_name(isa);
  const py::gil_scoped_release release;
  DOVE_CPU_KERNEL(group_norm_silu_backward)(params, chosen);
}

void eos_scan_cpu(uintptr_t states, int64_t state_stride, uintptr_t cu_seqlens, uintptr_t weight, uintptr_t bias,
                  float limit, uintptr_t steps, int32_t max_length, uintptr_t logits, uintptr_t lengths, int64_t rows,
                  int64_t width, int dtype, int num_threads, const std::string& isa) {
  const dove::EosScanParams params{reinterpret_cast<const void*>(states),
                                   state_stride,
                                   reinterpret_cast<const int32_t*>(cu_seqlens),
                                   reinterpret_cast<const float*>(weight),
                                   *reinterpret_cast<const float*>(bias),
                                   limit,
                                   reinterpret_cast<const int32_t*>(steps),
                                   max_length,
                                   reinterpret_cast<float*>(logits),
                                   reinterpret_cast<int32_t*>(lengths),
                                   rows,
                                   width,
                                   static_cast<dove::Dtype>(dtype),
                                   num_threads};
  const dove::Isa chosen = dove::isa_by_name(isa);
  const py::gil_scoped_release release;
  DOVE_CPU_KERNEL(eos_scan)(params, chosen);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The native kernels of dove_fast. Private: call dove_fast.ops.";
  module.attr("version") = DOVE_VERSION;
  module.def("build_info", &build_info);
  module.def("isa_available", [](const std::string& name) {
    try {
      dove::isa_by_name(name);
      return true;
    } catch (const std::invalid_argument&) {
      return false;
    }
  });
  module.def("keep_freed_memory", &dove::keep_freed_memory);
  py::register_local_exception_translator(&translate);

  module.def("layer_norm_pair_cpu", &layer_norm_pair_cpu);
  module.def("pack_cpu", cpu_pack(DOVE_CPU_KERNEL(pack)));
  module.def("unpack_cpu", cpu_pack(DOVE_CPU_KERNEL(unpack)));
  module.def("eos_scan_cpu", &eos_scan_cpu);
  module.def("prefix_attention_cpu", &prefix_attention_cpu);
  module.def("resize_square_cpu", &resize_square_cpu);
  module.def("vq_lookup_cpu", &vq_lookup_cpu);
  module.def("group_norm_silu_cpu", &group_norm_silu_cpu);
  module.def("group_norm_silu_backward_cpu", &group_norm_silu_backward_cpu);
#ifdef DOVE_CUDA
  module.def("pack_cuda", cuda_pack(&dove::cuda::pack));
  module.def("unpack_cuda", cuda_pack(&dove::cuda::unpack));
  module.attr("vq_lookup_words_a_tile") = dove::kVqLookupWordsATile;
  module.attr("vq_lookup_rows_a_block") = dove::kVqLookupRowsABlock;
  module.def("vq_lookup_scratch_bytes", &dove::vq_lookup_scratch_bytes);
  module.def("vq_lookup_cuda", &vq_lookup_cuda);
#endif
}
