# The loss of OpenAI's gpt2-medium (350M parameters) on OpenWebText, without training.
init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500                    # more batches, a steadier estimate
batch_size = 8
wandb_log = False
