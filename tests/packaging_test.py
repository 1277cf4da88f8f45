"""Contents of an installation and of a checkout: one checkout uses one set of kernels."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

import sparsek

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENTS = {
  str(path.relative_to(ROOT / "experiments"))
  for pattern in ("*.py", "*.flags", "*.yaml", "*.yml")
  for path in (ROOT / "experiments").rglob(pattern)
}
KERNELS = {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
REPORT = """
import os, sparsek, sparsek.kernels.specs as specs
for module in (sparsek, specs):
  print(os.path.realpath(module.__file__))
"""


@pytest.fixture
def checkout(tmp_path):
  """Makes copies of this checkout; a link stays a link."""

  def copy(name: str) -> pathlib.Path:
    folder = tmp_path / name
    folder.mkdir()
    for part in ("sparsek", "kernels", "experiments"):
      ignored = shutil.ignore_patterns("__pycache__")
      shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=ignored)
    for file in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
      shutil.copy(ROOT / file, folder / file)
    return folder

  return copy


def in_folder(folder: pathlib.Path, *arguments: str) -> str:
  """Runs python in a folder, which comes first on its path, as in a checkout."""
  variables = os.environ | {"PYTHONPATH": str(folder)}
  command = [sys.executable, *arguments]
  return subprocess.run(
    command, cwd=folder, env=variables, check=True, text=True, capture_output=True
  ).stdout


def test_advice_to_install_names_packages_that_an_index_has():
  """An installation from a checkout or a wheel cannot install its extras by the name sparsek."""
  advice = {}
  for folder in ("sparsek", "kernels", "experiments"):
    for path in (ROOT / folder).rglob("*.py"):
      for words in re.findall(r"pip install (.*)", path.read_text(encoding="utf-8")):
        advice.setdefault(words, path)
  assert len(advice) > 5
  for words, path in advice.items():
    assert not re.search(r"sparsek|(^|[\s'\"])(\.|-e\b)", words), f"{path}: pip install {words}"


@pytest.mark.slow
def test_two_checkouts_in_one_environment_use_their_own_kernels(checkout):
  for folder in (checkout("one"), checkout("two")):
    files = in_folder(folder, "-c", REPORT).split()
    assert files == [f"{folder}/sparsek/__init__.py", f"{folder}/kernels/specs.py"]


@pytest.mark.slow
def test_a_checkout_without_links_is_refused(checkout):
  """Git writes a file in place of a link where core.symlinks is false."""
  folder = checkout("plain")
  (folder / "sparsek" / "kernels").unlink()
  (folder / "sparsek" / "kernels").write_text("../kernels")
  # The other checkout offers its kernels, as an editable installation does.
  other = "import sys, kernels; sys.modules['sparsek.kernels'] = kernels"
  with pytest.raises(subprocess.CalledProcessError) as error:
    in_folder(folder, "-c", f"{other}; import sparsek")
  assert "kernels is no folder: in git it is a link" in error.value.stderr


@pytest.mark.slow
def test_packages_hold_the_kernels_as_plain_files(checkout):
  """The two steps of setuptools from which a wheel and an sdist are made."""
  folder = checkout("source")
  make = ("setup.py", "-q")
  in_folder(folder, *make, "build", "--build-lib=built", "sdist", "--formats=gztar")
  kernels = folder / "built" / "sparsek" / "kernels"
  assert {str(path.relative_to(kernels)) for path in kernels.rglob("*.py")} == KERNELS
  assert not any(path.is_symlink() for path in (folder / "built").rglob("*"))
  assert (folder / "built" / "sparsek" / "py.typed").exists()
  assert os.listdir(folder / "built") == ["sparsek"]
  installed = folder / "built" / "sparsek" / "experiments"
  files = (path for path in installed.rglob("*") if path.is_file())
  assert {str(path.relative_to(installed)) for path in files} == EXPERIMENTS
  (archive,) = (folder / "dist").glob("*.tar.gz")
  with tarfile.open(archive) as sdist:
    members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
  assert {f"sparsek/kernels/{name}" for name in KERNELS} <= set(members)
  assert all(member.isfile() or member.isdir() for member in members.values())
  entry_points = (folder / "sparsek.egg-info" / "entry_points.txt").read_text()
  assert "sparsek = sparsek.__main__:main" in entry_points
  described = (folder / "sparsek.egg-info/PKG-INFO").read_text()
  assert f"Version: {sparsek.__version__}\n" in described
  assert "/main/experiments/results/demo.png)" in described
  targets = re.findall(r"\]\(([^)]*)\)", described)
  assert targets and all(target.startswith(("https://", "#")) for target in targets)
  check_commands(folder / "built")


def check_commands(built: pathlib.Path) -> None:
  """Runs commands of a package from a folder that has no checkout."""
  elsewhere = built.parent / "elsewhere"
  elsewhere.mkdir()
  variables = os.environ | {"PYTHONPATH": str(built)}

  def sparsek_command(*arguments: str) -> str:
    command = [sys.executable, "-m", "sparsek", *arguments]
    return subprocess.run(
      command, cwd=elsewhere, env=variables, check=True, text=True, capture_output=True
    ).stdout

  assert sparsek_command("--version") == f"sparsek {sparsek.__version__}\n"
  recipe = ROOT / "experiments" / "recipes" / "tiny_stdlib.flags"
  lines = sparsek_command("recipe", "tiny_stdlib").splitlines()
  assert "#   python -m sparsek pretrain --flagfile=tiny_stdlib \\" in lines
  flags = [line for line in recipe.read_text().splitlines() if line.startswith("--")]
  assert [line for line in lines if line.startswith("--")] == flags
  assert "\ntiny_stdlib  " in sparsek_command("recipe")
  assert "python -m sparsek pretrain --workdir" in sparsek_command("pretrain", "--help")
