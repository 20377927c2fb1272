# The loss of OpenAI's gpt2-medium on OpenWebText. Nothing is trained or written.
init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500
batch_size = 8
