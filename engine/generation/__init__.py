"""Tokens out.

generate: stream, the loop over tokens, and TextSampler. kv_cache: keys and values of the tokens
before, and TextCache, which keeps them from one call to the next. text: Text, a sample as it grows.
prompt_file: the prompts of a file, and the lines of its answers.
cpu: optimize_for_generation, layouts of weights that a CPU reads faster.
It imports ground files only.
"""
