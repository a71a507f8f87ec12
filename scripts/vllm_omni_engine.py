"""vLLM-Omni's own start-up on a machine without an accelerator: its classes and loader run, its kernels do not.

``start`` does what a worker of the engine does until the first request: it reads the configs, builds the pipeline,
loads the weights and processes them. What is stubbed, and nothing else:

- The platform: it says that it is CUDA (9.0) or an Ascend NPU, and stays on the CPU.
- ``torch.ops._C``: any kernel is found, none is run but the one that quantizes to fp8. ``torch_npu``: casts.
- The kernels of routed experts: what they would be given stays with the layer.
- Components that the folder lacks (tokenizer, scheduler, VAE, most text encoders): an empty module in their place.
- Sizes of Z-Image and GLM-Image, whose pipelines ignore the config's: the config's, so that small models fit.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
os.environ.setdefault("MASTER_ADDR", "localhost")
os.environ.setdefault("MASTER_PORT", "29511")
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

FOUR_BITS = "float4_e2m1fn_x2"
_FOUR_BIT_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _register_torchvision_operators() -> None:
    """Its wheel from PyPI needs CUDA's libraries for them; without them it cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        globals()["_torchvision"] = library  # the operators live as long as this


def _npu_cast(tensor: torch.Tensor, dtype: Any) -> torch.Tensor:
    if dtype == FOUR_BITS:
        if not torch.isin(tensor.float().abs(), _FOUR_BIT_VALUES).all():
            raise ValueError("a weight that is cast to 4 bits has other values")
        return tensor
    return tensor.to(dtype)


def _fp8_quant(output: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, *_: Any) -> None:
    """The one kernel that runs at start-up: fused layers get one scale for all their shards."""
    largest = torch.finfo(output.dtype).max
    output.copy_((values.float() / scale).clamp(-largest, largest))


def _stub_kernels() -> None:
    npu = types.ModuleType("torch_npu")
    npu.__dict__.update(
        float8_e4m3fn=torch.float8_e4m3fn,
        float8_e8m0fnu=torch.float8_e8m0fnu,
        float4_e2m1fn_x2=FOUR_BITS,
        npu_dtype_cast=_npu_cast,
        npu_format_cast=lambda tensor, *_, **__: tensor,
    )
    sys.modules["torch_npu"] = npu
    torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]
    torch.cuda.Stream = torch.cuda.Event = MagicMock()  # type: ignore[misc]
    torch.ops._C = MagicMock(static_scaled_fp8_quant=_fp8_quant)  # type: ignore[assignment]


_register_torchvision_operators()

import diffusers  # noqa: E402
import transformers  # noqa: E402
import vllm.platforms  # noqa: E402
import vllm_omni.platforms  # noqa: E402
from vllm.platforms.interface import DeviceCapability, PlatformEnum  # noqa: E402
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum  # noqa: E402


class Pretended(OmniPlatform):  # type: ignore[misc]
    """CUDA or an NPU by name; everything stays on the CPU."""

    _enum = PlatformEnum.CUDA
    _omni_enum = OmniPlatformEnum.CUDA
    device_name = device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    simple_compile_backend = "eager"

    def __getattribute__(self, name: str) -> Any:
        quiet = {
            "get_torch_device": torch.device("cpu"),
            "get_device_count": 1,
            "get_device_capability": DeviceCapability(9, 0),
            "get_device_name": "CPU",
            "get_diffusion_attn_backend_cls": "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend",
            "set_device": None,
            "synchronize": None,
            "is_initialized": False,
            "has_flash_attn_package": False,
            "supports_torch_inductor": False,
            "get_attn_backend_cls": "vllm.v1.attention.backends.flex_attention.FlexAttentionBackend",
            "get_available_kv_cache_memory": 0,
        }
        if name in quiet:
            return lambda *_, **__: quiet[name]
        return super().__getattribute__(name)


class PretendedOmni(Pretended):
    """vLLM-Omni's own one; vLLM stays with CUDA, whatever this is (on an NPU a plug-in replaces its layers)."""


def pretend(platform: str) -> None:
    """``cuda`` or ``npu``, for everything that is built from now on."""
    PretendedOmni._omni_enum = OmniPlatformEnum(platform)


