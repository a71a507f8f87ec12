"""What is asked of both models, the same prompts, seed, sizes and steps, and what each answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from omni_convert.formats.errors import UsageError, printable

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Task = Literal["t2i", "t2v", "text"]
TASKS: tuple[Task, ...] = get_args(Task)
DEFAULT_SEED = 42
_SEEDS = 2**63
"""How many there are: PyTorch's generators take 64 bits with a sign."""
IMAGES, FRAMES, LOGITS, HIDDEN = "images", "frames", "logits", "hidden states"
"""What an answer can be."""
_ARGUMENTS: Mapping[str, str] = {
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "cfg_scale": "true_cfg_scale",
}
"""Fields -> what a pipeline of Diffusers calls them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """None leaves a value to the pipeline's default. Raises ``UsageError`` for what cannot be asked."""

    task: Task
    prompts: tuple[str, ...]
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    cfg_scale: float | None = None
    seed: int = DEFAULT_SEED
    warmup_runs: int = 1
    measure_runs: int = 1

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UsageError(f"task is {self.task!r}, expected one of {', '.join(TASKS)}.")
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise UsageError("found no prompt, or an empty one; expected --prompt TEXT, once or several times.")
        for text in (*self.prompts, self.negative_prompt or ""):
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # what Python makes of bytes that are not UTF-8
                raise UsageError(f"the prompt '{printable(text)}' is no text, expected UTF-8.")
        for name in ("height", "width", "num_frames", "num_inference_steps", "measure_runs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected 1 or more.")
        for name in ("guidance_scale", "cfg_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name} is {value}, expected a finite number.")
        if not 0 <= self.seed < _SEEDS:
            raise UsageError(f"seed is {self.seed}, expected 0 to {_SEEDS - 1}.")
        if self.warmup_runs < 0:
            raise UsageError(f"warmup_runs is {self.warmup_runs}, expected 0 or more.")
        if self.task == "text" and (given := [name for name in _ARGUMENTS if getattr(self, name) is not None]):
            raise UsageError(f"{_flags(given)} was given with --task text, which generates no picture. Leave it out.")

    def arguments(self) -> dict[str, Any]:
        """What a pipeline of Diffusers is called with beside prompt and generator."""
        values = {argument: getattr(self, name) for name, argument in _ARGUMENTS.items()}
        return {argument: value for argument, value in values.items() if value is not None}

    def check_arguments(self, taken: Mapping[str, Any], pipeline: str) -> None:
        """Raises:
        UsageError: the call of this pipeline, which has the parameters ``taken``, does not know a value that is given.
        """
        fields = {argument: name for name, argument in _ARGUMENTS.items()}
        unknown = [fields[argument] for argument in self.arguments() if argument not in taken]
        if unknown:
            knows = _flags([name for name, argument in _ARGUMENTS.items() if argument in taken])
            raise UsageError(f"{_flags(unknown)} was given, but {pipeline} has no such option; it knows {knows}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """To one prompt. ``output``: uint8 pixels (frames, height, width, 3), or float32 (tokens, vocabulary or width);
    ``kind`` says which. ``tokens``: of the prompt; ``best``: the most probable next one after each, of logits.

    ``latents``: after every step, on the CPU; empty where the pipeline does not tell. ``finite``: whether the model
    gave no NaN or Inf.
    """

    output: NDArray[Any]
    kind: str
    latents: list[torch.Tensor] = field(default_factory=list)
    tokens: Sequence[str] = ()
    best: Sequence[str] = ()
    finite: bool = True

    @property
    def is_pixels(self) -> bool:
        return self.kind in (IMAGES, FRAMES)


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
