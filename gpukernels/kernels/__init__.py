"""The Triton kernels and their launchers. Start with `norm.py`, which shows how a file is laid out."""
