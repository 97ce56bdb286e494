"""For `python setup.py install`; everything else is said in pyproject.toml."""

from setuptools import setup

setup()
