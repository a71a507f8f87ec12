"""MXFP4: e2m1 elements, one e8m0 scale per 32 weights along K (W4A4 on engines that have it).

| suffix       | dtype   | shape            | meaning                                            |
|--------------|---------|------------------|----------------------------------------------------|
| weight       | F8_E4M3 | (N, K)           | element values 0, +-.5, 1, 1.5, 2, 3, 4, 6, unpacked |
| weight_scale | U8      | (N, ceil(K / 32))| e8m0: w = weight * 2**(scale - 127)                |

vLLM-Omni casts the values to packed FP4 on the device and does not read packed files, so a file has 8.25 bits per
weight, the device 4.25. Rule ``even`` by default. ``mxfp4_scale_alg: 2`` has the engine choose activation scales with
less error. A K that is not a multiple of 32 is refused (the layer stays as it is).

    {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": true, "ignored_layers": [...], "mxfp4_scale_alg": 2}

vLLM-Omni loads it natively on Ascend NPUs only.
"""

from __future__ import annotations

from omni_convert.formats.mx import Mx

MXFP4 = Mx(name="mxfp4", element="e2m1", scale_rule="even", settings=(("mxfp4_scale_alg", 2),))
