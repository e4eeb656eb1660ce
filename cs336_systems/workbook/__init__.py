"""Notebooks, profiles and the problem index: what turns the package into a workbook."""
