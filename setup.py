from setuptools import setup

# The kernels live in their own folder and are installed inside the package:
# `kernels` on its own is the name of another distribution.
setup(
    packages=["fastbn", "fastbn.kernels"],
    package_dir={"fastbn.kernels": "kernels"},
    package_data={"fastbn": ["py.typed"]},
)