vllm.platforms.current_platform.__class__ = Pretended
vllm_omni.platforms.current_omni_platform.__class__ = PretendedOmni
_stub_kernels()


class Absent(torch.nn.Module):
    """A component that the folder lacks: no weights, any attribute."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return MagicMock(**{"__gt__.return_value": False})

    def __len__(self) -> int:
        return 8


def _stub_components() -> None:
    def found(owner: Any, method: str) -> Any:
        """``method``, but an absent component where the folder has none."""
        original = getattr(owner, method).__func__

        def load(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            if (Path(path) / kwargs.get("subfolder", "") / "config.json").is_file() or owner is None:
                return original(cls, path, *args, **kwargs)
            return Absent()

        return classmethod(load)

    for name in ("PreTrainedModel", "PreTrainedTokenizerBase", "AutoTokenizer", "AutoProcessor", "ProcessorMixin"):
        getattr(transformers, name).from_pretrained = classmethod(Absent)
    for owner in (diffusers.ModelMixin, diffusers.SchedulerMixin):
        owner.from_pretrained = classmethod(Absent)
    transformers.AutoConfig.from_pretrained = found(transformers.AutoConfig, "from_pretrained")
    configurable = diffusers.configuration_utils.ConfigMixin
    configurable.load_config = found(configurable, "load_config")
    from_config = configurable.from_config.__func__
    configurable.from_config = classmethod(
        lambda cls, config, **kwargs: Absent() if isinstance(config, Absent) else from_config(cls, config, **kwargs)
    )
    importlib.import_module("vllm_omni.diffusion.models.t5_encoder").T5EncoderModel = Absent


_stub_components()

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.config.load import LoadConfig  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend  # noqa: E402
from vllm.model_executor.layers.quantization import fp8  # noqa: E402
from vllm.model_executor.utils import replace_parameter  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402
from vllm_omni.diffusion.data import OmniDiffusionConfig  # noqa: E402
from vllm_omni.diffusion.distributed import parallel_state  # noqa: E402
from vllm_omni.diffusion.forward_context import set_forward_context  # noqa: E402
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader  # noqa: E402
from vllm_omni.diffusion.registry import initialize_model  # noqa: E402
from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs  # noqa: E402
from vllm_omni.diffusion.worker.diffusion_worker import create_diffusion_vllm_config  # noqa: E402


@dataclass
class Started:
    """A pipeline that is ready for requests. ``unread``: tensors of the folder that nothing looked at."""

    pipeline: torch.nn.Module
    config: Any
    warnings: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


class Reads(TorchDispatchMode):
    """Which of the tensors handed out were an argument of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.name_of: dict[int, str] = {}
        self.kept: list[torch.Tensor] = []
        self.read: set[str] = set()

    def hand_out(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            with torch.utils._python_dispatch._disable_current_modes():
                tensor = tensor.clone()  # with a storage of its own
            self.kept.append(tensor)
            self.name_of[tensor.untyped_storage().data_ptr()] = name
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self.read.add(self.name_of.get(leaf.untyped_storage().data_ptr(), ""))
        return func(*args, **(kwargs or {}))


class _Warnings(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        if "initialized from checkpoint" in record.getMessage():
            self.texts.append(record.getMessage())


class _Loader(DiffusersPipelineLoader):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(LoadConfig(use_tqdm_on_load=False), config)
        self.reads = Reads()

    def _get_weight_sources(self, model: torch.nn.Module) -> tuple[Any, ...]:
        return tuple(
            source
            for source in super()._get_weight_sources(model)
            if not isinstance(getattr(model, source.prefix.rstrip("."), None), Absent)
        )

    def get_all_weights(self, *args: Any, **kwargs: Any) -> Any:
        return self.reads.hand_out(super().get_all_weights(*args, **kwargs))


def _hand_over(method: Any, layer: Any, w13: Any, w2: Any, w13_scale: Any, w2_scale: Any, *_: Any) -> None:
    """Instead of the kernel that would get these."""
    scale = method.weight_scale_name
    for name, value in {"w13_weight": w13, "w2_weight": w2, f"w13_{scale}": w13_scale, f"w2_{scale}": w2_scale}.items():
        replace_parameter(layer, name, value)


fp8.select_fp8_moe_backend = lambda *_, **__: (Fp8MoeBackend.TRITON, None)
fp8.Fp8MoEMethod._setup_kernel = _hand_over


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the parameters that the engine builds, before anything is loaded."""
    with _engine(folder, "cuda") as config:
        model = initialize_model(config)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def start(folder: Path, platform: str = "cuda") -> Started:
    """The engine's start on one device."""
    with _engine(folder, platform) as config, ExitStack() as stack:
        loader = _Loader(config)
        started = Started(torch.nn.Module(), config)
        handler = _Warnings(started.warnings)
        logging.getLogger().addHandler(handler)
        stack.callback(logging.getLogger().removeHandler, handler)
        with loader.reads:
            started.pipeline = loader.load_model(load_device="cpu")
        started.unread = sorted(set(loader.reads.name_of.values()) - loader.reads.read)
    return started


@contextmanager
def _engine(folder: Path, platform: str) -> Iterator[Any]:
    """Its config, and the state in which its worker loads models."""
    pretend(platform)
    config = OmniDiffusionConfig(model=str(folder), num_gpus=1, extras={})
    config.enrich_config()
    engine = create_diffusion_vllm_config(torch.device("cpu"), config)
    with ExitStack() as stack:
        stack.enter_context(set_forward_context(vllm_config=engine, omni_diffusion_config=config))
        stack.enter_context(set_current_vllm_config(engine))
        stack.enter_context(_small(config))
        if not torch.distributed.is_initialized():
            parallel_state.init_distributed_environment(world_size=1, rank=0)
            parallel_state.initialize_model_parallel(data_parallel_size=1, sequence_parallel_size=1)
        with set_default_torch_dtype(config.dtype):
            yield config


@contextmanager
def _small(config: Any) -> Iterator[None]:
    """Whatever a pipeline builds besides its transformer, and Z-Image's transformer with the config's own sizes."""
    name = config.model_class_name
    with ExitStack() as stack:
        if name == "ZImagePipeline":
            module = importlib.import_module("vllm_omni.diffusion.models.z_image.pipeline_z_image")
            kind = module.ZImageTransformer2DModel
            sizes = get_transformer_config_kwargs(config.tf_model_config, kind)
            stack.enter_context(patch.object(module, kind.__name__, functools.partial(kind, **sizes)))
        if name == "BagelPipeline":
            module = importlib.import_module("vllm_omni.diffusion.models.bagel.pipeline_bagel")
            stack.enter_context(
                patch.object(module, "add_special_tokens", lambda tokenizer: (tokenizer, {"last": 7}, 0))
            )
            stack.enter_context(patch.object(module, "DistributedAutoEncoder", Absent))
            stack.enter_context(patch.object(module.SiglipImageProcessor, "from_pretrained", Absent))
        if name == "HunyuanImage3ForCausalMM":
            hunyuan = "vllm_omni.diffusion.models.hunyuan_image3"
            module = importlib.import_module(f"{hunyuan}.pipeline_hunyuan_image3")
            kind = importlib.import_module(f"{hunyuan}.hunyuan_image3_transformer").HunyuanImage3Config
            vae = importlib.import_module("vllm_omni.diffusion.distributed.autoencoders.autoencoder_kl_hunyuan")
            read = lambda folder, **_: kind(**json.loads((Path(folder) / "config.json").read_text()))  # noqa: E731
            stack.enter_context(patch.object(module, "get_config", read))
            stack.enter_context(patch.object(vae.DistributedAutoencoderKLHunyuan, "from_config", Absent))
            for part in _HUNYUAN_PARTS:
                stack.enter_context(patch.object(module, part, Absent))
            stack.enter_context(patch.object(module, "GenerationConfig", MagicMock()))
        yield


_HUNYUAN_PARTS = (
    "TokenizerWrapper", "HunyuanImage3ImageProcessor", "Siglip2VisionTransformer", "LightProjector",
    "TimestepEmbedder", "UNetDown", "UNetUp",
)  # fmt: skip
