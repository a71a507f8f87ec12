"""Engines that load our checkpoints: what each can read and run. Another engine is another value of ``TARGETS``.

Source of vLLM-Omni's facts: its 0.30.0 release, run on CPU with the kernels left out where a table says so, otherwise
read; and its support tables. Hardware is what the engine's code admits; nothing was run on it here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from omni_convert.formats.architectures import Architecture
from omni_convert.formats.base import Format
from omni_convert.formats.errors import UsageError
from omni_convert.formats.tables_diffusion import DIFFUSION_TABLES
from omni_convert.formats.tables_omni import OMNI_TABLES, OWN_TABLES


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What holds for some methods on some architectures; empty: for all.

    ``methods``: kinds of formats (see ``format_kind``), or ``fp8`` for all kinds of it. ``layers``: regular expression
    found in the checkpoint's names of the layers that are meant.
    """

    reason: str
    architectures: Sequence[str] = ()
    methods: Sequence[str] = ()
    layers: str = ""

    def holds(self, architecture: str | None, kind: str) -> bool:
        known = not self.architectures or architecture in self.architectures
        return known and (not self.methods or kind in self.methods or kind.split()[0] in self.methods)


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine.

    ``formats``: kind of format -> hardware on which it loads quantized weights of that kind. ``architectures``: the
    classes whose quantizable linears are known; ``None``: any linear of any class runs. ``refused``: what it cannot
    load all the same. ``kept``: layers that stay unquantized unless asked otherwise. ``cautions``: what loads with a
    condition. ``mixes``: whether layers of one model may have several formats. ``one_scale``: hardware on which
    it reads one scale of int8 layers that it fuses.
    """

    name: str
    title: str
    formats: Mapping[str, Sequence[str]]
    architectures: Sequence[Architecture] | None
    refused: Sequence[Rule] = ()
    kept: Sequence[Rule] = ()
    cautions: Sequence[Rule] = ()
    mixes: bool = False
    one_scale: Sequence[str] = ()

    def find(
        self, config: Mapping[str, object] | None, layers: Collection[str], pipeline: str | None = None
    ) -> Architecture | None:
        """The description of a model: by its config and its pipeline's class, or, for weights without a config, the
        one whose every linear is among ``layers``."""
        tables = (*(self.architectures or ()), *OWN_TABLES)
        if config is None:
            return next((table for table in tables if table.describes(layers)), None)
        return next((table for table in tables if table.is_class(config, pipeline)), None)

    def knows(self, architecture: Architecture | None) -> bool:
        """Whether it is known what the engine can run of this class."""
        return self.architectures is None or architecture in self.architectures

    def hardware(self, fmt: Format) -> list[str]:
        """Where it runs weights of a format as they are meant."""
        wrong = self.one_scale if getattr(fmt, "fused_scale", None) == "per-channel" else ()
        return [item for item in self.formats[format_kind(fmt)] if item not in wrong]

    def refusal(self, architecture: str | None, kind: str) -> str | None:
        """Why the engine cannot load this kind of format for this architecture; None if it can."""
        if kind not in self.formats:
            return f"it loads no {kind} weights"
        return next((rule.reason for rule in self.refused if rule.holds(architecture, kind)), None)

    def working(self, architecture: str | None) -> list[str]:
        """The kinds of formats that it loads for an architecture."""
        return [kind for kind in self.formats if self.refusal(architecture, kind) is None]

    def kept_rules(self, architecture: str | None, kind: str) -> Sequence[Rule]:
        """Which layers stay unquantized by default, and why."""
        return [rule for rule in self.kept if rule.holds(architecture, kind)]


def format_kind(fmt: Format) -> str:
    """What engines tell formats apart by: ``int8``, ``mxfp8``, ..., ``fp8 tensor``, ``static``, ``channel``, ``block``.

    ``static``: per weight, with recorded scales of the activations.
    """
    granularity = getattr(fmt, "granularity", None)
    if granularity is None:
        return fmt.name
    return f"{fmt.name} {'static' if 'input_scale' in fmt.needs else granularity}"


def kind_flags(kind: str) -> str:
    """What to type for a kind of format."""
    method, _, variant = kind.partition(" ")
    flag = {"": "", "tensor": "", "static": " --activation-scheme static"}.get(variant, f" --granularity {variant}")
    return f"--method {method}{flag}"


def find_target(name: str) -> Target:
    """A value of ``TARGETS``.

    Raises:
        UsageError: there is none of that name.
    """
    if not isinstance(name, str) or name not in TARGETS:
        raise UsageError(f"--target is {name!r}, expected one of {', '.join(TARGETS)}.")
    return TARGETS[name]


def names_of_encoder(architecture: Architecture, config: Mapping[str, object]) -> Iterator[str]:
    """What the engine calls every linear of the text encoder that shares the transformer's quantization config.

    Raises:
        KeyError: ``config``, the encoder's, does not say how many layers it has, or says nonsense.
    """
    encoder = architecture.text_encoder
    if encoder is None:
        return
    count: object = config
    for key in encoder.count:
        count = count.get(key) if isinstance(count, Mapping) else None
    if type(count) is not int or not 0 <= count < _MOST_LAYERS:
        raise KeyError(".".join(encoder.count))
    for name in encoder.layers:
        numbers = range(count) if ".N." in name else (0,)
        yield from (name.replace(".N.", f".{number}.") for number in numbers)


_MOST_LAYERS = 10_000
_CPU, _CUDA, _NPU = "CPU", "CUDA", "Ascend NPU"
_WAN = ("Wan", "Wan TI2V-5B", "Wan VACE")
_AUTOREGRESSIVE = ("Qwen3-Omni", "Qwen2.5-Omni", "Qwen3-TTS")
_FOR_TRANSFORMERS = ("int8", "mxfp8", "mxfp4", "mxfp4_dualscale")
"""Methods that only vLLM-Omni's diffusion transformers have."""

