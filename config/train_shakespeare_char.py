# A small GPT on Shakespeare's characters: about 3 minutes on an A100.
# On a laptop, shrink it: see "CPU" in the README.
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False      # it overfits towards the end; keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3                # small models take more
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99                        # few tokens per iteration: average over more of them
warmup_iters = 100
