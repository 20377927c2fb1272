# Trains 10.6 million parameters on Shakespeare's plays, one token a character. This size is for a
# GPU; the README has the flags that shrink it for a CPU.
out_dir = 'out-shakespeare-char'
sample_tokens = 200                 # printed after each evaluation
dataset = 'shakespeare_char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False      # the val loss rises again before the last iteration

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99                        # with 16,384 tokens an iteration, gradients are noisier
warmup_iters = 100
