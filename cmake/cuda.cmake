# The _cuda module. Every .cu names its own architectures: an sm_90a kernel built for sm_80 would be an empty stub.
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(HEBATRON_NVCC nvcc PATHS /usr/local/cuda/bin REQUIRED)
  set(CMAKE_CUDA_COMPILER ${HEBATRON_NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "hebatron: nvcc must be >= 12.4, got ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

set(portable_archs ${HEBATRON_CUDA_ARCHS})
if(NOT portable_archs)
  set(portable_archs 80-real 90a-real 80-virtual)
endif()

# hebatron_cuda_kernels(target archs files...): one object library per list of architectures. Its files enter the table of
# digests (cmake/digest.py) that _cuda.kernels() shows, and csrc/cuda/budgets.toml says what their machine code must hold.
function(hebatron_cuda_kernels target archs)
  add_library(${target} OBJECT ${ARGN})
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${archs}")
  target_include_directories(${target} PRIVATE csrc)
  # NDEBUG: without it device asserts serialise wgmma (C7510). -v, -warn-spills: the CI reads the log.
  target_compile_options(${target} PRIVATE -O3 -DNDEBUG -lineinfo -Xptxas=-v,-warn-spills)
  string(REPLACE ";" "," shown "${archs}")
  target_compile_definitions(${target} PRIVATE HEBATRON_CUDA_ARCHS="${shown}")
  target_sources(_cuda PRIVATE $<TARGET_OBJECTS:${target}>)
  foreach(file ${ARGN})
    string(REGEX REPLACE "^csrc/" "" name ${file})
    set_property(GLOBAL APPEND PROPERTY HEBATRON_KERNEL_FILES "${name}=${shown}")
  endforeach()
endfunction()

# The table, rewritten when a kernel or a header changes. Deferred: by then every kernel file has been named.
function(hebatron_kernel_table)
  get_property(files GLOBAL PROPERTY HEBATRON_KERNEL_FILES)
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS csrc/cuda/*.h csrc/cuda/*.cuh csrc/cuda/*.cu)
  set(digest ${CMAKE_SOURCE_DIR}/cmake/digest.py)
  set(table ${CMAKE_BINARY_DIR}/generated/kernel_table.h)
  add_custom_command(OUTPUT ${table} COMMAND ${Python_EXECUTABLE} ${digest} ${table} ${CMAKE_SOURCE_DIR}/csrc ${files}
    DEPENDS ${digest} ${sources} VERBATIM)
  target_sources(cuda_portable PRIVATE ${table})
endfunction()
cmake_language(DEFER CALL hebatron_kernel_table)

Python_add_library(_cuda MODULE WITH_SOABI csrc/bindings.cpp csrc/hebatron/check.cpp)
target_include_directories(_cuda PRIVATE csrc ${CMAKE_BINARY_DIR}/include)
target_compile_definitions(_cuda PRIVATE HEBATRON_MODULE=_cuda)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CUDA)
hebatron_cuda_kernels(cuda_portable "${portable_archs}" csrc/cuda/attention.cu csrc/cuda/attention_bwd.cu
  csrc/cuda/attention_decode.cu csrc/cuda/conv.cu csrc/cuda/device.cu csrc/cuda/grouped_gemm.cu csrc/cuda/grouped_gemm_sm80.cu csrc/cuda/loss.cu
  csrc/cuda/grouped_gemm_tiles.cu csrc/cuda/grouped_gemm_wgrad_sm80.cu csrc/cuda/moe.cu csrc/cuda/moe_combine.cu
  csrc/cuda/moe_decode.cu csrc/cuda/moe_permute.cu csrc/cuda/moe_route.cu csrc/cuda/norm.cu csrc/cuda/ssd_scan.cu csrc/cuda/ssd_scan_bwd.cu csrc/cuda/ssd_update.cu)
hebatron_cuda_kernels(cuda_sm90 90a-real csrc/cuda/attention_sm90.cu csrc/cuda/grouped_gemm_sm90.cu csrc/cuda/grouped_gemm_dgrad_sm90.cu
  csrc/cuda/grouped_gemm_wgrad_sm90.cu)
include(cmake/cutlass.cmake)
target_include_directories(cuda_portable PRIVATE ${CMAKE_BINARY_DIR}/generated)
