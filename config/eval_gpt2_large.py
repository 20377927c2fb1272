# The loss of OpenAI's gpt2-large on OpenWebText. Nothing is trained or written.
init_from = 'gpt2-large'
eval_only = True
eval_iters = 500
batch_size = 8
