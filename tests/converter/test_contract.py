"""Every rule of vLLM-Omni's contract about configs, files and layers: broken once, and seen by its check alone."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import Output, array, stored, weights
from hostile.small import random, read_json, to_bits, write_json, write_model, write_weights

from omni_convert.converter.contract import check_contract
from omni_convert.converter.convert import convert
from omni_convert.converter.verify import verify

Outputs = dict[tuple[str, str], Path]
BLOCK = "transformer_blocks.0"
BF16 = stored("BF16", [[0x3F80] * 64] * 64)
SCALE = stored("F32", [[0.5]] * 64)
VECTOR = stored("BF16", [0x3F80] * 64)


def key(name: str, value: object) -> Callable[[Output], None]:
    return lambda output: output.config(lambda config: config.update({name: value}))


def without(name: str) -> Callable[[Output], None]:
    return lambda output: output.config(lambda config: config.pop(name))


def listed(*changes: str, key: str = "ignored_layers") -> Callable[[Output], None]:
    """Add names to the list, or with a minus in front take them out."""

    def change(config: dict[str, Any]) -> None:
        config[key] = [name for name in config[key] if f"-{name}" not in changes]
        config[key] += [name for name in changes if not name.startswith("-")]

    return lambda output: output.config(change)


def tensors(**changes: Any) -> Callable[[Output], None]:
    """Replace tensors, or remove them (None); ``__`` stands for a dot."""

    def change(found: dict[str, Any]) -> None:
        for name, item in changes.items():
            found.pop(name.replace("__", "."), None)
            if item is not None:
                found[name.replace("__", ".")] = item

    return lambda output: output.tensors(change)


def layer(name: str, **items: Any) -> Callable[[Output], None]:
    return tensors(**{f"{name}.{suffix}": item for suffix, item in items.items()})


def both(*changes: Callable[[Output], None]) -> Callable[[Output], None]:
    def change_all(output: Output) -> None:
        for change in changes:
            change(output)

    return change_all


def move_config(output: Output) -> None:
    """To where only a reader of the whole pipeline would look."""
    data = read_json(output.main / "config.json")
    write_json(output.folder / "config.json", {"quantization_config": data.pop("quantization_config")})
    write_json(output.main / "config.json", data)


def to_the_talker(data: dict[str, Any]) -> None:
    data["talker_config"] = {"quantization_config": data.pop("quantization_config")}


def announce(**config: Any) -> Callable[[Output], None]:
    """Another method, with the same tensors and the same ignored layers."""

    def change(old: dict[str, Any]) -> None:
        names = old["ignored_layers"]
        old.clear()
        old.update(config | {"ignored_layers": names})

    return lambda output: output.config(change)


def off_the_top(data: dict[str, Any]) -> None:
    del data["quantization_config"]


def to_the_thinker(data: dict[str, Any]) -> None:
    data["thinker_config"]["quantization_config"] = data["thinker_config"]["text_config"].pop("quantization_config")


def apart(data: dict[str, Any]) -> None:
    data["thinker_config"]["text_config"]["quantization_config"]["ignore"] = []


CASES: list[tuple[str, str, Callable[[Output], object], str, str]] = [
    # Where the config lies.
    ("Qwen-Image", "mxfp8", move_config, "config place", "config.json: has no quantization_config at its top, where"),
    ("Qwen-Image", "mxfp8", lambda o: o.edit("model_index.json", lambda d: d.update(quantization_config={})),
     "config place", "model_index.json: has quantization_config, where the engine never looks"),
    ("Qwen3-Omni", "fp8 tensor", lambda o: o.edit("config.json", off_the_top), "config place", "at its top, where the"),
    ("Qwen3-Omni", "fp8 tensor", lambda o: o.edit("config.json", to_the_thinker),
     "config place", "where the engine does not look. Move it to"),
    ("Qwen2.5-Omni", "fp8 channel", lambda o: o.edit("config.json", apart), "config place", "the engine reads both"),
    ("Qwen3-TTS", "fp8 block",
     lambda o: o.edit("config.json", to_the_talker),
     "config place", "config.json: has talker_config.quantization_config, where the engine does not look"),
    # Keys and their values.
    ("Qwen-Image", "mxfp8", key("producer", "me"), "config keys", "the key producer, which mxfp8 does not know"),
    ("Qwen-Image", "mxfp8", key("method", "mxfp8"), "config keys", "the key quant_method, which mxfp8"),
    ("Qwen-Image", "mxfp8", key("weight_block_size", [32, 32]), "config keys", "a TypeError when the engine starts"),
    ("Qwen-Image", "mxfp8", key("ignored_layers", "img_in"), "config keys", "expected a list of names"),
    ("Qwen-Image", "mxfp8", key("quant_method", "mxfp9"), "config keys", "quant_method is mxfp9, expected one of"),
    ("Qwen-Image", "mxfp8", without("quant_method"), "config keys", "without method or quant_method it raises"),
    ("Qwen-Image", "mxfp4", key("mxfp4_scale_alg", 1), "config keys", "mxfp4_scale_alg is 1, expected 0 or 2"),
    ("Qwen-Image", "mxfp4_dualscale", key("w4a8_fallback_steps", [1]), "config keys", "raises a ValueError"),
    ("Qwen-Image", "fp8 block", key("activation_scheme", "static"), "config keys", "static activations: a ValueError"),
    ("Qwen-Image", "fp8 block", key("weight_block_size", 32), "config keys", "expected two sizes"),
    ("Qwen-Image", "fp8 channel", key("ignore", "img_in"), "config keys", "ignore is img_in, expected a list of names"),
    ("Qwen-Image", "mxfp8", lambda o: o.edit("transformer/config.json", lambda d: d.update(quantization_config="int8")),
     "config keys", "quantization_config is int8, expected an object"),
    ("Qwen-Image", "fp8 channel", key("quant_algo", "FP8_PB_WO"), "config keys", "quant_algo is FP8_PB_WO"),
    ("Wan", "mxfp8", lambda o: o.config(lambda c: c.update(method=c.pop("quant_method"))),
     "config keys", "look for quant_method alone"),
    ("Qwen3-Omni", "fp8 block", without("activation_scheme"), "config keys", "activation_scheme is None, expected"),
    # The serialized flag.
    ("Qwen-Image", "mxfp8", without("is_checkpoint_mxfp8_serialized"), "serialized flag", "is None, expected true"),
    ("Qwen-Image", "mxfp8", key("is_checkpoint_mxfp8_serialized", 1), "serialized flag", "is 1, expected true"),
    # Methods that a class cannot run.
    ("Wan TI2V-5B", "mxfp8", announce(quant_method="mxfp4", is_checkpoint_mxfp4_serialized=True),
     "method", "refuse TI2V-5B with 4 bits"),
    ("HunyuanImage-3.0", "fp8 tensor", lambda o: o.config(lambda c: c.update(weight_block_size=[32, 32])),
     "method", "puts the rows of fused weights in another order"),
    ("Qwen3-Omni", "fp8 block", announce(quant_method="int8", is_checkpoint_int8_serialized=True),
     "method", "has no such method"),
    ("Wan VACE", "mxfp8", announce(quant_method="modelopt", quant_algo="FP8"), "method", "by keywords: a TypeError"),
    # Names of ignored layers.
    ("Qwen-Image", "mxfp8", listed(f"{BLOCK}.attn.to_qkv"), "ignored layers", "builds transformer_blocks.0.attn.to_q"),
    ("Qwen-Image", "mxfp8", listed(f"{BLOCK}.img_mlp.*"), "ignored layers", "the engine knows no patterns"),
    ("Qwen-Image", "mxfp8", listed(f"transformer.{BLOCK}.img_mlp.net.2"), "ignored layers",
     f"have no transformer in front. List {BLOCK}.img_mlp.net.2"),
    ("Qwen-Image", "mxfp8", layer(f"{BLOCK}.img_mlp.net.2", weight=BF16, weight_scale=None), "ignored layers",
     f"does not ignore {BLOCK}.img_mlp.net.2, but the weights of {BLOCK}.img_mlp.net.2 are BF16"),
    ("Qwen-Image", "mxfp8", both(
        *(layer(f"{BLOCK}.attn.to_{part}", weight=BF16, weight_scale=None) for part in "qkv"),
        listed(*(f"{BLOCK}.attn.to_{part}" for part in "qkv")),
    ), "ignored layers", f"(it lists {BLOCK}.attn.to_q, {BLOCK}.attn.to_k, {BLOCK}.attn.to_v, which the engine never"),
    ("Wan", "mxfp8", both(
        layer("blocks.0.ffn.net.2", weight=BF16, weight_scale=None), listed("blocks.0.ffn.net.2"),
    ), "ignored layers", "does not ignore blocks.0.ffn.net_2 (it lists blocks.0.ffn.net.2"),
    ("GLM-Image", "mxfp8", layer(f"{BLOCK}.norm1.linear", weight=BF16, weight_scale=None), "ignored layers", "norm1"),
    ("HunyuanImage-3.0", "mxfp8", listed("-layers.0.mlp.gate"), "ignored layers", "does not ignore layers.0.mlp.gate"),
    ("HunyuanImage-3.0", "fp8 tensor", listed("model.layers.0.mlp.experts.1.down_proj"), "ignored layers",
     "builds layers.0.mlp.experts in BF16"),
    ("BAGEL", "mxfp8", listed("bagel.connector.fc1"), "ignored layers", "builds bagel.connector.fc1 in BF16"),
    ("Qwen3-Omni", "fp8 block", listed("-thinker.model.layers.0.mlp.gate"), "ignored layers",
     "does not ignore thinker.language_model.model.layers.0.mlp.gate"),
    ("Qwen3-TTS", "fp8 channel", listed("-lm_head", key="ignore"), "ignored layers", "does not ignore lm_head"),
    ("Qwen3-TTS", "fp8 channel", listed("layers.0.self_attn", key="ignore"), "ignored layers", "ignores layers.0.self"),
    ("Qwen2.5-Omni", "fp8 channel", listed("*.layers.0.mlp.down_proj", key="ignore"), "ignored layers", "ignores *."),
    ("Qwen2.5-Omni", "fp8 channel", listed("thinker.model.layers.0.mlp*", key="ignore"), "ignored layers",
     "ignores thinker.model.layers.0.mlp*, so that the engine builds thinker.language_model.model.layers.0.mlp."),
    # Layers that are built without the config.
    ("Qwen-Image", "mxfp8", layer("img_in", weight=stored("F8_E4M3", [[0] * 16] * 64)), "other layers", "img_in: its"),
    ("HunyuanImage-3.0", "mxfp8", layer("model.layers.0.mlp.experts.0.down_proj",
     weight=stored("F8_E4M3", [[0] * 64] * 64)), "other layers", "builds it without mxfp8"),
    ("FLUX.1", "mxfp8", layer(f"{BLOCK}.attn.to_q", weight=stored("F8_E4M3", [[0] * 64] * 64)),
     "unquantizable layers", "double blocks get no quantization config"),
    ("FLUX.1", "mxfp8", layer(f"{BLOCK}.attn.to_q", weight_scale=stored("U8", [[0, 0]] * 64)),
     "unquantizable layers", "has weight_scale"),
    ("Qwen-Image", "mxfp8", lambda o: o.edit("transformer/config.json", lambda d: d.update(
        _class_name="SD3Transformer2DModel")), "unquantizable layers", "builds this class without a quantiz"),
    # What stands beside the codes.
    ("Qwen-Image", "mxfp8", layer(f"{BLOCK}.attn.to_q", weight_scale=None), "scales", "attn.to_q: lacks weight"),
    ("Qwen-Image", "mxfp4_dualscale", layer(f"{BLOCK}.img_mlp.net.2", mul_scale=None), "scales", "lacks mul_scale"),
    ("Qwen-Image", "mxfp4", key("require_smooth_scale", True), "scales", "lacks mul_scale, which mxfp4 needs"),
    ("Qwen-Image", "mxfp8", layer("img_in", weight_scale=SCALE), "unknown tensors", "the engine drops it silently"),
    ("Z-Image", "mxfp8", layer("cap_embedder.1", weight_scale=SCALE), "unknown tensors", "stops with a KeyError"),
    ("Qwen-Image", "mxfp4", layer(f"{BLOCK}.img_mlp.net.2", weight_dual_scale=SCALE), "unknown tensors",
     f"{BLOCK}.img_mlp.net.2.weight_dual_scale: mxfp4 has no such tensor"),
    ("Qwen-Image", "mxfp8", layer("img_gone", weight_scale=SCALE), "unknown tensors", "beside it are absent"),
    ("Z-Image", "mxfp8", tensors(**{"layers.0.foo.weight": VECTOR}), "unknown tensors",
     "layers.0.foo.weight: Z-Image has no such tensor: the engine stops with a KeyError"),
    ("Z-Image", "mxfp8", tensors(**{"context_refiner.0.adaLN_modulation.0.weight": VECTOR}), "unknown tensors", "con"),
    ("Z-Image", "mxfp8", tensors(**{"layers.0.feed_forward.w2.bias": VECTOR}), "unknown tensors", "w2.bias: Z-Image"),
    ("FLUX.1", "mxfp8", tensors(rope=VECTOR), "unknown tensors", "rope: FLUX.1 has no such tensor"),
    ("FLUX.1", "mxfp8", tensors(**{f"{BLOCK}.attn.norm_k.bias": VECTOR}), "unknown tensors", "norm_k.bias: FLUX.1"),
    # Layers that are not there.
    ("Z-Image", "mxfp8", layer("layers.0.attention.to_out.0", weight=None, weight_scale=None), "all layers",
     "layers.0.attention.to_out.0: is not there, and the engine builds it: a ValueError"),
    ("Qwen-Image", "mxfp8", both(
        *(layer(f"{BLOCK}.attn.add_{part}_proj", weight=None, weight_scale=None) for part in "qkv"),
    ), "all layers", f"{BLOCK}.attn.add_kv_proj: is not there"),
    ("Wan VACE", "mxfp8", lambda o: o.tensors(lambda found: [found.pop(n) for n in [*found] if "s.2.ffn" in n]),
     "all layers", "blocks.2.ffn.net_2: is not there, and the engine builds it"),
    ("FLUX.1", "mxfp8", both(
        *(layer(f"single_transformer_blocks.{i}.proj_mlp", weight=None, weight_scale=None) for i in range(2)),
    ), "all layers", "has no layer single_transformer_blocks\\.\\d+\\.proj_mlp (a regular expression)"),
    ("Wan", "mxfp8", lambda o: o.tensors(lambda found: [found.pop(n) for n in [*found] if n.startswith("blocks.4.")]),
     "all layers", "blocks.4: is not there, but blocks.5 is"),
    # Layers that become one.
    ("Qwen-Image", "mxfp8", layer(f"{BLOCK}.attn.to_k", weight=BF16, weight_scale=None), "fused layers",
     f"{BLOCK}.attn.to_k: is unquantized, but {BLOCK}.attn.to_q is not, and the engine has one {BLOCK}.attn.to_qkv"),
    ("BAGEL", "mxfp8", layer("language_model.model.layers.0.self_attn.o_proj_moe_gen", weight=BF16, weight_scale=None),
     "fused layers", "has one bagel.language_model.model.layers.0.self_attn.o_proj for both"),
    ("Z-Image", "mxfp8", layer("layers.0.feed_forward.w3", weight=None, weight_scale=None), "fused layers",
     "layers.0.feed_forward.w13: is stacked from 2 layers, but only layers.0.feed_forward.w1 are there"),
    # The text encoder that shares the config.
    ("Z-Image", "mxfp8", listed("-model.layers.1.mlp.up_proj"), "text encoder", "does not ignore model.layers.1.mlp"),
    ("Z-Image", "mxfp8", listed("-lm_head"), "text encoder", "does not ignore lm_head"),
    ("FLUX.2-dev", "mxfp8", listed("-text_encoder.language_model.model.layers.0.mlp.gate_up_proj"), "text encoder",
     "does not ignore text_encoder.language_model.model.layers.0.mlp.gate_up_proj"),
    ("Z-Image", "mxfp8", lambda o: o.edit("text_encoder/config.json", lambda d: d.update(num_hidden_layers=3)),
     "text encoder", "does not ignore model.layers.2.self_attn.q_proj"),
    ("Z-Image", "mxfp8", lambda o: o.edit("text_encoder/config.json", lambda d: d.pop("num_hidden_layers")),
     "text encoder", "num_hidden_layers is no number of layers"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "change", "rule", "said"), CASES, ids=[f"{c[3]}: {c[4]}" for c in CASES])
def test_a_broken_rule_is_seen_by_its_check_alone(
    outputs: Outputs, tmp_path: Path, family: str, kind: str, change: Callable[[Output], object], rule: str, said: str
) -> None:
    output = Output(outputs[family, kind], tmp_path)
    change(output)
    failed = output.failed()
    assert said in failed.get(rule, str(failed))
    of_another_method = {"scales", "unknown tensors", "shapes", "codes", "other layers"}
    assert failed.keys() - (of_another_method if "method" in rule else set()) == {rule}
    assert verify(output.folder).ok is False


def _index(output: Output, change: Callable[[dict[str, Any]], object]) -> None:
    output.edit("transformer/diffusion_pytorch_model.safetensors.index.json", change)


def _second_index(output: Output) -> None:
    folder = output.main
    shutil.copy(folder / "diffusion_pytorch_model.safetensors.index.json", folder / "model.safetensors.index.json")


def _stale_shards(output: Output) -> None:
    for path in output.main.glob("*.index.json"):
        path.unlink()
    write_weights(output.main / "diffusion_pytorch_model-00001-of-00009.safetensors", {"x.weight": random(4)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_second_index, "has both diffusion_pytorch_model.safetensors.index.json and model.safetensors.index.json"),
        (_stale_shards, "shards diffusion_pytorch_model-*-of-0000"),
        (lambda o: _index(o, lambda d: d["weight_map"].pop("img_in.weight")), "does not list img_in.weight"),
        (lambda o: _index(o, lambda d: d["weight_map"].update(x=next(iter(d["weight_map"].values())))), "places x in"),
        (lambda o: _index(o, lambda d: d["weight_map"].update(x="gone.safetensors")), "gone.safetensors: is missing"),
        (lambda o: _index(o, lambda d: d["weight_map"].update(x="../x.safetensors")), "places x in ../x.safetensors"),
        (lambda o: _index(o, lambda d: d.pop("weight_map")), "has no weight_map: a ValueError"),
        (lambda o: next(o.main.glob("*.safetensors")).write_bytes(b"\0" * 9), "safetensors: "),
    ],
    ids=["two indexes", "stale shards", "unlisted", "ghost", "missing shard", "elsewhere", "no map", "damaged"],
)
def test_weight_files(outputs: Outputs, tmp_path: Path, change: Callable[[Output], object], said: str) -> None:
    output = Output(outputs["Qwen-Image", "mxfp8"], tmp_path)
    change(output)
    failed = output.failed()
    assert said in failed["weight files"]
    assert failed.keys() <= {"weight files", "fused layers"}  # what could not be read is missing there


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("model_index.json", "config place"),
        ("transformer/config.json", "config place"),
        ("text_encoder/config.json", "text encoder"),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", "weight files"),
        ("config.json", ""),  # of a pipeline: nobody reads it
    ],
)
def test_json_that_cannot_be_read(outputs: Outputs, tmp_path: Path, name: str, rule: str) -> None:
    output = Output(outputs["Z-Image", "mxfp8"], tmp_path)
    (output.folder / name).write_text("{")
    assert rule in output.failed() or not rule


def test_no_weights_at_all(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen-Image", "mxfp8"], tmp_path)
    for path in output.main.glob("*.safetensors*"):
        path.unlink()
    assert "holds no safetensors file: a RuntimeError" in output.failed()["weight files"]


def test_a_tensor_in_two_files(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen-Image", "mxfp8"], tmp_path)
    output.tensors(lambda found: None)
    write_weights(output.main / "more.safetensors", {"img_in.weight": random(64, 16)})
    assert set(output.failed()) == {"weight files"}


def test_an_encoder_that_is_quantized_too_need_not_be_ignored(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Z-Image", "mxfp8"], tmp_path)
    codes, scales = to_bits([[0.0]] * 64), to_bits([[1.0]])
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")]
    tensors: dict[str, Any] = {f"{name}.weight": codes._replace(dtype="F8_E4M3") for name in names}
    bits = {name: item._replace(bits=item.bits.astype("u1")) for name, item in tensors.items()}
    assert scales.dtype == "BF16"
    write_weights(output.folder / "text_encoder" / "more.safetensors", bits)
    for path in (output.folder / "text_encoder").glob("*.index.json"):
        path.unlink()
    output.edit("text_encoder/config.json", lambda d: d.update(quantization_config={"quant_method": "mxfp8"}))
    assert "text_encoder/ holds codes of it" in output.failed()["text encoder"]
    listed(*(f"-{name}" for name in names))(output)
    assert "text encoder" not in output.failed()


def test_modelopt_weights_are_dequantized_where_the_engine_wants_none(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen-Image", "fp8 channel"], tmp_path)
    listed(f"{BLOCK}.attn.to_out.0", key="ignore")(output)
    layer("img_in", weight=stored("F8_E4M3", [[0] * 16] * 64), weight_scale=stored("F32", [1.0] * 64))(output)
    assert output.failed() == {}


def test_the_older_form_of_modelopt_is_understood(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen-Image", "fp8 channel"], tmp_path)

    def change(config: dict[str, Any]) -> None:
        config.pop("quant_method")
        algo, names = config.pop("quant_algo"), config.pop("ignore")
        config.update(quant_method="modelopt", quantization={"quant_algo": algo, "exclude_modules": names})

    output.config(change)
    assert output.failed() == {}


def test_a_class_that_the_engine_has_no_table_of(tmp_path: Path) -> None:
    tensors = {"a.weight": random(4, 64), "b.weight": random(4, 64)}
    source = write_model(tmp_path / "model", {"_class_name": "Some"}, tensors)
    convert(source, tmp_path / "out", method="mxfp8", ignore=["b"])
    checks = {check.name: check for check in check_contract(tmp_path / "out")}
    assert checks["vllm-omni model class"].ok
    assert not checks["vllm-omni model class"].known
    result = verify(tmp_path / "out")
    assert result.ok
    (row,) = [row for row in result.to_text().splitlines() if row.startswith("vllm-omni model class")]
    assert row.split()[3:5] == ["not", "known"]
    assert [check["name"] for check in result.to_dict()["checks"] if not check["known"]] == ["vllm-omni model class"]
    assert "model is Some: not in the engine's tables" in checks["vllm-omni model class"].checked
    assert "vllm-omni other layers" not in checks
    config = read_json(tmp_path / "out" / "config.json")
    config["quantization_config"]["ignored_layers"].append("a")
    write_json(tmp_path / "out" / "config.json", config)
    failed = [check.name for check in check_contract(tmp_path / "out") if not check.ok]
    assert failed == ["vllm-omni ignored layers"]


def test_weights_that_are_no_codes_of_any_method_are_none(outputs: Outputs, tmp_path: Path) -> None:
    output = Output(outputs["Qwen-Image", "mxfp8"], tmp_path)
    layer("img_in", weight=stored("I64", [[1]]))(output)
    assert output.failed() == {}


def test_only_outputs_for_the_engine_are_checked(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {}, {"a.weight": random(4, 64)})
    for target, expected in (("vllm-omni", True), ("omni-convert", False)):
        convert(source, tmp_path / target, method="int8", target=target)
        names = [check.name for check in verify(tmp_path / target).checks]
        assert any(name.startswith("vllm-omni ") for name in names) is expected


def test_the_checker_knows_nothing_of_the_writer() -> None:
    allowed = {"check", "contract", "contract_folder", "contract_layers", "contract_methods", "contract_models"}
    allowed |= {"contract_read", "contract_values", "files", "errors", "header", "layout"}
    folder = Path(__file__).parents[2] / "converter"
    paths = [*folder.glob("contract*.py"), folder / "check.py"]
    assert len(paths) == 8
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("omni_convert"):
                names = {str(node.module).rpartition(".")[2]}
                if node.module in ("omni_convert.converter", "omni_convert.formats", "omni_convert"):
                    names = {alias.name for alias in node.names}
                assert names <= allowed, path
            elif isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("omni_convert")]


def test_helpers_are_inverse(outputs: Outputs) -> None:
    for item in weights(outputs["Qwen-Image", "mxfp8"] / "transformer").values():
        assert stored(item.dtype, array(item)) == item
