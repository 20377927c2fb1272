"""Hugging Face's formats: weights, tokenizers, exported folders."""
