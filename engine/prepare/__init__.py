"""Writes datasets: text becomes tokens, and the finished files replace an earlier dataset.

    text_files      find_files lists files; read_text and read_source read the text of one
    text_encoding   find_mark and guess_encoding tell how a text is encoded
    kinds           find_sources and identify tell what files are: text, rows, archives, others
    rows            read_rows reads JSON lines, JSON, csv, tsv and parquet, a dict for each row
    row_layout      RowLayout makes a document of a row; text_layout takes the text of a column
    documents       read_documents and read_segments read documents; split_position and others
                    divide them among machines
    held_out        HeldOut chooses what val.bin holds
    next_command    next_lines suggests the command that trains on a dataset
    name_tokenizer  name_tokenizer writes the meta.json of token files of others
    web_file        download_file fetches a file from a web address
    conversations   choose_row_layout makes documents of rows with prompts and answers
    encode          safe_pieces and document_pieces cut text; in_order keeps every core at work
    dataset_writer  dataset_writer writes train.bin and val.bin
    shard_writer    ShardWriter writes shards of equal length, in several processes if wanted
    publish         Replacement puts the finished files of either in the place of earlier ones

Of the other wings, these files import only engine.dataloader.token_files. They never import torch,
so that a prepare script starts at once.
"""
