"""Hugging Face's formats: weights, configurations, tokenizers, and the folder of a model.

For others:
    weights            load, to_transformers, CLASSES, NAMES
    save_pretrained    write, TrainedModel
    chat_template      the layout of conversations as transformers has it
    own_fields         what an exported folder says to our own scripts alone
    tokenizer_json     specs from and to tokenizer.json

The wing imports ground files only. It imports transformers, tokenizers and huggingface_hub inside
functions, as they take seconds to import.
"""
