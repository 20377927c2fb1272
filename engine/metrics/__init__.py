"""Numbers for people: the log line, metrics.jsonl, the health of each layer, bench.py's report.

Other files use step_log.StepLog and short_number; health.HealthMonitor; MetricsWriter and the
readers of metrics_file; bench_report.rows and write; peers.compare and table. The wing imports
ground files alone, and metrics_file does not import PyTorch, so that plot.py starts at once.
"""
