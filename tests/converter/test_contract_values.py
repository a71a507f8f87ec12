"""Every rule of vLLM-Omni's contract about what tensors are and hold: broken once, and seen by its check alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import Output, array, stored
from hostile.small import Stored, random, read_json, to_bits, write_json, write_model

from omni_convert.converter.contract import check_contract
from omni_convert.converter.convert import convert

Outputs = dict[tuple[str, str], Path]
Change = Callable[[dict[str, Stored]], object]
BLOCK = "transformer_blocks.0"
LAYER = f"{BLOCK}.attn.to_out.0"


def values(name: str, change: Callable[[Any], object]) -> Change:
    """Change the elements of a tensor in place."""

    def apply(found: dict[str, Stored]) -> None:
        elements = array(found[name])
        change(elements)
        found[name] = stored(found[name].dtype, elements)

    return apply


def put(name: str, place: Any, value: float) -> Change:
    return values(name, lambda elements: elements.__setitem__(place, value))


def replaced(name: str, dtype: str, elements: Any) -> Change:
    return lambda found: found.update({name: stored(dtype, elements)})


CASES: list[tuple[str, str, Change, str, str]] = [
    # dtypes and shapes
    ("Qwen-Image", "int8", replaced(f"{LAYER}.weight_scale", "F32", [1.0] * 64), "shapes", "expected F32 (64, 1)"),
    ("Qwen-Image", "fp8 channel", replaced(f"{LAYER}.weight_scale", "F32", [[1.0]] * 64), "shapes", "F32 (64,)"),
    ("Qwen-Image", "fp8 static", replaced(f"{LAYER}.input_scale", "F32", [1.0] * 2), "shapes", "F32 () or (1,)"),
    ("Qwen-Image", "fp8 block", replaced(f"{LAYER}.weight_scale_inv", "F32", [[1.0]]), "shapes", "F32 (2, 2)"),
    ("Qwen-Image", "mxfp8", replaced(f"{LAYER}.weight_scale", "F32", [[1.0] * 2] * 64), "shapes", "U8 (64, 2)"),
    ("Qwen-Image", "mxfp4", replaced(f"{LAYER}.weight", "U8", [[0] * 32] * 64), "shapes", "expected F8_E4M3 (N, K)"),
    ("Qwen-Image", "mxfp4_dualscale", replaced(f"{LAYER}.weight_dual_scale", "F32", [[1.0]] * 64),
     "shapes", "expected F32 (64, 1, 1)"),
    ("Qwen-Image", "mxfp4_dualscale", replaced(f"{LAYER}.mul_scale", "F32", [[1.0] * 64]), "shapes", "F32 (64,)"),
    # codes
    ("Qwen-Image", "mxfp8", put(f"{LAYER}.weight", (3, 5), 0xFF), "codes", "the byte 0xff at [3, 5] is NaN"),
    ("Qwen-Image", "fp8 block", put(f"{LAYER}.weight", (63, 0), 0x7F), "codes", "the byte 0x7f at [63, 0] is NaN"),
    ("Qwen-Image", "mxfp4", put(f"{LAYER}.weight", (3, 5), 0x31), "codes", "0x31 at [3, 5] is no weight of mxfp4"),
    ("Qwen-Image", "mxfp4_dualscale", put(f"{LAYER}.weight", (0, 0), 0xFE), "codes", "is no weight of mxfp4_dualscale"),
    # scales
    ("Qwen-Image", "int8", put(f"{LAYER}.weight_scale", (5, 0), np.nan), "scale values", "holds nan at [5]"),
    ("Qwen-Image", "int8", put(f"{LAYER}.weight_scale", (5, 0), 0), "scale values", "holds 0 at [5]"),
    ("Qwen-Image", "fp8 block", put(f"{LAYER}.weight_scale_inv", (1, 1), -1), "scale values", "holds -1 at [3]"),
    ("Qwen-Image", "fp8 static", put(f"{LAYER}.input_scale", 0, np.inf), "scale values", "input_scale: holds inf"),
    ("Qwen-Image", "mxfp8", put(f"{LAYER}.weight_scale", (0, 1), 255), "scale values", "holds 255 at [1]"),
    ("Qwen-Image", "mxfp4_dualscale", put(f"{LAYER}.weight_dual_scale", 0, 0), "scale values", "dual_scale: holds 0"),
    ("Qwen-Image", "mxfp4_dualscale", put(f"{LAYER}.mul_scale", 7, 1.001), "scale values", "a number that BF16 holds"),
    # scales of layers that become one
    ("Qwen-Image", "int8", put(f"{BLOCK}.attn.to_v.weight_scale", (5, 0), 0.5), "fused scales",
     f"{BLOCK}.attn.to_qkv: the rows of {BLOCK}.attn.to_q, {BLOCK}.attn.to_k, {BLOCK}.attn.to_v have 2 scales"),
    ("Z-Image", "int8", put("layers.0.feed_forward.w3.weight_scale", (0, 0), 0.5), "fused scales", "feed_forward.w13"),
    ("FLUX.2-dev", "int8", put(f"{BLOCK}.ff.linear_in.weight_scale", (5, 0), 0.5), "fused scales", "ff.linear_in: "),
    ("FLUX.2-klein", "int8", put(f"{BLOCK}.ff_context.linear_in.weight_scale", (0, 0), 0.5), "fused scales", "ff_cont"),
    ("HunyuanImage-3.0", "int8", put("model.layers.0.self_attn.qkv_proj.weight_scale", (63, 0), 0.5), "fused scales",
     "layers.0.self_attn.qkv_proj: the rows of model.layers.0.self_attn.qkv_proj have 2 scales"),
    ("HunyuanImage-3.0", "int8", put("model.layers.1.mlp.shared_mlp.gate_and_up_proj.weight_scale", (63, 0), 0.5),
     "fused scales", "layers.1.mlp.shared_mlp.gate_up_proj"),
    ("BAGEL", "int8", put("language_model.model.layers.0.self_attn.k_proj_moe_gen.weight_scale", (0, 0), 0.5),
     "fused scales", "self_attn.qkv_proj.gen_exp: the rows of"),
    ("Qwen-Image", "fp8 tensor", put(f"{BLOCK}.attn.to_v.weight_scale", 0, 0.5), "fused scales", "rounds all codes"),
    ("Qwen3-Omni", "fp8 tensor", put("thinker.model.layers.0.mlp.experts.1.up_proj.weight_scale", 0, 0.5),
     "fused scales", "model.layers.0.mlp.experts.1.w13"),
    ("Qwen-Image", "mxfp4_dualscale", put(f"{BLOCK}.attn.to_v.mul_scale", 7, 2.0), "fused factors",
     "attn.to_v differ in mul_scale, and the engine has one input for all"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "change", "rule", "said"), CASES, ids=[f"{c[3]}: {c[4]}" for c in CASES])
def test_a_broken_rule_is_seen_by_its_check_alone(
    outputs: Outputs, tmp_path: Path, family: str, kind: str, change: Change, rule: str, said: str
) -> None:
    output = Output(outputs[family, kind], tmp_path)
    output.tensors(change)
    failed = output.failed()
    assert said in failed.get(rule, str(failed))
    assert failed.keys() == {rule}


def test_one_matrix_may_have_a_scale_for_every_row(outputs: Outputs, tmp_path: Path) -> None:
    """Not stacked in the engine: a single block of FLUX.2 reads queries, keys, values and more from one tensor."""
    output = Output(outputs["FLUX.2-dev", "int8"], tmp_path)
    name = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight_scale"
    output.tensors(put(name, (0, 0), 0.5))
    assert output.failed() == {}


def test_a_scale_for_every_row_can_be_asked_for(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["Qwen-Image"], tmp_path / "out", method="int8", fused_scale="per-channel")
    output = Output(tmp_path / "out", tmp_path)
    assert output.failed() == {}
    (check,) = [check for check in check_contract(output.folder) if check.name == "vllm-omni fused scales"]
    assert check.checked.startswith("not asked for: fused_scale per-channel")
    output.edit("omni_convert.json", lambda manifest: manifest["recipe"].update(fused_scale="shared"))
    assert "attn.to_v have" in output.failed()["fused scales"]


def test_scales_of_int8_may_be_in_bf16(outputs: Outputs, tmp_path: Path) -> None:
    """The engine widens them; other methods' it does not."""
    output = Output(outputs["Qwen-Image", "int8"], tmp_path)
    names = [f"{BLOCK}.attn.to_{part}.weight_scale" for part in "qkv"]
    output.tensors(lambda found: found.update(dict.fromkeys(names, stored("BF16", [[0x3F80]] * 64))))
    assert output.failed() == {}
    output.tensors(put(names[1], (5, 0), 0x3F00))
    assert output.failed().keys() == {"fused scales"}
    output.tensors(lambda found: found.update({names[1]: stored("BF16", [[0x7F80]] * 64)}))
    assert "to_k.weight_scale: holds inf at [0]" in output.failed()["scale values"]
    other = Output(outputs["Qwen-Image", "fp8 tensor"], tmp_path / "fp8")
    other.tensors(replaced(f"{LAYER}.weight_scale", "BF16", [0x3F80]))
    assert other.failed().keys() == {"shapes"}


