"""The model card of a conversion: what it is, what was quantized, what that cost, and how to load it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_convert.converter.decide import natural_key
from omni_convert.converter.manifest_shape import load_manifest
from omni_convert.converter.recipe import Recipe
from omni_convert.formats import format_label
from omni_convert.formats.layout import MANIFEST_NAME
from omni_convert.formats.text import format_bytes, format_db, layer_patterns, mean_db
from omni_convert.hub.card_loading import library_of, loading
from omni_convert.hub.markdown import as_code, as_text
from omni_convert.hub.metadata import CARD_NAME, make_metadata, read_metadata

PICTURE_NAME = "omni_convert_sqnr.png"
_WORST = 3


@dataclass(frozen=True, kw_only=True)
class Base:
    """What was converted. ``repo``: on the Hub, None if it came from a folder and nobody said; ``revision``: commit."""

    repo: str | None
    revision: str | None
    name: str

    @property
    def link(self) -> str:
        if self.repo is None:
            return as_code(self.name)
        at = f"/tree/{self.revision}" if self.revision else ""
        return f"[{self.repo}](https://huggingface.co/{self.repo}{at})"


@dataclass
class _Layers:
    """Layers that differ only in their numbers, stored alike for the same reason. ``sqnr_db``: of each."""

    stored: str
    why: str
    count: int = 0
    sqnr_db: list[float] = field(default_factory=list)


def make_card(folder: Path, repo_id: str, *, base: Base, picture: bool = False) -> str:
    """README.md of the conversion in ``folder``, to be published as ``repo_id``.

    Args:
        folder: with the manifest, the configs, and the card of the base model as it arrived; no weight is read.
        picture: whether one of the error lies beside the card.
    """
    from huggingface_hub import ModelCard

    manifest = load_manifest(folder / MANIFEST_NAME)
    recipe = Recipe.from_dict(manifest["recipe"])
    library = library_of(folder, manifest["source"]["kind"])
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        _opening(manifest, recipe, base),
        _facts(manifest, recipe, base),
        "## What is quantized",
        *_layer_tables(manifest, recipe),
        "## What it costs",
        _error_text(manifest, picture),
        "## How to load it",
        *loading(folder, manifest, recipe, repo_id, library),
        "## How it was made",
        _making(manifest, base),
    ]
    head = card_head(folder, manifest["source"]["kind"], recipe, base.repo)
    return str(ModelCard(f"{head}\n" + "\n\n".join(sections) + "\n"))


def card_head(folder: Path, kind: str, recipe: Recipe, base_model: str | None) -> str:
    """The metadata of a card, between its lines. ``folder``: the conversion, or its source of that ``kind``."""
    methods = list(dict.fromkeys(fmt.name for fmt in recipe.formats))
    data = make_metadata(
        read_metadata(folder / CARD_NAME), base_model=base_model, library=library_of(folder, kind),
        tags=["omni-convert", *methods],
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---\n"


def base_of(manifest: Mapping[str, Any], given: str | None) -> Base:
    """``given``: the base model's repository, where the source was a folder."""
    source = manifest["source"]
    repo = given or source.get("repo")
    commit = source.get("revision") if repo == source.get("repo") else None  # means nothing in another repository
    return Base(repo=repo, revision=commit, name=source["name"])


def _opening(manifest: Mapping[str, Any], recipe: Recipe, base: Base) -> str:
    labels = " and ".join(f"**{label}**" for label in _labels(recipe))
    parts = [name for name in manifest["components"] if name]
    what = f"the {' and '.join(as_code(name) for name in parts)} in {labels}" if parts else f"its weights in {labels}"
    return (
        f"This is {base.link} with {what}, converted by omni-convert {as_text(manifest['omni_convert'])}. "
        "Everything else is byte for byte as it was. For what the model is, can do and may be used for, see the base "
        "model's card."
    )


def _facts(manifest: Mapping[str, Any], recipe: Recipe, base: Base) -> str:
    sizes = [
        sum(entry["size"] for name, entry in files.items() if name.endswith(".safetensors"))
        for files in (manifest["source"]["files"], manifest["files"])
    ]
    rows = [["Base model", base.link], ["Method", ", ".join(map(as_code, _labels(recipe)))]]
    for name, part in manifest["components"].items():
        title = f"{as_code(name)}, {as_code(part['class'])}" if name else as_code(part["class"])
        bits = 8 * part["bytes_after"] / part["weights"]
        change = f"{format_bytes(part['bytes_before'])} → {format_bytes(part['bytes_after'])}"
        rows.append([title, f"{change}, {bits:.2f} bits per weight"])
    rows.append(["All weights", f"{format_bytes(sizes[0])} → {format_bytes(sizes[1])}"])
    errors = [value for _, value in _errors(manifest)]
    rows.append(["Error of the weights", f"mean SQNR {format_db(mean_db(errors))} over {len(errors)} layers"])
    return _table(["", ""], rows)


