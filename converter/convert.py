"""From a source to a sealed output: plan, check everything, write, seal."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_convert.converter.device import CPU, DEVICE_PIECE_BYTES, check_name
from omni_convert.converter.files import processors
from omni_convert.converter.folder import OutputFolder
from omni_convert.converter.hub_source import fetching, naming, open_source
from omni_convert.converter.job import difference, job_identity
from omni_convert.converter.manifest import manifest_bytes
from omni_convert.converter.outlet import Outlet, outlet_bytes, write_out
from omni_convert.converter.pieces import PIECE_BYTES
from omni_convert.converter.plan import Plan, make_plan
from omni_convert.converter.progress import progress_bar
from omni_convert.converter.recipe import Choices, make_recipe
from omni_convert.converter.statistics import LayerStatistics
from omni_convert.formats import format_label
from omni_convert.formats.errors import OmniConvertError, SourceError, UsageError
from omni_convert.formats.layout import CONFIG_NAME, MANIFEST_NAME
from omni_convert.formats.quant_config import Spec
from omni_convert.formats.text import mean_db

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from omni_convert.converter.execute import Settings

ENGINES = ("local", "ray")
"""Who carries out a plan: this process, or a Ray cluster."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did. Bytes are tensor bytes of the quantized components; ``sqnr_db`` is per layer.
    ``shared_scale_db``: about what sharing scales costs the ``shared_scale_layers``, on average; None without any.

    ``warnings``: what may keep the target from loading the result. ``statistics``: by component and layer, if they were
    asked for.
    """

    out: Path | str
    method: str
    format: str
    layers: int
    bytes_before: int
    bytes_after: int
    bytes_copied: int
    bytes_written: int
    bits_per_weight: float
    seconds: float
    gigabytes_per_second: float
    sqnr_db: dict[str, float]
    shared_scale_layers: int
    shared_scale_db: float | None
    left_out: dict[str, str]
    warnings: tuple[str, ...]
    statistics: Mapping[tuple[str, str], LayerStatistics]

    @property
    def mean_sqnr_db(self) -> float:
        """Mean over the layers that lost anything; infinite if none did."""
        return mean_db(self.sqnr_db.values())

    def worst(self, count: int = 3) -> list[tuple[str, float]]:
        """The layers with the lowest SQNR, worst first."""
        return sorted(self.sqnr_db.items(), key=lambda item: (item[1], item[0]))[:count]

    def to_dict(self) -> dict[str, Any]:
        def number(value: float) -> float | None:
            return round(value, 3) if math.isfinite(value) else None  # JSON has no infinity

        worst = [{"layer": layer, "sqnr_db": number(value)} for layer, value in self.worst()]
        figures = {key: value for key, value in vars(self).items() if key not in {"out", "sqnr_db", "statistics"}}
        return {"out": str(self.out), **figures, "mean_sqnr_db": number(self.mean_sqnr_db), "worst_layers": worst}


def plan(source: str | os.PathLike[str], quantization: Spec = None, **choices: Unpack[Choices]) -> Plan:
    """Decide what a conversion would do, from headers alone. Arguments as in ``convert``."""
    recipe = make_recipe(quantization=quantization, **choices)
    checkpoint = open_source(source, recipe.components)
    with naming(checkpoint):
        return make_plan(checkpoint, recipe)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quantization: Spec = None,
    *,
    threads: int | None = None,
    memory: int | None = None,
    device: str = CPU,
    link: bool = False,
    durable: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    hash_source: bool = False,
    engine: str = "local",
    statistics: bool = False,
    progress: bool = False,
    methods: Sequence[str] = (),
    auto_ignore: str | None = None,
    budget: str | None = None,
    **choices: Unpack[Choices],
) -> Report:
    """Convert a BF16, FP16 or FP32 checkpoint into a quantized one.

    Args:
        source: pipeline folder, component or transformers folder, or one ``.safetensors`` file; never written to. What
            is none of these may be a repository on the Hub: ``org/name[@revision]``.
        out: a new or empty folder, or the unfinished output of this same job, which then goes on.
        quantization: as ``build_quant_config`` takes it: a method, a dict, a dict of components, a config.
        threads: default: the processors this process may use; with ``ray``, of one task, default 1. The bytes do not
            depend on it.
        memory: bytes that the run (with ``ray``, a task) may take beyond the libraries; default 400 MiB, of which it
            takes 12 for each thread, on a device 45, mostly.
        device: what quantizes: ``cpu``, ``cuda``, ``cuda:N``, ``npu`` or ``npu:N``. The bytes do not depend on it.
        link: hard-link files that arrive unchanged.
        durable: have the disk confirm every file, so that a loss of power cannot take what looks complete.
        overwrite: replace what ``out`` holds, also the unfinished output of this job.
        resume: go on with unfinished output, and stop if there is none.
        hash_source: record the sha256 of every source file; what the Hub cache holds of them is compared with it.
        engine: who does the work: ``local``, this process, or ``ray``, the Ray cluster that RAY_ADDRESS names or that
            runs on this machine.
        statistics: gather what ``report`` tells of every layer, while its weights pass by.
        progress: show a progress bar on stderr (if it is a terminal).
        auto_ignore: keep layers, or give them another of ``methods``, such that this holds of the others:
            ``sqnr>=30`` (dB). The source is then read twice: to choose (on processors alone), and to convert.
        budget: such that this holds, with the least error: ``size<=0.55`` of the source's tensor bytes.
        methods: in place of one method what to choose from, as ``analyze`` takes them: one for all layers, or, where
            the target mixes methods, one for each.
        choices: in place of ``quantization`` a ``recipe`` (see ``read_recipe``), or a ``method`` with its options
            ``granularity``, ``block_size``, ``activation_scheme``, ``scale_rule``, ``quality`` and ``fused_scale`` as
            ``formats.make_format`` takes them. With any of them ``ignore``, layers to keep: parts of names, globs over
            whole names, or ``re:`` regular expressions; ``layers``: ``PATTERN=METHOD``; ``ignore_whole_group``: keep
            all layers that the engine fuses with a kept one; ``components``: of a pipeline, what to quantize,
            ``NAME`` or ``NAME=METHOD``, default the diffusion transformers; ``input_scales``: layer -> scale of its
            activations, for static ones; ``target``: the engine that is to load ``out``; ``default_ignore``: whether
            what it keeps by default stays.

    Raises:
        OmniConvertError: names what is wrong and what to do. Files of ``out`` that are finished are kept for the next
            run of this job, without ``config.json`` and index; if there are none, ``out`` is as it was, or empty.
    """
    from omni_convert.converter.analyze import chosen_plan

    started = time.perf_counter()
    if str(out).startswith("hub:"):
        raise UsageError(f"{out}: is a repository, expected a folder. Call omni_convert.convert_to_hub.")
    means = Means(
        threads=threads, memory=memory, device=device, link=link, durable=durable, overwrite=overwrite, resume=resume,
        hash_source=hash_source, engine=engine, statistics=statistics,
    )  # fmt: skip
    own = threads if engine == ENGINES[0] else None  # those of tasks do not count here
    planned = chosen_plan(
        source, quantization, methods, auto_ignore, budget, choices, threads=own, memory=memory, progress=progress
    )
    return run(planned, Path(out), means, progress=progress, started=started)


@dataclass(frozen=True, kw_only=True)
class Means:
    """How a plan is carried out, as ``convert`` takes it; what is written depends on none of it."""

    threads: int | None = None
    memory: int | None = None
    device: str = CPU
    link: bool = False
    durable: bool = False
    overwrite: bool = False
    resume: bool = False
    hash_source: bool = False
    engine: str = ENGINES[0]
    scratch: Path | None = None
    """Where downloads are kept until their output is whole; None for the Hub cache, which keeps them for good."""
    statistics: bool = False

    def __post_init__(self) -> None:
        check_name(self.device)
        if self.engine == "ray" and self.device != CPU:
            raise UsageError(
                f"--device {self.device}: --engine ray quantizes on processors only. Leave out one of the two."
            )

    def settings(self, plan: Plan) -> Settings:
        """What ``execute`` takes, within the memory."""
        from omni_convert.converter.execute import DEFAULT_MEMORY, Settings, fit

        settings = Settings(
            threads=self.threads or (1 if self.engine == "ray" else processors()),
            piece_bytes=PIECE_BYTES if self.device == CPU else DEVICE_PIECE_BYTES,
            device=self.device,
            link=self.link,
            durable=self.durable,
            statistics=self.statistics,
        )
        return fit(plan, settings, DEFAULT_MEMORY if self.memory is None else self.memory)


def run(plan: Plan, out: Path, means: Means, *, progress: bool, started: float, outlet: Outlet | None = None) -> Report:
    """Carry out a plan.

    ``progress``: as in ``convert``. ``started``: when, by ``time.perf_counter``. ``outlet``: takes large files out of
    ``out``, and publishes the rest.
    """
    with naming(plan.checkpoint):
        return _run(plan, out, means, progress, started, outlet)


def _run(plan: Plan, out: Path, means: Means, progress: bool, started: float, outlet: Outlet | None) -> Report:
    from omni_convert.converter.execute import on_device

    execute, settings = _engine(means.engine), on_device(plan, means.settings(plan))
    hashing_threads = processors() if means.engine == "ray" else settings.threads  # this process does that alone
    folder = _output_folder(plan, out, means)
    try:
        folder.check(_disk_bytes(plan, means, kept=outlet is None), kept=outlet is None)
        elsewhere = outlet.there if outlet else {}
        kept = sum(record.size for name, record in folder.records.items() if name not in elsewhere)
        with progress_bar("check", kept, show=progress and kept > 0) as advance:
            folder.take(hashing_threads, advance, elsewhere)
        total = plan.bytes_before + plan.bytes_copied
        with (
            fetching(plan.checkpoint, folder.missing, show=progress),
            progress_bar("convert", total, show=progress) as advance,
        ):
            advance(total - _source_bytes(plan, folder.missing))
            work: tuple[Any, ...] = (plan, folder.path, folder.missing, settings)
            if outlet:
                write_out(outlet, folder, execute, *work, known=folder.known, progress=advance)
            else:
                execute(*work, known=folder.known, record=folder.record, progress=advance)
        _seal(plan, folder, hashing_threads if means.hash_source else 0, outlet)
    except OSError as error:
        path = Path(error.filename or folder.path)
        remedy = "cannot be written ({}). Check the folder, its rights and the free space, then run again."
        if path.is_relative_to(plan.checkpoint.root):
            remedy = "cannot be read ({}). Check the file and its rights, then run again."
        raise OmniConvertError(f"{path}: {remedy.format(error.strerror)}{folder.stop(keep=True)}") from error
    except SourceError:
        folder.stop(keep=False)
        raise
    except OmniConvertError as error:
        raise type(error)(f"{error}{folder.stop(keep=True)}") from error.__cause__
    except KeyboardInterrupt:
        before = " What was finished before is kept." if folder.records else ""
        raise KeyboardInterrupt(folder.stop(keep=True) or before) from None
    except BaseException:
        folder.stop(keep=True)
        raise
    return _report(plan, folder, time.perf_counter() - started)


def _engine(name: str) -> Callable[..., None]:
    """The ``execute`` of an engine."""
    if name not in ENGINES:
        raise UsageError(f"engine {name!r}: is not known, expected one of {', '.join(ENGINES)}.")
    if name == "ray":
        from omni_convert.converter import ray_cluster, ray_engine

        ray_cluster.import_ray()  # before anything is written
        return ray_engine.execute
    from omni_convert.converter import execute

    return execute.execute


def refusal(plan: Plan, out: Path, means: Means) -> str | None:
    """Why ``run`` would refuse to write this plan to ``out`` now; None if it would not."""
    try:
        check(plan, out, means)
    except (OmniConvertError, OSError) as error:
        return str(error)
    return None


def check(plan: Plan, out: Path, means: Means, *, kept: bool = True) -> None:
    """Raises what keeps ``run`` from writing this plan to ``out`` now. ``kept``: without an outlet."""
    from omni_convert.converter.execute import on_device

    with naming(plan.checkpoint):
        on_device(plan, means.settings(plan))
        _output_folder(plan, out, means).check(_disk_bytes(plan, means, kept=kept), kept=kept)


def needs(plan: Plan, means: Means, *, kept: bool = True) -> tuple[int, int]:
    """Peak memory beyond the libraries, and disk, in bytes, of carrying out ``plan``. ``kept``: without an outlet."""
    from omni_convert.converter.execute import memory_bytes

    return memory_bytes(plan, means.settings(plan)), _disk_bytes(plan, means, kept=kept)


def _disk_bytes(plan: Plan, means: Means, *, kept: bool) -> int:
    return plan.disk_bytes(linked=means.link) if kept else outlet_bytes(plan)


def device_need(plan: Plan, means: Means) -> int:
    """Peak memory of the device, in bytes; 0 for the CPU."""
    from omni_convert.converter.execute import device_bytes

    return device_bytes(plan, means.settings(plan))


def _output_folder(plan: Plan, out: Path, means: Means) -> OutputFolder:
    if means.resume and means.overwrite:
        raise UsageError("--resume goes on with what is there, --overwrite begins anew. Give one of them.")
    if plan.checkpoint.hub:
        given = {"--link": means.link, "--engine ray": means.engine == "ray"}
        refused = [option for option in given if given[option]]
        plan.checkpoint.hub.prepare(means.scratch, refused, compares=means.hash_source)
    return OutputFolder(
        plan, out, job_identity(plan), overwrite=means.overwrite, resume=means.resume, durable=means.durable
    )


def _source_bytes(plan: Plan, names: Iterable[str]) -> int:
    """Bytes that are read for some files of the output."""
    sizes = {
        name: sum(tensor.source.spec.nbytes for tensor in shard.tensors) for name, (_, shard) in plan.shards.items()
    }
    sizes |= {name: file.size for name, file in plan.checkpoint.others.items()}
    return sum(sizes[name] for name in names)


def _check_source(plan: Plan, job: Mapping[str, Any]) -> None:
    """Raises:
    SourceError: a file of the source is not what it was when the run began.
    """
    for _, shard in plan.shards.values():
        plan.checkpoint.shard_file(shard.source).check()
    for file in plan.checkpoint.others.values():
        file.check()
    if reason := difference(job, job_identity(plan)):
        raise SourceError(f"{plan.checkpoint.root}: changed during the run: {reason}. Run again.")


def _seal(plan: Plan, folder: OutputFolder, hashing_threads: int, outlet: Outlet | None) -> None:
    """Write what makes the folder loadable, the most telling file last. ``hashing_threads``: for the source, or 0."""
    texts: dict[str, bytes] = {}
    for part in plan.components:
        component = part.component
        if component.shards.index_name:
            texts[component.relative(component.shards.index_name)] = part.index_bytes
        texts[component.relative(CONFIG_NAME)] = part.config_bytes
    texts |= {
        name: plan.checkpoint.others[name].located().read_bytes()
        for name in folder.seals
        if name in plan.checkpoint.others
    }
    files = {name: (record.sha256, record.size) for name, record in folder.records.items()}
    files |= {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in texts.items()}
    texts[MANIFEST_NAME] = manifest_bytes(plan, files, folder.errors, hashing_threads=hashing_threads)
    _check_source(plan, folder.job)
    folder.sync()
    for name in folder.seals:
        folder.write(name, texts[name])
    if outlet:  # until that is done the folder is unfinished, and the next run goes on
        outlet.publish(folder.path)
    folder.finish()


def _report(plan: Plan, folder: OutputFolder, seconds: float) -> Report:
    read = plan.bytes_before + plan.bytes_copied
    several = len(plan.components) > 1
    errors = folder.errors
    costs = [error.shared_scale_db for error in errors.values() if error.shared_scale_db is not None]
    return Report(
        out=folder.path,
        method=" + ".join(dict.fromkeys(fmt.name for fmt in plan.recipe.formats)),
        format=" + ".join(map(format_label, plan.recipe.formats)),
        layers=len(errors),
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        bytes_copied=plan.bytes_copied,
        bytes_written=sum(record.size for record in folder.records.values())
        + sum((folder.path / name).stat().st_size for name in folder.seals),
        bits_per_weight=plan.bits_per_weight,
        seconds=seconds,
        gigabytes_per_second=read / seconds / 1e9,
        sqnr_db={
            (f"{component}.{layer}" if several else layer): error.sqnr_db
            for (component, layer), error in errors.items()
        },
        shared_scale_layers=len(costs),
        shared_scale_db=sum(costs) / len(costs) if costs else None,
        left_out=dict(plan.checkpoint.left_out),
        warnings=plan.warnings,
        statistics={place: error.statistics for place, error in errors.items() if error.statistics},
    )
