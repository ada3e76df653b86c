# The baseline of grouped_gemm, built where HEBATRON_CUTLASS_DIR names CUTLASS's headers (bench/fetch_cutlass.sh).
if(NOT HEBATRON_CUTLASS_DIR)
  return()
endif()
hebatron_cuda_kernels(cuda_cutlass 90a-real csrc/cuda/cutlass/grouped_gemm.cu)
target_include_directories(cuda_cutlass SYSTEM PRIVATE ${HEBATRON_CUTLASS_DIR}/include)
# Tiles of 208 and 224 columns are wgmma shapes that CUTLASS declares only on demand.
target_compile_definitions(cuda_cutlass PRIVATE CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED)
target_compile_definitions(cuda_portable PRIVATE HEBATRON_CUTLASS)  # for the choice in grouped_gemm.cu
