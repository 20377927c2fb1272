"""Reads prepared datasets: their token files, the order of training windows, batches on the device.

What others use: `open_dataset`, `batches` (TokenDataset, train_batches, eval_batches, prefetch,
dataset_tokenizer) and `token_files` (the layout of token files, which engine.prepare writes).
`window_order`, `file_formats`, `masks` and `mixture` serve these.

This wing imports ground files of engine/ and no other wing. `token_files` does without torch, so
that a prepare.py, which imports it, starts fast.
"""
