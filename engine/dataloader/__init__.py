"""Reads prepared datasets: token files, the order of windows, batches on the device."""
