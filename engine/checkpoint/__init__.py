"""What out_dir holds: checkpoints of one file or of one file a rank, the folder of a run, loading a model."""
