"""Importing the package is cheap and works before and after the libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def test_another_packages_quantizer_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    from omni_convert.runtime import diffusers_plugin, transformers_plugin

    for plugin in (diffusers_plugin, transformers_plugin):
        quantizers: dict[str, type] = {"int8": dict}
        configs: dict[str, type] = {}
        plugin.register(SimpleNamespace(AUTO_QUANTIZER_MAPPING=quantizers, AUTO_QUANTIZATION_CONFIG_MAPPING=configs))
        assert quantizers == {"int8": dict}
        assert "int8" not in configs
    assert caplog.text.count("registered it first") == 2


def test_public_names() -> None:
    import omni_convert

    for name in omni_convert.__all__:
        assert getattr(omni_convert, name) is not None
