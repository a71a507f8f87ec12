"""Files cut into parts: even, without gaps, and the same bytes whoever converts them in whichever order."""

from __future__ import annotations

import pickle
import random as rng
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hostile.small import QWEN_CONFIG, Tensor, qwen_shards, random, snapshot, write_json, write_model, write_sharded

from omni_convert.converter import convert as module
from omni_convert.converter.assemble import Assembly
from omni_convert.converter.convert import convert, plan
from omni_convert.converter.execute import Record, Settings
from omni_convert.converter.groups import Group, Groups
from omni_convert.converter.output import PARTIAL_SUFFIX, PartFile, partial_files, partial_path
from omni_convert.converter.part_work import convert_part, hash_file, measure_part
from omni_convert.converter.parts import (
    PARTS_PER_WORKER,
    SMALLEST_PART,
    Part,
    part_bytes,
    shared_groups,
    split,
    whole_file,
)
from omni_convert.converter.pieces import smallest_piece
from omni_convert.converter.plan import Plan
from omni_convert.formats.errors import OmniConvertError, UsageError

METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
    "fp8 channel": {"method": "fp8", "granularity": "channel"},
    "fp8 block": {"method": "fp8", "block_size": (32, 32), "target": "omni-convert"},
    "mxfp4": {"method": "mxfp4", "target": "omni-convert"},
    "dual scale": {"method": "mxfp4_dualscale", "target": "omni-convert"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks whose fused layers lie in four shards, one of them much larger than the others."""
    shards: list[dict[str, Tensor]] = [{}, {}, {}, {}]
    for block, tensors in enumerate(qwen_shards(width=64)):
        for place, (name, tensor) in enumerate(tensors.items()):
            shards[1 + (place // 2) % 3 if block else 0][name] = tensor
    shards[0]["transformer_blocks.1.attn.to_k.weight"] = shards[1].pop(
        "transformer_blocks.1.attn.to_k.weight", None
    ) or (
        shards[2].pop("transformer_blocks.1.attn.to_k.weight", None)
        or shards[3].pop("transformer_blocks.1.attn.to_k.weight")
    )
    folder = tmp_path_factory.mktemp("source") / "model"
    write_sharded(folder / "transformer", list(shards), QWEN_CONFIG)
    write_json(
        folder / "model_index.json",
        {"_class_name": "QwenImagePipeline", "transformer": ["diffusers", "QwenImageTransformer2DModel"]},
    )
    (folder / "vae").mkdir()
    (folder / "vae" / "weights.bin").write_bytes(rng.Random(0).randbytes(10_000))
    (folder / "empty").touch()
    return folder


def parts_of(planned: Plan, names: Sequence[str], size: int) -> list[Part]:
    return [part for name in names for part in split(planned, whole_file(planned, name), size)]


class InParts:
    """``execute``, one part after the other in random order, each with nothing but what can be sent to it."""

    def __init__(self, size: int, *, seed: int = 0, lose: bool = False) -> None:
        """``lose``: every part three times, as if two workers were out of touch, one until the file had its name."""
        self.size = size
        self.rng = rng.Random(seed)
        self.lose = lose

    def __call__(
        self,
        planned: Plan,
        out: Path,
        names: Sequence[str],
        settings: Settings,
        *,
        known: Mapping[Group, float],
        record: Record,
        progress: Callable[[int], None],
    ) -> None:
        parts = parts_of(planned, names, self.size)
        known = dict(known)
        for part, groups in shared_groups(planned, parts, known.keys()).items():
            for group, value in sent(measure_part)(planned, part, groups, settings).items():
                known[group] = max(known.get(group, 0.0), value)
        assembly = Assembly(planned, out, parts, Groups(planned, settings.piece_bytes, known), record)
        self.rng.shuffle(parts)
        for part in parts:
            for _ in range(1 + self.lose):
                done = sent(convert_part)(planned, part, out, settings, known=known, attempt="0123abcd")
            progress(part.size)
            if assembly.add(part, done):
                assembly.name(part, hash_file(out / part.name, part.source, "0123abcd"))
            if self.lose:
                sent(convert_part)(planned, part, out, settings, known=known, attempt="0123abcd")


def sent(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` on copies of its arguments, and a copy of its result, as if on another machine."""

    def call(*arguments: Any, **options: Any) -> Any:
        copied, named = pickle.loads(pickle.dumps((arguments, options)))
        return pickle.loads(pickle.dumps(function(*copied, **named)))

    return call


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(("size", "lose"), [(700, False), (5000, True), (20_000, False), (1 << 30, True)])
def test_same_bytes_in_any_order(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int, lose: bool
) -> None:
    expected = convert(source, tmp_path / "one", **METHODS[kind]).to_dict()
    monkeypatch.setattr(module, "_engine", lambda name: InParts(size, seed=size, lose=lose))
    monkeypatch.setattr(module, "PIECE_BYTES", 1500)
    found = convert(source, tmp_path / "parts", **METHODS[kind]).to_dict()
    assert snapshot(tmp_path / "parts") == snapshot(tmp_path / "one")
    for key in ("out", "seconds", "gigabytes_per_second"):
        del expected[key], found[key]
    assert found == expected


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("size", [100, 700, 5000, 1 << 30])
def test_parts_cover_every_byte_once(source: Path, kind: str, size: int) -> None:
    planned = plan(source, **METHODS[kind])
    for name in [*planned.shards, *planned.checkpoint.others]:
        file = whole_file(planned, name)
        parts = split(planned, file, size)
        assert parts[0].start == file.start and parts[-1].stop == file.stop
        assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
        assert [part.is_first for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    data = sum(tensor.source.spec.nbytes for tensor in planned.tensors())
    assert sum(part.size for part in parts_of(planned, list(planned.shards), size)) == data


def test_parts_are_even_to_a_row(tmp_path: Path) -> None:
    weights = {f"blocks.{n}.ff.weight": random(100 * (n + 1), 48) for n in range(5)} | {"norm.weight": random(48)}
    planned = plan(write_model(tmp_path / "model", {}, weights), method="int8")
    file = whole_file(planned, "diffusion_pytorch_model.safetensors")
    parts = split(planned, file, file.size // 7)
    sizes = [part.size for part in parts]
    assert len(parts) in (7, 8)
    assert max(sizes) - min(sizes) <= 2 * 96


def test_rows_that_share_scales_stay_together(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {}, {"a.ff.weight": random(100, 64)})
    planned = plan(source, method="fp8", block_size=(32, 32), target="omni-convert")
    (tensor,) = planned.tensors()
    assert smallest_piece(tensor) == 32 * 128
    file = whole_file(planned, "diffusion_pytorch_model.safetensors")
    assert [part.size for part in split(planned, file, 1)] == [32 * 128] * 3 + [4 * 128]


@pytest.mark.parametrize("workers", [1, 2, 256])
def test_size_of_a_part(workers: int) -> None:
    assert part_bytes(10**12, workers) * workers * PARTS_PER_WORKER == pytest.approx(10**12, rel=1e-3)
    assert part_bytes(10**6, workers) == SMALLEST_PART


def test_only_groups_that_are_spread_are_measured_beforehand(source: Path) -> None:
    planned = plan(source, method="int8")
    names = list(planned.shards)
    shared = shared_groups(planned, parts_of(planned, names, 1 << 30), set())
    groups = {group for found in shared.values() for group in found}
    assert groups and all(group[1].startswith("transformer_blocks.1.") for group in groups)
    assert shared_groups(planned, parts_of(planned, names, 1 << 30), groups) == {}
    assert shared_groups(planned, parts_of(planned, names[:1], 1 << 30), set()) == {}


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """Each puts its own bytes, and one of them both: it was thought lost."""
    path = tmp_path / "x"
    one, two = (PartFile(path, "0123abcd", 10, durable=durable) for durable in (True, False))
    one.write(0, b"01234")
    two.write(5, b"56789")
    two.finish()
    again = PartFile(path, "0123abcd", 10, durable=False)
    again.write(0, b"01234")
    again.finish()
    assert partial_path(path, "0123abcd").read_bytes() == b"0123456789"
    one.close()
    assert partial_path(path, "0123abcd").read_bytes() == b"0123456789"


def test_part_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OmniConvertError, match=r"x: cannot be written \(No such file"):
        PartFile(tmp_path / "gone" / "x", "0123abcd", 10, durable=False)


def test_partial_files_of_every_attempt_are_found(tmp_path: Path) -> None:
    left = [f"a{PARTIAL_SUFFIX}", f"a.0123abcd{PARTIAL_SUFFIX}", f"a.b.ffffffff{PARTIAL_SUFFIX}"]
    others = [f"a.0123abc{PARTIAL_SUFFIX}", f"b{PARTIAL_SUFFIX}", PARTIAL_SUFFIX, "a", "a.0123abcd"]
    for name in left + others:
        (tmp_path / name).touch()
    paths = [tmp_path / "a", tmp_path / "a.b", tmp_path / "missing" / "c"]
    assert sorted(path.name for path in partial_files(paths)) == sorted(left)


def test_partial_files_of_lost_workers_are_removed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "one", method="int8")
    monkeypatch.setattr(module, "_engine", lambda name: InParts(1 << 30, lose=True))
    convert(source, tmp_path / "out", method="int8")
    assert not list((tmp_path / "out").rglob(f"*{PARTIAL_SUFFIX}"))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "one")


@pytest.mark.parametrize("engine", ["Ray", "spark", ""])
def test_engine_that_nobody_knows(source: Path, tmp_path: Path, engine: str) -> None:
    with pytest.raises(UsageError, match="is not known, expected one of local, ray"):
        convert(source, tmp_path / "out", method="int8", engine=engine)
    assert not (tmp_path / "out").exists()


def test_ray_that_is_not_installed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Install it on every node: pip install 'omni-convert\[ray\]'"):
        convert(source, tmp_path / "out", method="int8", engine="ray")
    assert not (tmp_path / "out").exists()


def test_cluster_has_no_devices(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device cuda: --engine ray quantizes on processors only"):
        convert(source, tmp_path / "out", method="int8", engine="ray", device="cuda")
    assert not (tmp_path / "out").exists()
