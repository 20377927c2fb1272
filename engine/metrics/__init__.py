"""Numbers for people: the log line, metrics.jsonl, the health of each layer, the report of bench.py."""
