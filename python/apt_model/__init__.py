"""Trainers built on `apt_kernels`: they orchestrate, the mathematics is in the kernels."""
