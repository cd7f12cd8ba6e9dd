"""What is shipped: the package list against the folders, and the wheel built from a clean copy of the commit."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import liar_opt

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("passes", "frontend", "runtime", "tools")
NOT_SHIPPED = "dev"


def configuration() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_of_folders() -> dict[str, Path]:
    """Every folder with Python in it that must be a package, by import name."""
    found = {"liar_opt": ROOT / "src" / "liar_opt"}
    for name in FOLDERS:
        for folder in [ROOT / name, *sorted(path for path in (ROOT / name).rglob("*") if path.is_dir())]:
            relative = folder.relative_to(ROOT)
            if NOT_SHIPPED not in relative.parts and any(folder.glob("*.py")):
                found[".".join(["liar_opt", *relative.parts])] = folder
    return found


def tracked() -> set[str]:
    listing = subprocess.run(["git", "ls-tree", "-r", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    return set(listing.stdout.splitlines())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tracked()
    folder = tmp_path_factory.mktemp("wheel")
    archive, clone = folder / "clone.tar", folder / "clone"
    subprocess.run(["git", "archive", "--output", str(archive), "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as opened:
        opened.extractall(clone, filter="tar")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(clone),
    ]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_folder_is_listed_and_every_listed_package_exists() -> None:
    listed = configuration()["tool"]["setuptools"]["packages"]
    folders = packages_of_folders()
    assert sorted(listed) == sorted(folders)
    assert [name for name, folder in folders.items() if not (folder / "__init__.py").is_file()] == []


def test_package_dir_and_symlinks_name_the_same_folders() -> None:
    directories = configuration()["tool"]["setuptools"]["package-dir"]
    assert directories == {"": "src", **{f"liar_opt.{name}": name for name in FOLDERS}}
    for name in FOLDERS:
        link = ROOT / "src" / "liar_opt" / name
        if not link.is_symlink():
            pytest.skip("this checkout has no symlinks")
        assert link.readlink() == Path("..", "..", name)


def test_no_module_is_named_after_a_dependency() -> None:
    project = configuration()["project"]
    requirements = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {re.split(r"[^\w-]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
    names = (names - {"liar_opt"}) | {"onnxruntime"}
    modules = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    assert [str(path) for path in modules if path.stem.lower() in names] == []


def test_the_wheel_has_one_name_at_its_top(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"liar_opt", f"liar_opt-{liar_opt.__version__}.dist-info"}


def test_the_wheel_holds_every_committed_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {f"liar_opt/{name}" for name in tracked() if name.split("/")[0] in FOLDERS and name.endswith(".py")}
    expected = {name for name in expected if not name.startswith(f"liar_opt/tools/{NOT_SHIPPED}/")}
    expected |= {name.removeprefix("src/") for name in tracked() if re.fullmatch(r"src/liar_opt/[^/]*\.(py|typed)", name)}
    shipped = {name for name in wheel.namelist() if name.startswith("liar_opt/")}
    assert shipped == expected


def test_the_wheel_states_licence_and_command(wheel: zipfile.ZipFile) -> None:
    information = f"liar_opt-{liar_opt.__version__}.dist-info"
    metadata = wheel.read(f"{information}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert b"Apache License" in wheel.read(f"{information}/licenses/LICENSE")
    assert "liar-opt = liar_opt.__main__:main" in wheel.read(f"{information}/entry_points.txt").decode()


def test_the_changelog_knows_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == liar_opt.__version__
