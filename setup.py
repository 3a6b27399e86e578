from setuptools import find_packages, setup

# The kernels live in a folder of their own and are installed inside the package,
# because `kernels` on its own is the name of another distribution.
setup(
    packages=[
        *find_packages(include=["fastbn", "fastbn.*"]),
        "fastbn.kernels",
        *(f"fastbn.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fastbn.kernels": "kernels"},
    package_data={"fastbn": ["py.typed"]},
)
