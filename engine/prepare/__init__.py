"""Writes datasets: texts in, tokens encoded on every core, files published together when they are whole."""
