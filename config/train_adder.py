# A GPT learns to add two numbers below 100, on a laptop's CPU. First write the sums, then train,
# then count the right answers:
#   python data/adder/prepare.py
#   python train.py config/train_adder.py
#   python evaluate.py --out_dir=out-adder --tasks=exact,held_out --data=data/adder
out_dir = 'out-adder'
init_from = 'auto'                  # the same command again resumes the run
dataset = 'adder'
sampling = 'epoch'                  # read each sum once, then again in another order
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
