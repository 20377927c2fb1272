# The loss of OpenAI's gpt2-xl (1558M parameters) on OpenWebText, without training.
init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500                    # more batches, a steadier estimate
batch_size = 8
wandb_log = False
