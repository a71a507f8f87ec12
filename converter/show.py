"""How a plan and a report look: as text for people, as data for scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni_convert.converter.convert import Report
from omni_convert.converter.decide import natural_key
from omni_convert.converter.fused import shared_scales
from omni_convert.converter.plan import ComponentPlan, Plan, TensorPlan
from omni_convert.formats import format_label
from omni_convert.formats.config import exact_pattern
from omni_convert.formats.errors import printable
from omni_convert.formats.target import find_target
from omni_convert.formats.text import format_bytes, format_db, format_table, layer_patterns

_NO_TABLE = "no table for this class: by name and shape"


@dataclass
class Group:
    """Tensors that differ only in their numbers and share one decision."""

    pattern: str
    action: str
    why: str
    count: int = 0
    weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def add(self, tensor: TensorPlan) -> None:
        self.count += 1
        self.weights += tensor.source.spec.numel
        self.bytes_before += tensor.source.spec.nbytes
        self.bytes_after += tensor.bytes_after


def group_tensors(part: ComponentPlan) -> list[Group]:
    """Groups of a component, quantized first, each in the order of the names."""
    groups: dict[tuple[str, str, str], Group] = {}
    tensors = sorted(part.tensors(), key=lambda item: natural_key(item.name))
    patterns = layer_patterns({tensor.layer for tensor in tensors})
    for tensor in tensors:
        fmt = tensor.decision.format
        # What is no weight matrix is one line: biases and norms are many, small, and always kept.
        matrix = tensor.is_matrix or (tensor.name.endswith(".weight") and len(tensor.source.spec.shape) > 1)
        pattern = patterns[tensor.layer] if matrix else "(biases, norms and other tensors)"
        why = _reason(tensor) if matrix else "not a weight matrix"
        action = format_label(fmt) if fmt else f"keep {tensor.source.spec.dtype}"
        groups.setdefault((pattern, action, why), Group(pattern, action, why)).add(tensor)
    return sorted(groups.values(), key=lambda group: group.action.startswith("keep"))


def _reason(tensor: TensorPlan) -> str:
    """Why; rules that name one layer or group, of which a recipe may have hundreds, are all the same reason."""
    reason = tensor.decision.reason
    flag, _, rule = reason.partition(" ")
    names = {name for known in (tensor.layer, tensor.group) if known for name in (known, exact_pattern(known))}
    if flag == "--ignore" and rule in names:
        return f"{flag}, by name"
    pattern, _, method = rule.rpartition("=")
    return f"{flag}, by name: {method}" if flag == "--layer" and pattern in names else reason


def plan_text(plan: Plan, memory: int, disk: int, device: int = 0) -> str:
    """The plan as ``--dry-run`` prints it. ``memory``, ``disk`` and ``device``: what is needed of each, in bytes."""
    blocks = [_component_text(plan, part) for part in plan.components]
    hub = plan.checkpoint.hub
    summary = [
        *([["source", f"{hub} on the Hub, {format_bytes(hub.bytes_to_download)} to download"]] if hub else []),
        ["to be loaded by", find_target(plan.recipe.target).title],
        ["quantized components", f"{format_bytes(plan.bytes_before)} -> {format_bytes(plan.bytes_after)}"],
        ["bits per weight", f"{plan.bits_per_weight:.2f}"],
        ["copied unchanged", f"{format_bytes(plan.bytes_copied)} in {_plural(len(plan.checkpoint.others), 'file')}"],
        ["peak memory", f"{format_bytes(memory)} beyond Python and its libraries"],
        *([["device memory", f"{format_bytes(device)} at most"]] if device else []),
        ["disk needed", format_bytes(disk)],
    ]
    shared = shared_scales(plan)
    summary += [["shared scales", shared.to_text()]] if shared else []
    summary += [["left out", f"{name} ({why})"] for name, why in plan.checkpoint.left_out.items()]
    blocks.append(format_table(summary, header=False))
    return "\n\n".join(blocks)


def plan_dict(plan: Plan, memory: int, disk: int, device: int = 0) -> dict[str, Any]:
    """The plan as data: the same facts as ``plan_text``, and every tensor."""
    shared = shared_scales(plan)
    return {
        "recipe": plan.recipe.to_dict(),
        "kind": plan.checkpoint.kind,
        "source": {**hub.identity(), "bytes_to_download": hub.bytes_to_download}
        if (hub := plan.checkpoint.hub)
        else None,
        "components": [_component_dict(part) for part in plan.components],
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bytes_copied": plan.bytes_copied,
        "bits_per_weight": plan.bits_per_weight,
        "peak_memory": memory,
        "device_memory": device,
        "disk_needed": disk,
        "copied": {name: file.size for name, file in plan.checkpoint.others.items()},
        "left_out": dict(plan.checkpoint.left_out),
        "shared_scales": shared.to_dict() if shared else None,
        "warnings": list(plan.warnings),
    }


def report_text(report: Report) -> str:
    """The table at the end of a conversion."""
    rows = [
        ["layers quantized", f"{report.layers} to {report.format}"],
        ["size", f"{format_bytes(report.bytes_before)} -> {format_bytes(report.bytes_after)}"],
        ["bits per weight", f"{report.bits_per_weight:.2f}"],
        ["copied unchanged", format_bytes(report.bytes_copied)],
        ["elapsed", f"{report.seconds:.2f} s ({report.gigabytes_per_second:.2f} GB/s read)"],
        ["mean SQNR", format_db(report.mean_sqnr_db)],
    ]
    for place, (layer, value) in enumerate(report.worst()):
        rows.append(["worst SQNR" if place == 0 else "", f"{format_db(value)}  {layer}"])
    if report.shared_scale_db is not None:
        lost = f"cost {report.shared_scale_db:.1f} dB on {_plural(report.shared_scale_layers, 'fused layer')} (mean)"
        rows.append(["shared scales", lost])
    rows += [["left out", f"{name} ({why})"] for name, why in report.left_out.items()]
    rows.append(["written to", str(report.out)])
    return format_table(rows, header=False)


def _component_text(plan: Plan, part: ComponentPlan) -> str:
    """One table; the reasons, which are long and few, stand below it under letters."""
    groups = group_tensors(part)
    reasons = list(dict.fromkeys(group.why for group in groups))
    letters = {reason: _letter(number) for number, reason in enumerate(reasons)}
    rows = [["layers", "count", "action", "before", "after", "why"]]
    for group in groups:
        sizes = (format_bytes(group.bytes_before), format_bytes(group.bytes_after))
        rows.append([group.pattern, str(group.count), group.action, *sizes, letters[group.why]])
    guessed = "by name and shape" if find_target(plan.recipe.target).architectures is None else _NO_TABLE
    known = f"table for {part.architecture}" if part.architecture else guessed
    name = part.component.name or plan.checkpoint.name
    title = f"{name}: {part.component.class_name}, {_plural(len(part.shards), 'shard')} ({known})"
    notes = "\n".join(f"{letter}: {printable(reason)}" for reason, letter in letters.items())
    return f"{title}\n{format_table(rows, right=(1, 3, 4))}\n{notes}"


def _letter(number: int) -> str:
    """a to z, aa, ab, ..."""
    prefix = _letter(number // 26 - 1) if number >= 26 else ""
    return prefix + chr(ord("a") + number % 26)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _component_dict(part: ComponentPlan) -> dict[str, Any]:
    return {
        "name": part.component.name,
        "class": part.component.class_name,
        "architecture": part.architecture,
        "shards": [shard.source.path.name for shard in part.shards],
        "ignored_layers": list(part.ignored_layers),
        "groups": [vars(group) for group in group_tensors(part)],
        "tensors": {
            tensor.name: {
                "action": tensor.decision.format.name if tensor.decision.format else "keep",
                "why": tensor.decision.reason,
                "dtype": tensor.source.spec.dtype,
                "shape": list(tensor.source.spec.shape),
                "bytes_before": tensor.source.spec.nbytes,
                "bytes_after": tensor.bytes_after,
            }
            for tensor in part.tensors()
        },
    }
