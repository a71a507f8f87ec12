"""What quantization cost: reports of layers, sensitivity of a model to methods, comparison of outputs."""