def _layer_tables(manifest: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    for name, part in manifest["components"].items():
        if len(manifest["components"]) > 1:
            yield f"### {as_code(name)}"
        usual = format_label(recipe.part(name).format)
        rows = [
            [as_code(pattern), str(group.count), group.stored, _range(group.sqnr_db), as_text(group.why)]
            for pattern, group in _groups(part["tensors"], usual)
        ]
        yield _table(["layers", "count", "stored as", "SQNR", "why"], rows, right=(1,))
    yield "Biases, norms and other small tensors are kept as they were."


def _groups(tensors: Mapping[str, Any], usual: str) -> list[tuple[str, _Layers]]:
    """Weight matrices by the shape of their names; quantized ones first."""
    names = sorted((name for name in tensors if _is_matrix(name, tensors[name])), key=natural_key)
    patterns = layer_patterns({name.removesuffix(".weight") for name in names})
    groups: dict[tuple[str, str, str], _Layers] = {}
    for name in names:
        entry, pattern = tensors[name], patterns[name.removesuffix(".weight")]
        kept = entry["action"] == "keep"
        stored = "unchanged" if kept else f"**{as_text(entry.get('format', usual))}**"
        group = groups.setdefault((pattern, stored, entry["why"]), _Layers(stored, entry["why"]))
        group.count += 1
        if not kept:
            group.sqnr_db.append(_db(entry))
    found = [(pattern, group) for (pattern, _, _), group in groups.items()]
    return sorted(found, key=lambda item: item[1].stored == "unchanged")


def _is_matrix(name: str, entry: Mapping[str, Any]) -> bool:
    return bool(entry["action"] != "keep" or (name.endswith(".weight") and not entry["why"].startswith("1-D")))


def _errors(manifest: Mapping[str, Any]) -> list[tuple[str, float]]:
    several = len(manifest["components"]) > 1
    return [
        (f"{name}.{tensor}" if several else tensor, _db(entry))
        for name, part in manifest["components"].items()
        for tensor, entry in part["tensors"].items()
        if entry["action"] != "keep"
    ]


def _db(entry: Mapping[str, Any]) -> float:
    value = entry.get("sqnr_db")
    return math.inf if value is None else float(value)


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = format_db(min(values)), format_db(max(values))
    return low if low == high else f"{low.removesuffix(' dB')} to {high}"


def _error_text(manifest: Mapping[str, Any], picture: bool) -> str:
    errors = sorted(_errors(manifest), key=lambda item: (item[1], natural_key(item[0])))
    worst = [[as_code(name.removesuffix(".weight")), format_db(value)] for name, value in errors[:_WORST]]
    lines = [
        "SQNR is the power of a layer's weights over the power of their error, measured on every weight while it was "
        "quantized: 6 dB are one bit. It says nothing of images, sound or text by itself; compare outputs before you "
        "rely on them.",
        *([f"![SQNR of the layers over the blocks of the model]({PICTURE_NAME})"] if picture else []),
        _table(["lowest SQNR", ""], worst, right=(1,)),
    ]
    costs = [e["shared_scale_db"] for p in manifest["components"].values() for e in p["tensors"].values()
             if "shared_scale_db" in e]  # fmt: skip
    if costs:
        lines.append(
            f"{len(costs)} layers that engines fuse share their scales, which costs them "
            f"{math.fsum(costs) / len(costs):.1f} dB on average."
        )
    return "\n\n".join(lines)


def _making(manifest: Mapping[str, Any], base: Base) -> str:
    source = base.repo or "model/"
    if base.repo and base.revision:
        source += f"@{base.revision}"
    return (
        f"[`{MANIFEST_NAME}`]({MANIFEST_NAME}) lists what was done to every tensor and the sha256 of every file. The "
        "same bytes again, and a check of a copy:\n\n"
        f"```bash\nomni-convert --recipe {MANIFEST_NAME} {source} out/\nomni-convert verify out/\n```"
    )


def _labels(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys(map(format_label, recipe.formats)))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
