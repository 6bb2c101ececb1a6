"""The code that runs an op: plain PyTorch (the oracle), C++, CUDA; Triton's lies in kernels/."""
