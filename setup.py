"""Package metadata, all of it read from settings.ini, and the notebooks and recipes that the package brings along."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {name.removesuffix("_requirements"): cfg[name].split() for name in cfg if name.endswith("_requirements")}
dev, ray = extras.pop("dev"), extras.pop("ray")   # a cluster's package is not for everybody
extras["all"] = sorted({req for reqs in extras.values() for req in reqs})
extras["dev"], extras["ray"] = extras["all"] + ray + dev, ray

# An installed cvnb has no project around it: it runs these. In an editable install they are where they are.
PROJECT = {"stages": "nbs/stages/*.ipynb", "configs": "configs/*.*", "rules": "configs/rules/*.yaml",
           "serving": "configs/serving/*", "converters": "configs/converters/*", "dashboards": "dashboards/*.*"}


class BuildWithProject(build_py):
    "Build the package with the project's stages, recipes, rules, dashboards and templates inside."
    def project_files(self) -> dict[Path, Path]:   # target -> source
        "List what is copied, and where to."
        into = Path(self.build_lib)/cfg["lib_path"]/"_project"
        return {into/kind/p.name: p for kind, glob in PROJECT.items() for p in sorted(Path().glob(glob))
                if not p.name.startswith((".", "_"))}

    def run(self) -> None:
        "Build, then copy."
        super().run()
        if self.editable_mode: return
        for target, source in self.project_files().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        "Name everything that was built."
        return super().get_outputs(include_bytecode) + [str(p) for p in self.project_files() if not self.editable_mode]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
        "papermill.engine": cfg["papermill_engines"].split(),
    },
    cmdclass={"build_py": BuildWithProject},
    include_package_data=True,
    zip_safe=False,
)
