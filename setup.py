"""Find the packages; everything else is in pyproject.toml.

`kernels/` and `hooks/` install as `workbench.kernels` and `workbench.hooks` (`package-dir` in pyproject.toml). The
declarative `packages.find` cannot give a folder another name, so the list is put together here.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["workbench", "workbench.*"])
    + [f"workbench.{name}" for name in find_packages(include=["kernels", "kernels.*", "hooks", "hooks.*"])]
)
