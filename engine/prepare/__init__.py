"""Writes datasets: text becomes tokens, and the finished files replace an earlier dataset.

    text_files      find_files, read_text, read_documents, split_position and others read text
    web_file        download_file fetches a file from a web address
    conversations   choose_row_layout makes documents of rows with prompts and answers
    encode          safe_pieces and document_pieces cut text; in_order keeps every core at work
    dataset_writer  dataset_writer writes train.bin and val.bin
    shard_writer    ShardWriter writes shards of equal length, in several processes if wanted
    publish         Replacement puts the finished files of either in the place of earlier ones

Of the other wings, these files import only engine.dataloader.token_files. They never import torch,
so that a prepare script starts at once.
"""
