"""One op a file: the plain-jnp reference that defines it, and the accelerator kernels that compute it faster."""
