"""An environment with torch alone, as a bare `pip install` gives it, made in a second and without a download."""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def make_torch_only_environment(folder: Path) -> Path:
    """Makes a virtual environment whose site-packages link to torch's distributions here; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    paths = sysconfig.get_paths(scheme="venv" if sys.version_info >= (3, 11) else None, vars={"base": str(folder)})
    site_packages = Path(paths["purelib"])
    for name in distributions_below("torch"):
        for entry in top_level_entries(name):
            link = site_packages / entry.name
            if not link.exists():  # several distributions may share a namespace folder
                link.symlink_to(entry)
    return Path(paths["scripts"]) / "python"


def distributions_below(name: str) -> set[str]:
    """The distribution and, through what each requires without extras, all that it stands on."""
    found: set[str] = set()
    pending = [name]
    while pending:
        current = canonicalize_name(pending.pop())
        if current in found:
            continue
        found.add(current)
        for line in importlib.metadata.requires(current) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return found


def top_level_entries(name: str) -> set[Path]:
    """The files and folders in site-packages that belong to a distribution."""
    distribution = importlib.metadata.distribution(name)
    tops = {Path(file.parts[0]) for file in distribution.files or () if file.parts[0] != ".."}
    return {Path(str(distribution.locate_file(top))) for top in tops} - {Path("__pycache__")}