# With int8 activations there, 25 of 30 everyday sentences keep a cosine of 0.995 to MiniLM's float32 embeddings;
# without, all 30 (but not all single words: "Thanks!" has 0.984).
_BERT_VALUES = Rule(
    architectures=("BERT",),
    methods=("int8",),
    layers=r"\.attention\.self\.value$",
    reason="value projections read a normalized stream with a few large channels",
)

_VLLM_OMNI = Target(
    name="vllm-omni",
    title="vLLM-Omni",
    formats={
        "int8": (_CUDA, _NPU),  # CUDA from sm_80
        "fp8 tensor": (_CUDA,),
        "fp8 static": (_CUDA,),
        "fp8 channel": (_CUDA,),
        "fp8 block": (_CUDA,),
        "mxfp8": (_NPU,),
        "mxfp4": (_NPU,),
        "mxfp4_dualscale": (_NPU,),
    },
    architectures=(*DIFFUSION_TABLES, *OMNI_TABLES),
    one_scale=(_CUDA,),
    refused=(
        Rule(architectures=("SD3.5",), reason="it builds this class without a quantization config"),
        Rule(
            architectures=_WAN,
            methods=("fp8 channel",),
            reason="scales per channel go under ModelOpt's name, on which its Wan pipelines stop with a TypeError",
        ),
        Rule(
            architectures=("Wan TI2V-5B",),
            methods=("mxfp4", "mxfp4_dualscale"),
            reason="its own tools refuse this model with 4 bits for lack of accuracy",
        ),
        Rule(
            architectures=_AUTOREGRESSIVE,
            methods=_FOR_TRANSFORMERS,
            reason="vLLM runs its language model, and has this method for no serialized checkpoint",
        ),
        Rule(
            architectures=("Qwen2.5-Omni",),
            methods=("fp8 tensor", "fp8 static", "fp8 block"),
            reason="its vision tower would be built quantized too, and no list of ignored layers matches there",
        ),
        Rule(
            architectures=("HunyuanImage-3.0",),
            methods=("fp8 channel", "fp8 block"),
            reason="its loader reorders the rows of fused weights, but not scales of this shape",
        ),
        Rule(
            architectures=("HunyuanImage-3.0",),
            methods=("mxfp4_dualscale",),
            reason="its loader halves the mul_scale of gate and up as if it had their rows",
        ),
        Rule(
            architectures=("Qwen3-Omni",),
            methods=("fp8 channel",),
            reason="vLLM's ModelOpt experts take one scale each",
        ),
    ),
    kept=(
        Rule(
            architectures=("Qwen-Image",),
            methods=("fp8",),
            layers=r"\.img_mlp\.",
            reason="the image stream has no norm that would absorb the error, as vLLM-Omni's guide says",
        ),
        Rule(
            architectures=("Wan", "Wan VACE"),
            methods=("mxfp4_dualscale",),
            layers=r"^blocks\.[0-4]\.",
            reason="vLLM-Omni leaves the first 5 blocks alone",
        ),
        _BERT_VALUES,
    ),
    cautions=(
        Rule(
            architectures=("HunyuanImage-3.0",),
            methods=_FOR_TRANSFORMERS,
            reason="vLLM-Omni's diffusion stage alone can read this method; a deployment that also runs the "
            "autoregressive stage reads the same config and needs fp8",
        ),
    ),
)  # fmt: skip

_OMNI_CONVERT = Target(
    name="omni-convert",
    title="omni_convert.load",
    # Run on the CPU; for the others checked without hardware.
    formats=dict.fromkeys(_VLLM_OMNI.formats, (_CPU, _CUDA, _NPU)),
    architectures=None,
    kept=(_BERT_VALUES,),
    mixes=True,
)

TARGETS: Mapping[str, Target] = {target.name: target for target in (_VLLM_OMNI, _OMNI_CONVERT)}
"""Every engine by name, the default first."""

DEFAULT_TARGET = _VLLM_OMNI.name
