"""For tools that still ask for this file; pyproject.toml has the rest."""

from setuptools import setup

setup()
