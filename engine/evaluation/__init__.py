"""Tasks to scores: files of tasks, examples in tokens, log-likelihoods, results.

Other files use tasks.load_tasks; results.evaluate_tasks and TaskScorer; task_files.read_records.
Of the other wings, this one imports generation.kv_cache alone.
"""
