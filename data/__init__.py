"""Datasets: a folder for each, whose prepare.py writes the token files.

This file makes `data` a package of ours, whatever else is installed under that name.
"""
