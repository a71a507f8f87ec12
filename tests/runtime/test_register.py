"""Importing the package is cheap and works before and after the libraries."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from kinds import KINDS

from omni_convert.formats import FORMATS
from omni_convert.formats.errors import OmniConvertError
from omni_convert.runtime.names import register_names

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numba", "numpy", "safetensors"}

SHOW = (
    "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as d\n"
    "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as t\n"
    "print(d['int8'].__module__, t['int8'].__module__)\n"
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_stays_light() -> None:
    loaded = run("import sys, omni_convert; print(' '.join(sys.modules))").split()
    assert not HEAVY.intersection(loaded)


@pytest.mark.parametrize(
    "code",
    [
        f"import omni_convert\n{SHOW}",
        f"{SHOW.partition('print')[0]}import omni_convert\nprint{SHOW.partition('print')[2]}",
        f"import omni_convert\nfrom omni_convert.runtime.register import register_plugins\nregister_plugins()\n{SHOW}",
    ],
    ids=["before", "after", "twice"],
)
def test_registers_in_any_order(code: str) -> None:
    assert run(code) == "omni_convert.runtime.diffusers_plugin omni_convert.runtime.transformers_plugin"


def test_names_of_others_keep_what_is_theirs() -> None:
    """Their quantizer stays, their config class too, except for configs that we wrote."""

    class Ours:
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any]) -> object:
            return "ours", config_dict

    class Theirs:
        def __init__(self, quant_type: str) -> None:
            self.quant_type = quant_type

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any]) -> object:
            return cls(config_dict["quant_type"])

    quantizers: dict[str, type] = {"fp8": dict}
    configs: dict[str, Any] = {"fp8": Theirs, "modelopt": Theirs}
    library = SimpleNamespace(AUTO_QUANTIZER_MAPPING=quantizers, AUTO_QUANTIZATION_CONFIG_MAPPING=configs)
    register_names(library, int, Ours)
    register_names(library, int, Ours)
    assert quantizers.keys() == {"omni_convert", *FORMATS}
    assert quantizers["fp8"] is dict
    assert quantizers["omni_convert"] is quantizers["int8"] is int
    for kind in ("fp8 tensor", "fp8 channel", "mxfp8"):
        config = KINDS[kind].config(["a"])
        assert configs[config["quant_method"]].from_dict(config) == ("ours", config)
    for method in ("fp8", "modelopt"):
        assert issubclass(configs[method], Theirs)
        assert configs[method].__name__ == "Theirs"
        read = configs[method].from_dict({"quant_method": method, "quant_type": "x"})
        for made in (configs[method](quant_type="x"), read):
            assert (type(made), made.quant_type) == (Theirs, "x")


def test_the_libraries_own_configs_are_read_as_before() -> None:
    from diffusers.quantizers import auto as diffusers_auto
    from transformers import FineGrainedFP8Config, Mxfp4Config
    from transformers.quantizers.auto import AutoQuantizationConfig

    for method, expected in (("fp8", FineGrainedFP8Config), ("mxfp8", FineGrainedFP8Config), ("mxfp4", Mxfp4Config)):
        found = AutoQuantizationConfig.from_dict({"quant_method": method})
        assert type(found) is expected
    with pytest.raises(OmniConvertError, match="'modelopt' with quant_algo FP8, expected one of"):
        AutoQuantizationConfig.from_dict({"quant_method": "modelopt", "quant_algo": "FP8"})
    modelopt = diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING["modelopt"]
    assert issubclass(modelopt, diffusers_auto.NVIDIAModelOptConfig)
    assert diffusers_auto.AUTO_QUANTIZER_MAPPING["modelopt"] is diffusers_auto.NVIDIAModelOptQuantizer


def test_public_names() -> None:
    import omni_convert

    for name in omni_convert.__all__:
        assert getattr(omni_convert, name) is not None
