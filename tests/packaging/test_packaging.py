"""The wheel works away from the repository: everything is in it, and nothing is found elsewhere."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("integrations", "launch", "configs")
DATA = (
    "configs/deepspeed/*.json",
    "configs/machines/*.json",
    "configs/megatron/*.yaml",
    "configs/models/*.json",
    "configs/torch/*.yaml",
    "launch/*.sh",
    "launch/*.sbatch",
)
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import json
import spectral_dist, spectral_dist.integrations, spectral_dist.launch, spectral_dist.configs
import spectral_dist.integrations.apex, spectral_dist.integrations.torch.mpi
import spectral_dist.launch.corpus
from importlib.metadata import Distribution
files = {name: module.__file__ for name, module in sys.modules.items()
         if name.partition(".")[0] == "spectral_dist"}
print(json.dumps([files, spectral_dist.__version__, spectral_dist.Muon.__name__]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content in an empty folder; built from a copy, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    junk = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("spectral_dist", *PARTS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=junk)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder,
        source,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    shutil.rmtree(source)
    return folder / "installed"


def test_imports_from_an_empty_directory(installed, tmp_path):
    command = [sys.executable, "-I", "-B", "-c", PROGRAM, str(installed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    files, version, name = json.loads(done.stdout)
    assert len(files) > 15
    for module, file in files.items():
        assert Path(file).is_relative_to(installed), module
    assert name == "Muon"
    assert f"spectral_dist-{version}.dist-info" in {path.name for path in installed.iterdir()}


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(installed):
    """setup.cfg lists packages and data by hand; a new folder is easily forgotten."""
    wanted = {Path("spectral_dist/py.typed"), Path("spectral_dist/optimizers.pyi")}
    for top in ("spectral_dist", *PARTS):
        modules = list((ROOT / top).rglob("*.py"))  # does not follow the links
        assert modules, top
        wanted |= {place(path) for path in modules}
    for pattern in DATA:
        data = list(ROOT.glob(pattern))
        assert data, pattern
        wanted |= {place(path) for path in data}
    files = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path for path in files if not path.parts[0].endswith(".dist-info")} == wanted


def place(path: Path) -> Path:
    """Where a file of the repository lies in the wheel."""
    inside = path.relative_to(ROOT)
    return inside if inside.parts[0] == "spectral_dist" else "spectral_dist" / inside


def test_commands_and_metadata(installed):
    (folder,) = installed.glob("*.dist-info")
    parser = configparser.ConfigParser()
    parser.read(folder / "entry_points.txt")
    commands = dict(parser["console_scripts"])
    assert commands
    for target in commands.values():
        module, _, name = target.partition(":")
        file = installed / f"{module.replace('.', '/')}.py"
        assert file.exists(), target
        assert name in file.read_text(), target
    text = (folder / "METADATA").read_text()
    for extra in ("deepspeed", "megatron", "mpi", "train", "triton", "test"):
        assert f"Provides-Extra: {extra}\n" in text
    assert re.search("^License(-Expression)?: Apache-2.0$", text, re.MULTILINE)
    assert "Requires-Python: >=3.11\n" in text
    licenses = list(folder.glob("**/LICENSE"))
    assert [path.read_text() for path in licenses] == [(ROOT / "LICENSE").read_text()]
