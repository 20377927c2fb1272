"""Tokens out: the key/value cache, generation token by token, faster layouts of weights on a
CPU."""
