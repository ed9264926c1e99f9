// What would be asked of newer system libraries, so that a library that is built on a new system opens on those since glibc 2.28 (RHEL 8, Debian 10).
#include <new>
#include <sstream>

#if defined(__GLIBCXX__)
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;  // since glibc 2.32: whether shared_ptr may count without atomics
}
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }  // since GCC 11
template basic_stringstream<char>::basic_stringstream();               // since GCC 9
}  // namespace std
#endif
