"""What out_dir holds: writing it, finding the newest state in it, and reading it without trust.

For others:
    run_folder    open_run, load_state, newest_checkpoint, find_run, is_one_model, clean_out_dir,
                  locked, write_run_json
    contents      Checkpoint, what a file holds and every reader gets
    kept          kept_name, kept_models, scores_path, for which PyTorch is not imported
    gathered      gather, gather_weights, write, read, read_ckpt, and the names of its files
    sharded       ShardedSaver, load, load_whole
    load_model    load_model, checkpoint_spec, run_spec, download_source, load_to_train, new_tokens

The wing imports ground files only, and never training or metrics. load_model alone also imports
dataloader.batches and hf.tokenizer_json.
"""
