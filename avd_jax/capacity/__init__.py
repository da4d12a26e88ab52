"""Does a program fit its devices, and what does it cost: compiling ahead of time, FLOPs, kernels."""
