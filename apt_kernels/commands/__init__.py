"""The command `apt-kernels`: what is here, whether it computes right, how fast it is."""
