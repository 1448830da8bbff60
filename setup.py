"""What pyproject.toml cannot say: ``conf/`` stands beside the package in a checkout and inside it in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lr2train", "lr2train.*"]), "lr2train.conf"],
    package_dir={"lr2train.conf": "conf"},
    package_data={"lr2train.conf": ["*.yaml", "*/*.yaml"], "lr2train.reporting": ["page.html.j2", "style.css"]},
    exclude_package_data={"lr2train.conf": ["local/*"]},
)
