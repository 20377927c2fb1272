"""Tokens out.

generate: stream, the loop over tokens, and TextSampler. kv_cache: keys and values of earlier tokens.
cpu: layouts of weights that a CPU reads faster; optimize_for_generation.
It imports ground files only.
"""
