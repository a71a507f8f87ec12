"""MXFP8: e4m3 elements, one e8m0 scale per 32 weights along K (W8A8 on engines that have it).

| suffix       | dtype   | shape            | meaning                             |
|--------------|---------|------------------|-------------------------------------|
| weight       | F8_E4M3 | (N, K)           | element values                      |
| weight_scale | U8      | (N, ceil(K / 32))| e8m0: w = weight * 2**(scale - 127) |

The scale is stored as its byte: loaders copy it by value, and a float8_e8m0fnu tensor would be converted. Rule
``rceil`` by default: nothing saturates, and no choice of power-of-two scales has less error. A K that is not a
multiple of 32 is refused (the layer stays as it is), though the arithmetic pads the tail with zeros.

    {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": true, "ignored_layers": [...]}

vLLM-Omni loads it natively on Ascend NPUs; on CUDA and XPU it refuses serialized checkpoints of this kind.
"""

from __future__ import annotations

from omni_convert.formats.mx import Mx

MXFP8 = Mx(name="mxfp8", element="e4m3", scale_rule="rceil")
