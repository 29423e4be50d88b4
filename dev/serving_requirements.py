"""Write what a container of a service installs, from requirements.lock: `make lock` runs this.

    python dev/serving_requirements.py [--check]

The packages are those that the core and the extras `serve`, `grpc` and `sign` reach on Linux, each with the version and
the hashes that the lock has. The environment has to be the lock's: what a package needs is read from what is installed.
"""
from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from importlib.metadata import requires
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SERVING = ROOT/"configs/serving"
PARTS = {"requirements.txt": ("serve", "grpc"), "requirements-sign.txt": ("serve", "grpc", "sign")}
VERSIONS = ("3.11", "3.12", "3.13")


def read_lock(
    text: str,             # of requirements.lock
) -> dict[str, str]:       # package -> its lines; one that stands twice has the lines of both
    "Split a lock by package."
    found: dict[str, str] = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        name = canonicalize_name(re.match(r"[\w.-]+", block)[0])
        found[name] = f"{found[name]}\n{block}" if name in found else block
    return found


def reach(
    wanted: list[str],   # requirements
) -> set[str]:           # names of packages
    "Follow requirements on Linux, for each version of Python."
    found: set[tuple[str, str, str]] = set()
    todo = [(Requirement(text), "", version) for text in wanted for version in VERSIONS]
    while todo:
        requirement, extra, version = todo.pop()
        environment = default_environment() | dict(
            extra=extra, python_version=version, python_full_version=f"{version}.0", sys_platform="linux",
            platform_system="Linux", os_name="posix", platform_machine="x86_64", implementation_name="cpython")
        if requirement.marker and not requirement.marker.evaluate(environment): continue
        name = canonicalize_name(requirement.name)
        for wanted_extra in ("", *requirement.extras):
            key = name, wanted_extra, version
            if key in found: continue
            found.add(key)
            todo += [(Requirement(text), wanted_extra, version) for text in requires(name) or []]
    return {name for name, _, _ in found}


def render(
    parts: tuple[str, ...],   # extras
) -> str:                     # a file of requirements
    "Take the lines of the packages that extras need."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    read = config["DEFAULT"]
    wanted = [r for part in ("", *parts) for r in read[f"{part}_requirements".strip("_")].split()]
    lock = read_lock((ROOT/"requirements.lock").read_text(encoding="utf-8"))
    return "\n".join(lock[name] for name in sorted(reach(wanted))) + "\n"


def main() -> None:
    "Write the files, or say which differ."
    differ = []
    for name, parts in PARTS.items():
        text = render(parts)
        if "--check" not in sys.argv: (SERVING/name).write_text(text, encoding="utf-8")
        elif not (SERVING/name).exists() or (SERVING/name).read_text(encoding="utf-8") != text: differ.append(name)
    if differ: sys.exit(f"{', '.join(differ)} in configs/serving: run python dev/serving_requirements.py")


if __name__ == "__main__": main()