def test_mul_scale_of_mxfp4_is_welcome_on_all_shards(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen-Image", "mxfp4"], tmp_path)
    names = [f"{BLOCK}.attn.to_{part}.mul_scale" for part in "qkv"]
    output.tensors(lambda found: found.update(dict.fromkeys(names, stored("F32", [2.0] * 64))))
    assert output.failed() == {}
    output.tensors(lambda found: found.pop(names[0]))
    assert output.failed().keys() == {"fused factors"}


def test_blocks_of_rows_must_not_reach_over_two_matrices(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["FLUX.2-dev", "fp8 block"], tmp_path)
    layers = [f"{BLOCK}.attn.to_{part}" for part in "qkv"]

    def change(found: dict[str, Stored]) -> None:
        for layer in layers:
            found[f"{layer}.weight"] = stored("F8_E4M3", [[0] * 64] * 40)
        linear = f"{BLOCK}.ff.linear_in"
        found[f"{linear}.weight"] = stored("F8_E4M3", [[0] * 64] * 64)
        found[f"{linear}.weight_scale_inv"] = stored("F32", [[1.0] * 2] * 2)

    output.tensors(change)
    (lines,) = output.failed().values()
    assert sorted(line.partition(".weight:")[0] for line in lines.splitlines()) == sorted(layers[:2])
    output.tensors(lambda found: found.update(
        {f"{BLOCK}.ff.linear_in.weight": stored("F8_E4M3", [[0] * 64] * 40)},
    ))  # fmt: skip
    assert "blocks of 32 do not divide: a ValueError" in output.failed()["shapes"]
    assert f"{BLOCK}.ff.linear_in with 20 rows" in output.failed()["shapes"]


def test_columns_that_the_method_cannot_divide(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen-Image", "mxfp4_dualscale"], tmp_path)

    def change(found: dict[str, Stored]) -> None:
        found[f"{LAYER}.weight"] = stored("F8_E4M3", [[0] * 32] * 64)
        found[f"{LAYER}.weight_scale"] = stored("U8", [[1]] * 64)
        found[f"{LAYER}.mul_scale"] = stored("F32", [1.0] * 32)

    output.tensors(change)
    assert output.failed() == {
        "shapes": f"{LAYER}.weight: has K = 32, mxfp4_dualscale needs a multiple of 64. Convert again."
    }


def test_rows_that_an_npu_cannot_take(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(65535, 16)})
    output = Output(convert(source, tmp_path / "out", method="int8").out, tmp_path)
    assert output.failed() == {}
    output.tensors(lambda found: found.update({
        "a.weight": stored("I8", np.zeros((65536, 16))), "a.weight_scale": stored("F32", np.ones((65536, 1))),
    }))  # fmt: skip
    assert "has 65536 rows, and an NPU" in output.failed()["shapes"]


def test_values_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_convert.converter.contract_values.PIECE_BYTES", 100)
    source = write_model(tmp_path / "model", {}, {"a.weight": to_bits(np.ones((7, 64)))})
    output = Output(convert(source, tmp_path / "out", method="mxfp8").out, tmp_path)
    assert output.failed() == {}
    output.tensors(put("a.weight", (6, 63), 0x7F))
    assert "the byte 0x7f at [6, 63]" in output.failed()["codes"]


def test_damaged_manifest_asks_for_nothing(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen-Image", "int8"], tmp_path)
    for recipe in (None, [], {"components": []}, {"components": {"a": 1}}):
        data = read_json(output.folder / "omni_convert.json") | {"recipe": recipe}
        write_json(output.folder / "omni_convert.json", data)
        (check,) = [check for check in check_contract(output.folder) if check.name == "vllm-omni fused scales"]
        assert not check.checked.startswith("not asked")
    (output.folder / "omni_convert.json").write_text("{")
    assert [check.name for check in check_contract(output.folder)]
