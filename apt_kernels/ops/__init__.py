"""One file an operation: contract, checks, choice of backend, autograd, fake kernels."""
