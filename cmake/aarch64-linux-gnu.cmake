# Cross build for arm64 Linux with Debian's g++-aarch64-linux-gnu; ExecuTorch's aarch64 wheel is given as executorch_DIR.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Programs of the machine that builds, libraries and headers of the target. The wheel lies outside the target's root.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)
# Every arm64 since 2013 runs this; kernels that need more are chosen at run time.
set(CMAKE_CXX_FLAGS_INIT "-march=armv8-a")
# ExecuTorch's libraries name symbols of a newer C library than the cross compiler brings; the board's resolves them.
set(CMAKE_EXE_LINKER_FLAGS_INIT "-Wl,--allow-shlib-undefined")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-Wl,--allow-shlib-undefined")
