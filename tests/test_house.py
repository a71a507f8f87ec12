"""The house rules that a machine can check: who may import whom, what is packaged, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "formats": {"formats"},
    "converter": {"converter", "formats"},
    "runtime": {"runtime", "formats"},
    "quality": {"quality", "converter", "runtime", "formats"},
    "hub": {"hub", "quality", "converter", "formats"},
}
ROOMS = tuple(MAY_IMPORT)
LINES = 400


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downwards(room: str) -> None:
    found = {
        (path.name, name)
        for path in sources(room)
        for name in imports(path)
        if name.startswith("omni_convert.") and name != "omni_convert.__version__"
    }
    assert {(path, name) for path, name in found if name.split(".")[1] not in MAY_IMPORT[room]} == set()


def test_every_folder_with_modules_is_packaged() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    homes = {name: ROOT / folder for name, folder in setup["package-dir"].items()}
    assert set(setup["packages"]) == homes.keys() == {"omni_convert", *(f"omni_convert.{room}" for room in ROOMS)}
    packaged = {home.resolve() for home in homes.values()}
    assert all((home / "__init__.py").is_file() for home in packaged)
    modules = [path for home in packaged for path in home.resolve().rglob("*.py")]
    assert len(modules) > 20
    assert {path.parent.resolve() for path in modules} == packaged


def test_nothing_that_tools_leave_behind_is_kept() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert [name for name in names if name.endswith((".orig", ".rej", ".bak", ".pyc"))] == []


def test_rooms_have_one_home() -> None:
    for room in ROOMS:
        assert (ROOT / "src" / "omni_convert" / room).resolve() == ROOT / room


def test_files_are_short() -> None:
    files = [path for folder in (*ROOMS, "src", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert {path.name: n for path in files if (n := len(path.read_text().splitlines())) > LINES} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import omni_convert",
        "import omni_convert.converter.convert, omni_convert.formats.int8, omni_convert.formats.config",
        "from omni_convert import cli; cli.main(['--help'], standalone_mode=False)",
        "from omni_convert import cli; cli.main(['verify', '--help'], standalone_mode=False)",
    ],
)
def test_heavy_libraries_are_imported_when_used(code: str) -> None:
    heavy = {
        "torch",
        "numba",
        "diffusers",
        "transformers",
        "accelerate",
        "tqdm",
        "ray",
        "huggingface_hub",
        "matplotlib",
        *(["numpy"] if "cli" in code else []),
    }
    code = f"import sys; {code}; print(sorted({heavy} & sys.modules.keys()), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "[]\n")
