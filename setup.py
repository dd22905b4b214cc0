"""What pyproject.toml cannot say: in a clone, the pipelines and what Python imports at its start lie beside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    """Also puts the pipelines into the package, and the two files of `infra/autoload` beside it."""

    def run(self) -> None:
        super().run()
        # an editable install reads the pipelines where they lie; the rest of its wheel is made in a folder of its own
        wheel = Path(self.get_finalized_command("install").install_purelib if self.editable_mode else self.build_lib)
        self._copy("infra/autoload", wheel)
        if not self.editable_mode:
            self._copy("pipelines", wheel / "moeflow" / "pipelines")

    def _copy(self, folder: str, to: Path) -> None:
        self.mkpath(str(to))
        for file in sorted(Path(folder).iterdir()):
            if file.suffix in (".py", ".pth", ".yaml"):
                self.copy_file(str(file), str(to / file.name))


setup(cmdclass={"build_py": Build})
