"""Copy the folder ``conf`` of the repository into the wheel as ``fedlearn/conf``, and leave out the benchmarks."""

from setuptools import find_packages, setup

PACKAGES = ("fedlearn", "strategies", "simulations")
found = find_packages(
    include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")],
    exclude=["simulations.benchmarks*"],
)
setup(packages=[*found, "fedlearn.conf"], package_dir={"fedlearn.conf": "conf"})
