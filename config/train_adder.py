# A GPT that learns to add two numbers below 100, on a laptop's CPU; python data/adder/prepare.py writes the sums.
# Count the right answers with: python evaluate.py --out_dir=out-adder --tasks=exact,held_out --data=data/adder
out_dir = 'out-adder'
init_from = 'auto'                  # the same command again goes on, or ends at once where the run is finished
dataset = 'adder'
sampling = 'epoch'                  # each sum once, then again in another order
eval_interval = 100
eval_iters = 2
log_interval = 50
always_save_checkpoint = False
wandb_project = 'adder'

gradient_accumulation_steps = 1
batch_size = 256
block_size = 9                      # one sum

n_layer = 2
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 3e-3
max_iters = 800
lr_decay_iters = 800
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 50
