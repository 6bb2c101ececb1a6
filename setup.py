"""Packages and the one CMake project; everything else is in pyproject.toml.

`kernels/` is a source root: it holds the import package `slicefine_kernels`, a name that nobody
else owns.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["slicefine*"]) + find_packages("kernels"),
    package_dir={"slicefine_kernels": "kernels/slicefine_kernels"},
    cmake_source_dir="csrc",
)
