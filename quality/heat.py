"""Heat maps of SQNR: blocks across, kinds of layers down. What stands out from the paper is what lost most."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from omni_convert.formats.text import format_db
from omni_convert.quality import html
from omni_convert.quality.html import text
from omni_convert.quality.layers import Conversion, Layer

NARROW = 120
"""From so many blocks on, cells have no gaps between them, which would take their width."""
SHADES = 9
"""From q0, the best, to q8: perceptually ordered, by lightness alone too."""
_STEPS = (0.25, 0.5, 1, 2, 3, 5, 10, 20)


@dataclass(frozen=True)
class Shades:
    """The scale of a map: shade n begins ``step`` * n dB below ``best``; ``worst``: the lowest SQNR of all. The same
    figures give the same shade only within a report; the legend says which."""

    best: float
    step: float
    worst: float

    @classmethod
    def of(cls, layers: Iterable[Layer]) -> Shades:
        """A scale whose shades hold every layer, none of them less than a quarter of a dB wide."""
        found = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None and math.isfinite(layer.sqnr_db)]
        low, high = min(found, default=0.0), max(found, default=0.0)
        for step in _STEPS:
            best = math.ceil(high / step) * step
            if best - SHADES * step <= low:
                return cls(best, step, low)
        return cls(math.ceil(high), math.ceil((high - low) / SHADES), low)

    def shade(self, sqnr_db: float) -> int:
        return 0 if math.isinf(sqnr_db) else max(0, min(SHADES - 1, int((self.best - sqnr_db) / self.step)))

    def css(self, layer: Layer) -> str:
        """The class of a cell."""
        return "kept" if layer.sqnr_db is None else f"q{self.shade(layer.sqnr_db)}"

    def legend(self) -> str:
        bounds = [self.best - (shade + 1) * self.step for shade in range(self.shade(self.worst) + 1)]
        cells = "".join(f'<span><i class="q{shade}"></i>{bound:g}</span>' for shade, bound in enumerate(bounds))
        kept = '<span><i class="kept"></i>kept</span>'
        return f'<div class="legend"><b>dB, at least</b>{cells}{kept}</div>'


class Family(NamedTuple):
    """Blocks that are numbered together: the start of their names, the kinds of layers in them, and the numbers that
    occur, in order."""

    prefix: str
    kinds: dict[str, dict[int, list[Layer]]]
    blocks: tuple[int, ...]


def families(layers: Sequence[Layer]) -> list[Family]:
    """Every family of blocks, in the order of the layers; what is in no block is left out."""
    found: dict[str, dict[str, dict[int, list[Layer]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for layer in layers:
        if layer.block is not None:
            prefix, _, rest = layer.kind.partition("*")
            start = f"{layer.component}: {prefix}" if layer.component else prefix
            found[start][rest.removeprefix(".") or layer.kind][layer.block].append(layer)
    return [
        Family(prefix.rstrip("."), dict(kinds), tuple(sorted(set[int]().union(*kinds.values()))))
        for prefix, kinds in found.items()
    ]


def heat_maps(done: Conversion) -> list[str]:
    """A legend and a map for every family of blocks; then one for what is in no block."""
    shades = Shades.of(done.layers)
    maps = [_family(family, shades) for family in families(done.layers)]
    loose = [layer for layer in done.layers if layer.block is None]
    if loose:
        rows = "".join(_row(done.label(layer), [[layer]], shades) for layer in loose)
        maps.append(f'<figure class="heat" style="--n:1"><figcaption>outside of blocks</figcaption>{rows}</figure>')
    return [shades.legend(), *maps]


def _family(family: Family, shades: Shades) -> str:
    rows = "".join(
        _row(kind, [by_block.get(block, []) for block in family.blocks], shades)
        for kind, by_block in family.kinds.items()
    )
    ends = "".join(f"<span>{block}</span>" for block in dict.fromkeys((family.blocks[0], family.blocks[-1])))
    caption = f"<figcaption>{text(family.prefix)}, {len(family.blocks)} blocks</figcaption>"
    axis = f'<div class="row ends"><span></span><div>{ends}</div></div>'
    look = "heat dense" if len(family.blocks) > NARROW else "heat"
    return f'<figure class="{look}" style="--n:{len(family.blocks)}">{caption}{rows}{axis}</figure>'


def _row(name: str, cells: Sequence[Sequence[Layer]], shades: Shades) -> str:
    drawn = "".join(_cell(cell, shades) for cell in cells)
    return f'<div class="row"><span>{html.name(name)}</span><div class="cells">{drawn}</div></div>'


def _cell(layers: Sequence[Layer], shades: Shades) -> str:
    """The worst of the layers that share a cell, such as experts."""
    if not layers:
        return "<i></i>"
    layer = min(layers, key=lambda layer: math.inf if layer.sqnr_db is None else layer.sqnr_db)
    said = f"kept: {layer.reason}" if layer.sqnr_db is None else f"{format_db(layer.sqnr_db)}, {layer.format}"
    more = f"\nthe worst of {len(layers)} here" if len(layers) > 1 else ""
    tip = "&#10;".join(text(part) for part in f"{layer.full_name}\n{said}{more}".split("\n"))
    return f'<i class="{shades.css(layer)}" data-tip="{tip}"></i>'
