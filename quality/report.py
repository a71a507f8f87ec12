"""The layer report: what quantization cost every layer, what the worst look like, and what keeping them would cost."""

from __future__ import annotations

import math
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omni_convert.converter.checkpoint import open_component
from omni_convert.converter.hub_source import converted_from, local_folder
from omni_convert.formats.errors import printable
from omni_convert.formats.quant_config import NONE
from omni_convert.formats.text import format_bytes, format_db, format_table, mean_db
from omni_convert.quality.fused import own_pattern
from omni_convert.quality.layers import Conversion, Layer, read_conversion
from omni_convert.quality.trace_file import read_trace

if TYPE_CHECKING:
    from omni_convert.converter.convert import Report
    from omni_convert.converter.layer_error import LayerError
    from omni_convert.converter.statistics import LayerStatistics
    from omni_convert.quality.codes import Codes, Scales

WORST = 20
"""How many layers are shown in detail."""


class Step(NamedTuple):
    """What is left when ``kept`` groups of layers, the worst first, stay unquantized.

    ``error``: the sum of all layers' relative errors, as a share of what it is now.
    """

    kept: int
    group: str
    bytes_after: int
    error: float


@dataclass(frozen=True, kw_only=True)
class Detail:
    """One of the worst layers. ``after``: the dequantized sample in even bins from -``limit`` to ``limit``, those of
    ``statistics.counts``. ``keep``: the option that keeps its group."""

    layer: Layer
    statistics: LayerStatistics | None
    limit: float
    after: tuple[int, ...]
    scales: tuple[Scales, ...]
    keep: str


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A conversion looked at. ``statistics``: by component and layer, as far as known. ``outputs``: SQNR of layers on
    real activations, by full name, if they were traced. ``origin``: where the figures come from, in a sentence.
    ``seconds``: what the conversion took, if it has just run."""

    conversion: Conversion
    statistics: Mapping[tuple[str, str], LayerStatistics]
    details: tuple[Detail, ...]
    curve: tuple[Step, ...]
    outputs: Mapping[str, float]
    origin: str
    seconds: float | None

    @property
    def mean_sqnr_db(self) -> float:
        """Mean over the layers that lost anything; infinite if none did."""
        return mean_db(layer.sqnr_db for layer in self.conversion.quantized if layer.sqnr_db is not None)

    @property
    def methods(self) -> str:
        """The formats that occur, most frequent first."""
        counts: dict[str, int] = defaultdict(int)
        for layer in self.conversion.quantized:
            counts[str(layer.format)] += 1
        return " + ".join(sorted(counts, key=lambda label: -counts[label]))

    def summary(self) -> list[tuple[str, str]]:
        """The main figures, by name."""
        done = self.conversion
        kept = len(done.layers) - len(done.quantized)
        rows = [
            ("method", self.methods),
            ("size", f"{format_bytes(done.bytes_before)} → {format_bytes(done.bytes_after)}"),
            ("share of the original", f"{done.bytes_after / done.bytes_before:.1%}"),
            ("bits per weight", f"{done.bits_per_weight:.2f}"),
            ("layers", f"{len(done.quantized)} quantized, {kept} kept"),
            ("mean SQNR", format_db(self.mean_sqnr_db)),
        ]
        rows += [("lowest SQNR", format_db(done.worst[0].sqnr_db or 0.0))] if done.worst else []
        return rows + ([("time", f"{self.seconds:.1f} s")] if self.seconds is not None else [])

    def to_dict(self) -> dict[str, Any]:
        """The report as data: all that the page shows."""
        done = self.conversion
        return {
            "out": str(done.path),
            "omni_convert": done.version,
            "recipe": done.recipe.to_dict(),
            "origin": self.origin,
            "bytes_before": done.bytes_before,
            "bytes_after": done.bytes_after,
            "bits_per_weight": done.bits_per_weight,
            "mean_sqnr_db": _finite(self.mean_sqnr_db),
            "seconds": self.seconds,
            "layers": [self._layer_dict(layer) for layer in done.layers],
            "worst": [
                {
                    "layer": detail.layer.full_name,
                    "keep": detail.keep,
                    "limit": detail.limit,
                    "after": list(detail.after),
                    "scales": [asdict(scales) for scales in detail.scales],
                }
                for detail in self.details
            ],
            "curve": [step._asdict() for step in self.curve],
        }

    def _layer_dict(self, layer: Layer) -> dict[str, Any]:
        found = self.statistics.get((layer.component, layer.name))
        figures = asdict(layer) | {"shape": list(layer.shape), "sqnr_db": _finite(layer.sqnr_db)}
        traced = {"output_sqnr_db": _finite(self.outputs[layer.full_name])} if layer.full_name in self.outputs else {}
        return {**figures, **traced, "statistics": asdict(found) if found else None}

    def to_text(self) -> str:
        """The summary and the worst layers, for a terminal."""
        lines = [format_table([[name, value.replace("→", "->")] for name, value in self.summary()], header=False), ""]
        if self.details:
            rows = [["worst layers", "SQNR", "to keep it"]]
            for detail in self.details[:10]:
                rows.append([self.conversion.label(detail.layer), format_db(detail.layer.sqnr_db or 0.0), detail.keep])
            lines += [format_table(rows, right=(1,)), ""]
        return "\n".join([*lines, self.origin])

    def to_html(self) -> str:
        """The report as a page that needs no other file."""
        from omni_convert.quality.report_page import report_page

        return report_page(self)


def report(
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    run: Report | None = None,
    trace: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> LayerReport:
    """What the conversion in ``out`` cost, layer by layer.

    Args:
        out: a finished conversion.
        source: the model that was converted, a folder or a repository on the Hub, to measure every layer anew in one
            pass over it.
        run: what ``convert`` returned, with what it gathered if it was asked for ``statistics``: no weight of the
            source is read again. Without it and ``source``, what the manifest and the codes tell.
        trace: JSON that ``compare`` wrote with ``--trace-layers``: the error of layers on real activations.
        progress: show a progress bar on stderr (if it is a terminal).

    Raises:
        OmniConvertError: ``out`` is not a finished conversion, ``source`` is not what was converted, or ``trace`` is
            of other layers.
    """
    done = read_conversion(out)
    outputs = read_trace(Path(trace), done) if trace is not None else {}
    codes = _codes(done)
    if source is not None:
        errors = _measured(
            done, Path(os.path.abspath(local_folder(converted_from(source, done.source)))), codes, progress
        )
        statistics = {place: error.statistics for place, error in errors.items() if error.statistics}
        done = replace(done, layers=tuple(_with_error(layer, errors) for layer in done.layers))
        origin = f"Measured anew, against {Path(source).name}."
    else:
        statistics = dict(run.statistics) if run else {}
        origin = _origin(done, statistics)
    groups = _worst_groups(done)
    return LayerReport(
        conversion=done,
        statistics=statistics,
        details=tuple(_detail(layer, done, codes, statistics) for layer in done.worst[:WORST]),
        curve=tuple(_curve(done, groups)),
        outputs=outputs,
        origin=origin,
        seconds=run.seconds if run else None,
    )


def _origin(done: Conversion, statistics: Mapping[tuple[str, str], LayerStatistics]) -> str:
    missing = len(done.quantized) - len(statistics)
    if not statistics:
        return (
            "SQNR as the conversion recorded it. Nothing is known of the original weights: their histograms and "
            "channels need --source, or --report during the conversion."
        )
    if missing:
        return (
            f"Measured during the conversion, except {missing} layers, which an earlier run finished without being "
            "asked for a report: of these only the SQNR is known. --source measures all."
        )
    return "Measured during the conversion."


def _codes(done: Conversion) -> dict[str, dict[str, Codes]]:
    """Component -> layer -> its codes."""
    from omni_convert.quality.codes import open_codes

    return {name: open_codes(open_component(done.path, name), formats) for name, formats in done.formats.items()}


def _measured(
    done: Conversion, source: Path, codes: Mapping[str, Mapping[str, Codes]], progress: bool
) -> dict[tuple[str, str], LayerError]:
    from tqdm import tqdm

    from omni_convert.quality.measure import measure

    total = sum(layer.bytes_before for layer in done.quantized)
    with tqdm(total=total, unit="B", unit_scale=True, desc="measure", disable=None if progress else True) as bar:
        return measure(source, done.source, codes, bar.update)


def _with_error(layer: Layer, errors: Mapping[tuple[str, str], LayerError]) -> Layer:
    error = errors.get((layer.component, layer.name))
    return replace(layer, sqnr_db=error.sqnr_db) if error else layer


def _worst_groups(done: Conversion) -> list[list[Layer]]:
    """Layers that are quantized or kept together, those with the worst layer first."""
    groups: dict[tuple[str, str], list[Layer]] = defaultdict(list)
    for layer in done.quantized:
        groups[layer.component, layer.group].append(layer)
    return [groups[place] for place in dict.fromkeys((layer.component, layer.group) for layer in done.worst)]


def _curve(done: Conversion, groups: Sequence[Sequence[Layer]]) -> Iterable[Step]:
    size, total = done.bytes_after, math.fsum(layer.error for layer in done.layers)
    left = total
    yield Step(0, "", size, 1.0)
    for kept, group in enumerate(groups, start=1):
        size += sum(layer.bytes_before - layer.bytes_after for layer in group)
        left -= math.fsum(layer.error for layer in group)
        yield Step(kept, group[0].group, size, max(0.0, left / total))


def _detail(
    layer: Layer,
    done: Conversion,
    codes: Mapping[str, Mapping[str, Codes]],
    statistics: Mapping[tuple[str, str], LayerStatistics],
) -> Detail:
    import numpy as np

    from omni_convert.converter.statistics import histogram, sample_rows

    found, own = statistics.get((layer.component, layer.name)), codes[layer.component][layer.name]
    values = own.values(sample_rows(layer.shape))
    limit = found.limit if found else float(np.abs(values).max())
    return Detail(
        layer=layer,
        statistics=found,
        limit=limit,
        after=histogram(values, limit),
        scales=tuple(own.scales()),
        keep=_keeping_option(layer, done),
    )


def _keeping_option(layer: Layer, done: Conversion) -> str:
    """Of a layer that has its format by a rule, it is another rule: these go before ``--ignore``."""
    pattern = keeping_pattern(layer, done)
    group = (one for one in done.layers if (one.component, one.group) == (layer.component, layer.group))
    if any(one.reason.startswith("--layer ") for one in group):
        return f"--layer {shlex.quote(f'{pattern}={NONE}')}"
    return f"--ignore {shlex.quote(pattern)}"


def keeping_pattern(layer: Layer, done: Conversion) -> str:
    """What ``--ignore`` takes for the group of a layer, and for nothing else of the conversion."""
    prefix = f"{layer.component}." if len(done.classes) > 1 else ""
    others = (other for other in done.layers if other.component == layer.component and other.group != layer.group)
    return prefix + own_pattern(layer.group, (name for other in others for name in (other.name, other.group)))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 3)


def title(done: Conversion) -> str:
    """What a page about a conversion is called."""
    return printable(done.source.get("name") or done.path.name)
