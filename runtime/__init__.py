"""Quantized checkpoint -> running model: modules, kernels per device, loading."""
