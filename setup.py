"""What pyproject.toml cannot say: recipes travel in the wheel, and the package page's links lead to the repository."""

import os
import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


HERE = Path(__file__).parent
REPOSITORY = os.environ.get("ES_TRL_REPOSITORY", "").rstrip("/")  # where this copy is published from; releases set it


class BuildWithRecipes(build_py):
    """Copies the recipes' YAML to `es_trl/recipes/<model>/<method>/`; in a clone they are read where they are."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for config in sorted((HERE / "recipes").glob("*/*/*.yaml")):
            target = Path(self.build_lib, "es_trl", config.relative_to(HERE))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(config, target)


def package_page() -> str:
    """README with absolute links; without a repository, a relative link is its text and a relative picture is left out."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    relative = r"\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)"
    if not REPOSITORY:
        return re.sub(relative, r"\1", re.sub("!" + relative, "", text))
    text = re.sub("!" + relative, rf"![\1]({REPOSITORY}/raw/HEAD/\2)", text)
    return re.sub(relative, rf"[\1]({REPOSITORY}/blob/HEAD/\2)", text)


URLS = {
    "Repository": "",
    "Documentation": "/tree/HEAD/docs",
    "Issues": "/issues",
    "Changelog": "/blob/HEAD/CHANGELOG.md",
}

setup(
    cmdclass={"build_py": BuildWithRecipes},
    long_description=package_page(),
    long_description_content_type="text/markdown",
    project_urls={name: REPOSITORY + path for name, path in URLS.items()} if REPOSITORY else {},
)
