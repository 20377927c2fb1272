# A model of bytes with about 38 million parameters, for one GPU. Bits per character are the loss
# divided by ln 2.
#
# The shape is that of T12 in Al-Rfou et al. 2018 (arXiv:1808.04444). T12 reached 1.11 bits per
# character with auxiliary losses. This config has not been run to its end here.
out_dir = 'out-enwik8'
dataset = 'enwik8'                  # text8 works too
eval_interval = 1000
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_project = 'enwik8'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 512

n_layer = 12
n_head = 8
n_embd = 512
dropout = 0.2                       # an epoch is about 2,700 iterations

learning_rate = 1e-3
max_iters = 60000
lr_decay_iters = 60000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 2000
