"""What vLLM-Omni 0.30 takes of every serialized method: config keys, their values, and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from omni_convert.formats.errors import printable

COMPANIONS = frozenset(
    {
        "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_dual_scale", "mul_scale", "input_scale",
        "pre_quant_scale", "weight_packed", "weight_zero_point", "qweight", "qzeros", "wscales",
    }
)  # fmt: skip
"""Suffixes of what stands beside the codes of a quantized weight, in any method."""

MAX_NPU_ROWS = 65535
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One kind of serialized weights. ``scales``: suffix -> dtype and accepted shapes, from (N, K) and the block.

    ``wider``: dtypes that the engine copies into parameters of F32 as well.
    """

    weight: str
    scales: Callable[[int, int, Sequence[int]], Mapping[str, tuple[str, Sequence[Shape]]]]
    optional: Sequence[str] = ()
    wider: Sequence[str] = ()
    columns: int = 1
    """What K must be a multiple of."""


def _one(*suffixes: str) -> Mapping[str, tuple[str, Sequence[Shape]]]:
    return dict.fromkeys(suffixes, ("F32", ((), (1,))))


def _groups(rows: int, columns: int) -> tuple[str, Sequence[Shape]]:
    return "U8", ((rows, -(-columns // 32)),)


METHODS: Mapping[str, Method] = {
    "int8": Method(weight="I8", scales=lambda n, k, block: {"weight_scale": ("F32", ((n, 1),))}, wider=("BF16",)),
    "fp8": Method(weight="F8_E4M3", scales=lambda n, k, block: _one("weight_scale")),
    "fp8 static": Method(weight="F8_E4M3", scales=lambda n, k, block: _one("weight_scale", "input_scale")),
    "fp8 block": Method(
        weight="F8_E4M3",
        scales=lambda n, k, block: {"weight_scale_inv": ("F32", ((-(-n // block[0]), -(-k // block[1])),))},
    ),
    "modelopt": Method(weight="F8_E4M3", scales=lambda n, k, block: _one("weight_scale", "input_scale")),
    "modelopt channel": Method(weight="F8_E4M3", scales=lambda n, k, block: {"weight_scale": ("F32", ((n,),))}),
    "mxfp8": Method(weight="F8_E4M3", scales=lambda n, k, block: {"weight_scale": _groups(n, k)}),
    "mxfp4": Method(
        weight="F8_E4M3",
        scales=lambda n, k, block: {"weight_scale": _groups(n, k), "mul_scale": ("F32", ((k,),))},
        optional=("mul_scale",),
    ),
    "mxfp4_dualscale": Method(
        weight="F8_E4M3",
        scales=lambda n, k, block: {
            "weight_scale": _groups(n, k),
            "weight_dual_scale": ("F32", ((n, -(-k // 512), 1),)),
            "mul_scale": ("F32", ((k,),)),
        },
        columns=64,
    ),
}

FLAGS: Mapping[str, str] = {
    "int8": "is_checkpoint_int8_serialized",
    "fp8": "is_checkpoint_fp8_serialized",
    "mxfp8": "is_checkpoint_mxfp8_serialized",
    "mxfp4": "is_checkpoint_mxfp4_serialized",
    "mxfp4_dualscale": "is_checkpoint_serialized",
}
"""What says that a method's weights are quantized on disk."""


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_block(value: object) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)
    return value is None or pair


_NAMES = (_is_names, "a list of names")
_EMPTY = (lambda value: not value, "nothing: it raises a ValueError")
_DYNAMIC = (lambda value: value == "dynamic", "'dynamic'")
_ANY = (lambda value: True, "")
_KEYS: Mapping[str, Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "int8": {"activation_scheme": _DYNAMIC, "ignored_layers": _NAMES},
    "fp8": {
        "activation_scheme": (lambda value: value in ("dynamic", "static"), "'dynamic' or 'static'"),
        "ignored_layers": _NAMES,
        "weight_block_size": (_is_block, "two sizes"),
        "store_dtype": (lambda value: value is None, "nothing"),
    },
    "mxfp8": {"ignored_layers": _NAMES},
    "mxfp4": {
        "ignored_layers": _NAMES,
        "require_smooth_scale": (lambda value: type(value) is bool, "true or false"),
        "mxfp4_scale_alg": (lambda value: type(value) is int and value in (0, 2), "0 or 2"),
        "w4a8_fallback_steps": _ANY,
        "w4a8_fallback_layers": _NAMES,
    },
    "mxfp4_dualscale": {
        "ignored_layers": _NAMES,
        "num_bf16_fallback_layers": _ANY,
        "w4a8_fallback_steps": _EMPTY,
        "w4a8_fallback_layers": _EMPTY,
    },
}
_MODELOPT = {"FP8": "modelopt", "FP8_PER_CHANNEL_PER_TOKEN": "modelopt channel"}


@dataclass(frozen=True, kw_only=True)
class Announced:
    """A ``quantization_config`` as the engine understands it.

    ``kind``: key of ``METHODS``; None if what it would build cannot be told. ``ignored``: as listed. ``flag``: the
    serialized flag's name and value, where the method has one. ``problems``: with keys and values.
    """

    kind: str | None = None
    block: Sequence[int] = ()
    ignored: Sequence[str] = ()
    smooth: bool = False
    flag: tuple[str, object] | None = None
    problems: Sequence[str] = field(default=())

    @property
    def modelopt(self) -> bool:
        return self.kind is not None and self.kind.startswith("modelopt")

    def required(self, suffixes: Mapping[str, object]) -> list[str]:
        method = METHODS[self.kind or ""]
        return [suffix for suffix in suffixes if self.smooth or suffix not in method.optional]


def understand(data: object, *, vllm: bool, wan: bool) -> Announced:
    """Read a config as vLLM's ``from_config`` does (``vllm``), or as the diffusion path does, by keyword arguments."""
    if not isinstance(data, Mapping):
        return Announced(problems=(f"is {printable(data)}, expected an object: the engine finds no method in it",))
    method = data.get("quant_method") if vllm else data.get("method", data.get("quant_method"))
    if method == "modelopt":
        return _modelopt(data, wan=wan)
    if vllm and method == "fp8":
        return _from_config(data)
    if not isinstance(method, str) or method not in _KEYS:
        keys = "quant_method" if vllm else "method or quant_method"
        said = "an unknown method is a ValueError" if method is not None else f"without {keys} it raises a ValueError"
        return Announced(problems=(f"quant_method is {printable(method)}, expected one of {', '.join(_KEYS)}: {said}",))
    problems = list(_key_problems(data, method, wan=wan))
    good = {key: data.get(key) for key, (accepts, _) in _KEYS[method].items() if accepts(data.get(key))}
    return Announced(
        kind=_kind(data, method),
        block=_sizes(good.get("weight_block_size")),
        ignored=_listed(good.get("ignored_layers")),
        smooth=good.get("require_smooth_scale") is True,
        flag=(FLAGS[method], data.get(FLAGS[method])),
        problems=tuple(problems),
    )


def _key_problems(data: Mapping[str, object], method: str, *, wan: bool) -> Iterator[str]:
    known = _KEYS[method]
    named = "method" if "method" in data else "quant_method"
    if wan and "quant_method" not in data:
        yield "says method, but the experts of Wan look for quant_method alone and find no config. Rename the key"
    for key, value in data.items():
        if key in (named, FLAGS[method]):
            continue
        if key not in known:
            yield (
                f"has the key {printable(key)}, which {method} does not know ({', '.join((FLAGS[method], *known))}): "
                "a TypeError when the engine starts. Remove it"
            )
        elif not known[key][0](value):
            yield f"{key} is {printable(value)}, expected {known[key][1]}"
    yield from _block_problems(data)


def _block_problems(data: Mapping[str, object]) -> Iterator[str]:
    if data.get("weight_block_size") is not None and data.get("activation_scheme", "dynamic") != "dynamic":
        yield "has weight_block_size with static activations: a ValueError. Use dynamic ones"


def _from_config(data: Mapping[str, object]) -> Announced:
    """fp8 through vLLM: it needs ``activation_scheme``, takes other keys for notes, and the name for the flag."""
    known = _KEYS["fp8"]
    problems = [
        f"{key} is {printable(data.get(key))}, expected {expected}: vLLM stops on that"
        for key, (accepts, expected) in known.items()
        if not accepts(data.get(key))
    ]
    good = {key: data.get(key) for key, (accepts, _) in known.items() if accepts(data.get(key))}
    return Announced(
        kind=_kind(data, "fp8"),
        block=_sizes(good.get("weight_block_size")),
        ignored=_listed(good.get("ignored_layers")) or _listed(data.get("modules_to_not_convert")),
        problems=(*problems, *_block_problems(data)),
    )


def _modelopt(data: Mapping[str, object], *, wan: bool) -> Announced:
    """Other keys are tolerated; the older form has an object ``quantization``."""
    inner = data.get("quantization")
    part = inner if isinstance(inner, Mapping) else data
    algo = str(part.get("quant_algo", "")).upper()
    key = "exclude_modules" if part is inner else "ignore"
    problems = []
    if algo not in _MODELOPT:
        problems.append(f"quant_algo is {printable(part.get('quant_algo'))}, expected {' or '.join(_MODELOPT)}")
    if not _is_names(part.get(key)):
        problems.append(f"{key} is {printable(part.get(key))}, expected a list of names")
    kind = _MODELOPT.get(algo) if _is_names(part.get(key)) else None
    return Announced(kind=kind, ignored=_listed(part.get(key)), problems=tuple(problems))


def _kind(data: Mapping[str, object], method: str) -> str | None:
    block = data.get("weight_block_size") if method == "fp8" else None
    if not _is_names(data.get("ignored_layers")) or not _is_block(block):
        return None
    if block is not None:
        return "fp8 block"
    return "fp8 static" if method == "fp8" and data.get("activation_scheme") == "static" else method


def _sizes(value: object) -> Sequence[int]:
    return value if isinstance(value, list) else ()


def _listed(value: object) -> Sequence[str]:
    return tuple(value) if isinstance(value, list) and _is_names(value) else ()
