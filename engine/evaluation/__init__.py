"""Tasks to scores: files of tasks, examples in tokens, log-likelihoods, results."""
