"""A CUDA card that is not there, for tests on machines without one.

``build.py`` compiles two small libraries that answer for an H100; a program that is started with
them can make tensors on ``cuda:0`` that have a device, a dtype and a shape, and no values
(``card.py``). So operands on different devices, reads that wait for the device, the attention
kernels that are chosen and the cost of each operator show without a GPU. Values, times, dtype
errors and NCCL do not.
"""
