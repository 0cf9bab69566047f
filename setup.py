"""Build step: the folder ``conf`` of the repository becomes ``fedlearn/conf`` in a wheel; benchmarks are left out."""

from setuptools import find_packages, setup

PACKAGES = ("fedlearn", "strategies", "simulations")
found = find_packages(
    include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")],
    exclude=["simulations.benchmarks*"],
)
setup(packages=[*found, "fedlearn.conf"], package_dir={"fedlearn.conf": "conf"})
