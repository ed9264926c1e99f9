# Writes the size and the SHA-256 of a library beside it, which tpllm/native/library.py compares before it opens the library.
#   cmake -DLIBRARY=path/to/_kernels.so -P checksum.cmake
file(SIZE "${LIBRARY}" size)
file(SHA256 "${LIBRARY}" digest)
file(WRITE "${LIBRARY}.sha256" "${size} ${digest}\n")
