# A first result on a laptop's CPU, from text that needs no download: the source of Python's own
# standard library, one token a character. It takes about four minutes on two cores.
out_dir = 'out-stdlib-char'
init_from = 'auto'                  # the same command again resumes the run
sample_tokens = 200
dataset = 'stdlib_char'
eval_interval = 500
eval_iters = 20
log_interval = 50
always_save_checkpoint = False
wandb_project = 'stdlib-char'

gradient_accumulation_steps = 1
batch_size = 12
block_size = 128                    # about three lines of code

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0                       # a short run sees too little to overfit
init_std = 0.049                    # 0.02 sqrt(768 / n_embd), by studies/initialisation.md

learning_rate = 2e-3
max_iters = 2500
lr_decay_iters = 2500
min_lr = 2e-4
beta2 = 0.99
warmup_iters = 100
