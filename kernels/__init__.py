"""The layers of `reference` as Triton kernels: the same functions, the same arguments, the same shapes, on a GPU.

Without a GPU they run in Triton's interpreter, on the CPU, slowly: set TRITON_INTERPRET=1 before triton is imported.
"""
